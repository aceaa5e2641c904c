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
import importlib.util
import json
import math
import netrc
import os
import re
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trl.config import closest

__all__ = ["Trackers", "check_trackers"]

IDS = "trackers.json"
"""File in the folder of the run with what the trackers call it, to go on with the same run."""

GROUPS = {
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_per_second/rollout": "speed/tokens_per_second_rollout",
    "tokens_per_second/optimisation": "speed/tokens_per_second_optimisation",
    "machine_share": "speed/machine_share",
    "episodes": "progress/episodes",
    "learning_rate": "progress/learning_rate",
}
"""Names for figures that have no group of their own before a slash."""

REACH_SECONDS = 3.0
"""How long to wait for a server, to see whether there is a network."""


# --- checks -------------------------------------------------------------------------------------


def check_trackers(names: Sequence[str]) -> None:
    """Raise one error that names every tracker which is unknown or not installed.

    Raises:
        ValueError: for unknown names, with the closest known one.
        ImportError: for packages that are missing, with the line that installs them.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"`names` must be a list of trackers, got {names!r}.")
    unknown = [name for name in names if name not in STARTERS]
    missing = [
        problem
        for name in dict.fromkeys(names)
        if name in STARTERS and (problem := _import_problem(name))
    ]
    problems = [
        f"{name!r} is no tracker (there are {', '.join(STARTERS)})."
        f"{closest(name, STARTERS) if isinstance(name, str) else ''}"
        for name in unknown
    ]
    if unknown:
        raise ValueError(" ".join(problems + missing))
    if missing:
        raise ImportError(" ".join(missing))


def _import_problem(name: str) -> str | None:
    """Return what is wrong with the package of a tracker, and how to mend it."""
    line = f"pip install {name}"
    try:
        there = importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was made by hand
        there = True
    if not there:
        return f"The tracker {name!r} is not installed: {line}."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that they need
            module = importlib.import_module(name)
            if name == "tensorboard":
                importlib.import_module("torch.utils.tensorboard")
    except Exception as error:  # an import may fail in any way
        return (
            f"The tracker {name!r} is installed but does not start "
            f"({type(error).__name__}: {error}): pip install --upgrade {name}."
        )
    if name == "trackio" and not hasattr(module, "Table"):
        return (
            f"trackio {getattr(module, '__version__', '')} is too old to take step numbers: "
            "pip install --upgrade trackio."
        )
    return None


# --- the trackers of a run ----------------------------------------------------------------------


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
        RuntimeError: if a tracker of a new run does not start. On resume there is a warning.
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
        self._running: dict[str, _Tracker] = {}
        if not names or not _is_main_process():
            return
        run = _Run(Path(out), project, run_name or Path(out).resolve().name, config, resume_step)
        for name in dict.fromkeys(names):
            try:
                self._running[name] = STARTERS[name](run)
            except Exception as error:  # whatever their code raises
                message = f"the tracker {name!r} does not start: {type(error).__name__}: {error}"
                if resume_step is None:
                    self.close()
                    raise RuntimeError(f"{message}. Leave it out of `tracking.to`.") from error
                warnings.warn(f"{message}. The run goes on without it.", stacklevel=2)
        self.notes += run.notes
        run.write_ids()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send the figures of a step; what is not a finite number is left out."""
        figures = {
            tracked_name(name): float(value)
            for name, value in row.items()
            if name != "step" and _is_number(value)
        }
        if figures:
            self._each(lambda tracker: tracker.log(figures, step))

    def log_samples(self, samples: Iterable[Mapping[str, Any]], step: int) -> None:
        """Send some samples, as a table where the tracker has such a thing, else as text.

        Args:
            samples: Of the same keys each, such as prompt, response and score; what is nested in
                them gets columns of its own.
            step: When they were written.
        """
        samples = [_flat(sample) for sample in samples]
        if samples:
            self._each(lambda tracker: tracker.log_samples(samples, step))

    def close(self) -> None:
        """Finish; it may be called again."""
        self._each(lambda tracker: tracker.close())
        self._running = {}

    def _each(self, call: Callable[[_Tracker], None]) -> None:
        """Call it for each tracker, and give up those that fail."""
        for name, tracker in list(self._running.items()):
            try:
                call(tracker)
            except Exception as error:  # a full disk, a server that is away
                del self._running[name]
                warnings.warn(
                    f"the tracker {name!r} has failed and is given up, the run goes on without it: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=3,
                )


def tracked_name(name: str) -> str:
    """Return the name that a figure has in a tracker: a group, a slash, and what is measured."""
    return re.sub(r"[^\w\-./ ]", "_", GROUPS.get(name, name))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_main_process() -> bool:
    from accelerate.state import PartialState

    return PartialState().is_main_process


class _Run:
    """What every tracker is told of the run."""

    def __init__(
        self,
        out: Path,
        project: str,
        name: str,
        config: Mapping[str, Any] | None,
        resume_step: int | None,
    ) -> None:
        self.out, self.project, self.name = out, project, name
        self.config = dict(config or {})
        self.resume_step = resume_step
        self.notes: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        self.ids: dict[str, str] = {}
        if resume_step is not None and (out / IDS).exists():
            self.ids = json.loads((out / IDS).read_text(encoding="utf-8"))

    def write_ids(self) -> None:
        (self.out / IDS).write_text(json.dumps(self.ids, indent=2) + "\n", encoding="utf-8")


class _Tracker:
    """A tracker of accelerate, and how it shows samples."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker
        tracker.start()

    def log(self, figures: dict[str, float], step: int) -> None:
        self.tracker.log(figures, step=step)

    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        self.tracker.log({"samples": markdown_table(samples)}, step=step)

    def close(self) -> None:
        self.tracker.finish()


class _Wandb(_Tracker):
    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        columns = list(samples[0])
        rows = [[sample.get(column) for column in columns] for sample in samples]
        self.tracker.log_table("samples", columns=columns, data=rows, step=step)


class _Trackio(_Tracker):
    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        import pandas
        import trackio

        table = trackio.Table(dataframe=pandas.DataFrame(samples))
        self.tracker.log({"samples": table}, step=step)


class _MLflow(_Tracker):
    def log_samples(self, samples: list[dict[str, Any]], step: int) -> None:
        import mlflow

        mlflow.log_text(markdown_table(samples), f"samples/step-{step}.md")


def _start_tensorboard(run: _Run) -> _Tracker:
    from accelerate.tracking import TensorBoardTracker

    folder = run.out / "tensorboard"
    # Events from here on that an earlier writer has left are not shown.
    purge = {} if run.resume_step is None else {"purge_step": run.resume_step + 1}
    tracker = _Tracker(TensorBoardTracker(_file_name(run.name), folder, **purge))
    if run.config and run.resume_step is None:
        # As text: its table of hyperparameters would make a run of its own beside this one.
        settings = json.dumps(run.config, indent=2, default=str)
        tracker.tracker.log({"config": f"```json\n{settings}\n```"}, step=0)
    run.notes.append(f"TensorBoard: tensorboard --logdir {folder}")
    return tracker


def _start_wandb(run: _Run) -> _Tracker:
    from accelerate.tracking import WandBTracker

    offline, why = _wandb_offline()
    again = "wandb" in run.ids
    run.ids.setdefault("wandb", uuid.uuid4().hex[:8])
    settings: dict[str, Any] = {
        "name": run.name,
        "dir": str(run.out),
        "id": run.ids["wandb"],
        "config": run.config,
        "settings": {"console": "off"},  # the live display would fill its log
    }
    if offline:
        settings["mode"] = "offline"  # which takes no `resume`; the upload joins runs by their id
        run.notes.append(
            f"W&B: offline, since {why}. The run is kept in {run.out / 'wandb'}; to upload it: "
            f"wandb sync {'--append ' if again else ''}{run.out / 'wandb' / 'offline-run-*'}"
        )
    else:
        settings["resume"] = "allow"
    return _Wandb(WandBTracker(run.project, **settings))


def _wandb_offline() -> tuple[bool, str]:
    """Return whether to run offline, and why."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode == "offline", "WANDB_MODE says so"
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or "api.wandb.ai"
    if not (os.environ.get("WANDB_API_KEY") or _has_login(host)):
        return True, "there is no API key (wandb login, or WANDB_API_KEY)"
    try:
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((host, port), REACH_SECONDS).close()
    except OSError:
        return True, f"{host} cannot be reached"
    return False, ""


def _has_login(host: str) -> bool:
    """Return whether `wandb login` has left a key for the server."""
    places = [Path(os.environ.get("NETRC", "~/.netrc")), Path("~/_netrc")]
    for place in places:
        try:
            if netrc.netrc(str(place.expanduser())).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _start_trackio(run: _Run) -> _Tracker:
    from accelerate.tracking import TrackioTracker

    again = "trackio" in run.ids
    # A name that was used before would be taken for the same run.
    run.ids.setdefault("trackio", f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    resume = {"resume": "allow"} if again else {}
    tracker = TrackioTracker(run.project, name=run.ids["trackio"], config=run.config, **resume)
    run.notes.append(f"trackio: trackio show --project {run.project!r}")
    return _Trackio(tracker)


def _start_mlflow(run: _Run) -> _Tracker:
    from accelerate.tracking import MLflowTracker

    tracker = _MLflow(MLflowTracker(run.project, run_name=run.name, run_id=run.ids.get("mlflow")))
    if "mlflow" not in run.ids:
        run.ids["mlflow"] = tracker.tracker.tracker.info.run_id
        if run.config:
            tracker.tracker.store_init_configuration(_flat(run.config))
    return tracker


STARTERS: dict[str, Callable[[_Run], _Tracker]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "trackio": _start_trackio,
    "mlflow": _start_mlflow,
}
"""The trackers by name, and what starts them."""


# --- texts --------------------------------------------------------------------------------------


def markdown_table(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return samples as a Markdown table in which their texts are shown as they are."""
    columns = list(samples[0])
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for sample in samples:
        cells = [_cell(sample.get(column)) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:+.3f}"
    text = " ".join(str(value).split())
    return re.sub(r"([\\|`*_\[\]#~])", r"\\\1", text).replace("<", "&lt;")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _file_name(name: str) -> str:
    return re.sub(r"[^\w\-.]", "_", name)
