"""The server is killed at random moments while somebody votes: nothing acknowledged is lost."""

import multiprocessing
import os
import random
import signal
from contextlib import suppress
from itertools import count
from threading import Timer

import httpx
import pytest
import starlette.applications  # noqa: F401  before the fork: each server starts at once
import uvicorn  # noqa: F401

from tests.evaluation.people.asking import make_store
from trl.evaluation.people.items import Item
from trl.evaluation.people.server import serve
from trl.evaluation.people.store import Store

FORK = multiprocessing.get_context("fork")


def run_server(path, tell):
    serve(Store(path), "127.0.0.1", 0, started=tell.put)


class Killed:
    """A server that is killed again and again, and a voter who goes on with the next one."""

    def __init__(self, path):
        self.path, self.acknowledged = path, {}
        self.cookies = httpx.Cookies()
        self.pending = None

    def live(self, votes, seconds, token=None):
        """Start a server, and vote until it is killed: so many seconds after so many votes."""
        tell = FORK.SimpleQueue()
        process = FORK.Process(target=run_server, args=(self.path, tell))
        process.start()
        address = tell.get()
        timer = Timer(seconds, os.kill, (process.pid, signal.SIGKILL))
        with (
            suppress(httpx.TransportError),
            httpx.Client(base_url=address, cookies=self.cookies, timeout=60) as client,
        ):
            client.headers["Origin"] = address.rstrip("/")
            if token:
                client.post("/api/join", json={"token": token}).raise_for_status()
                self.cookies = client.cookies
            self.vote_on(client, votes, timer)
        process.join()
        assert process.exitcode == -signal.SIGKILL

    def vote_on(self, client, votes, timer):
        state = client.get("/api/state").raise_for_status().json()
        for turn in count():
            if turn == votes:
                timer.start()
            client.headers["X-CSRF-Token"] = state["csrf"]
            name = random.randbytes(16).hex()
            self.pending = self.pending or {
                "item": state["item"]["id"],
                "client": name,
                "answer": 0,
            }
            state = client.post("/api/vote", json=self.pending).raise_for_status().json()
            self.acknowledged[self.pending["client"]] = (state["vote"], self.pending["item"])
            self.pending = None


@pytest.mark.parametrize(
    "kills", [3, pytest.param(200, marks=pytest.mark.slow)], ids=["3 times", "200 times"]
)
def test_no_acknowledged_vote_is_lost_or_there_twice(kills, tmp_path):
    items = [Item(f"p{i}", ("a", "b")) for i in range(kills * 50)]
    store = make_store(tmp_path / "s", items)
    voter, token = Killed(tmp_path / "s"), store.link("ann")
    chance = random.Random(kills)
    for turn in range(kills):
        voter.live(chance.randrange(5), chance.uniform(0, 0.03), None if turn else token)
    found = store.db.execute("SELECT client, id, item FROM votes WHERE undone IS NULL").fetchall()
    stored = {row["client"]: (row["id"], row["item"]) for row in found}
    assert len(stored) == len(found) == len({item for _, item in stored.values()})
    assert voter.acknowledged.items() <= stored.items()
    # What was sent and not acknowledged may be there, and is the only one that may.
    assert len(stored) - len(voter.acknowledged) in (0, 1)
    assert len(voter.acknowledged) >= kills
    assert store.db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert store.progress(1)["own"] == store.fact("votes") == len(found)
