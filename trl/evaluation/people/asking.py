"""Asking people, and waiting for what they say: for what cannot go on without them.

    store = Store("votes.sqlite", make=True)
    store.ask("pair")
    asking = ask(store, items)
    answers = wait(asking, timeout=600)  # a list for each item, empty where nobody answered

Items that people judged before are not asked again. What `wait` returned is kept: the same items
asked again, after the program was killed, give the same at once. Each thread and process opens a
`Store` of its own.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trl.evaluation.people.items import SKIP, Answer, Item
from trl.evaluation.people.store import OPEN, Store

__all__ = ["Asking", "Look", "Stopped", "ask", "enough", "look", "taken", "wait", "waits"]

EVERY = 0.2
"""Seconds between two looks at the store."""
GRACE = 2.0
"""Seconds after the last answer in which it may still be undone."""
ALIVE = 15.0
"""Seconds after its last look in which somebody still waits."""
GONE = 120.0
"""Seconds after which the process that asks for others has died."""
OVER = threading.Event()
"""Set by who ends a program in which another thread than the main one waits."""
SIGNALS = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]


class Stopped(KeyboardInterrupt):
    """Waiting was ended, by Ctrl-C or a stop: what was answered is in the store."""


@dataclass(frozen=True, slots=True)
class Asking:
    """Items that were asked together."""

    store: Store
    key: str
    """The same for the same items and question."""
    items: tuple[int, ...]
    """Their numbers in the store."""
    per_item: int
    """Answers that each needs."""


@dataclass(frozen=True, slots=True)
class Look:
    """What has been said so far."""

    answers: list[list[Answer]]
    """Of each item, without skips."""
    left: int
    """Items that wait for somebody."""
    last: float
    """When the last of the answers came, in seconds since 1970; 0: there is none."""
    enough: bool
    """Whether somebody said that it is enough for now."""


def ask(store: Store, items: Sequence[Item], *, again: bool = False) -> Asking:
    """Let people judge items, unless it was done before.

    Args:
        store: Whose question is set by `Store.ask`.
        items: At least one; the same may come twice.
        again: Of the same items asked before, ask those that nobody answered once more.

    Raises:
        ValueError: if one of them does not fit the question.
        StoreError: see `Store`.
    """
    keys = [item.key for item in items]
    per_item = store.fact("per_item")
    said = json.dumps([store.fact("question"), per_item, keys])
    key = hashlib.sha256(said.encode()).hexdigest()[:32]
    store.add(dict(zip(keys, items, strict=True)).values())
    with store._write() as db:
        found = db.execute(
            "SELECT key, id FROM items WHERE key IN (SELECT value FROM json_each(?))",
            [json.dumps(keys)],
        )
        ids = {row["key"]: row["id"] for row in found}
        asking = Asking(store, key, tuple(ids[each] for each in keys), per_item)
        before = taken(asking)
        if before is not None and (all(before) or not again):
            return asking
        _open(store, asking.items, True)
        db.execute(
            "INSERT INTO askings VALUES (?, ?, ?, NULL, NULL) ON CONFLICT (key) DO UPDATE SET "
            "seen = excluded.seen, answers = NULL, enough = iif(answers IS NULL, enough, NULL)",
            [key, json.dumps(asking.items), store.clock()],
        )
    return asking


def look(asking: Asking) -> Look:
    """Return what has been said so far."""
    db, of_item = asking.store.db, {item: [] for item in asking.items}
    last = 0.0
    with asking.store._told():
        row = db.execute("SELECT enough FROM askings WHERE key = ?", [asking.key]).fetchone()
        for vote in db.execute(
            "SELECT item, answer, at FROM votes WHERE undone IS NULL AND item IN "
            "(SELECT value FROM json_each(?)) ORDER BY id",
            [json.dumps(asking.items)],
        ):
            of_item[vote["item"]].append(json.loads(vote["answer"]))
            last = max(last, vote["at"])
    # A skip is as good as an answer here: who skipped it will not say more.
    left = sum(len(said) < asking.per_item for said in of_item.values())
    answers = [[each for each in of_item[item] if each != SKIP] for item in asking.items]
    return Look(answers, left, last, bool(row and row["enough"]))


def taken(asking: Asking) -> list[list[Answer]] | None:
    """Return what was taken for the answers to these items; None: nothing yet."""
    with asking.store._told():
        row = asking.store.db.execute(
            "SELECT answers FROM askings WHERE key = ?", [asking.key]
        ).fetchone()
    return json.loads(row["answers"]) if row and row["answers"] else None


def wait(
    asking: Asking,
    *,
    timeout: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    seen: Callable[[Look], Any] = lambda found: None,
    grace: float | None = None,
) -> list[list[Answer]]:
    """Wait until all is answered, then take the answers and return a list of them for each item.

    A list is empty if nobody answered: since somebody said that it is enough for now, the time is
    over, or who looked at it skipped it. Nobody is asked for those any more.

    Args:
        asking: From `ask`.
        timeout: Seconds after which the answers that there are have to do; None: there is no end.
        stop: Called now and then; ends the waiting if it returns True.
        seen: Called with what is seen, at the start and whenever that has changed.
        grace: Seconds after the last answer in which it may be undone; None: two.

    Raises:
        Stopped: if it is to end, by `stop`, or in the main thread by Ctrl-C; all is kept.
    """
    store, began, before = asking.store, time.monotonic(), None
    grace = GRACE if grace is None else grace
    with _at_once():
        while (answers := taken(asking)) is None:
            found = look(asking)
            if found != before:
                seen(found)
            before = found
            if stop() or OVER.is_set():
                raise Stopped("It was stopped while it waited for people.")
            over = timeout is not None and time.monotonic() - began >= timeout
            quiet = store.clock() - found.last >= grace
            if found.enough or over or (quiet and not found.left):
                _take(asking, found.answers)
                continue
            _here(asking)
            time.sleep(EVERY)
    return answers


def waits(store: Store) -> Look | None:
    """Return how far the items are that somebody waits for; None: nobody waits."""
    with store._told():
        row = store.db.execute(
            "SELECT * FROM askings WHERE answers IS NULL AND seen > ? ORDER BY seen DESC",
            [store.clock() - ALIVE],
        ).fetchone()
    if row is None:
        return None
    items = tuple(dict.fromkeys(json.loads(row["items"])))
    return look(Asking(store, row["key"], items, store.fact("per_item")))


def enough(store: Store) -> None:
    """Say that it is enough for now: what is waited for goes on with the answers that there are."""
    with store._write() as db:
        for row in db.execute("SELECT * FROM askings WHERE answers IS NULL").fetchall():
            db.execute("UPDATE askings SET enough = ? WHERE key = ?", [store.clock(), row["key"]])
            _open(store, json.loads(row["items"]), False)


def wait_for_other(asking: Asking, stop: Callable[[], bool] = lambda: False) -> list[list[Answer]]:
    """Wait until another process, which asks, has taken the answers.

    Raises:
        Stopped: see `wait`.
        RuntimeError: if the other process has died.
    """
    store, began = asking.store, asking.store.clock()
    with _at_once():
        while (answers := taken(asking)) is None:
            row = store.db.execute("SELECT seen FROM askings WHERE key = ?", [asking.key])
            here = max([began, *(each["seen"] for each in row)])
            if stop():
                raise Stopped("It was stopped while it waited for people.")
            if store.clock() - here > GONE:
                raise RuntimeError("The process that asks people is gone: start the run again.")
            time.sleep(EVERY)
    return answers


def _here(asking: Asking) -> None:
    """Let the page and other processes know that somebody still waits."""
    now = asking.store.clock()
    with asking.store._write("NORMAL") as db:
        late = "UPDATE askings SET seen = ? WHERE key = ? AND seen < ?"
        db.execute(late, [now, asking.key, now - ALIVE / 5])


def _take(asking: Asking, answers: list[list[Answer]]) -> None:
    """Keep what is taken for the answers, and ask nobody for the others any more."""
    with asking.store._write() as db:
        said = "UPDATE askings SET answers = ? WHERE key = ? AND answers IS NULL"
        db.execute(said, [json.dumps(answers), asking.key])
        _open(asking.store, asking.items, False)


def _open(store: Store, items: Sequence[int], asked: bool) -> None:
    """Show items to people, or no more."""
    db, own = store.db, json.dumps(items)
    these = "(SELECT value FROM json_each(?))"
    if asked:
        db.execute(f"DELETE FROM withdrawn WHERE item IN {these}", [own])
    else:
        db.execute("INSERT OR IGNORE INTO withdrawn SELECT value FROM json_each(?)", [own])
        db.execute(f"DELETE FROM leases WHERE item IN {these}", [own])
    db.execute(f"UPDATE items SET open = {OPEN} WHERE id IN {these}", [own])


@contextmanager
def _at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends at once what else would end after the step; only in the main thread."""

    def handle(number: int, frame: Any) -> None:
        raise Stopped("It was stopped while it waited for people.")

    mine = threading.current_thread() is threading.main_thread()
    handlers = {each: signal.getsignal(each) for each in set(SIGNALS) if mine}
    free = {k: v for k, v in handlers.items() if v not in (None, signal.SIG_IGN)}
    try:
        for each in free:
            signal.signal(each, handle)
        yield
    finally:
        for each, handler in free.items():
            signal.signal(each, handler)
