"""What a program asks people, waits for, and takes for their answers."""

import sqlite3
import threading
import time

import pytest

from tests.evaluation.people.voting import Voter
from trl.evaluation.people.asking import Stopped, ask, enough, look, taken, wait, waits
from trl.evaluation.people.items import Item
from trl.evaluation.people.store import Store


def items(*texts):
    return [Item("How was it?", (text,)) for text in texts]


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "s", make=True)
    made.ask("thumbs")
    yield made
    made.close()


@pytest.fixture
def voter(store):
    with Voter(store.path, lambda shown: "good" in shown.responses[0]) as answering:
        yield answering


def test_answers_come_in_the_order_of_the_items_and_are_asked_for_once(store, voter):
    asked = items("good", "bad", "good", "so good")
    assert wait(ask(store, asked), grace=0) == [[True], [False], [True], [True]]
    assert sorted(voter.seen) == ["bad", "good", "so good"]
    more = ask(store, items("bad", "new"))
    known, asked_now = look(more).answers  # the voter may have answered the new one by now
    assert known == [False]
    assert asked_now in ([], [False])
    assert wait(more, grace=0) == [[False], [False]]
    assert sorted(voter.seen) == ["bad", "good", "new", "so good"]


def test_what_nobody_answers_in_time_is_taken_from_the_page_and_may_be_asked_again(store):
    (ann,) = [store.join(store.link("ann"))]
    asking = ask(store, items("a", "b"))
    assert waits(store).left == 2
    first = store.next(ann)
    store.vote(ann, first.id, "1", True)
    held = store.next(ann)
    assert wait(asking, timeout=0) == [[True], []]
    assert waits(store) is None
    assert store.next(ann) is None
    store.ask("thumbs", per_item=1)  # as a new start does
    assert store.next(ann) is None
    # The same again, as after a kill, gives the same; by hand it is asked once more.
    assert wait(ask(store, items("a", "b"))) == [[True], []]
    assert store.next(ann) is None
    store.vote(ann, held.id, "late", False)
    assert wait(ask(store, items("a", "b"))) == [[True], []]
    assert wait(ask(store, items("a", "b"), again=True), grace=0) == [[True], [False]]


def test_enough_for_now_ends_the_waiting_that_there_is(store):
    asking = ask(store, items("a", "b"))
    said = threading.Timer(0.3, enough, [Store(store.path)])
    said.start()
    assert wait(asking) == [[], []]
    said.join()
    assert wait(ask(store, items("a", "b", "c")), timeout=0) == [[], [], []]
    assert not look(ask(store, items("d"))).enough
    assert not look(ask(store, items("a", "b"), again=True)).enough


def test_an_answer_may_be_undone_while_others_are_waited_for_and_a_little_after(tmp_path):
    now, done = [1000.0], []
    path = tmp_path / "s"
    store = Store(path, make=True, clock=lambda: now[0])
    store.ask("thumbs")
    ann = store.join(store.link("ann"))

    def waited():
        other = Store(path, clock=lambda: now[0])
        done.append(wait(ask(other, items("a"))))
        other.close()

    waiting = threading.Thread(target=waited)
    waiting.start()
    while (shown := store.next(ann)) is None:
        time.sleep(0.05)
    vote = store.vote(ann, shown.id, "1", True)
    time.sleep(0.6)
    assert not done  # as long as the clock stands
    store.undo(ann, vote)
    now[0] = 2000.0
    time.sleep(0.6)
    assert not done  # nothing is answered
    store.vote(ann, store.next(ann).id, "2", False)
    now[0] = 3000.0
    waiting.join()
    assert done == [[[False]]]
    store.close()


def test_several_people_judge_an_item_and_a_skip_is_no_answer(store):
    store.ask("thumbs", per_item=2)
    ann, ben = (store.join(store.link(name)) for name in ("ann", "ben"))
    asking = ask(store, items("a"))
    store.vote(ann, store.next(ann).id, "1", True)
    assert look(asking).left == 1
    store.vote(ben, store.next(ben).id, "1", "skip")
    assert wait(asking, grace=0) == [[True]]


def test_a_stop_ends_the_waiting_and_keeps_what_was_answered(store):
    ann = store.join(store.link("ann"))
    asking = ask(store, items("a", "b"))
    store.vote(ann, store.next(ann).id, "1", True)
    with pytest.raises(Stopped):
        wait(asking, stop=lambda: True)
    assert taken(asking) is None
    assert look(ask(store, items("a", "b"))).answers == [[True], []]


def test_a_store_of_before_is_asked_too(store):
    store.add(items("a"))
    path = store.path
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE askings")
        db.execute("DROP TABLE withdrawn")
    db.close()
    again = Store(path)
    assert wait(ask(again, items("a")), timeout=0) == [[]]
    again.close()
