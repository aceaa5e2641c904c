"""A loop of choices whose trainer and page are killed, while somebody chooses on the page."""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import starlette.applications  # noqa: F401  before the forks: each begins at once
import uvicorn  # noqa: F401

from tests.training.runs import lines
from tests.training.test_taste import (
    check_same,
    hidden,
    loop_of,
    no_pictures,  # noqa: F401
    parts,  # noqa: F401
    whole,  # noqa: F401
)
from trl.evaluation.people import asking
from trl.evaluation.people.server import serve
from trl.evaluation.people.store import Shown, Store, StoreError
from trl.training.taste import Simulated, tune_to_taste

HERE = Path("/proc/self/stat")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HERE.is_file(), reason="how long a process worked is read from /proc"),
]
FORK = multiprocessing.get_context("fork")
KILLS, MOST = 50, 12
"""In all, and of one loop."""


def train(made, out):
    tune_to_taste(loop_of(made, out, simulated=None, port=0), resume=True)


def wait_for_store(out):
    """Return the store that the trainer makes, once something is asked in it."""
    while True:
        with suppress(StoreError):
            store = Store(out / "votes.sqlite")
            if store.fact("question"):
                return store
            store.close()
        time.sleep(0.02)


def show(out, port):
    """Serve the page, as `trl label --store` does."""
    serve(wait_for_store(out), "127.0.0.1", port)


def choose(made, out, port):
    """Choose on the page, whichever is there; what it acknowledged is written down."""
    hand, pending, address = Simulated(hidden(made)), None, f"http://127.0.0.1:{port}"
    client = httpx.Client(base_url=address, headers={"Origin": address}, timeout=60)
    token = wait_for_store(out).link("me")
    with (out / "acknowledged.jsonl").open("a", buffering=1) as said:
        while True:
            try:
                state = client.get("/api/state")
                if state.status_code == 401:  # the trainer gives links too: only the last is good
                    token = wait_for_store(out).link("me")
                    client.post("/api/join", json={"token": token})
                    continue
                state = state.raise_for_status().json()
                client.headers["X-CSRF-Token"] = state["csrf"]
                if pending is None and (item := state["item"]) is not None:
                    shown = Shown(item["id"], item["prompt"], tuple(item["responses"]))
                    pending = {"item": shown.id, "answer": hand.choose("me", shown)}
                    pending["client"] = random.randbytes(8).hex()
                if pending is not None:
                    client.post("/api/vote", json=pending).raise_for_status()
                    said.write(json.dumps(pending) + "\n")
                    pending = None
            except httpx.TransportError:
                pass
            time.sleep(0.02)


class Played:
    """A loop in three processes, of which two are killed and started again."""

    def __init__(self, made, out):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out.mkdir()
        self.out = out
        self.works = {"trainer": (train, (made, out)), "page": (show, (out, port))}
        self.living = {name: self.start(name) for name in self.works}
        self.person = FORK.Process(target=choose, args=(made, out, port), daemon=True)
        self.person.start()

    def start(self, name):
        work, given = self.works[name]
        process = FORK.Process(target=work, args=given, daemon=True)
        process.start()
        return process

    def kill(self, names):
        """Kill them, and return whether they were there to be killed."""
        for name in names:
            os.kill(self.living[name].pid, signal.SIGKILL)
        for name in names:
            self.living[name].join()
        codes = [self.living[name].exitcode for name in names]
        assert set(codes) <= {0, -signal.SIGKILL}
        killed = -signal.SIGKILL in codes
        self.living |= {name: self.start(name) for name in names}
        return killed

    def end(self):
        """Let the trainer come to its end, and return the seconds that it worked."""
        worked = 0.0
        while self.living["trainer"].is_alive():
            worked = max(worked, self.worked())
            assert self.person.is_alive()  # else the trainer would wait for ever
            time.sleep(0.01)
        assert self.living["trainer"].exitcode == 0
        for process in (self.person, self.living["page"]):
            process.kill()
            process.join()
        return worked

    def worked(self):
        """Return the seconds of a processor that this trainer had: those of a clock say little."""
        with suppress(OSError):
            told = Path(f"/proc/{self.living['trainer'].pid}/stat").read_text().rsplit(") ")[1]
            return sum(map(int, told.split()[11:13])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def votes(self):
        """Return how many answers were acknowledged."""
        said = self.out / "acknowledged.jsonl"
        return len(said.read_bytes().splitlines()) if said.is_file() else 0

    def lives_until(self, chance, seconds):
        """Wait for a random moment, of its work or of the choices; tell whether it came."""
        votes, work = 99, self.worked() + chance.uniform(0, seconds / 3)
        if self.votes() < 19 and chance.random() < 0.5:
            votes, work = self.votes() + chance.randrange(1, 6), 99.0
        while self.living["trainer"].is_alive():
            if self.worked() >= work or self.votes() >= votes:
                time.sleep(chance.uniform(0, 0.05))
                return True
            assert self.person.is_alive()
            time.sleep(0.005)
        return False


def check_votes(out):
    """Check that no vote is lost, and that nothing was asked twice."""
    store = Store(out / "votes.sqlite")
    rows = store.db.execute("SELECT client, item, undone FROM votes").fetchall()
    items = store.fact("items")
    store.close()
    acknowledged = {row["client"]: row["item"] for row in lines(out / "acknowledged.jsonl")}
    assert {row["client"]: row["item"] for row in rows} == acknowledged
    assert len(rows) == len({row["item"] for row in rows}) == items == 24
    assert not any(row["undone"] for row in rows)


def test_trainer_and_page_are_killed_at_random_moments(whole, parts, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(asking, "GRACE", 0.1)
    played = Played(parts, tmp_path / "alive")
    seconds = played.end()
    check_same(whole[0], tmp_path / "alive")  # as if the choices were made without a page
    check_votes(tmp_path / "alive")
    chance, kills, number = random.Random(0), Counter(), 0
    while kills.total() < KILLS:
        out = tmp_path / f"case-{number}"
        played = Played(parts, out)
        for _ in range(min(MOST, KILLS - kills.total())):
            if not played.lives_until(chance, seconds):
                break
            names = chance.choice((("trainer",), ("page",), ("trainer", "page")))
            kills[names] += played.kill(names)
        played.end()
        check_same(whole[0], out)
        check_votes(out)
        number += 1
        print(f"{number} loops of {seconds} s, kills: {dict(kills)}", flush=True)
    assert min(kills.values()) >= 5
