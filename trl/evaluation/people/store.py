"""One SQLite file with all that people judge and answered: nothing that was acknowledged is lost.

A vote is on the disk (synchronous=FULL) when `vote` returns; a vote that is sent again under the
same name is the same vote. Several processes may use one store. An item is leased to who sees it,
so that as many people judge it as `per_item` says, and no more. Nothing is ever deleted: a vote
that is undone stays, with the time of that.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.config.errors import refuse, shown
from trl.evaluation.people.items import QUESTIONS, SKIP, Answer, Item, Vote

__all__ = ["Refused", "Shown", "Store", "StoreError"]

SCHEMA = 1
"""Version of the tables; a store of a newer one is refused."""
APPLICATION = 0x74726C70
"""What SQLite files of this kind have in their header: trlp."""
LEASE = 600.0
"""Seconds that an item is kept for who sees it."""
WAIT = 10.0
"""Seconds to wait for another process that writes."""
PAGES = 8000
"""Of the log (32 MB) before they are moved into the file, for which a vote waits. By itself
SQLite does that every 1,000, or 90 votes: one in a hundred took five times longer."""
LONGEST_COMMENT = 10_000
HISTORY = 100
"""Answers of their own that somebody is shown."""

TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE items (
    id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, place REAL NOT NULL, prompt TEXT NOT NULL,
    responses TEXT NOT NULL, sources TEXT NOT NULL, ratings TEXT NOT NULL, gold TEXT,
    answered INTEGER NOT NULL DEFAULT 0, open INTEGER NOT NULL DEFAULT 1);
CREATE INDEX waiting ON items (place) WHERE open = 1;
CREATE TABLE annotators (
    id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, token TEXT,
    answered INTEGER NOT NULL DEFAULT 0, place REAL NOT NULL DEFAULT -1);
CREATE TABLE votes (
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items,
    annotator INTEGER NOT NULL REFERENCES annotators, client TEXT NOT NULL, answer TEXT NOT NULL,
    shown TEXT NOT NULL, seconds REAL, flag INTEGER NOT NULL, comment TEXT NOT NULL,
    at REAL NOT NULL, undone REAL, UNIQUE (annotator, client));
CREATE UNIQUE INDEX once ON votes (item, annotator) WHERE undone IS NULL;
CREATE INDEX own ON votes (annotator, id) WHERE undone IS NULL;
CREATE TABLE leases (
    item INTEGER NOT NULL REFERENCES items, annotator INTEGER NOT NULL REFERENCES annotators,
    until REAL NOT NULL, PRIMARY KEY (item, annotator)) WITHOUT ROWID;
"""
LATER_TABLES = """
CREATE TABLE IF NOT EXISTS withdrawn (item INTEGER PRIMARY KEY REFERENCES items);
CREATE TABLE IF NOT EXISTS askings (
    key TEXT PRIMARY KEY, items TEXT NOT NULL, seen REAL NOT NULL, enough REAL, answers TEXT)
    WITHOUT ROWID;
"""
# Of `asking`; an older trl does not look at them.
# `place` of annotators: where the search for what they have not seen goes on. `answered` of items
# does not count skips; items with a known answer stay open for everybody.

OPEN = """(id NOT IN (SELECT item FROM withdrawn) AND (gold IS NOT NULL OR
    answered < (SELECT value FROM facts WHERE name = 'per_item')))"""
FREE = """(gold IS NOT NULL OR answered + (SELECT count(*) FROM leases WHERE item = items.id
    AND annotator <> :me AND until > :now) < :per_item)"""
UNSEEN = """NOT EXISTS (SELECT 1 FROM votes WHERE item = items.id AND annotator = :me
    AND undone IS NULL)"""


class StoreError(OSError):
    """A store that cannot be opened, read or written; says what to do."""


class Refused(ValueError):
    """A request that changes nothing, and why.

    Attributes:
        code: `gone`, `answered`, `leased`, `bad` or `link`.
    """

    def __init__(self, code: str, told: str) -> None:
        super().__init__(told)
        self.code = code


@dataclass(frozen=True, slots=True)
class Shown:
    """An item as one person sees it."""

    id: int
    prompt: Any
    responses: tuple[str, ...]
    """In the order in which they are shown."""


class Store:
    """The file of items and votes; see this module.

    Args:
        path: The file.
        make: Make it if it is not there.
        clock: Seconds since 1970.

    Raises:
        StoreError: if it is no store, one of a newer version, or cannot be opened.
    """

    def __init__(
        self, path: str | Path, *, make: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self.clock = Path(path).expanduser(), clock
        if not make and not self.path.is_file():
            raise StoreError(f"There is no store of votes {str(self.path)!r}.")
        with self._told():
            self.db = sqlite3.connect(
                self.path, timeout=WAIT, isolation_level=None, check_same_thread=False
            )
            self.db.row_factory = sqlite3.Row
            self._open()
            self.secret = bytes.fromhex(self.fact("secret"))

    def _open(self) -> None:
        """Check what file it is, and make the tables of a new one."""
        # In one statement: another process may be making it.
        version, application, has_tables = self.db.execute(
            "SELECT user_version, application_id, EXISTS (SELECT 1 FROM sqlite_master) "
            "FROM pragma_user_version, pragma_application_id"
        ).fetchone()
        if version > SCHEMA and application == APPLICATION:
            raise StoreError(
                f"{str(self.path)!r} was written by a newer trl (version {version} of its tables; "
                f"this one knows {SCHEMA}): bring trl up to date."
            )
        if application != APPLICATION and has_tables:
            raise StoreError(
                f"{str(self.path)!r} is another program's database: name another file."
            )
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA foreign_keys = ON")
        self.db.execute(f"PRAGMA wal_autocheckpoint = {PAGES}")
        known = "SELECT 1 FROM sqlite_master WHERE name = 'askings'"
        if version == SCHEMA and self.db.execute(known).fetchone():
            return
        with self._write():
            for statement in LATER_TABLES.split(";"):
                self.db.execute(statement)
            if self.db.execute("PRAGMA user_version").fetchone()[0]:
                return  # another process was quicker, or it is there since an older trl
            for statement in TABLES.split(";"):
                self.db.execute(statement)
            facts = {"secret": secrets.token_hex(32), "name": secrets.token_hex(4), "per_item": 1}
            facts |= {"items": 0, "plain": 0, "votes": 0}
            self.db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            self.db.execute(f"PRAGMA application_id = {APPLICATION}")
            self.db.execute(f"PRAGMA user_version = {SCHEMA}")

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn errors of SQLite into sentences."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            told = str(error)
            advice = {
                "full": "the disk is full. Nothing was changed: make room and try again",
                "readonly": "the file or its folder may not be written: give yourself the right to",
                "unable to open": "it cannot be opened: its folder must be there and be writable",
                "locked": "another program keeps it locked: end that and try again",
                "disk I/O": "the disk fails. Nothing was changed: look at it",
                "not a database": "it is not a store of votes: name another file",
                "malformed": "the file is damaged: bring back a copy",
            }
            why = next((text for sign, text in advice.items() if sign in told), None)
            if why is None:
                raise
            raise StoreError(f"{str(self.path)!r}: {why} ({told}).") from error

    @contextmanager
    def _write(self, level: str = "FULL") -> Iterator[sqlite3.Connection]:
        """Do all of it or nothing, alone.

        FULL: it is on the disk afterwards. NORMAL: a power cut may undo it, though no kill does.
        """
        with self._told():
            self.db.execute(f"PRAGMA synchronous = {level}")
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            finally:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")

    # -- what is asked ---------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """Return one of the facts: question, per_item, guidelines, name, items, votes."""
        with self._told():
            row = self.db.execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
        return row and row[0]

    def ask(
        self, question: str, *, per_item: int | None = None, guidelines: str | None = None
    ) -> None:
        """Say what is asked of every item; what is None stays.

        Raises:
            ValueError: if there are answers to another question.
        """
        before = self.fact("question")
        if before not in (None, question):
            fix = "name another file with --store"
            refuse("question", f"be {before!r} as before in {self.path}", repr(question), fix)
        given = {"question": question, "per_item": per_item, "guidelines": guidelines}
        with self._write() as db:
            for name, value in given.items():
                if value is not None:
                    db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [name, value])
            db.execute(f"UPDATE items SET open = {OPEN} WHERE open <> {OPEN}")

    def add(self, items: Iterable[Item], *, votes: bool = False) -> int:
        """Add what is not there yet, and return how many that were.

        Args:
            items: To be judged; those with a known answer are strewn among the others.
            votes: Also take over the votes that they have.

        Raises:
            ValueError: if one of them does not fit the question.
        """
        question = QUESTIONS[self.fact("question")]
        fresh, known = 0, 0
        with self._write() as db:
            before = self.fact("items")
            for item in items:
                count, most = len(item.responses), question.most
                if not question.fewest <= count <= most:
                    rule = f"be {question.fewest} to {most} for the question {question!r}"
                    refuse("responses", rule, str(count))
                if item.gold is not None:
                    question.check(item.gold, count)
                place = before + fresh if item.gold is None else random.uniform(0, before + fresh)
                values = [item.key, place, _json(item.prompt), *map(_json, (item.responses,))]
                values += [*map(_json, (item.sources, item.ratings)), _json(item.gold, True)]
                cursor = db.execute(
                    "INSERT OR IGNORE INTO items (key, place, prompt, responses, sources, ratings, "
                    "gold) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
                fresh += cursor.rowcount
                known += cursor.rowcount if item.gold is not None else 0
                if votes:
                    self._take_over(item, question)
            for name, more in (("items", fresh), ("plain", fresh - known)):
                db.execute("UPDATE facts SET value = value + ? WHERE name = ?", [more, name])
        return fresh

    def _take_over(self, item: Item, question: Any) -> None:
        """Write the votes that an item came with, each only once."""
        row = self.db.execute("SELECT * FROM items WHERE key = ?", [item.key]).fetchone()
        for vote in item.votes:
            question.check(vote.answer, len(item.responses))
            self.db.execute("INSERT OR IGNORE INTO annotators (name) VALUES (?)", [vote.annotator])
            me = self._annotator(vote.annotator)
            client = f"file-{item.key}"
            own = "item = ? AND annotator = ? AND (undone IS NULL OR client = ?)"
            if self.db.execute(
                f"SELECT 1 FROM votes WHERE {own}", [row["id"], me, client]
            ).fetchone():
                continue
            values = [row["id"], me, client, _json(vote.answer), _json(vote.shown)]
            values += [vote.seconds, vote.flag, vote.comment, vote.when or self.clock()]
            self._insert(values)
            self._count(row["id"], me, 1, vote.answer)

    # -- who answers -----------------------------------------------------------------------------

    def link(self, name: str) -> str:
        """Return a new token for somebody, who may be new; the one before it is no longer good."""
        if not name.strip() or len(name) > 100 or not name.isprintable():
            refuse("annotator", "be a name of 1 to 100 letters", shown(name))
        token = secrets.token_urlsafe(24)
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO annotators (name) VALUES (?)", [name])
            db.execute("UPDATE annotators SET token = ? WHERE name = ?", [_hash(token), name])
        return token

    def join(self, token: str) -> int:
        """Return who a token is for; it is good only once.

        Raises:
            Refused: if it was used before, or is no token.
        """
        with self._write() as db:
            found = db.execute(
                "UPDATE annotators SET token = NULL WHERE token = ? RETURNING id", [_hash(token)]
            ).fetchall()
        if not found:
            told = "This link was used before, or replaced: ask for a new one, which was printed"
            raise Refused("link", f"{told} where the page is served, when it was used.")
        return int(found[0]["id"])

    def name(self, me: int) -> str | None:
        """Return the name of an annotator, or None if there is no such one."""
        with self._told():
            row = self.db.execute("SELECT name FROM annotators WHERE id = ?", [me]).fetchone()
        return row and row["name"]

    def _annotator(self, name: str) -> int:
        row = self.db.execute("SELECT id FROM annotators WHERE name = ?", [name]).fetchone()
        return int(row["id"])

    # -- judging ---------------------------------------------------------------------------------

    def next(self, me: int) -> Shown | None:
        """Return what somebody is to judge now, leased to them; None: there is nothing.

        That is what they have before them already, else the next item that they have not judged
        and that still needs somebody.
        """
        with self._write("NORMAL") as db:  # a lease may be lost
            known = self._known(me)
            row = db.execute(
                f"SELECT items.* FROM leases JOIN items ON items.id = leases.item WHERE "
                f"leases.annotator = :me AND {FREE} AND {UNSEEN} ORDER BY until DESC LIMIT 1",
                known,
            ).fetchone()
            own = db.execute("SELECT * FROM annotators WHERE id = ?", [me]).fetchone()
            if row is None and own["answered"] < self.fact("items"):
                for after in (own["place"], -1):  # once more from the beginning
                    row = (
                        row
                        or db.execute(
                            f"SELECT * FROM items WHERE open = 1 AND place > :after AND {FREE} AND "
                            f"{UNSEEN} ORDER BY place LIMIT 1",
                            known | {"after": after},
                        ).fetchone()
                    )
            if row is None:
                return None
            self._lease(row["id"], me)
            db.execute("UPDATE annotators SET place = ? WHERE id = ?", [row["place"], me])
        return self._shown(row, me)

    def vote(
        self, me: int, item: int, client: str, answer: Answer, *, seconds: float | None = None,
        flag: bool = False, comment: str = "",
    ) -> int:  # fmt: skip
        """Take an answer, and return the number of the vote: it is on the disk.

        Args:
            me: The annotator.
            item: Its number.
            client: A name for the vote by who sends it; the same name again is the same vote.
            answer: As `items` has it, an index counting the responses as they were shown.
            seconds: How long it took.
            flag: Whether something is wrong with the item.
            comment: What the annotator says of it.

        Raises:
            Refused: if the item is gone, answered or leased to another; nothing is changed then.
        """
        with self._write() as db:
            sent = "SELECT id FROM votes WHERE annotator = ? AND client = ?"
            if before := db.execute(sent, [me, client]).fetchone():
                return int(before["id"])
            row = db.execute("SELECT * FROM items WHERE id = ?", [item]).fetchone()
            if row is None:
                raise Refused("gone", f"Item {item} is not there.")
            known = self._known(me) | {"item": item}
            if not db.execute(
                f"SELECT 1 FROM items WHERE id = :item AND {UNSEEN}", known
            ).fetchone():
                raise Refused("answered", "You answered this item before: undo that first.")
            if not db.execute(f"SELECT 1 FROM items WHERE id = :item AND {FREE}", known).fetchone():
                full = row["answered"] >= known["per_item"]
                told = "was judged by somebody else" if full else "is with somebody else now"
                raise Refused("answered" if full else "leased", f"This item {told}.")
            order = self._order(row, me)
            if type(answer) is int and len(order) > 1 and 0 <= answer < len(order):
                answer = order[answer]
            try:
                QUESTIONS[self.fact("question")].check(answer, len(order))
            except ValueError as error:
                raise Refused("bad", str(error)) from None
            values = [item, me, client, _json(answer), _json(order), seconds, flag]
            number = self._insert([*values, comment[:LONGEST_COMMENT], self.clock()])
            self._count(item, me, 1, answer)
            db.execute("DELETE FROM leases WHERE item = ? AND annotator = ?", [item, me])
        return number

    def undo(self, me: int, vote: int) -> dict[str, Any]:
        """Take back a vote of one's own: its item is leased again. Return what it said.

        Raises:
            Refused: if there is no such vote.
        """
        with self._write() as db:
            find = "SELECT * FROM votes WHERE id = ? AND annotator = ?"
            row = db.execute(find, [vote, me]).fetchone()
            if row is None:
                raise Refused("gone", "There is no such answer of yours.")
            if row["undone"] is None:
                db.execute("UPDATE votes SET undone = ? WHERE id = ?", [self.clock(), vote])
                self._count(row["item"], me, -1, json.loads(row["answer"]))
                self._lease(row["item"], me)
        return _said(row)

    def _known(self, me: int) -> dict[str, Any]:
        return {"me": me, "now": self.clock(), "per_item": self.fact("per_item")}

    def _lease(self, item: int, me: int) -> None:
        self.db.execute(
            "INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", [item, me, self.clock() + LEASE]
        )

    def _insert(self, values: list[Any]) -> int:
        return int(
            self.db.execute(
                "INSERT INTO votes (item, annotator, client, answer, shown, seconds, flag, "
                "comment, at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            ).lastrowid
            or 0
        )

    def _count(self, item: int, me: int, more: int, answer: Answer) -> None:
        """Keep count: scanning all votes would be too slow for every answer."""
        db = self.db
        db.execute("UPDATE annotators SET answered = answered + ? WHERE id = ?", [more, me])
        if answer == SKIP:
            return
        changed = db.execute(
            "UPDATE items SET answered = answered + ? WHERE id = ? RETURNING gold", [more, item]
        ).fetchone()
        db.execute(f"UPDATE items SET open = {OPEN} WHERE id = ?", [item])
        if changed["gold"] is None:
            db.execute("UPDATE facts SET value = value + ? WHERE name = 'votes'", [more])

    def _order(self, row: sqlite3.Row, me: int) -> list[int]:
        """Return in which order somebody sees the responses: at random, and always the same."""
        order = list(range(len(json.loads(row["responses"]))))
        random.Random(f"{self.secret.hex()} {row['id']} {me}").shuffle(order)
        return order

    def _shown(self, row: sqlite3.Row, me: int) -> Shown:
        responses = json.loads(row["responses"])
        order = self._order(row, me)
        return Shown(row["id"], json.loads(row["prompt"]), tuple(responses[i] for i in order))

    # -- looking ---------------------------------------------------------------------------------

    def history(self, me: int) -> list[dict[str, Any]]:
        """Return somebody's answers, the last one first, an index as they saw it."""
        with self._told():
            rows = self.db.execute(
                "SELECT votes.*, prompt FROM votes JOIN "
                "items ON items.id = votes.item WHERE annotator = ? AND undone IS NULL "
                "ORDER BY votes.id DESC LIMIT ?",
                [me, HISTORY],
            ).fetchall()
        found = []
        for row in rows:
            prompt = json.loads(row["prompt"])
            text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt)
            found.append(_said(row) | {"vote": row["id"], "prompt": text[:200]})
        return found

    def progress(self, me: int) -> dict[str, int]:
        """Return how many of the items somebody answered, and how many votes there are of all."""
        with self._told():
            own = self.db.execute("SELECT answered FROM annotators WHERE id = ?", [me]).fetchone()
        asked = self.fact("per_item") * self.fact("plain")
        items, votes = self.fact("items"), self.fact("votes")
        return {"own": own["answered"], "items": items, "votes": votes, "asked": asked}

    def last(self, me: int) -> int | None:
        """Return the number of somebody's last vote that is not undone."""
        with self._told():
            row = self.db.execute(
                "SELECT max(id) AS id FROM votes WHERE annotator = ? AND undone IS NULL", [me]
            ).fetchone()
        return row and row["id"]

    def items(self) -> Iterator[Item]:
        """Return every item with its votes that are not undone, in the order of adding."""
        with self._told():
            votes: dict[int, list[Vote]] = {}
            for row in self.db.execute(
                "SELECT votes.*, name FROM votes JOIN annotators ON annotators.id = annotator "
                "WHERE undone IS NULL ORDER BY votes.id"
            ):
                vote = Vote(
                    row["name"], json.loads(row["answer"]), row["seconds"], row["at"],
                    tuple(json.loads(row["shown"])), bool(row["flag"]), row["comment"],
                )  # fmt: skip
                votes.setdefault(row["item"], []).append(vote)
            for row in self.db.execute("SELECT * FROM items ORDER BY id"):
                yield Item(
                    json.loads(row["prompt"]),
                    *(tuple(json.loads(row[name])) for name in ("responses", "sources", "ratings")),
                    None if row["gold"] is None else json.loads(row["gold"]),
                    tuple(votes.get(row["id"], ())),
                )


def _said(vote: sqlite3.Row) -> dict[str, Any]:
    """Return what a vote said, an index as its annotator saw it."""
    answer, order = json.loads(vote["answer"]), json.loads(vote["shown"])
    if type(answer) is int and len(order) > 1:  # that of a file may have no order
        answer = order.index(answer)
    return {"item": vote["item"], "answer": answer} | {
        "flag": bool(vote["flag"]),
        "comment": vote["comment"],
    }


def _json(value: Any, none: bool = False) -> str | None:
    return None if none and value is None else json.dumps(value, default=dict)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
