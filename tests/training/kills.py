"""Kill -9 runs, their resumes and classifiers, at file events and at random moments.

    python -m tests.training.kills --kills 200 --out kills.jsonl     goes on where it stopped

Each case is a run in a folder of its own that is killed `KILLS` times, gone on with after each, and
at last let to its end, which is compared bit for bit with that of one that was never killed. Runs
are made in forks of this process, which has imported everything: a kill costs about a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from tests.training.runs import assert_same_run, make_parts, tiny_recipe, without_time
from tests.training.runs import lines as rows_of
from tests.training.test_classifier_training import reviews, tiny_bert, write
from tests.training.test_resume import variants
from trl.config.recipe import CheckpointConfig, ClassifierRecipe, DataConfig
from trl.training import run
from trl.training.classifier import train_classifier
from trl.training.run import run_recipe

KILLS = 10
"""Of a case, before it is let to its end."""
MOST_EVENTS = 70
"""A kill comes before one of so many changes of files, about as many as three steps make."""
USUAL = 2.0
"""Seconds after which it comes at the latest."""
LONGEST = 600
"""Seconds that a session may take."""
CHANGES = "open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"


# -- what is killed --------------------------------------------------------------------------------


def kinds(parts: Path) -> dict[str, Callable[[Path], Any]]:
    """Return by name what trains in a folder; called again, it goes on."""
    often = {"steps": 12, "eval_every": 3, "checkpoints": CheckpointConfig(every=2, keep=2)}
    chosen = variants(parts)
    chosen["a stream"] = {
        "data": DataConfig(prompts=str(parts / "many.jsonl"), shuffle_buffer=16, held_out=6)
    }
    chosen["every step"] = {"checkpoints": CheckpointConfig(every=1, keep=1)}

    def of_run(changes: dict[str, Any]) -> Callable[[Path], Any]:
        return lambda out: run_recipe(tiny_recipe(parts, out, **often | changes), resume="auto")

    def classifier(out: Path) -> Any:
        made = ClassifierRecipe(
            model=str(parts / "bert"),
            train=str(parts / "train.jsonl"),
            test=str(parts / "test.jsonl"),
            crop_words=(2, 8),
            dropout=0.2,
            epochs=4,
            batch_size=16,
            learning_rate=1e-2,
            max_length=32,
            log_every=5,
            precision="fp32",
            out=str(out),
            quiet=True,
        )
        return (out / "summary.json").exists() or train_classifier(made, resume=True)

    by_name = {name: of_run(changes) for name, changes in chosen.items()}
    for number in range(3):  # as many of them as a quarter
        by_name[f"classifier {number}"] = classifier
    return by_name


def make_all(parts: Path) -> None:
    """Write the models and the data of all kinds."""
    parts.mkdir(parents=True)
    make_parts(parts)
    prompts = [f"w{a} w{b} w{c}" for a in range(1, 8) for b in range(9, 14) for c in range(1, 4)]
    (parts / "many.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in prompts))
    tiny_bert(parts / "bert")
    write(parts / "train.jsonl", reviews(200, 0))
    write(parts / "test.jsonl", reviews(40, 1))


def check_same(kind: str, whole: Path, killed: Path) -> None:
    """Raise an AssertionError unless both ended alike, bit for bit."""
    if not kind.startswith("classifier"):
        return assert_same_run(whole, killed)
    load = AutoModelForSequenceClassification.from_pretrained
    first, second = (load(out / "classifier").state_dict() for out in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    timed = ("seconds", "train_seconds")
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows]
        for rows in (
            [*without_time(rows_of(out / "metrics.jsonl")), json.loads(_text(out))]
            for out in (whole, killed)
        )
    )
    assert ours == theirs
    assert not (killed / "checkpoints").exists()


def _text(out: Path) -> str:
    return (out / "summary.json").read_text()


# -- how -------------------------------------------------------------------------------------------


def session(work: Callable[[Path], Any], out: Path, how: int | float | None) -> tuple[str, str]:
    """Train in a fork, which is killed; return how that ended, and where it was killed.

    Args:
        work: What to do in the folder.
        out: The folder.
        how: Before which change of a file there, or after how many seconds; None: not at all.
    """
    note = out.with_name(f"{out.name}.note")
    note.unlink(missing_ok=True)
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        _train(work, out, how, note)
    started = time.monotonic()
    longest = how if isinstance(how, float) else LONGEST
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - started > longest:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    seconds, code = time.monotonic() - started, os.waitstatus_to_exitcode(ended[1])
    where = note.read_text() if note.exists() else f"after {seconds:.2f} s"
    if code == -signal.SIGKILL and longest == LONGEST and not note.exists():
        return "hung", where
    return {0: "ended", -signal.SIGKILL: "killed"}.get(code, "failed"), where


def _train(work: Callable[[Path], Any], out: Path, how: int | float | None, note: Path) -> None:
    """Be the fork: train, be killed before the change of a file, and leave."""
    count, code = 0, 1

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not str(given[0]).startswith(str(out)):
            return
        if event == "open" and not (given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        count += 1
        if count == how:
            handle = os.open(note, os.O_WRONLY | os.O_CREAT)
            os.write(handle, f"before {event} {Path(str(given[0])).name}, change {count}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if isinstance(how, int):
            sys.addaudithook(watch)
        work(out)
        code = 0
    except BaseException:
        note.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def kill_case(
    kind: str, work: Callable[[Path], Any], whole: Path, out: Path, number: int, most: int
) -> list[dict[str, Any]]:
    """Kill a run up to `most` times, let it end, and compare it; return a row for each."""
    draw, rows = random.Random(number), list[dict[str, Any]]()
    if not whole.exists():
        result, told = session(work, whole, None)
        assert result == "ended", told
    for kill in range(most):
        at_event = (kill + number) % 2 == 0
        how = draw.randint(1, MOST_EVENTS) if at_event else draw.uniform(0.05, USUAL)
        result, told = session(work, out, how)
        rows.append({"case": number, "kind": kind, "result": result, "where": told})
        if result != "killed":
            break
    if rows and rows[-1]["result"] in ("failed", "hung"):
        return rows
    result, told = session(work, out, None)
    same, words = result == "ended", told if result != "ended" else ""
    if same:
        try:
            check_same(kind, whole, out)
        except Exception:
            same, words = False, traceback.format_exc()
    rows.append({"case": number, "kind": kind, "result": "compared", "same": same, "told": words})
    return rows


def kill_many(folder: Path, kills: int, results: Path, *, each: int = KILLS) -> list[dict]:
    """Kill until there are so many kills; what `results` has counts. Return all rows."""
    rows = rows_of(results) if results.exists() else []
    make_all(folder / "parts")
    run.write_report = lambda runs, out: out / "report.html"  # pictures take seconds
    by_name = kinds(folder / "parts")
    names = sorted(by_name, key=lambda name: random.Random(name).random())
    number = max((row["case"] for row in rows), default=-1) + 1
    while (left := kills - sum(row["result"] == "killed" for row in rows)) > 0:
        kind, out = names[number % len(names)], folder / f"case {number}"
        whole = folder / ("classifier" if kind.startswith("classifier") else kind)
        made = kill_case(kind, by_name[kind], whole, out, number, min(each, left))
        with results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        rows += made
        if all(row.get("same", True) and row["result"] != "failed" for row in made):
            shutil.rmtree(out)
        number += 1
    return rows


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of what went wrong."""
    return [row for row in rows if row["result"] in ("failed", "hung") or row.get("same") is False]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=KILLS, help="of a case")
    parser.add_argument("--out", type=Path, default=Path("kills.jsonl"))
    parser.add_argument("--folder", type=Path, help="to train in; what failed stays there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = options.folder or Path(tempfile.mkdtemp())
    found = kill_many(place, options.kills, options.out, each=options.each)
    killed = sum(row["result"] == "killed" for row in found)
    print(f"{killed} kills, {len(failures(found))} failures; {place}")
    sys.exit(bool(failures(found)))
