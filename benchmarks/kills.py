"""Kill -9 runs of two processes with sharded weights, and compare what they end with.

    python benchmarks/kills.py                until there are 50 kills; goes on where it was stopped
    python benchmarks/kills.py --table        their sums

A run of a tiny model, `torchrun --nproc-per-node 2 -m trl train RECIPE`, is made once without a
stop. Then others of the same recipe are killed, and each gone on with by `--resume`, until it ends:
all of its processes are killed, or one of the two alone; while it starts, at a random moment of its
steps, or within a save, when there is the folder that a checkpoint is written in. What it ends with
must be what the first one has, bit for bit: weights, optimiser, random numbers, the policies, and
every figure but those of time. A line of results/kills.jsonl is a kill, or a run that has ended.

To start is what takes long. The run without a stop, and what is killed while it starts, is the
command itself; the rest is the same launcher and the same command in forks of this process, which
has imported everything.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(ROOT))  # for the tests' tiny model, and how they compare runs

import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.fsdp  # noqa: E402, F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

import trl.training.run  # noqa: E402, F401
from tests.training.runs import assert_same_run, lines, make_parts, tiny_recipe  # noqa: E402
from trl import cli, config  # noqa: E402
from trl.config.recipe import CheckpointConfig, ModelConfig, RewardConfig  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "kills.jsonl"
STEPS = 12
EACH = 6
"""Kills of a run at most, before it is let to its end."""
AIMS = "steps", "save", "steps", "save", "start", "steps"
"""What is killed, in turn."""
LONGEST = {"start": 15.0, "steps": 5.0, "save": 0.1}
"""Seconds, at most, from the start of a session, of its steps, or of a save, to the kill."""
LIMIT = 300
"""Seconds that a session may take, or the rest of one to end when a process is killed."""


def make_recipe(folder: Path, out: Path) -> Path:
    """Write the recipe of a run, and return its path."""
    reward = RewardConfig(kind="function", name=f"{folder / 'reward.py'}:counting")
    recipe = tiny_recipe(
        folder,
        out,
        model=ModelConfig(name=str(folder / "model"), shard=True),
        reward=(reward,),
        steps=STEPS,
        eval_every=4,
        checkpoints=CheckpointConfig(every=2, keep=2),
    )
    path = out.with_suffix(".yaml")
    path.write_text(config.dump(recipe))
    return path


def by_command(recipe: Path, said: Path) -> psutil.Process:
    """Start the processes of a run as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "localhost", "--nproc-per-node", "2", "-m", "trl"]
    with said.open("w") as output:
        return psutil.Popen(
            [*command, "train", str(recipe), "--resume"],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def by_fork(recipe: Path, said: Path) -> psutil.Process:
    """Start the processes of a run as forks of this one, by the same launcher."""
    if child := os.fork():
        return psutil.Process(child)
    code = 1
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        settings = LaunchConfig(
            *(1, 1, 2),  # hosts, at least and at most, and processes of each
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            run_id=recipe.stem,
            start_method="fork",
            monitor_interval=0.1,
            max_restarts=0,
        )
        elastic_launch(settings, _be_a_rank)(["train", str(recipe), "--resume"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _be_a_rank(command: list[str]) -> None:
    """Do in a fork what the command does in a process of its own, and end as it would."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)  # the launcher's are others
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = cli.main(command)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if code:
        os._exit(code)


class Session:
    """The processes of a run, from their start or resume to their end."""

    def __init__(self, start: Callable[[Path, Path], psutil.Process], recipe: Path) -> None:
        self.out, self.said = recipe.with_suffix(""), recipe.with_suffix(".said")
        self.recipe_was = self._recipe_written()
        self.started, self.began = time.monotonic(), time.time()
        self.launcher = start(recipe, self.said)

    def code(self) -> int | None:
        """Return how it ended; None: it has not."""
        try:
            return self.launcher.wait(timeout=0)
        except psutil.TimeoutExpired:
            return None

    def _recipe_written(self) -> int:
        path = self.out / "recipe.yaml"
        return path.stat().st_mtime_ns if path.exists() else 0

    def saving(self) -> bool:
        """Tell whether a checkpoint is being written, or was when all were killed."""
        for partial in (self.out / "checkpoints").glob(".step-*.partial"):
            with suppress(FileNotFoundError):
                if partial.stat().st_mtime > self.began:  # else a killed session has left it
                    return True
        return False

    def wait_until(self, condition: Callable[[], bool], every: float = 0.0005) -> bool:
        """Wait for something, and return whether it came before the end of the session."""
        while not condition():
            if self.code() is not None:
                return False
            if time.monotonic() - self.started > LIMIT:
                raise TimeoutError(f"a session took more than {LIMIT} s: {self.said.read_text()}")
            time.sleep(every)
        return True

    def wait_for(self, aim: str, draw: random.Random) -> bool:
        """Wait for the moment of a kill; return False if the session ends before."""
        if aim != "start":
            if not self.wait_until(lambda: self._recipe_written() != self.recipe_was, 0.02):
                return False
            if aim == "save":
                for _ in range(draw.randint(0, 2)):  # let some pass
                    if not (self.wait_until(self.saving) and self.wait_until(self._not_saving)):
                        return False
                if not self.wait_until(self.saving):
                    return False
        until = time.monotonic() + draw.uniform(0, LONGEST[aim])
        return self.wait_until(lambda: time.monotonic() >= until)

    def _not_saving(self) -> bool:
        return not self.saving()

    def kill(self, which: str) -> dict[str, Any]:
        """Kill all, or one rank; return what was killed, and how long the others took to end."""
        at, ranks = time.monotonic(), sorted(self.launcher.children(), key=lambda rank: rank.pid)
        everyone = [self.launcher, *ranks]
        chosen = [ranks[int(which[-1])]] if which != "all" and len(ranks) == 2 else []
        within = self.saving()
        for process in chosen or everyone:  # the ranks may not be there yet, or no more
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if chosen:
            within = within and self.saving()  # the other one waits in it
        _, alive = psutil.wait_procs(everyone, timeout=LIMIT)
        seconds = time.monotonic() - at
        for process in alive:
            process.kill()
        return {
            "which": which if chosen else "all",
            "in_save": within if chosen else self.saving(),  # what is left of one
            "after": round(at - self.started, 2),
            "rest_ended_after": round(seconds, 2),
            "hung": bool(alive),
        }


def differences(whole: Path, out: Path) -> str:
    """Return how a run differs from the one without stops; empty: in nothing but its times."""
    try:
        steps = [row["step"] for row in lines(out / "metrics.jsonl")]
        assert steps == list(range(STEPS + 1)), f"metrics.jsonl has the steps {steps}"
        assert_same_run(whole, out)
        for folder in ("policy", "best"):
            first, second = (
                {str(path.relative_to(run)): path.read_bytes() for path in files(run / folder)}
                for run in (whole, out)
            )
            assert first == second, folder
        left = [path.name for path in out.rglob(".*") if path.suffix in (".partial", ".old")]
        assert not left, f"{left} is left"
    except (AssertionError, OSError) as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def last_step(out: Path) -> int:
    """Return the last step whose figures are written; −1: there is none."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def ended(session: Session) -> str:
    """Let a run go on to its end; return what it said if that is not as it must be."""
    session.wait_until(lambda: False, 0.05)
    if session.code() == 0:
        return ""
    lines = session.said.read_text().splitlines()  # whose traces have paths of this machine
    errors = [line for line in lines if "Error" in line and "File " not in line]
    return f"it failed: {errors[-1] if errors else 'without a word'}"


def kill_run(number: int, kills: int, most: int, folder: Path, add: Callable[[dict], None]) -> bool:
    """Kill a run up to `most` times, let it end, compare it; return whether it was as it must be.

    Args:
        number: Of the run.
        kills: That others have had; each one is drawn by its number.
        most: Of this run.
        folder: Has the parts, and the run without stops, `whole`.
        add: Keeps a row.
    """
    out = folder / f"run-{number}"
    recipe, problem = make_recipe(folder, out), None
    for kill in range(kills, kills + most):
        aim, draw = AIMS[kill % len(AIMS)], random.Random(kill)
        session = Session(by_command if aim == "start" else by_fork, recipe)
        which = draw.choice(["all", "all", "rank 0", "rank 1"])
        if not session.wait_for(aim, draw):
            problem = ended(session)
            break
        row = session.kill(which)
        add({"kill": kill, "run": number, "aim": aim, "step": last_step(out), **row})
    if problem is None:
        problem = ended(Session(by_fork, recipe))
    problem = problem or differences(folder / "whole", out)
    add({"run": number, "identical": not problem, "differs": problem})
    return not problem


def kill_many(kills: int, results: Path) -> None:
    """Kill until there are so many kills; those of runs that `results` has the end of count."""
    there = read(results)
    compared = {row["run"] for row in there if "identical" in row}
    kept = [json.dumps(row) + "\n" for row in there if row["run"] in compared]
    results.write_text("".join(kept))

    def add(row: dict[str, Any]) -> None:
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    folder, all_good = Path(tempfile.mkdtemp()), True
    make_parts(folder)
    problem = ended(Session(by_command, make_recipe(folder, folder / "whole")))
    assert not problem, problem
    while (made := sum("kill" in row for row in read(results))) < kills:
        number = 1 + max((row["run"] for row in read(results)), default=-1)
        good = kill_run(number, made, min(EACH, kills - made), folder, add)
        all_good = all_good and good
        if good:
            shutil.rmtree(folder / f"run-{number}")
    if all_good:
        shutil.rmtree(folder)
    else:
        print(f"What differs is in {folder}.")


def read(results: Path) -> list[dict[str, Any]]:
    return lines(results) if results.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return the sums of all rows, in Markdown."""
    kills = [row for row in rows if "kill" in row]
    ends = [row for row in rows if "identical" in row]
    counts = Counter((row["which"], row["in_save"]) for row in kills)
    told = ["| killed | within a save | else |", "|---|---:|---:|"]
    told += [
        f"| {which} | {counts[which, True]} | {counts[which, False]} |"
        for which in ("all", "rank 0", "rank 1")
    ]
    waits = [row["rest_ended_after"] for row in kills if row["which"] != "all"]
    told += [
        "",
        f"{len(kills)} kills, {sum(row['in_save'] for row in kills)} within a save; "
        f"{len(ends)} runs, {sum(row['identical'] for row in ends)} of them "
        f"identical; of a run of which one process was killed the rest had ended after "
        f"{max(waits, default=0):.1f} s at most, {sum(row['hung'] for row in kills)} hung.",
    ]
    return "\n".join(told)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        kill_many(options.kills, options.results)
    print(table(read(options.results)))
    sys.exit(not all(row.get("identical", True) for row in read(options.results)))
