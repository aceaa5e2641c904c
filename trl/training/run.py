"""`trl train`: a recipe as a run in a folder, which can be stopped and gone on with at any moment.

    result = run_recipe(Recipe(steps=100, out="runs/mine"))
    result = run_recipe(recipe, resume="auto")  # from the last checkpoint, if there is one

A run that is gone on with ends with the same weights and figures, bit for bit, as one that was
never stopped (on the same machine and versions; figures of time apart). What a checkpoint holds is
in `Run.state_dict`.
"""

from __future__ import annotations

import errno
import io
import json
import math
import pickle
import random
import shlex
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

import trl
from trl import config as settings
from trl.compute.precision import make_accelerator
from trl.config import SettingsError, closest
from trl.config.recipe import Recipe
from trl.data.prompts import PretrainingText, load_prompts
from trl.evaluation.control import ControlScorer
from trl.evaluation.scores import pairs_of
from trl.evaluation.weighted_sum import WeightedSum
from trl.ppo import PPOTrainer
from trl.report import before_after_tables, read_runs, write_report
from trl.report.figures import duration
from trl.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    damage,
    remove,
    replaced_folder,
    step_of,
)
from trl.training.folder import FIRST_ROW, RunFolder
from trl.training.held_out import FIGURES, HeldOut, Measurement
from trl.training.interrupt import GracefulStop
from trl.training.loop import Loop, Row
from trl.training.parts import (
    load_model,
    load_scorer,
    load_tokenizer,
    make_sampler,
    make_schedule,
    quiet_transformers,
    seeded,
)
from trl.watch.diagnosis import Diagnosis
from trl.watch.display import Display
from trl.watch.tracking import Trackers, check_trackers

STATE = "state.pt"
TRACKED_SAMPLES = 16
"""Samples of an evaluation that trackers get."""

MAY_CHANGE = (
    *("out", "quiet", "profile", "tracking", "checkpoints", "steps", "episodes", "stop"),
    *("ppo.forward_batch_size", "ppo.token_budget", "ppo.keep_freed_memory", "sampling.max_rows"),
)
"""Settings that may differ when a run is gone on with: they do not change what a step computes but
by rounding, unless the learning rate falls over the steps of the whole run."""

FORMAT = 1
"""Of what is in a checkpoint."""


@dataclass(frozen=True)
class Result:
    """What `run_recipe` returns."""

    folder: Path
    model: nn.Module
    """The policy as it is now."""
    steps: int
    """Steps that were made, those of earlier sessions included."""
    summary: dict[str, Any]
    """Figures on the held-out prompts before and after, and why the run ended."""
    interrupted: bool
    """Whether it was stopped by Ctrl-C and can be gone on with."""


def run_recipe(recipe: Recipe, resume: str | Path | None = None) -> Result:
    """Run a recipe in its folder.

    Args:
        recipe: The settings.
        resume: None: start anew, in a folder without a run. "auto": go on from the last whole
            checkpoint, or start if there is none. A checkpoint's folder: go on from that one.

    Raises:
        SettingsError, OSError, ValueError: before anything is trained: for settings that do not
            fit the model, the data or the earlier part of the run; for a folder in use.
        CheckpointError: if there are checkpoints, but none is whole.
        OSError: if the disk is full; the last checkpoint is good then.
    """
    folder = RunFolder(Path(recipe.out).expanduser())
    # Of several processes the first decides, and the others wait until it has.
    accelerator = make_accelerator(recipe.ppo.precision)
    with folder.in_use() if accelerator.is_main_process else nullcontext():
        checkpoint, notes = _find_checkpoint(folder, recipe, resume)
        accelerator.wait_for_everyone()
        with quiet_transformers():
            run = Run(recipe, folder, accelerator)
        if checkpoint is not None:
            notes.append(run.go_on_from(checkpoint))
        with _told_to_resume(run):
            return run.train(notes)


@contextmanager
def _told_to_resume(run: Run) -> Iterator[None]:
    """Say on a full disk what is good, and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        good = [path.name for path in run.checkpoints.all()]
        raise OSError(
            error.errno,
            f"{error.strerror} after step {run.loop.steps_done}. Checkpoints that are good: "
            f"{', '.join(good) or 'none yet'}. Make room, then go on with --resume",
            error.filename,
        ) from error


def _find_checkpoint(
    folder: RunFolder, recipe: Recipe, resume: str | Path | None
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to go on from, and what the user should know of the choice."""
    if resume is None:
        if folder.has_run():
            raise FileExistsError(
                errno.EEXIST,
                "`out` must be a folder without a run: add --resume to go on with it, or name "
                "another one with --out",
                str(folder.path),
            )
        if others := folder.others():
            raise FileExistsError(
                errno.EEXIST,
                f"`out` must be a folder of its own, but there are {', '.join(others)} in it, "
                "which the run would replace: name another one with --out",
                str(folder.path),
            )
        return None, []
    checkpoints = Checkpoints(folder.checkpoints, recipe.checkpoints.keep)
    if resume == "auto":
        chosen, problems = checkpoints.newest()
        notes = [f"Left out, since it is not whole: {problem}." for problem in problems]
    else:
        chosen, notes = Path(resume).expanduser(), []
        inside = chosen.resolve().parent == folder.checkpoints.resolve()
        if step_of(chosen) is None or not inside or not chosen.is_dir():
            raise ValueError(
                f"`resume` must be auto or a checkpoint of this run, in {folder.checkpoints}, got "
                f"{str(resume)!r}: there are {[path.name for path in checkpoints.all()]}."
            )
        if problem := damage(chosen):
            raise CheckpointError(f"{chosen} is not whole: {problem}. Take another one, or auto.")
    if chosen is None:
        if folder.others():
            return _find_checkpoint(folder, recipe, None)
        return None, [f"There is no checkpoint in {folder.path}: the run starts anew."]
    if folder.recipe.exists():
        _check_same(folder, recipe)
    return chosen, notes


def _check_same(folder: RunFolder, recipe: Recipe) -> None:
    """Raise unless the recipe is that of the run so far, but for what may change."""
    before = settings.build(Recipe, settings.read_yaml(folder.recipe))
    changed = {
        path: pair
        for path, pair in settings.differences(before, recipe).items()
        if not any(path == name or path.startswith(f"{name}.") for name in MAY_CHANGE)
    }
    if changed:
        raise SettingsError(
            "Recipe",
            [
                f"`{path}` must be as in the run so far ({folder.recipe}), {old!r}, to go on with "
                f"it, got {new!r}: set it back, or start another run with --out."
                for path, (old, new) in changed.items()
            ],
        )


class Run:
    """Everything that a recipe needs, and where the run stands.

    Args:
        recipe: The settings.
        folder: Where it writes.
        accelerator: None: one made for `recipe.ppo.precision`.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, accelerator: Accelerator | None = None
    ) -> None:
        self.recipe, self.folder = recipe, folder
        self.accelerator = accelerator or make_accelerator(recipe.ppo.precision)
        # What is cheap to check comes first: a tracker that is not installed, say.
        check_trackers(recipe.tracking.to)
        self.scorer, self.judge = load_scorer(recipe.reward)
        _check_best(recipe, self.judge)
        self.tokenizer = load_tokenizer(recipe.model)
        with seeded(recipe.seed):  # an adapter's new weights are random
            self.model = load_model(recipe.model)
        self.trainer = PPOTrainer(
            self.model,
            recipe.model.reference,
            replace(recipe.ppo, seed=recipe.seed),
            accelerator=self.accelerator,
        )
        self.main = self.accelerator.is_main_process
        processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        own_seed = recipe.seed * processes + self.rank  # each draws other responses and texts
        self.trainer.pretraining = self.pretraining = self._pretraining(own_seed)
        prompts = load_prompts(recipe.data, self.tokenizer, seed=recipe.seed, policy=self.model)
        self.loop = Loop(
            self.trainer,
            make_sampler(recipe, self.tokenizer, own_seed),
            self.scorer,
            prompts.train,
            schedule=make_schedule(recipe.schedule, recipe.total_steps),
            parts=recipe.sampling.parts,
            profile=recipe.profile,
        )
        self.held_out = None
        if prompts.held_out:
            sampler = make_sampler(recipe, self.tokenizer, recipe.seed + 1, group_size=1)
            sampler.check(self.model, prompts.held_out, name="held-out prompts")
            self.held_out = HeldOut(self.trainer, sampler, self.judge, prompts.held_out)
        self.prompts = prompts
        everything = json.dumps([prompts.train, prompts.held_out])
        self.prompts_checksum = zlib.crc32(everything.encode())
        self.seed = own_seed
        self.checkpoints = Checkpoints(folder.checkpoints, recipe.checkpoints.keep)
        self.diagnosis = Diagnosis(
            recipe.ppo,
            precision=self.trainer.precision,
            compares_groups=self.trainer.algorithm.groups,
        )
        self.resumed_at: int | None = None
        self.before: Row = {}
        self.after: Row = {}
        self.best: float | None = None
        self.best_step = 0
        self.without_gain = 0
        """Evaluations since the best one."""
        _check_states(self._stateful())
        self.stopped: str | None = None
        """Why the run ended before its last step."""
        self.seconds = 0.0
        """Of earlier sessions."""

    def _pretraining(self, seed: int) -> PretrainingText | None:
        source = self.recipe.pretraining
        if source.text is None:
            return None
        return PretrainingText(
            source.text,
            self.tokenizer,
            column=source.column,
            subset=source.subset,
            split=source.split,
            tokens=source.tokens,
            seed=seed,
            name="pretraining.text",
        )

    # -- the run ---------------------------------------------------------------------------------

    def train(self, notes: list[str]) -> Result:
        """Make the steps that are left, then save the policy, the summary and the report."""
        recipe, loop = self.recipe, self.loop
        total = recipe.total_steps
        started = time.perf_counter()
        with ExitStack() as stack:
            display = stack.enter_context(
                Display(total, first_step=loop.steps_done, quiet=recipe.quiet or not self.main)
            )
            for note in notes + self._notes():
                display.note(note)
            display.note(self._introduction())
            self.display = display
            self.trackers = stack.enter_context(closing(self._trackers()))
            for note in self.trackers.notes:
                display.note(note)
            interrupt = stack.enter_context(GracefulStop())
            if self.resumed_at is None:
                self._begin()
            while loop.steps_done < total and self.stopped is None:
                self._step()
                self.stopped = self.stopped or self._no_more_gain()
                asked = self._any(interrupt.asked)
                last = loop.steps_done == total or self.stopped is not None
                if last or asked or loop.steps_done % recipe.checkpoints.every == 0:
                    self._write_checkpoint(started)
                if asked and not last:
                    return self._interrupted(started)
            steps = f"all {loop.steps_done} steps are made"
            return self._end(self.stopped or steps, started)

    def _begin(self) -> None:
        """Write what stands before the first step."""
        random.seed(self.seed)  # what a reward, or a model, may draw from
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)
        if self.main:
            self.folder.cut({})  # of a start that never came to its first checkpoint
        self._tell(
            self.diagnosis.look_at_start(self.model, self.tokenizer, sampler=self.loop.sampler)
        )
        row: Row = dict(FIRST_ROW)
        if self.held_out is not None:
            row |= self._evaluate()
            self.before = self.after = _held_out(row)
        self.display.row(row)
        if self.main:  # not before: a start whose scorer fails at once is no run
            self.folder.write("recipe.yaml", settings.dump(self.recipe))
        self._write_row(row)
        self._tell(self.diagnosis.look(row))

    def _step(self) -> Row:
        loop, recipe = self.loop, self.recipe
        row = loop.step()
        step = loop.steps_done
        row = {"step": step, "episodes": step * recipe.ppo.batch_size} | row
        self.stopped = self._kl_too_large(row)
        last = step == recipe.total_steps or self.stopped is not None
        if self.held_out is not None and (step % recipe.eval_every == 0 or last):
            row |= self._evaluate()
            self.after = _held_out(row)
        assert loop.rollout is not None
        self._write_row(row, loop.all_scores.tolist())
        self._tell(self.diagnosis.look(row, loop.rollout, loop.scores))
        self.display.row(row)
        for query, response in pairs_of(loop.rollout)[:1]:
            self.display.sample(query, response, loop.scores[0].item())
        return row

    def _evaluate(self) -> Row:
        """Measure on the held-out prompts; keep the policy if it is the best so far."""
        assert self.held_out is not None
        measured = self.held_out.measure()
        figures = measured.figures()
        step = self.loop.steps_done
        if self.main:
            rows = [{"step": step} | sample.row() for sample in measured.samples]
            self.folder.add("samples", *rows)
            self.trackers.log_samples(rows[:TRACKED_SAMPLES], step)
        self._keep_best(measured, figures)
        return figures

    def _keep_best(self, measured: Measurement, figures: Row) -> None:
        wanted = self.recipe.checkpoints
        if wanted.best is None:
            return
        value = figures.get(wanted.best, math.nan)
        if math.isnan(value):
            self.without_gain += 1
            return
        gain = 0.0 if self.best is None else value - self.best
        if wanted.mode == "min":
            gain = -gain
        if self.best is not None and not gain > self.recipe.stop.min_gain:
            self.without_gain += 1
            return
        self.best, self.best_step, self.without_gain = value, self.loop.steps_done, 0
        if self.loop.steps_done:  # the policy as it was at first is where it came from
            self._save_policy(self.folder.best)

    def _kl_too_large(self, row: Row) -> str | None:
        """Return why the run ends early, if the policy went too far."""
        stop = self.recipe.stop
        if stop.kl is not None and row["objective/kl"] > stop.kl:
            return f"the KL, {row['objective/kl']:.1f} nats, is above stop.kl, {stop.kl}"
        return None

    def _no_more_gain(self) -> str | None:
        """Return why the run ends early, if it does not get better."""
        stop = self.recipe.stop
        if stop.patience is not None and self.without_gain >= stop.patience:
            return (
                f"{self.without_gain} evaluations in a row were no better than that of step "
                f"{self.best_step} (stop.patience)"
            )
        return None

    def _any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags) > 0)

    # -- what is written -------------------------------------------------------------------------

    def _write_row(self, row: Row, scores: list[float] | None = None) -> None:
        if not self.main:
            return
        step = int(row["step"])
        self.folder.add("metrics", row)
        if scores is not None:
            self.folder.add("scores", {"step": step, "scores": [round(s, 4) for s in scores]})
        self.trackers.log(row, step)

    def _tell(self, findings: list[Any]) -> None:
        """Show what looks wrong, once."""
        for finding in findings:
            self.display.finding(finding)
            if self.main:
                self.folder.add("warnings", finding.row())

    def _trackers(self) -> Trackers:
        tracking = self.recipe.tracking
        return Trackers(
            tracking.to if self.main else (),
            out=self.folder.path,
            project=tracking.project,
            run_name=tracking.name,
            config=settings.as_mapping(self.recipe),
            resume_step=self.resumed_at,
        )

    def _save_policy(self, target: Path) -> None:
        """Write the policy as plain transformers loads it, whole or not at all."""
        if self.main:
            with replaced_folder(target) as partial, quiet_transformers():
                self.model.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)
        self.accelerator.wait_for_everyone()

    def _end(self, reason: str, started: float) -> Result:
        summary = self._summary(reason, started, finished=True)
        self._save_policy(self.folder.policy)
        if self.main:
            self.folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
            report = write_report([self.folder.path], self.folder.path)
            if not self.recipe.quiet:
                tables = before_after_tables(*read_runs([self.folder.path]))
                self.display.console.print(*tables)
            self.display.note(
                f"Finished in {duration(summary['seconds'])}: {reason}. The tuned model is in "
                f"{self.folder.policy}/; look at {report}."
            )
            if self.recipe.profile is not None:
                self.display.note(f"Where the time went is in {self.recipe.profile}/.")
        return Result(self.folder.path, self.model, self.loop.steps_done, summary, False)

    def _interrupted(self, started: float) -> Result:
        summary = self._summary("interrupted", started, finished=False)
        if self.main:
            self.folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
            command = f"trl train {shlex.quote(str(self.folder.recipe))} --resume"
            self.display.note(f"Stopped after step {self.loop.steps_done}. Go on with: {command}")
        return Result(self.folder.path, self.model, self.loop.steps_done, summary, True)

    def _summary(self, reason: str, started: float, *, finished: bool) -> dict[str, Any]:
        return {
            "before": self.before,
            "after": self.after,
            "best": {"step": self.best_step, self.recipe.checkpoints.best or "": self.best},
            "steps": self.loop.steps_done,
            "total_steps": self.recipe.total_steps,
            "seconds": self.seconds + time.perf_counter() - started,
            "finished": finished,
            "reason": reason,
            "parameters": self.model.num_parameters(),
            "precision": self.trainer.precision.replace("no", "fp32"),
            "processes": self.accelerator.num_processes,
            "versions": {"trl": trl.__version__, "torch": str(torch.__version__)},
        }

    def _notes(self) -> list[str]:
        """Return what the user may not expect of the settings."""
        episodes, size = self.recipe.episodes, self.recipe.ppo.batch_size
        if episodes is None or episodes % size == 0:
            return []
        return [
            f"{episodes} episodes are {self.recipe.total_steps} whole steps of {size}: "
            f"{episodes % size} are left out."
        ]

    def _introduction(self) -> str:
        prompts = self.prompts
        trained = sum(weight.numel() for weight in self.trainer.trainable)
        return (
            f"{self.recipe.ppo.algorithm.upper()} on {self.recipe.model.name}: "
            f"{self.model.num_parameters() / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of them "
            f"trained, {self.trainer.precision.replace('no', 'fp32')}; "
            f"{prompts}; in {self.folder.path}/."
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def _write_checkpoint(self, started: float) -> None:
        own_states = gather_object([self._own_state()])
        if self.main:
            state = self.state_dict(own_states)
            state["seconds"] = self.seconds + time.perf_counter() - started
            self.checkpoints.write(
                self.loop.steps_done, lambda folder: torch.save(state, folder / STATE)
            )
        self.accelerator.wait_for_everyone()

    def state_dict(self, own_states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain values and tensors.

        Weights that are not trained are left out: they come from the recipe again.

        Args:
            own_states: What differs from process to process.
        """
        return {
            "format": FORMAT,
            "prompts": self.prompts_checksum,
            "step": self.loop.steps_done,
            "processes": self.accelerator.num_processes,
            "weights": self._weights(),
            "trainer": self.trainer.state_dict(),
            "loop": self.loop.state_dict(),
            "of_each_process": own_states,
            "diagnosis": self.diagnosis.state_dict(),
            "figures": {"before": self.before, "after": self.after},
            "best": (self.best, self.best_step, self.without_gain, self._best_figure()),
            "stopped": (self.stopped, settings.as_mapping(self.recipe.stop)),
            "files": self.folder.sizes(),
            "versions": {"trl": trl.__version__, "torch": str(torch.__version__)},
        }

    def _own_state(self) -> dict[str, Any]:
        """Return what differs from process to process."""
        return {
            "random": _random_state(),
            "scorers": {name: part.state_dict() for name, part in self._stateful().items()},
            "pretraining": self.pretraining.state_dict() if self.pretraining else None,
        }

    def go_on_from(self, checkpoint: Path) -> str:
        """Bring everything to where the checkpoint was written; return a note on it.

        Raises:
            CheckpointError: if it is of another model, or of another number of processes.
        """
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{checkpoint} was written by trl {state['versions']['trl']}, in a format that "
                "this version does not read."
            )
        if state["prompts"] != self.prompts_checksum:
            raise CheckpointError(
                f"{checkpoint} is of a run on other prompts: the file or dataset of `data.prompts` "
                "has changed since. Bring it back, or start another run with --out."
            )
        if state["processes"] != self.accelerator.num_processes:
            raise CheckpointError(
                f"{checkpoint} is of a run on {state['processes']} processes, got "
                f"{self.accelerator.num_processes}: start as many."
            )
        weights = self._weights()
        if {name: w.shape for name, w in weights.items()} != {
            name: w.shape for name, w in state["weights"].items()
        }:
            raise CheckpointError(
                f"{checkpoint} has other weights than the model of the recipe: is its folder, or "
                "its name on the hub, another model now?"
            )
        self.trainer.load_state_dict(state["trainer"])
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state["weights"][name])
        self.loop.load_state_dict(state["loop"])
        own = state["of_each_process"][self.rank]
        for name, part in self._stateful().items():
            part.load_state_dict(own["scorers"][name])
        if self.pretraining is not None:
            self.pretraining.load_state_dict(own["pretraining"])
        self.diagnosis.load_state_dict(state["diagnosis"])
        self.before, self.after = state["figures"]["before"], state["figures"]["after"]
        *best, figure = state["best"]
        if figure == self._best_figure():  # else what was best is of another kind
            self.best, self.best_step, self.without_gain = best
        stopped, by = state["stopped"]
        if by == settings.as_mapping(self.recipe.stop):  # else the user wants it to go on
            self.stopped = stopped
        self.seconds = state["seconds"]
        self.resumed_at = state["step"]
        if self.main:
            self.folder.cut(state["files"])
            self.folder.write("recipe.yaml", settings.dump(self.recipe))
            (self.folder.path / "summary.json").unlink(missing_ok=True)
            remove(self.folder.policy)  # of a later step, if it is there
            for path in self.checkpoints.all():
                if step_of(path) > state["step"]:  # of steps that are made again, or damaged
                    remove(path)
        self.accelerator.wait_for_everyone()
        _set_random_state(own["random"])
        return f"Going on after step {state['step']}, from {checkpoint}."

    def _best_figure(self) -> tuple[str | None, str]:
        return self.recipe.checkpoints.best, self.recipe.checkpoints.mode

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that are trained, by name."""
        named = self.model.named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}

    def _stateful(self) -> dict[str, Any]:
        """Return the scorers, or their functions, that have a state of their own."""
        found = {}
        for name, (scorer, _) in self.judge.parts.items():
            for place, part in (name, scorer), (f"{name}()", getattr(scorer, "function", None)):
                if hasattr(part, "load_state_dict") and not isinstance(part, nn.Module):
                    found[place] = part
        return found


def _check_best(recipe: Recipe, judge: WeightedSum) -> None:
    """Raise unless `checkpoints.best` is a figure that evaluations will have."""
    names = [*judge.parts]
    for scorer, _ in judge.parts.values():
        if isinstance(scorer, ControlScorer):
            names += ["hit", *(f"hit/{prefix.strip()}" for prefix in scorer.targets)]
    known = [f"held_out/{name}" for name in ("reward/mean", "reward/median", *FIGURES)]
    known += [f"held_out/reward/{name}" for name in names]
    best = recipe.checkpoints.best
    if best is not None and best not in known:
        raise SettingsError(
            "Recipe",
            [f"`checkpoints.best` must be one of {known}, got {best!r}.{closest(best, known)}"],
        )


def _check_states(parts: Mapping[str, Any]) -> None:
    """Raise unless the states of scorers can be read back from a checkpoint."""
    for name, part in parts.items():
        buffer = io.BytesIO()
        torch.save(part.state_dict(), buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except pickle.UnpicklingError as error:
            raise TypeError(
                f"`state_dict()` of the scorer {name} must give plain values and tensors (numbers, "
                "texts, lists, dicts), or no run could be gone on with; turn numpy arrays into "
                f"lists or tensors. {str(error).splitlines()[-1]}"
            ) from None


def _held_out(row: Row) -> Row:
    return {name: value for name, value in row.items() if name.startswith("held_out/")}


def _random_state() -> dict[str, Any]:
    """Return the state of every source of random numbers of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
