"""How a run goes on: which checkpoint, whether it is one of the same run, what is random."""

from __future__ import annotations

import errno
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed

import trl
from trl import config as settings
from trl.compute.peers import meet
from trl.compute.processes import check_same_everywhere
from trl.config import SettingsError
from trl.config.errors import refuse
from trl.config.places import refuse_run
from trl.config.recipe import ClassifierRecipe, Recipe
from trl.environments.contract import EpisodeError
from trl.evaluation.scores import ScoringError
from trl.training.checkpoints import CheckpointError, Checkpoints, damage, step_of
from trl.training.folder import RunFolder
from trl.training.parts import Parts

STATE = "state.pt"
KEYS = (
    *("format", "step", "processes", "weights", "trainer", "loop", "of_each_process", "diagnosis"),
    *("recipe", "fingerprints", "figures", "best", "stopped", "files", "versions", "seconds"),
)
"""What every checkpoint holds."""

VERSIONS = {
    "trl": trl.__version__,
    "torch": str(torch.__version__),
    "transformers": transformers.__version__,
    "threads": str(torch.get_num_threads()),
    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
}
"""Of what writes it; others change rounding."""

NEVER = ("ppo.learning_rate",)
"""Settings that may not go from "auto" to a number or back: the optimiser has other parts then."""
ALL_THE_SAME = "go on all the same with --resume-changed (in Python resume='changed')"

MAY_CHANGE = (
    "ppo.collective_timeout",
    *("out", "quiet", "profile", "tracking", "checkpoints", "steps", "episodes", "stop"),
    *("ppo.forward_batch_size", "ppo.token_budget", "ppo.keep_freed_memory", "sampling.max_rows"),
    *("model.shard", "model.offload"),
)
"""Settings that may differ when a run is gone on with: they do not change what a step computes but
by rounding, unless the learning rate falls over the steps of the whole run."""


@contextmanager
def opened(
    folder: RunFolder | None, resume: str | Path | None, accelerator: Accelerator
) -> Iterator[tuple[Path | None, list[str]]]:
    """Keep a folder for one run; yield the checkpoint to go on from, and notes on its choice.

    Args:
        folder: That of the run. None: it has none.
        resume: None: start anew, in a folder without a run. "auto": go on from the last whole
            checkpoint, or start if there is none. A checkpoint's folder: go on from that one.
            "changed", or "changed:" and a checkpoint's folder: likewise, though the run is not
            quite the same.
        accelerator: Of several processes the first decides, and the others wait until it has.

    Raises:
        OSError, ValueError: for a folder in use, or a checkpoint that is not there.
        CheckpointError: if there are checkpoints, but none is whole.
    """
    if folder is None:
        yield None, []
        return
    kind, _, named = str(resume).partition(":")
    if kind == "changed":
        folder.changes, resume = True, named or "auto"
    with folder.in_use() if accelerator.is_main_process else nullcontext():
        found = _find_checkpoint(folder, resume)
        meet()
        rule = "be a folder that every process sees: of several hosts, on a shared disk"
        check_same_everywhere(accelerator, "out", rule, getattr(found[0], "name", "no checkpoint"))
        try:
            yield found
        except OSError as error:  # on a full disk say what is good, and how to go on
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            good = ", ".join(path.name for path in Checkpoints(folder.checkpoints).all())
            raise OSError(
                error.errno,
                f"{error.strerror}. Checkpoints that are good: {good or 'none yet'}. Make room, "
                "then go on with --resume (in Python resume='auto')",
                error.filename,
            ) from error


def _find_checkpoint(folder: RunFolder, resume: str | Path | None) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to go on from, and what the user should know of the choice."""
    checkpoints = Checkpoints(folder.checkpoints)
    if resume == "auto":
        chosen, problems = checkpoints.newest(problem_of)
        if chosen is not None:
            return chosen, [f"Left out, since it is not whole: {problem}." for problem in problems]
    elif resume is not None:
        chosen = Path(resume).expanduser()
        inside = chosen.resolve().parent == folder.checkpoints.resolve()
        if step_of(chosen) is None or not inside or not chosen.is_dir():
            there = [path.name for path in checkpoints.all()]
            rule = f"be auto or a checkpoint of this run, in {folder.checkpoints}"
            refuse("resume", rule, repr(str(resume)), f"there are {there}")
        if problem := problem_of(chosen):
            raise CheckpointError(f"{chosen} is not whole: {problem}. Take another one, or auto.")
        return chosen, []
    if others := ", ".join(folder.others()):
        rule = f"of its own, but there are {others} in it, which the run would replace"
        told = f"`out` must be a folder {rule}: name another one: {str(folder.path)!r}"
        raise FileExistsError(told)
    if resume is None and folder.has_run():
        refuse_run(folder.path)
    if resume is None:
        return None, []
    told = f"There is no checkpoint in {folder.path}: the run starts anew."
    return None, [told] if folder.has_run() else []


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds."""
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
    return dict(state)


def own_of(state: Mapping[str, Any], accelerator: Accelerator) -> tuple[dict[str, Any], list[str]]:
    """Return what a checkpoint holds of this process alone, and a sentence if it is of none.

    With another number of processes than wrote it, that is what the first one's scorers knew; texts
    of pretraining and random numbers begin anew then: both are None.
    """
    states, processes = state["of_each_process"], accelerator.num_processes
    if len(states) == processes:
        return states[accelerator.process_index], []
    told = (
        f"The checkpoint is of a run on {len(states)} processes, and these are {processes}: "
        "responses are drawn by other random numbers."
    )
    return states[0] | {"pretraining": None, "random": None}, [told]


def problem_of(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be gone on from; None: it can."""
    if problem := damage(checkpoint):
        return problem
    try:
        state = read_state(checkpoint)
    except (OSError, RuntimeError, TypeError, ValueError, EOFError, pickle.PickleError) as error:
        return f"{STATE} cannot be read ({' '.join(str(error).split())[:200]})"
    missing = [key for key in KEYS if key not in state]
    return f"{STATE} has no {', '.join(missing)}" if missing else None


def check_same(
    folder: RunFolder, recipe: Recipe | ClassifierRecipe, may_change: Sequence[str] = MAY_CHANGE
) -> None:
    """Raise unless the recipe is that of the run so far, but for what may change.

    Raises:
        SettingsError: naming every setting that is another one.
    """
    if folder.recipe.exists() and not folder.changes:
        other_settings(settings.read_yaml(folder.recipe), recipe, folder.recipe, may_change)


def other_settings(
    before: Mapping[str, Any],
    recipe: Recipe | ClassifierRecipe,
    place: Path,
    may_change: Sequence[str] = MAY_CHANGE,
    *,
    changes: bool = False,
) -> dict[str, tuple[Any, Any]]:
    """Return what settings were and are, of those that must be as in the run so far, and are not.

    Args:
        before: The settings of the run so far.
        recipe: Those of now.
        place: Where the former stand.
        may_change: Those that may differ, sections too.
        changes: Whether others may, too.

    Raises:
        SettingsError: naming those that may not.
    """
    pairs = changed_settings(before, recipe, may_change)
    barred = {path: pair for path, pair in pairs.items() if path in NEVER and "auto" in pair}
    told = barred or ({} if changes else pairs)
    found = [
        f"`{path}` must be as in the run so far ({place}), {old!r}, to go on with it, got {new!r}."
        for path, (old, new) in told.items()
    ]
    if not found:
        return pairs
    fix = f"Set {'it' if len(found) == 1 else 'them'} back, or start another run in another folder"
    if barred:
        fix += ', which may begin from the policy of this one (model.name: its folder "policy")'
    elif isinstance(recipe, Recipe):
        fix += f", or {ALL_THE_SAME}"
    raise SettingsError(type(recipe).__name__, found, f"{fix}.")


def changed_settings(
    before: Mapping[str, Any],
    recipe: Recipe | ClassifierRecipe,
    may_change: Sequence[str] = MAY_CHANGE,
) -> dict[str, tuple[Any, Any]]:
    """Return what settings were and are, of those that must not differ and do, by their paths."""
    old = settings.build(type(recipe), before)
    return {
        path: pair
        for path, pair in settings.differences(old, recipe).items()
        if not any(path == name or path.startswith(f"{name}.") for name in may_change)
        and not (_follows(path, old) and _follows(path, recipe))
    }


def _follows(path: str, recipe: Recipe | ClassifierRecipe) -> bool:
    """Tell whether a setting is what it would be if the others alone were given."""
    section, _, name = path.partition(".")
    if not isinstance(recipe, Recipe) or section not in ("ppo", "sampling"):
        return False
    tree = settings.as_mapping(recipe)
    value = tree[section].pop(name, None)
    of_itself = settings.as_mapping(type(getattr(recipe, section))())
    return bool((of_itself | recipe.completed(tree)[section]).get(name) == value)


def told_changes(
    checkpoint: Path, state: Mapping[str, Any], recipe: Recipe, parts: Parts, folder: RunFolder
) -> list[str]:
    """Return in what a checkpoint is of another run, or raise unless it may be."""
    pairs = other_settings(state["recipe"], recipe, checkpoint, changes=folder.changes)
    told = [f"`{k}` was {old!r} up to here, and is {new!r}." for k, (old, new) in pairs.items()]
    if others := parts.changed(state):
        if not folder.changes:
            raise CheckpointError(
                f"{checkpoint} is of a run {'; '.join(others)}. Bring back what it was, start "
                f"another run in another folder, or {ALL_THE_SAME}."
            )
        told.append(
            f"Gone on with all the same, though {checkpoint} is of a run {'; '.join(others)}."
        )
    return told + other_versions(checkpoint, state["versions"])


def going_on(checkpoint: Path, state: Mapping[str, Any], recipe: Recipe) -> str:
    """Return what a run says as it goes on; of a schedule too that is another one now."""
    told = f"Going on after step {state['step']}, from {checkpoint}."
    before, now = settings.build(type(recipe), state["recipe"]).total_steps, recipe.total_steps
    if before == now or recipe.schedule.kind == "constant":
        return told
    other = f"that of {now} steps from here on, and was that of {before}"
    return f"{told} The schedule of the learning rate is {other}."


def where_it_stands(
    error: BaseException, saved: Sequence[Path], to_go_on: Callable[[str], str], *, whole: bool
) -> str:
    """Return what is left of a run that failed, and the one command that goes on with it.

    Args:
        error: What it failed with.
        saved: Its last checkpoint; none: there is none.
        to_go_on: Returns the command, given what resumes: auto or changed.
        whole: Whether the checkpoint is of the step before, not of updates in the midst of one.
    """
    if not saved:
        begin = "mend it, and start" if isinstance(error, Exception) else "start"
        told = f"Nothing is saved, as no step is made: {begin} from the beginning with"
        return f"{told}: {to_go_on('auto')}"
    # To the checkpoint, a reward or an environment that was mended since is another one.
    mended = isinstance(error, ScoringError | EpisodeError)
    way = "Mend it, and go on with" if mended else "Go on with"
    short = "It failed amid its updates; memory was short for a copy of what was before. "
    how = to_go_on("changed" if mended else "auto")
    return f"{'' if whole else short}Saved is {saved[0]}. {way}: {how}"


def other_versions(checkpoint: Path | str, before: Mapping[str, str]) -> list[str]:
    """Return a sentence on what wrote a checkpoint if that was something else; else none."""
    others = [
        f"{name} {old}, now {VERSIONS[name]}"
        for name, old in before.items()
        if old != VERSIONS.get(name)
    ]
    told = f"{checkpoint} was written with {', '.join(others)}: numbers may round otherwise."
    return [told] if others else []


def random_state() -> dict[str, Any]:
    """Return the state of every source of random numbers of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any] | None, seed: int) -> None:
    """Go on from `random_state()`; None: begin with a seed."""
    if state is None:
        set_seed(seed % 2**32)
        return
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
