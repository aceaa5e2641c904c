"""The processes of a run: forks of one that has imported all that takes long, once.

Each fork is a main program with an end of its own: hooks, signals and `atexit` are those of
`python script.py`.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from tests.hosts import Host

ROOT = Path(__file__).parents[1]


@cache
def _server() -> subprocess.Popen[str]:
    settings = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.ranks"],
        cwd=ROOT,
        env=os.environ | settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.stdin.close)
    return server


def launch(
    function: Callable[..., None],
    world: int,
    folder: Path,
    *arguments: Any,
    timeout: float = 900,
    awaited: list[int] | None = None,
    hosts: Sequence[Host] = (),
) -> tuple[list[int], list[str]]:
    """Return how each of several processes ended, and what it said on stderr.

    Args:
        function: Of a test module; gets the arguments.
        world: Number of processes.
        folder: Of their output.
        *arguments: What JSON can write.
        timeout: Seconds after which they are killed.
        awaited: Ranks after whose end the others are killed; None: all are waited for.
        hosts: That of each process; none: all are on this machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    order = {
        "module": function.__module__,
        "name": function.__name__,
        "arguments": arguments,
        "world": world,
        "folder": str(folder),
        "port": str(port),
        "timeout": timeout,
        "hosts": [asdict(host) for host in hosts],
        "awaited": list(range(world)) if awaited is None else awaited,
    }
    print(json.dumps(order), file=_server().stdin, flush=True)
    codes = json.loads(_server().stdout.readline())
    return codes, [(Path(folder) / f"stderr-{rank}").read_text() for rank in range(world)]


def _serve() -> Callable[[], None] | None:
    """Carry out orders; in a process that is started by one, return what it is to do."""
    for line in sys.stdin:
        order = json.loads(line)
        started: dict[int, int] = {}
        for rank in range(order["world"]):
            process = os.fork()
            if process == 0:
                return _become(rank, order)
            started[process] = rank
        print(json.dumps(_wait(started, order)), flush=True)
    return None


def _become(rank: int, order: dict[str, Any]) -> Callable[[], None]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, target in ((0, os.devnull), (1, os.devnull), (2, f"stderr-{rank}")):
        place = Path(order["folder"]) / target
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    if order["world"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(order["world"]), "MASTER_PORT": order["port"]}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if order["hosts"]:
        os.environ["MASTER_ADDR"] = order["hosts"][0]["address"]
        Host(**order["hosts"][rank]).enter()
    function = getattr(importlib.import_module(order["module"]), order["name"])
    return lambda: function(*order["arguments"])


def _wait(started: dict[int, int], order: dict[str, Any]) -> list[int]:
    codes: dict[int, int] = {}
    until = time.monotonic() + order["timeout"]
    while len(codes) < len(started):
        done = all(rank in codes for rank in order["awaited"])
        if done or time.monotonic() > until:
            for process, rank in started.items():
                if rank not in codes:
                    os.kill(process, signal.SIGKILL)
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            codes[started[process]] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    return [codes[rank] for rank in range(len(codes))]


if __name__ == "__main__":
    for name in (
        "tests.conftest",
        "tests.models.policies",
        "tests.training.runs",
        "trl.training.run",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
    ):
        importlib.import_module(name)
    job = _serve()
    if job is not None:
        job()
