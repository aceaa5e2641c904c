"""What was acknowledged is there, once; what is refused changes nothing."""

import multiprocessing
import os
import re
import sqlite3
import tempfile
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from trl.evaluation.people.items import SKIP, Item, Vote
from trl.evaluation.people.store import LEASE, SCHEMA, Refused, Store, StoreError


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def pairs(number):
    return [Item(f"prompt {i}", (f"a {i}", f"b {i}"), ("one", "two")) for i in range(number)]


def make(path, items, question="pair", **more):
    store = Store(path, make=True, clock=more.pop("clock", None) or Clock())
    store.ask(question, **more)
    store.add(items)
    return store


def people(store, *names):
    return [store.join(store.link(name)) for name in names]


def votes_of(store):
    return [vote for item in store.items() for vote in item.votes]


@pytest.fixture
def store(tmp_path):
    with_pairs = make(tmp_path / "votes.sqlite", pairs(5))
    yield with_pairs
    with_pairs.close()


def test_a_vote_counts_the_responses_as_the_item_has_them(tmp_path):
    store = make(tmp_path / "s", pairs(40))
    (ann,) = people(store, "ann")
    orders = Counter()
    for number in range(40):
        shown = store.next(ann)
        store.vote(ann, shown.id, f"v{number}", 0, seconds=1.5, flag=True, comment="hm")
        said = next(i for i in store.items() if i.prompt == shown.prompt)
        (vote,) = said.votes
        assert said.responses[vote.answer] == shown.responses[0]
        assert vote.shown[0] == vote.answer
        assert (vote.seconds, vote.flag, vote.comment) == (1.5, True, "hm")
        orders[vote.shown] += 1
    assert orders.keys() == {(0, 1), (1, 0)}
    assert min(orders.values()) > 5
    assert store.next(ann) is None


def test_the_order_stays_and_differs_between_people(store):
    ann, ben = people(store, "ann", "ben")
    first = store.next(ann)
    assert store.next(ann) == first
    rows = store.db.execute("SELECT * FROM items").fetchall()
    orders = [[store._order(row, who) for row in rows] for who in (ann, ben, 3, 4, 5)]
    assert len({str(order) for order in orders}) > 1


def test_the_same_vote_again_is_the_same_vote(store):
    (ann,) = people(store, "ann")
    item = store.next(ann).id
    assert store.vote(ann, item, "x", "tie") == store.vote(ann, item, "x", "tie")
    assert len(votes_of(store)) == 1
    with pytest.raises(Refused, match="undo that first") as refused:
        store.vote(ann, item, "y", "tie")
    assert refused.value.code == "answered"


@pytest.mark.parametrize(
    ("item", "answer", "code"),
    [(99, 0, "gone"), (1, 2, "bad"), (1, -1, "bad"), (1, True, "bad"), (1, "left", "bad")],
)
def test_what_is_no_answer_changes_nothing(item, answer, code, store):
    (ann,) = people(store, "ann")
    with pytest.raises(Refused) as refused:
        store.vote(ann, item, "x", answer)
    assert refused.value.code == code
    assert votes_of(store) == []
    assert store.progress(ann) == {"own": 0, "items": 5, "votes": 0, "asked": 5}


def test_an_item_is_with_one_person_until_the_lease_ends(tmp_path):
    clock = Clock()
    store = make(tmp_path / "s", pairs(1), clock=clock)
    ann, ben = people(store, "ann", "ben")
    item = store.next(ann).id
    assert store.next(ben) is None
    with pytest.raises(Refused, match="with somebody else now") as refused:
        store.vote(ben, item, "x", 0)
    assert refused.value.code == "leased"
    clock.now += LEASE + 1
    assert store.next(ben).id == item
    with pytest.raises(Refused, match="with somebody else now"):
        store.vote(ann, item, "y", 0)
    store.vote(ben, item, "x", 0)
    with pytest.raises(Refused, match="judged by somebody else") as refused:
        store.vote(ann, item, "y", 0)
    assert refused.value.code == "answered"
    assert [vote.annotator for vote in votes_of(store)] == ["ben"]


def test_who_was_late_may_answer_what_nobody_else_took(tmp_path):
    clock = Clock()
    store = make(tmp_path / "s", pairs(1), clock=clock)
    (ann,) = people(store, "ann")
    item = store.next(ann).id
    clock.now += 10 * LEASE
    store.vote(ann, item, "x", 0)
    assert len(votes_of(store)) == 1


def test_several_judge_the_same_item(tmp_path):
    store = make(tmp_path / "s", pairs(2), per_item=3)
    team = people(store, "ann", "ben", "cid", "dot")
    for who in team[:3]:
        for turn in range(2):
            store.vote(who, store.next(who).id, f"{who} {turn}", 0)
    assert store.next(team[3]) is None
    assert [len(item.votes) for item in store.items()] == [3, 3]
    assert store.progress(team[0]) == {"own": 2, "items": 2, "votes": 6, "asked": 6}
    store.ask("pair", per_item=4)
    assert store.next(team[3]) is not None


def test_a_skip_leaves_the_item_to_others(tmp_path):
    store = make(tmp_path / "s", pairs(1))
    ann, ben = people(store, "ann", "ben")
    store.vote(ann, store.next(ann).id, "x", SKIP)
    assert store.next(ann) is None
    assert store.next(ben) is not None
    assert store.progress(ann) == {"own": 1, "items": 1, "votes": 0, "asked": 1}


def test_everything_can_be_undone_in_any_order(store):
    (ann,) = people(store, "ann")
    numbers = []
    for turn, answer in enumerate([0, "tie", SKIP, "both_bad", 1]):
        numbers.append(store.vote(ann, store.next(ann).id, f"{turn}", answer, comment=f"c{turn}"))
    assert store.last(ann) == numbers[-1]
    assert store.next(ann) is None
    said = store.undo(ann, numbers[1])
    assert (said["answer"], said["comment"]) == ("tie", "c1")
    assert store.next(ann).id == said["item"]
    assert store.undo(ann, numbers[1]) == said  # twice is once
    for number in numbers:
        store.undo(ann, number)
    assert store.progress(ann) == {"own": 0, "items": 5, "votes": 0, "asked": 5}
    assert store.last(ann) is None
    assert votes_of(store) == []
    kept = store.db.execute("SELECT count(*) FROM votes WHERE undone IS NOT NULL").fetchone()
    assert kept[0] == 5
    store.vote(ann, said["item"], "again", 1)
    assert len(store.history(ann)) == 1


def test_nobody_undoes_the_answer_of_another(store):
    ann, ben = people(store, "ann", "ben")
    number = store.vote(ann, store.next(ann).id, "x", 0)
    with pytest.raises(Refused, match="no such answer of yours"):
        store.undo(ben, number)
    assert len(votes_of(store)) == 1


def test_known_answers_are_asked_of_everybody_and_are_not_counted(tmp_path):
    gold = Item("known", ("a", "b"), gold=1)
    store = make(tmp_path / "s", [*pairs(3), gold])
    team = people(store, "ann", "ben")
    for who in team:
        while (shown := store.next(who)) is not None:
            store.vote(who, shown.id, f"{shown.id}", 0)
    (item,) = [item for item in store.items() if item.gold is not None]
    assert [vote.annotator for vote in item.votes] == ["ann", "ben"]
    assert store.progress(team[0])["votes"] == store.progress(team[0])["asked"] == 3


def test_a_link_is_good_once_and_a_new_one_replaces_it(store):
    first = store.link("ann")
    second = store.link("ann")
    with pytest.raises(Refused, match="ask for a new one"):
        store.join(first)
    ann = store.join(second)
    with pytest.raises(Refused):
        store.join(second)
    assert store.join(store.link("ann")) == ann
    assert second not in str(store.db.execute("SELECT * FROM annotators").fetchall())


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 101, "‮evil"])
def test_a_name_must_be_one(name, store):
    with pytest.raises(ValueError, match="must be a name of 1 to 100 letters"):
        store.link(name)


def test_items_are_added_once_and_must_fit_the_question(store):
    assert store.add([*pairs(5), *pairs(6)]) == 1
    with pytest.raises(ValueError, match="`responses` must be 2 to 2"):
        store.add([Item("p", ("only one",))])
    assert store.fact("items") == 6
    with pytest.raises(ValueError, match="`question` must be 'pair' as before"):
        store.ask("rating")


def test_votes_of_a_file_are_taken_over_once(store):
    item = Item("p", ("a", "b"), votes=(Vote("ann", 1, when=5.0), Vote("ben", "tie")))
    for _ in range(2):
        store.add([item], votes=True)
    assert [(v.annotator, v.answer) for v in votes_of(store)] == [("ann", 1), ("ben", "tie")]
    ann = store._annotator("ann")
    store.undo(ann, store.last(ann))
    store.add([item], votes=True)
    assert [vote.annotator for vote in votes_of(store)] == ["ben"]


# -- files that are not as they should be ----------------------------------------------------------


def test_a_store_of_a_newer_version_is_refused(store):
    store.db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(StoreError, match=r"written by a newer trl .*: bring trl up to date"):
        Store(store.path)


def test_another_file_is_refused(tmp_path):
    with pytest.raises(StoreError, match="There is no store of votes"):
        Store(tmp_path / "none")
    (tmp_path / "text").write_text("not a database at all, but a text of some length" * 50)
    with pytest.raises(StoreError, match="it is not a store of votes: name another file"):
        Store(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    other.close()
    with pytest.raises(StoreError, match="another program's database"):
        Store(tmp_path / "other", make=True)


def try_to_write(path, tell):
    if os.geteuid() == 0:
        os.setuid(65534)  # nobody: who is root may write anything
    try:
        Store(path).link("ann")
    except StoreError as error:
        tell.put(str(error))
    else:
        tell.put("written")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_read_only_store_is_told(kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        make(path, pairs(1)).close()
        path.chmod(0o444 if kind == "file" else 0o666)
        path.parent.chmod(0o555 if kind == "folder" else 0o777)
        context = multiprocessing.get_context("fork")
        tell = context.SimpleQueue()
        process = context.Process(target=try_to_write, args=(path, tell))
        process.start()
        told = tell.get()
        process.join()
    assert re.search("give yourself the right to|its folder must be there and be writable", told)


def test_a_full_disk_is_told_and_no_vote_is_lost(store):
    (ann,) = people(store, "ann")
    shown = store.next(ann)
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="the disk is full. Nothing was changed: make room"):
        store.vote(ann, shown.id, "x", 0, comment="c" * 9000)
    assert votes_of(store) == []
    assert store.progress(ann)["own"] == 0
    store.db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    store.vote(ann, shown.id, "x", 0, comment="c" * 9000)
    assert len(votes_of(store)) == 1


def judge(path, name, tell):
    store = Store(path)
    me = store.join(store.link(name))
    while (shown := store.next(me)) is not None:
        tell.put((name, store.vote(me, shown.id, f"{name} {shown.id}", 0)))
    tell.put((name, None))


def test_two_processes_share_a_store_and_lose_nothing(tmp_path):
    make(tmp_path / "s", pairs(60)).close()
    context = multiprocessing.get_context("fork")
    tell, names = context.SimpleQueue(), ["ann", "ben"]
    both = [context.Process(target=judge, args=(tmp_path / "s", name, tell)) for name in names]
    for process in both:
        process.start()
    told = Counter()
    done = 0
    while done < 2:
        name, number = tell.get()
        done += number is None
        told[name] += number is not None
    for process in both:
        process.join()
    store = Store(tmp_path / "s")
    assert Counter(vote.annotator for vote in votes_of(store)) == told
    assert sum(told.values()) == 60
    assert max(len(item.votes) for item in store.items()) == 1


def test_many_processes_may_make_the_same_store(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        secrets = pool.map(secret_of, [tmp_path / "s"] * 8)
    assert len(set(secrets)) == 1


def test_a_store_that_another_process_is_making_is_no_other_program(tmp_path, monkeypatch):
    """It is made right after the late one has read whose file it is."""
    opened = sqlite3.connect

    class Opened:
        def __init__(self, *given, **how):
            self.db, self.others = opened(*given, **how), [True]

        def execute(self, *statement):
            found = self.db.execute(*statement)
            if self.others and "application_id" in statement[0]:
                rows = found.fetchall()
                self.others.clear()
                with monkeypatch.context() as patch:
                    patch.setattr(sqlite3, "connect", opened)
                    Store(tmp_path / "s", make=True).close()
                return SimpleNamespace(fetchone=lambda: rows[0])
            return found

        def __getattr__(self, name):
            return getattr(self.db, name)

    monkeypatch.setattr(sqlite3, "connect", Opened)
    late = Store(tmp_path / "s", make=True).secret
    monkeypatch.undo()
    assert Store(tmp_path / "s").secret == late


def secret_of(path):
    return Store(path, make=True).secret


# -- any order of events ---------------------------------------------------------------------------


class Judging(RuleBasedStateMachine):
    """Three people, four items, two votes each at most; beside it, a plain record of the votes."""

    @initialize()
    def begin(self):
        self.clock, self.numbers = Clock(), count()
        self.store = make(":memory:", pairs(4), per_item=2, clock=self.clock)
        self.team = people(self.store, "ann", "ben", "cid")
        self.live: dict[int, tuple[int, int, object]] = {}

    who = st.integers(0, 2)

    @rule(who=who, answer=st.sampled_from([0, 1, "tie", SKIP]))
    def judge(self, who, answer):
        me = self.team[who]
        shown = self.store.next(me)
        if shown is not None:
            number = self.store.vote(me, shown.id, str(next(self.numbers)), answer)
            assert number not in self.live
            self.live[number] = (me, shown.id, answer)

    @rule(who=who, item=st.integers(0, 6), answer=st.sampled_from([0, "tie", SKIP, 7]))
    def judge_anything(self, who, item, answer):
        me = self.team[who]
        try:
            number = self.store.vote(me, item, str(next(self.numbers)), answer)
        except Refused:
            return
        self.live[number] = (me, item, answer)

    @rule(who=who, number=st.integers(1, 30))
    def undo(self, who, number):
        try:
            self.store.undo(self.team[who], number)
        except Refused:
            assert self.live.get(number, (None,))[0] != self.team[who]
        else:
            self.live.pop(number, None)

    @rule(seconds=st.sampled_from([1.0, LEASE + 1]))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def all_is_there_and_counted(self):
        found = self.store.db.execute("SELECT id, annotator, item FROM votes WHERE undone IS NULL")
        assert {row[0]: tuple(row)[1:] for row in found} == {
            number: vote[:2] for number, vote in self.live.items()
        }
        counted = [item for _, item, answer in self.live.values() if answer != SKIP]
        assert max(Counter(counted).values(), default=0) <= 2
        for me in self.team:
            own = sum(vote[0] == me for vote in self.live.values())
            assert self.store.progress(me) == {
                "own": own,
                "items": 4,
                "votes": len(counted),
                "asked": 8,
            }


TestJudging = Judging.TestCase
TestJudging.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_one_in_a_hundred_votes_does_not_wait_for_the_log_to_be_moved(tmp_path):
    store = make(tmp_path / "s", pairs(3))
    (ann,) = people(store, "ann")
    for _ in range(1200):  # a page each, and no wait for the disk
        store.next(ann)
    assert (tmp_path / "s-wal").stat().st_size > 1100 * 4096  # else it begins anew after 1,000
