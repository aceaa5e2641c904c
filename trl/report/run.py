"""The folder of a run, read for its report: whatever is there, and notes on what is not.

    recipe.yaml      settings                 summary.json     before and after, written at the end
    metrics.jsonl    a row for each step      samples.jsonl    held-out responses at each evaluation
    scores.jsonl     scores of each batch     warnings.jsonl   what looked wrong

A run that goes on, or was killed, lacks some of them, and a last line may be cut. A run that was
resumed has steps twice: the later rows count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = (
    "recipe.yaml",
    "metrics.jsonl",
    "scores.jsonl",
    "samples.jsonl",
    "warnings.jsonl",
    "summary.json",
)

WHY_CUT = "its last line is cut: the run goes on, or was stopped while it wrote"

PHASES = ("rollout", "evaluation", "optimisation")


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


@dataclass(slots=True)
class RunWarning:
    """What looked wrong in a run; the same warning at several steps is one of these."""

    name: str
    seen: str
    """At its first step."""
    causes: list[str]
    fix: str
    steps: list[int]


@dataclass(slots=True)
class Run:
    """A run, as far as its folder tells."""

    path: Path
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    """Settings under dotted names."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """A row for each step, in order; what was not a finite number is NaN."""
    scores: dict[int, list[float]] = field(default_factory=dict)
    """The finite scores of each step."""
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    """Responses to the held-out prompts, by step."""
    warnings: list[RunWarning] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was missing or could not be read."""

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary.get("finished", self.summary))

    @property
    def algorithm(self) -> str | None:
        """Its algorithm, if the recipe is there; PPO unless it names another."""
        if not self.recipe:
            return None
        return str(self._setting("ppo.algorithm", "algorithm") or "ppo")

    @property
    def model(self) -> str | None:
        """The model that was tuned."""
        name = self._setting("model.name", "model")
        return None if name is None else str(name)

    @property
    def last_step(self) -> int:
        """The last step there is a row of."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def total_steps(self) -> int | None:
        """How many steps it was to take, if that is known."""
        told = self.summary.get("total_steps")
        if isinstance(told, int):
            return told
        steps, episodes = self._setting("steps"), self._setting("episodes")
        batch_size = self._setting("ppo.batch_size")
        if not isinstance(steps, int) and isinstance(episodes, int) and isinstance(batch_size, int):
            steps = max(1, episodes // max(1, batch_size))
        return steps if isinstance(steps, int) else None

    @property
    def seconds(self) -> float | None:
        """How long it took; for a run without a summary, the steps alone."""
        whole = as_number(self.summary.get("seconds"))
        if whole is not None and math.isfinite(whole):
            return whole
        spent = [row.get(f"time/{phase}", math.nan) for row in self.metrics for phase in PHASES]
        spent = [value for value in spent if math.isfinite(value)]
        return sum(spent) if spent else None

    @property
    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """Step and finite held-out figures of each evaluation, without the prefix `held_out/`."""
        found = []
        for row in self.metrics:
            figures = _held_out(row)
            if figures:
                found.append((int(row["step"]), figures))
        return found

    @property
    def before(self) -> dict[str, float]:
        """Held-out figures before training, or at the first evaluation."""
        measured = self.evaluations
        return (dict(measured[0][1]) if measured else {}) | self._summed_up("before")

    @property
    def after(self) -> dict[str, float]:
        """Held-out figures at the last evaluation; none if there was but one."""
        measured = self.evaluations
        return (dict(measured[-1][1]) if len(measured) > 1 else {}) | self._summed_up("after")

    @property
    def pairs(self) -> list[tuple[Sample, Sample]]:
        """Each held-out prompt's response at the first and at the last evaluation."""
        if len(self.samples) < 2:
            return []
        steps = sorted(self.samples)
        after: dict[str, list[Sample]] = {}
        for sample in self.samples[steps[-1]]:
            after.setdefault(sample.prompt, []).append(sample)
        return [
            (sample, after[sample.prompt].pop(0))
            for sample in self.samples[steps[0]]
            if after.get(sample.prompt)
        ]

    def _setting(self, *names: str) -> Any:
        return next(
            (self.recipe[name] for name in names if self.recipe.get(name) is not None), None
        )

    def _summed_up(self, side: str) -> dict[str, float]:
        figures = self.summary.get(side)
        if not isinstance(figures, dict):
            return {}
        return _held_out(
            {f"held_out/{key.removeprefix('held_out/')}": v for key, v in figures.items()}
        )


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Read the folders of some runs, each once, and give each a name of its own.

    Raises:
        ValueError: if there is none.
        FileNotFoundError: naming every folder that is not one of a run.
    """
    if isinstance(folders, (str, Path)):
        raise TypeError(f"`runs` must be a list of folders, got {folders!r}: write [{folders!r}].")
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if not paths:
        raise ValueError("`runs` must hold at least one folder of a run.")
    problems = [problem for path in paths if (problem := _not_a_run(path))]
    if problems:
        raise FileNotFoundError(" ".join(problems))
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def as_number(value: Any) -> float | None:
    """Return a JSON value as a float: NaN for null or what is too large, None for no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, under dotted names: `ppo.gamma`, `reward.0.kind`."""
    if isinstance(settings, Mapping) and settings:
        entries: Any = settings.items()
    elif isinstance(settings, list) and any(isinstance(entry, Mapping) for entry in settings):
        entries = enumerate(settings)
    else:
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for key, value in entries:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _not_a_run(path: Path) -> str | None:
    """Say why a folder is not one of a run, or nothing if it is."""
    if not path.exists():
        return f"{path} is not there: give the folder of a run, the `out` of its recipe."
    if not path.is_dir():
        return f"{path} is a file: give the folder of the run, {path.parent}."
    if any((path / name).is_file() for name in FILES):
        return None
    inside = [
        str(child)
        for child in sorted(path.iterdir())
        if child.is_dir() and any((child / name).is_file() for name in FILES)
    ]
    fix = (
        f"Runs are inside it: give {', '.join(inside[:3])}{', …' if len(inside) > 3 else ''}."
        if inside
        else "Give the folder that a run wrote, the `out` of its recipe."
    )
    return f"{path} is not the folder of a run: it holds none of {', '.join(FILES)}. {fix}"


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parents as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    names: list[str] = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


def _read(path: Path, name: str) -> Run:
    run = Run(path, name)
    run.recipe = _read_recipe(path / "recipe.yaml", run.notes)
    run.metrics = _read_metrics(path / "metrics.jsonl", run.notes)
    run.scores = _read_scores(path / "scores.jsonl", run.notes)
    run.samples = _read_samples(path / "samples.jsonl", run.notes)
    run.warnings = _read_warnings(path / "warnings.jsonl", run.notes)
    run.summary = _read_summary(path / "summary.json", run.notes)
    run.notes += _not_finite(run.metrics)
    steps = sorted(run.samples)
    if len(steps) > 1 and len(run.pairs) < len(run.samples[steps[0]]):
        run.notes.append(
            f"samples.jsonl: {len(run.pairs)} of {len(run.samples[steps[0]])} held-out prompts "
            f"have a response at step {steps[-1]}; only these are compared."
        )
    return run


def _read_recipe(path: Path, notes: list[str]) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append("recipe.yaml is missing: the settings are not known.")
        return {}
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append("recipe.yaml could not be read: the settings are not known.")
        return {}
    if not isinstance(settings, dict):
        notes.append("recipe.yaml holds no settings.")
        return {}
    return flatten(settings)


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for line in _rows(path, notes, "no charts of the training"):
        figures = {key: as_number(value) for key, value in line.items()}
        row = rows.setdefault(line["step"], {})
        row |= {key: value for key, value in figures.items() if value is not None}
    return [rows[step] for step in sorted(rows)]


def _read_scores(path: Path, notes: list[str]) -> dict[int, list[float]]:
    scores: dict[int, list[float]] = {}
    for line in _rows(path, notes, "no histogram of the scores"):
        listed = line.get("scores")
        if isinstance(listed, list):
            numbers = [as_number(value) for value in listed]
            scores[line["step"]] = [x for x in numbers if x is not None and math.isfinite(x)]
    return {step: listed for step, listed in sorted(scores.items()) if listed}


def _read_samples(path: Path, notes: list[str]) -> dict[int, list[Sample]]:
    samples: dict[int, list[Sample]] = {}
    unread = 0
    for line in _rows(path, notes, "no samples"):
        step, prompt, response = line["step"], line.get("prompt"), line.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str):
            unread += 1
            continue
        parts = line.get("parts")
        parts = parts if isinstance(parts, dict) else {}
        numbers = {name: as_number(value) for name, value in parts.items()}
        samples.setdefault(step, []).append(
            Sample(
                prompt=prompt,
                response=response,
                reward=_finite(line.get("reward")),
                kl=_finite(line.get("kl")),
                length=_finite(line.get("length")),
                ended=line["ended"] if isinstance(line.get("ended"), bool) else None,
                parts={n: x for n, x in numbers.items() if x is not None and math.isfinite(x)},
            )
        )
    if unread:
        notes.append(
            f"samples.jsonl: {unread} lines without a prompt and a response were left out."
        )
    return dict(sorted(samples.items()))


def _read_warnings(path: Path, notes: list[str]) -> list[RunWarning]:
    found: dict[str, RunWarning] = {}
    for line in _rows(path, notes, None):
        name = str(line.get("name") or "warning")
        causes = line.get("causes")
        causes = [str(cause) for cause in causes] if isinstance(causes, list) else []
        warning = found.setdefault(
            name,
            RunWarning(name, str(line.get("seen") or ""), causes, str(line.get("fix") or ""), []),
        )
        warning.steps.append(line["step"])
    return list(found.values())


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append("summary.json is missing: the run goes on, or was stopped before its end.")
        return {}
    except (ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        notes.append("summary.json could not be read: the run was stopped while it wrote.")
        return {}
    return summary


def _rows(path: Path, notes: list[str], without: str | None) -> list[dict[str, Any]]:
    """Read the mappings with a step of a file of JSON lines, and note what is missing or unread.

    A step below the one before it means that the run was resumed there: what was written of that
    step and later ones before is left out.

    Args:
        path: The file.
        notes: Where to say what was missing or could not be read.
        without: What the report lacks without the file; None: it may well be missing.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        if without:
            notes.append(f"{path.name} is missing: {without}.")
        return []
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines and without:
        notes.append(f"{path.name} is empty: {without}.")
    rows: list[dict[str, Any]] = []
    unread = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                notes.append(f"{path.name}: {WHY_CUT}.")
            else:
                unread += 1
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
            unread += 1
            continue
        if rows and step < rows[-1]["step"]:
            rows = [kept for kept in rows if kept["step"] < step]
        rows.append(row)
    if unread:
        notes.append(
            f"{path.name}: {unread} of {len(lines)} lines were left out, since they are not JSON "
            "with a step."
        )
    return rows


def _not_finite(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Name the figures that were a number in some rows and none in others."""
    notes = []
    for key in dict.fromkeys(key for row in rows for key in row):
        there = [row for row in rows if key in row]
        broken = [row for row in there if not math.isfinite(row[key])]
        if 0 < len(broken) < len(there):
            notes.append(
                f"metrics.jsonl: {key} is not a finite number in {len(broken)} of {len(there)} "
                f"rows (first at step {broken[0]['step']:.0f})."
            )
    return notes


def _held_out(row: Mapping[str, Any]) -> dict[str, float]:
    figures = {
        key.removeprefix("held_out/"): _finite(value)
        for key, value in row.items()
        if key.startswith("held_out/")
    }
    return {key: value for key, value in figures.items() if value is not None}


def _finite(value: Any) -> float | None:
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None
