"""A run: steps, measured and watched, in a folder from which it can go on at any moment.

    result = run_recipe(Recipe(steps=100, out="runs/mine"))
    result = run_recipe(recipe, resume="auto")  # from the last checkpoint, if there is one

A run that is gone on with ends with the same weights and figures, bit for bit, as one that was
never stopped (on the same machine and versions; figures of time apart). What a checkpoint holds is
in `Run.state_dict`. `trl.train` is a run too, in a folder or without one.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

import trl
from trl import config as settings
from trl.compute.peers import told_to_peers
from trl.compute.precision import make_accelerator
from trl.config.recipe import Recipe
from trl.evaluation.scores import pairs_of
from trl.models.loading import quiet_transformers
from trl.report import before_after_tables, read_runs, write_report
from trl.report.figures import duration
from trl.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    check_readable,
    remove,
    replaced_folder,
    step_of,
)
from trl.training.folder import FIRST_ROW, RunFolder
from trl.training.interrupt import GracefulStop
from trl.training.loop import Row
from trl.training.parts import Parts
from trl.training.resume import (
    check_same,
    opened,
    random_state,
    seed_everything,
    set_random_state,
)
from trl.watch.diagnosis import Diagnosis, Finding
from trl.watch.display import Display
from trl.watch.tracking import Trackers, check_trackers

STATE = "state.pt"
TRACKED_SAMPLES = 16
"""Samples of an evaluation that trackers get."""

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
    accelerator = make_accelerator(recipe.ppo.precision)
    with told_to_peers(), opened(folder, resume, accelerator) as (checkpoint, notes):
        if checkpoint is not None:
            check_same(folder, recipe)
        check_trackers(recipe.tracking.to)  # cheap, so it comes first
        with quiet_transformers():
            run = Run(recipe, Parts.of_recipe(recipe, accelerator), folder)
        if checkpoint is not None:
            notes.append(run.go_on_from(checkpoint))
        return run.train(notes)


class Run:
    """The steps of a training, and what is made of them.

    Args:
        recipe: How it goes, and what the parts were made of.
        parts: What it is made of.
        folder: Where it writes. None: nowhere, and random numbers are not seeded.
        on_row: Gets each row of figures; the run ends if it returns what counts as true.
        on_finding: Gets what looks wrong, besides the screen.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        folder: RunFolder | None,
        *,
        on_row: Callable[[Row], Any] = lambda row: None,
        on_finding: Callable[[Finding], None] = lambda finding: None,
    ) -> None:
        self.recipe, self.parts, self.folder = recipe, parts, folder
        self.path = Path(recipe.out).expanduser()
        self.on_row, self.on_finding = on_row, on_finding
        self.trainer, self.loop = parts.trainer, parts.loop
        self.accelerator = self.trainer.accelerator
        self.main = folder is not None and self.accelerator.is_main_process
        if folder is not None:
            self.checkpoints = Checkpoints(folder.checkpoints, recipe.checkpoints.keep)
            check_readable({name: part.state_dict() for name, part in parts.stateful().items()})
        self.diagnosis = Diagnosis(
            self.trainer.config,
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
        self.stopped: str | None = None
        """Why the run ended before its last step."""
        self.seconds = 0.0
        """Of earlier sessions."""
        self.started = time.perf_counter()

    # -- the run ---------------------------------------------------------------------------------

    def train(self, notes: Sequence[str] = ()) -> Result:
        """Make the steps that are left, then save the policy, the summary and the report."""
        recipe, loop = self.recipe, self.loop
        total = recipe.total_steps
        self.started = time.perf_counter()
        with ExitStack() as stack:
            quiet = recipe.quiet or not self.main
            display = Display(total, first_step=loop.steps_done, quiet=quiet)
            self.display = stack.enter_context(display)
            self.trackers = stack.enter_context(closing(self._trackers()))
            for note in [*notes, *self._introduction(), *self.trackers.notes]:
                display.note(note)
            interrupt = GracefulStop()
            if self.folder is not None:
                stack.enter_context(interrupt)
            if self.resumed_at is None:
                self._begin()
            enough = asked = False
            while loop.steps_done < total and not (self.stopped or enough):
                enough = self._step()
                asked = self._any(interrupt.asked)
                last = loop.steps_done == total or self.stopped is not None or enough
                if last or asked or loop.steps_done % recipe.checkpoints.every == 0:
                    self._write_checkpoint()
                if asked and not last:
                    return self._interrupted()
            steps = f"all {loop.steps_done} steps are made"
            return self._end(self.stopped or ("`on_step` ended it" if enough else steps))

    def _begin(self) -> None:
        """Measure and write what stands before the first step."""
        if self.folder is not None:
            seed_everything(self.parts.seed)
        if self.main:
            self.folder.cut({})  # of a start that never came to its first checkpoint
        parts = self.parts
        self._tell(
            self.diagnosis.look_at_start(parts.model, parts.tokenizer, sampler=self.loop.sampler)
        )
        row: Row = dict(FIRST_ROW)
        if parts.held_out is not None:
            row |= self._evaluate()
            self.before = self.after
        self.display.row(row)
        if self.main:  # not before: a start whose scorer fails at once is no run
            self.folder.write("recipe.yaml", settings.dump(self.recipe))
        self._write_row(row)
        self.on_row(row)
        self._tell(self.diagnosis.look(row))

    def _step(self) -> bool:
        """Make a step, and return whether it was enough for `on_row`."""
        loop, recipe = self.loop, self.recipe
        row = loop.step()
        step = loop.steps_done
        row = {"step": step, "episodes": step * self.trainer.config.batch_size} | row
        self.stopped = self._kl_too_large(row)
        last = step == recipe.total_steps or self.stopped is not None
        due = step % recipe.eval_every == 0 or last
        if self.parts.held_out is not None and due:
            row |= self._evaluate()
        enough = self._any(bool(self.on_row(row)))
        if self.parts.held_out is not None and enough and not due:
            row |= self._evaluate()  # the last one, as it turns out
        assert loop.rollout is not None
        self._write_row(row, loop.all_scores.tolist())
        self._tell(self.diagnosis.look(row, loop.rollout, loop.scores))
        self.display.row(row)
        if not self.display.console.quiet:
            for query, response in pairs_of(loop.rollout)[:1]:
                self.display.sample(query, response, loop.scores[0].item())
        self.stopped = self.stopped or self._no_more_gain()
        return enough

    def _evaluate(self) -> Row:
        """Measure on the held-out prompts; keep the policy if it is the best so far."""
        assert self.parts.held_out is not None
        samples, figures = self.parts.held_out.measure()
        self.after = figures
        step = self.loop.steps_done
        if self.main:
            rows = [{"step": step} | sample for sample in samples]
            self.folder.add("samples", *rows)
            self.trackers.log_samples(rows[:TRACKED_SAMPLES], step)
        if self.recipe.checkpoints.best is not None:
            self._keep_best(figures.get(self.recipe.checkpoints.best, math.nan))
        return figures

    def _keep_best(self, value: float) -> None:
        sign = -1 if self.recipe.checkpoints.mode == "min" else 1
        gain = math.inf if self.best is None else sign * (value - self.best)
        if math.isnan(value) or not gain > self.recipe.stop.min_gain:
            self.without_gain += 1
            return
        self.best, self.best_step, self.without_gain = value, self.loop.steps_done, 0
        if self.loop.steps_done:  # the policy as it was at first is where it came from
            self._save_policy("best")

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
        if self.folder is None or self.accelerator.num_processes == 1:
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

    def _tell(self, findings: list[Finding]) -> None:
        """Show what looks wrong, once."""
        for finding in findings:
            self.display.finding(finding)
            if self.main:
                self.folder.add("warnings", finding.row())
            if self.accelerator.is_main_process:
                self.on_finding(finding)

    def _trackers(self) -> Trackers:
        tracking = self.recipe.tracking
        return Trackers(
            tracking.to if self.main else (),
            out=self.path,
            project=tracking.project,
            run_name=tracking.name,
            config=settings.as_mapping(self.recipe),
            resume_step=self.resumed_at,
        )

    def _save_policy(self, name: str) -> None:
        """Write the policy as plain transformers loads it, whole or not at all."""
        if self.main:
            with replaced_folder(self.path / name) as partial, quiet_transformers():
                self.parts.model.save_pretrained(partial)
                if self.parts.tokenizer is not None:
                    self.parts.tokenizer.save_pretrained(partial)
        if self.folder is not None:
            self.accelerator.wait_for_everyone()

    def _end(self, reason: str) -> Result:
        self._save_policy("policy")
        summary = self._summary(reason, finished=True)
        if self.main:
            report = write_report([self.path], self.path)
            if not self.recipe.quiet:
                self.display.console.print(*before_after_tables(*read_runs([self.path])))
            self.display.note(
                f"Finished in {duration(summary['seconds'])}: {reason}. The tuned model is in "
                f"{self.folder.policy}/; look at {report}."
            )
            if self.recipe.profile is not None:
                self.display.note(f"Where the time went is in {self.recipe.profile}/.")
        return self._result(summary)

    def _interrupted(self) -> Result:
        summary = self._summary("interrupted", finished=False)
        command = f"trl train {shlex.quote(str(self.folder.recipe))} --resume"
        self.display.note(f"Stopped after step {self.loop.steps_done}. Go on with: {command}")
        return self._result(summary)

    def _result(self, summary: dict[str, Any]) -> Result:
        steps = self.loop.steps_done
        return Result(self.path, self.parts.model, steps, summary, not summary["finished"])

    def _summary(self, reason: str, *, finished: bool) -> dict[str, Any]:
        """Write how the run ended, and return it."""
        summary = {
            "before": self.before,
            "after": self.after,
            "best": {"step": self.best_step, self.recipe.checkpoints.best or "": self.best},
            "steps": self.loop.steps_done,
            "total_steps": self.recipe.total_steps,
            "seconds": self._seconds(),
            "finished": finished,
            "reason": reason,
            "parameters": self.parts.parameters,
            "precision": self.trainer.precision.replace("no", "fp32"),
            "processes": self.accelerator.num_processes,
            "versions": _versions(),
        }
        if self.main:
            self.folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def _introduction(self) -> list[str]:
        """Return what the run is, and what the user may not expect of its settings."""
        recipe, config = self.recipe, self.trainer.config
        notes = []
        if recipe.episodes is not None and (rest := recipe.episodes % config.batch_size):
            notes.append(
                f"{recipe.episodes} episodes are {recipe.total_steps} whole steps of "
                f"{config.batch_size}: {rest} are left out."
            )
        trained = sum(weight.numel() for weight in self.trainer.trainable)
        notes.append(
            f"{config.algorithm.upper()} on {recipe.model.name}: "
            f"{self.parts.parameters / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of them "
            f"trained, {self.trainer.precision.replace('no', 'fp32')}; "
            f"{self.parts.prompts}; in {self.path}/."
        )
        return notes

    # -- checkpoints -----------------------------------------------------------------------------

    def _write_checkpoint(self) -> None:
        if self.folder is None:
            return
        own_states = gather_object([{"random": random_state()} | self.parts.own_state()])
        if self.main:
            state = self.state_dict(own_states)
            self.checkpoints.write(
                self.loop.steps_done, lambda folder: torch.save(state, folder / STATE)
            )
        self.accelerator.wait_for_everyone()

    def state_dict(self, own_states: list[dict[str, Any]]) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain values and tensors.

        Args:
            own_states: What differs from process to process.
        """
        return {
            "format": FORMAT,
            "step": self.loop.steps_done,
            **self.parts.state_dict(),
            "of_each_process": own_states,
            "diagnosis": self.diagnosis.state_dict(),
            "figures": {"before": self.before, "after": self.after},
            "best": (self.best, self.best_step, self.without_gain, self._best_figure()),
            "stopped": (self.stopped, settings.as_mapping(self.recipe.stop)),
            "files": self.folder.sizes(),
            "versions": _versions(),
            "seconds": self._seconds(),
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
        if problem := self.parts.misfit(state):
            raise CheckpointError(f"{checkpoint} {problem}")
        own = state["of_each_process"][self.accelerator.process_index]
        self.parts.load_state_dict(state, own)
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
            (self.path / "summary.json").unlink(missing_ok=True)
            remove(self.folder.policy)  # of a later step, if it is there
            for path in self.checkpoints.all():
                if step_of(path) > state["step"]:  # of steps that are made again, or damaged
                    remove(path)
        self.accelerator.wait_for_everyone()
        set_random_state(own["random"])
        return f"Going on after step {state['step']}, from {checkpoint}."

    def _best_figure(self) -> tuple[str | None, str]:
        return self.recipe.checkpoints.best, self.recipe.checkpoints.mode


def _versions() -> dict[str, str]:
    return {"trl": trl.__version__, "torch": str(torch.__version__)}
