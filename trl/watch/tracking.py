"""Send the figures of a run to TensorBoard, Weights & Biases, trackio or MLflow.

    check_trackers(["tensorboard", "wandb"])        # before anything slow
    trackers = Trackers(["tensorboard", "wandb"], out="runs/a", project="trl")
    trackers.log(row, step)
    trackers.log_samples([{"prompt": "I saw", "response": " it", "score": 0.3}], step)
    trackers.close()

They come with the extra `tracking` (MLflow with `pip install mlflow`) and run through the
tracker classes of accelerate. What the run itself writes as JSON lines does not depend on them: a
tracker that fails in the middle of a run is given up with a warning, and the run goes on.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import tracking
from accelerate.state import PartialState

from trl.config.errors import hidden, refuse
from trl.config.recipe import TRACKERS
from trl.config.writing import flatten
from trl.watch.markdown import escaped, markdown_table, visible

IDS = "trackers.json"
"""File in the folder of the run with what the trackers call it, to go on with the same run."""

SPEED, PROGRESS = ("tokens_per_second", "machine_share"), ("episodes", "learning_rate")
"""Figures that have no group of their own before a slash, by the group that they get."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise one error that names every tracker which cannot be used.

    Raises:
        ValueError: for unknown names.
        ImportError: for packages that cannot be imported, with the line that installs them.
    """
    if unknown := [name for name in names if name not in TRACKERS]:
        refuse("names", f"be trackers of {', '.join(TRACKERS)}", repr(unknown))
    problems = []
    for name in dict.fromkeys(names):
        try:
            with warnings.catch_warnings(action="ignore"):  # of packages that they need
                importlib.import_module(name.replace("tensorboard", "torch.utils.tensorboard"))
        except Exception as error:  # an import may fail in any way
            problem = f"{name!r} cannot be imported ({type(error).__name__}: {error})"
            problems.append(f"The tracker {problem}: pip install --upgrade {name}.")
    if problems:
        raise ImportError(" ".join(problems))


class Trackers:
    """Any number of trackers, as one; none at all is fine. Only the main process has some.

    Make it when the accelerator is there, which knows the main process; `check_trackers` can be
    called long before.

    Args:
        names: Any of tensorboard, wandb, trackio, mlflow.
        out: Folder of the run: TensorBoard's and W&B's files go there, and the ids of the run.
        project: Project (MLflow: experiment) there.
        run_name: Name of the run there. None: that of the folder.
        config: Settings, to show beside the figures.
        resume_step: Last step of the checkpoint that the run goes on from: its trackers go on with
            the same run, and TensorBoard leaves out what was logged after it. W&B and MLflow
            already have those steps. None: a new run.

    Attributes:
        notes: What to tell the user: where the files are, and what was decided for them.

    Raises:
        ValueError, ImportError: see `check_trackers`.

    Warns:
        UserWarning: if a tracker does not start, or fails later: the run goes on without it.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        out: str | os.PathLike[str],
        project: str = "trl",
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        check_trackers(names)
        self.notes: list[str] = []
        self._running: dict[str, Any] = {}
        self._left_out: set[str] = set()
        if not names or not PartialState().is_main_process:
            return
        self.out, self.project, self.config = Path(out), project, dict(config or {})
        self.name, self.resume_step = run_name or self.out.resolve().name, resume_step
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / IDS
        resumes = resume_step is not None and file.exists()
        self.ids = json.loads(file.read_text(encoding="utf-8")) if resumes else {}
        for name in dict.fromkeys(names):
            with self._given_up_if_it_fails(name):
                self._running[name] = tracker = getattr(self, f"_{name}")()
                tracker.start()
                self._tell(tracker)
        file.write_text(json.dumps(self.ids, indent=2) + "\n", encoding="utf-8")

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send the figures of a step.

        Args:
            row: Numbers; and arrays, which become histograms in TensorBoard and W&B. Other values
                are left out.
            step: Which step.

        Warns:
            UserWarning: once for each figure that has NaN or infinity, which are left out.
        """
        if not self._running:
            return
        known = {
            name: np.asarray(value, np.float64)
            for name, value in row.items()
            if isinstance(value, (int, float, np.ndarray)) and not isinstance(value, bool)
            if name != "step"
        }
        finite = {name: values[np.isfinite(values)] for name, values in known.items()}
        if left_out := {n for n in known if finite[n].size < known[n].size} - self._left_out:
            self._left_out |= left_out
            what = "the trackers get no NaN and no infinity, which are left out of "
            warnings.warn(what + ", ".join(f"`{name}`" for name in sorted(left_out)), stacklevel=2)
        there = {name: values for name, values in finite.items() if values.size}
        numbers = {
            tracked_name(n): values.item() for n, values in there.items() if not known[n].ndim
        }
        arrays = {tracked_name(n): values for n, values in there.items() if known[n].ndim}
        if there:
            self._each(lambda tracker: _send_figures(tracker, numbers, arrays, step))

    def log_samples(self, samples: Iterable[Mapping[str, Any]], step: int) -> None:
        """Send some samples, as a table where the tracker has such a thing, else as text.

        Args:
            samples: Of the same keys each, such as prompt, response and score; what is nested in
                them gets columns of its own.
            step: When they were written.
        """
        # Without a scorer of parts there is no column for them; the prompt says what messages do.
        kept = [{k: v for k, v in row.items() if v != {} and k != "messages"} for row in samples]
        if rows := [flatten(row) for row in kept]:
            self._each(lambda tracker: _send_samples(tracker, rows, step))

    def close(self) -> None:
        """Finish; it may be called again."""
        self._each(lambda tracker: tracker.finish())
        self._running = {}

    def _each(self, call: Callable[[Any], None]) -> None:
        """Call it for each tracker, and give up those that fail."""
        for name, tracker in list(self._running.items()):
            with self._given_up_if_it_fails(name):
                call(tracker)

    @contextmanager
    def _given_up_if_it_fails(self, name: str) -> Iterator[None]:
        """Go on without a tracker in which something fails: a full disk, a server that is away."""
        try:
            yield
        except Exception as error:  # whatever their code raises
            self._running.pop(name, None)
            what = f"the tracker {name!r} has failed and is given up, the run goes on without it"
            told = visible(hidden(f"{what}: {type(error).__name__}: {error}"))
            warnings.warn(told, stacklevel=4)

    # -- what each of them is ----------------------------------------------------------------------

    def _tensorboard(self) -> tracking.GeneralTracker:
        folder = self.out / "tensorboard"
        self.notes.append(f"TensorBoard: tensorboard --logdir {folder}")
        # Events from here on that an earlier writer has left are not shown.
        purge = {} if self.resume_step is None else {"purge_step": self.resume_step + 1}
        name = re.sub(r"[^\w\-.]", "_", self.name)
        return tracking.TensorBoardTracker(name, folder, **purge)

    def _wandb(self) -> tracking.GeneralTracker:
        from requests.utils import get_netrc_auth  # W&B brings it along

        how: dict[str, Any] = {"resume": "allow"}
        url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        key = os.environ.get("WANDB_API_KEY") or get_netrc_auth(url)
        if os.environ.get("WANDB_MODE", "online" if key else "offline") == "offline":
            how = {"mode": "offline"}  # which takes no `resume`; the upload joins runs by their id
            why = "there is no API key (wandb login)" if not key else "WANDB_MODE says so"
            sync = f"wandb sync {'--append ' if 'wandb' in self.ids else ''}{self.out / 'wandb'}"
            self.notes.append(f"W&B: offline, since {why}; to upload it: {sync}/offline-run-*")
        how |= {"name": self.name, "dir": str(self.out), "config": self.config}
        how["id"] = self.ids.setdefault("wandb", uuid.uuid4().hex[:8])
        how["settings"] = {"console": "off"}  # the live display would fill its log
        return tracking.WandBTracker(self.project, **how)

    def _trackio(self) -> tracking.GeneralTracker:
        self.notes.append(f"trackio: trackio show --project {self.project!r}")
        # A name that was used before would be taken for the same run.
        name = self.ids.setdefault("trackio", f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        return tracking.TrackioTracker(self.project, name=name, config=self.config, resume="allow")

    def _mlflow(self) -> tracking.GeneralTracker:
        known = self.ids.get("mlflow")
        return tracking.MLflowTracker(self.project, run_name=self.name, run_id=known)

    def _tell(self, tracker: Any) -> None:
        """Send the settings to a tracker that did not get them when it was made."""
        if tracker.name == "mlflow":
            self.ids["mlflow"] = tracker.tracker.info.run_id
            if self.resume_step is None:
                tracker.store_init_configuration(flatten(self.config))
        elif tracker.name == "tensorboard" and self.resume_step is None:
            # As text: its table of hyperparameters would make a run of its own beside this one.
            settings = json.dumps(self.config, indent=2, default=str)
            tracker.log({"config": f"```json\n{settings}\n```"}, step=0)


def _send_figures(tracker: Any, numbers: dict[str, Any], arrays: dict[str, Any], step: int) -> None:
    """Send numbers, and histograms of arrays where the tracker has such a thing."""
    if tracker.name == "wandb":
        import wandb

        numbers = numbers | {name: wandb.Histogram(values) for name, values in arrays.items()}
    if numbers:
        tracker.log(numbers, step=step)
    for name, values in arrays.items() if tracker.name == "tensorboard" else ():
        tracker.writer.add_histogram(name, values, step)


def _send_samples(tracker: Any, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Send rows of the same names as a table where the tracker has such a thing, else as text."""
    names = list(rows[0])
    if tracker.name == "wandb":
        tracker.log_table("samples", names, [list(row.values()) for row in rows], step=step)
    elif tracker.name == "trackio":
        import pandas
        import trackio

        tracker.log({"samples": trackio.Table(dataframe=pandas.DataFrame(rows))}, step=step)
    else:
        text = markdown_table(names, [[_cell(value) for value in row.values()] for row in rows])
        if tracker.name == "tensorboard":
            tracker.log({"samples": text}, step=step)
        else:
            import mlflow

            mlflow.log_text(text, f"samples/step-{step}.md")


def _cell(value: Any) -> str:
    return f"{value:+.3f}" if isinstance(value, float) else escaped(visible(str(value)))


def tracked_name(name: str) -> str:
    """Return the name that a figure has in a tracker: a group, a slash, and what is measured."""
    first = name.partition("/")[0]
    group = "speed/" if first in SPEED else "progress/" if first in PROGRESS else ""
    return re.sub(r"[^\w\-./ ]", "_", group + (name.replace("/", "_") if group else name))
