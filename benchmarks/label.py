"""Votes a second, and how long an answer takes, of `trl label` with many items and clients.

    python benchmarks/label.py [--items 100000] [--clients 8] [--rate 50] [--seconds 20]

A server of its own process, on a store in a temporary folder of this disk (--folder: another);
every vote is on the disk before it is answered. First the clients vote together at the given rate,
then one client asks for each kind of answer alone. Writes results/label-<date>.json with how busy
the machine was.
"""

import argparse
import asyncio
import datetime
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from trl.evaluation.people.items import Item
from trl.evaluation.people.server import serve
from trl.evaluation.people.store import Store

TEXT = "A response of the usual length, with nothing in it that matters here. " * 8


def run_server(path, tell):
    serve(Store(path), "127.0.0.1", 0, started=tell.put)


def times_told(seconds):
    told = sorted(1000 * each for each in seconds)
    names = {"median": 0.5, "p99": 0.99, "most": 1.0}
    figures = {
        f"{name}_ms": round(told[min(int(share * len(told)), len(told) - 1)], 2)
        for name, share in names.items()
    }
    return {"requests": len(told), **figures}


async def sign_in(address, token):
    client = httpx.AsyncClient(base_url=address, headers={"Origin": address.rstrip("/")})
    (await client.post("/api/join", json={"token": token})).raise_for_status()
    state = (await client.get("/api/state")).raise_for_status().json()
    client.headers["X-CSRF-Token"] = state["csrf"]
    return client, state


async def vote(client, state, times):
    body = {"item": state["item"]["id"], "client": os.urandom(16).hex(), "answer": 0}
    begun = time.perf_counter()
    answer = await client.post("/api/vote", json=body)
    times.append(time.perf_counter() - begun)
    return answer.raise_for_status().json()


async def vote_at_a_rate(signed_in, offset, rate, seconds, times):
    """One of the clients: votes at moments of its own, whatever the last one took."""
    client, state = signed_in
    begun = time.perf_counter() + offset
    for turn in range(int(rate * seconds)):
        await asyncio.sleep(max(begun + turn / rate - time.perf_counter(), 0))
        state = await vote(client, state, times)
    return state


async def measure(address, tokens, rate, seconds):
    people = [await sign_in(address, token) for token in tokens]
    together, begun = [], time.perf_counter()
    shares = [
        vote_at_a_rate(each, place / rate, rate / len(people), seconds, together)
        for place, each in enumerate(people)
    ]
    states = await asyncio.gather(*shares)
    wall = time.perf_counter() - begun
    found = {"votes_per_second": round(len(together) / wall, 1), "together": times_told(together)}
    client, state = people[0][0], states[0]
    alone = {"vote": [], "undo": [], "/api/state": [], "/api/history": [], "/": []}
    for _ in range(100):
        state = await vote(client, state, alone["vote"])
        begun = time.perf_counter()
        body = {"vote": state["vote"]}
        state = (await client.post("/api/undo", json=body)).raise_for_status().json()
        alone["undo"].append(time.perf_counter() - begun)
        for path in ("/api/state", "/api/history", "/"):
            begun = time.perf_counter()
            (await client.get(path)).raise_for_status()
            alone[path].append(time.perf_counter() - begun)
    for each, _ in people:
        await each.aclose()
    return found | {"alone": {name: times_told(told) for name, told in alone.items()}}


def disk_ms(folder, times=50):
    """Return how long this disk takes to make 4 kB safe: no vote can be quicker."""
    told = []
    with open(Path(folder) / "probe", "wb") as file:
        for _ in range(times):
            begun = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            told.append(time.perf_counter() - begun)
    return round(1000 * statistics.median(told), 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--folder", help="where the store is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = Store(Path(folder) / "votes.sqlite", make=True)
        store.ask("pair", per_item=2)
        store.add(Item(f"Prompt {i}", (TEXT, f"{TEXT} {i}")) for i in range(options.items))
        tokens = [store.link(f"person {i}") for i in range(options.clients)]
        tell = multiprocessing.SimpleQueue()
        server = multiprocessing.Process(target=run_server, args=(store.path, tell), daemon=True)
        server.start()
        address, busy = tell.get(), os.getloadavg()[0]
        found = asyncio.run(measure(address, tokens, options.rate, options.seconds))
        server.terminate()
        server.join()
        found |= {"items": options.items, "clients": options.clients, "fsync_ms": disk_ms(folder)}
    found |= {"load_before": busy, "load_after": os.getloadavg()[0], "cores": os.cpu_count()}
    text = json.dumps(found, indent=2)
    print(text)
    path = Path(__file__).parent / "results" / f"label-{datetime.date.today()}.json"
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
