"""The folder of a run, read for its report: whatever is there, and notes on what is not.

    recipe.yaml      settings                 summary.json     before and after, written at the end
    metrics.jsonl    a row for each step      samples.jsonl    held-out responses at each evaluation
    scores.jsonl     scores of each batch     warnings.jsonl   what looked wrong
    rollouts.jsonl   some of its responses

A run that goes on, or was killed, lacks some of them, and a last line may be cut. A run that was
resumed has steps twice: the later rows count.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from trl.config.errors import refuse
from trl.config.reading import parse_yaml
from trl.config.writing import flatten

WITHOUT = {
    "recipe.yaml": "the settings are not known",
    "metrics.jsonl": "no charts of the training",
    "scores.jsonl": "no histogram of the scores",
    "samples.jsonl": "no samples of held-out prompts",
    "warnings.jsonl": "",
    "summary.json": "the run goes on, or was stopped before its end",
}
"""The files of a run, and what a report lacks without them; nothing: a file may well be missing."""

FIX = "Give the folder that a run wrote, the `out` of its recipe."
COUNTS = ("turns", "tool_calls", "tool_errors")
PHASES = ("rollout", "evaluation", "optimisation")


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of an episode, behind its prompt."""

    role: str
    """Of a tool, with its name."""
    content: str
    reward: float | None = None
    """Of the policy's turn that it is."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A response to a held-out prompt."""

    prompt: str
    response: str
    reward: float | None = None
    kl: float | None = None
    length: float | None = None
    ended: bool | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    """The score by each scorer."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What scorers noted beside: the answer that one read off it, say."""
    messages: tuple[tuple[str, str], ...] = ()
    """Role and words of each message of the prompt, if it is a chat."""
    turns: tuple[Turn, ...] = ()
    """What followed the prompt, if it was an episode of several turns."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Of an episode: those of `COUNTS` that are known."""
    stop: str = ""
    """Why an episode ended."""


@dataclass(slots=True)
class Run:
    """A run, as far as its folder tells."""

    path: Path
    name: str
    number: int = 0
    """Which of the runs that are shown together."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings under dotted names."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """A row for each step, in order; what was not a finite number is NaN."""
    scores: dict[int, list[float]] = field(default_factory=dict)
    """The finite scores of each step."""
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    """Responses to the held-out prompts, by step."""
    rollouts: dict[int, list[Sample]] = field(default_factory=dict)
    """The first responses of each step's batch."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """What looked wrong: the rows of `trl.watch.diagnosis.Finding`."""
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was missing or could not be read."""

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary.get("finished", self.summary))

    @property
    def algorithm(self) -> str | None:
        """Its algorithm, if the recipe is there."""
        return self.recipe.get("ppo.algorithm")

    @property
    def model(self) -> str | None:
        """The model that was tuned."""
        return self.recipe.get("model.name")

    @property
    def where(self) -> list[str]:
        """When and on what it ran, as far as its summary tells."""
        told, versions = self.summary, self.summary.get("versions") or {}
        size, trained = (_finite(told.get(name)) for name in ("parameters", "trained"))
        numbers = [f"{size / 1e6:.1f}M parameters"] if size else []
        if size and trained and trained != size:
            numbers[0] += f", {trained / 1e6:.1f}M of them trained"
        numbers += [str(told["precision"])] if "precision" in told else []
        device, threads = versions.get("device"), str(versions.get("threads"))
        on = [str(device)] if device else []
        on += [f"{threads} thread{'s' * (threads != '1')}"] if device == "cpu" else []
        processes = told.get("processes", 1)
        on += [f"{processes} processes"] if processes != 1 else []
        names = [f"{x} {versions[x]}" for x in ("trl", "torch", "transformers") if x in versions]
        parts = str(told.get("ended", "")), *map(", ".join, (numbers, on, names))
        return [part for part in parts if part]

    @property
    def last_step(self) -> int:
        """The last step there is a row of."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def state(self) -> str:
        """How far it has come."""
        if self.finished:
            return f"{self.last_step} steps"
        steps = self.summary.get("total_steps") or self.recipe.get("steps")
        return f"{self.last_step}{f' of {steps}' if steps else ''} steps, not finished"

    @property
    def seconds(self) -> float:
        """How long it took; for a run without a summary, the steps alone."""
        steps = [row.get(f"time/{phase}", 0.0) for row in self.metrics for phase in PHASES]
        return self.summary.get("seconds") or sum(filter(math.isfinite, steps))

    @property
    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """Step and finite held-out figures of each evaluation, without the prefix `held_out/`."""
        found = []
        for row in self.metrics:
            keys = [key for key in row if key.startswith("held_out/") and math.isfinite(row[key])]
            if keys:
                figures = {key.removeprefix("held_out/"): row[key] for key in keys}
                found.append((int(row["step"]), figures))
        return found

    @property
    def before(self) -> dict[str, float]:
        """Held-out figures at the first evaluation."""
        return self.evaluations[0][1] if self.evaluations else {}

    @property
    def after(self) -> dict[str, float]:
        """Held-out figures at the last evaluation; none if there was but one."""
        return self.evaluations[-1][1] if len(self.evaluations) > 1 else {}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each scorer in the reward, as far as its summary tells."""
        found = self.summary.get("weights")
        return _numbers(found) if isinstance(found, dict) else {}

    @property
    def last_rollouts(self) -> dict[int, list[Sample]]:
        """The first responses of the last step's batch, by that step."""
        return {max(self.rollouts): self.rollouts[max(self.rollouts)]} if self.rollouts else {}

    @property
    def pairs(self) -> list[tuple[Sample, Sample]]:
        """Each held-out prompt's response at the first and at the last evaluation."""
        if len(self.samples) < 2:
            return []
        after: dict[str, list[Sample]] = {}
        for sample in self.samples[max(self.samples)]:
            after.setdefault(sample.prompt, []).append(sample)
        return [
            (sample, after[sample.prompt].pop(0))
            for sample in self.samples[min(self.samples)]
            if after.get(sample.prompt)
        ]


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Read the folders of some runs, each once, and give each a name of its own.

    Raises:
        ValueError: if there is none.
        FileNotFoundError: naming every folder that is not one of a run.
    """
    if isinstance(folders, (str, Path)):
        fix = f"write [{folders!r}]"
        refuse("runs", "be a list of folders", repr(folders), fix, error=TypeError)
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if not paths:
        refuse("runs", "hold at least one folder of a run")
    if problems := [problem for path in paths if (problem := _not_a_run(path))]:
        raise FileNotFoundError(" ".join(problems))
    return [_read(*run) for run in zip(paths, _names(paths), range(len(paths)), strict=True)]


def _not_a_run(path: Path) -> str | None:
    """Say why a folder is not one of a run, or nothing if it is."""
    if any((path / name).is_file() for name in WITHOUT):
        return None
    inside = {str(file.parent) for name in WITHOUT for file in path.glob(f"*/{name}")}
    what = "holds none of " + ", ".join(WITHOUT) if path.is_dir() else "is no folder"
    fix = f"Runs are inside it: give {', '.join(sorted(inside)[:3])}." if inside else FIX
    return f"{path} is not the folder of a run: it {what}. {fix}"


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parents as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    names: list[str] = []
    for own in parts:
        ends = (own[-length:] for length in range(1, len(own) + 1))
        alone = (end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1)
        names.append("/".join(next(alone)))
    return names


def _read(path: Path, name: str, number: int) -> Run:
    run = Run(path, name, number)
    run.recipe = flatten(_mapping(path / "recipe.yaml", partial(parse_yaml, typed=True), run.notes))
    run.summary = _mapping(path / "summary.json", json.loads, run.notes)
    rows: dict[int, dict[str, float]] = {}
    for line in _rows(path / "metrics.jsonl", run.notes):
        # The training and the evaluation of a step may be two rows.
        rows.setdefault(line["step"], {}).update(_numbers(line))
    run.metrics = [rows[step] for step in sorted(rows)]
    for line in _rows(path / "scores.jsonl", run.notes):
        given = line.get("scores")
        given = given if isinstance(given, list) else []
        if scores := [s for s in given if _finite(s) is not None]:
            run.scores[line["step"]] = scores
    for line in _rows(path / "samples.jsonl", run.notes):
        run.samples.setdefault(line["step"], []).append(_sample(line))
    if (rollouts := path / "rollouts.jsonl").is_file():  # older runs have none
        for line in _rows(rollouts, run.notes):
            run.rollouts.setdefault(line["step"], []).append(_sample(line))
    run.warnings = _rows(path / "warnings.jsonl", run.notes)
    if run.pairs and len(run.pairs) < (asked := len(run.samples[min(run.samples)])):
        answered = f"{len(run.pairs)} of {asked} held-out prompts have a response at step"
        last = f"{max(run.samples)}; only these are compared."
        run.notes.append(f"samples.jsonl: {answered} {last}")
    return run


def _sample(line: Mapping[str, Any]) -> Sample:
    """What a line of samples.jsonl, or of rollouts.jsonl, tells."""
    parts, noted = line.get("parts"), line.get("notes")
    return Sample(
        str(line.get("prompt", "")),
        str(line.get("response", "")),
        *(_finite(line.get("reward")), _finite(line.get("kl")), _finite(line.get("length"))),
        ended=line.get("ended"),
        parts=_numbers(parts if isinstance(parts, dict) else {}),
        notes={k: str(v) for k, v in noted.items() if v} if isinstance(noted, dict) else {},
        messages=_messages(line),
        **_episode(line.get("episode")),
    )


def _episode(found: Any) -> dict[str, Any]:
    """What a sample's `episode` tells."""
    if not isinstance(found, dict):
        return {}
    rows = found.get("messages")
    turns = [
        Turn(
            " ".join(str(row[key]) for key in ("role", "name") if row.get(key)),
            str(row.get("content", "")),
            _finite(row.get("reward")),
        )
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict)
    ]
    counts = {name: n for name in COUNTS if (n := _finite(found.get(name))) is not None}
    return {"turns": tuple(turns), "counts": counts, "stop": str(found.get("stop", ""))[:40]}


def _messages(line: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Role and words of the messages of a sample, those that have both."""
    found = line.get("messages")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    told = [("tools", text)] if rows and (text := _tools(line.get("episode"))) else []
    return (*told, *((str(row.get("role", "")), str(row.get("content", ""))) for row in rows))


def _tools(episode: Any) -> str:
    """What the model was told of its tools."""
    return str(episode.get("tools", "")) if isinstance(episode, dict) else ""


def _mapping(path: Path, read: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    """Read a small file that holds a mapping, or note that it is missing or broken."""
    why = "is missing"
    if (text := _text(path, notes)) is not None:
        why = "could not be read"
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            found = read(text)
            if isinstance(found, dict):
                return found
    notes.append(f"{path.name} {why}: {WITHOUT[path.name]}.")
    return {}


def _text(path: Path, notes: list[str]) -> str | None:
    """Return the text of a file; None if there is none, as for a pipe, which may never end."""
    if path.is_file():
        return path.read_bytes().decode("utf-8", errors="replace")
    if path.exists():
        notes.append(f"{path.name} is no file, and is left out.")
    return None


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the mappings with a step of a file of JSON lines, and note what is missing or unread.

    A step below the one before it means that the run was resumed there: what was written of that
    step and later ones before is left out.
    """
    text = _text(path, notes)
    lines = [line for line in (text or "").split("\n") if line.strip()]
    if not lines and WITHOUT[path.name]:
        problem = "is missing" if text is None else "is empty"
        notes.append(f"{path.name} {problem}: {WITHOUT[path.name]}.")
    rows: list[dict[str, Any]] = []
    unread = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
            if number == len(lines):
                why = "the run goes on, or was stopped while it wrote"
                notes.append(f"{path.name}: its last line is cut: {why}.")
                break
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step < 2**53:
            unread += 1
            continue
        if rows and step < rows[-1]["step"]:
            rows = [kept for kept in rows if kept["step"] < step]
        rows.append(row)
    if unread:
        what = f"{unread} of {len(lines)} lines were left out"
        notes.append(f"{path.name}: {what}, since they are not JSON with a step.")
    return rows


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row: NaN for null, which stands for what was not finite."""
    return {
        key: math.nan if (number := _finite(value)) is None else number
        for key, value in row.items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }


def _finite(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return value if number else None
