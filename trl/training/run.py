"""A run: steps, measured and watched, in a folder from which it can go on at any moment.

    result = run_recipe(Recipe(steps=100, out="runs/mine"))
    result = run_recipe(recipe, resume="auto")  # from the last checkpoint, if there is one

A run that is gone on with ends with the same weights and figures, bit for bit, as one that was
never stopped (on the same machine and versions; figures of time apart). What a checkpoint holds is
in `Run._write_checkpoint`. `trl.train` is a run too, in a folder or without one.
"""

from __future__ import annotations

import copy
import json
import math
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object, set_seed
from torch import nn

from trl import config as settings
from trl.compute.peers import meet, told_to_peers
from trl.compute.precision import make_accelerator
from trl.compute.starting import busy_told, processes_told
from trl.config.code import Trust, flags_to_go_on
from trl.config.places import FIRST_ROW
from trl.config.recipe import Recipe
from trl.evaluation.people.asking import Stopped
from trl.evaluation.scores import pairs_of
from trl.models.loading import quiet_transformers
from trl.models.whole import add_whole_weights
from trl.report import before_after_tables, read_runs, write_report
from trl.report.figures import duration
from trl.training import checkpoints
from trl.training import undo as undoing
from trl.training.checkpoints import CheckpointError
from trl.training.folder import BEST_STEP, RunFolder, best_step
from trl.training.held_out import Sample, samples_of
from trl.training.interrupt import GracefulStop
from trl.training.loop import Row
from trl.training.parts import Parts
from trl.training.resume import (
    VERSIONS,
    check_same,
    going_on,
    opened,
    own_of,
    random_state,
    read_state,
    set_random_state,
    told_changes,
    where_it_stands,
)
from trl.training.sharded import put_together, taken_apart, write_together
from trl.watch.diagnosis import Diagnosis, Finding
from trl.watch.display import Display
from trl.watch.tracking import Trackers, check_trackers

TOO_FAST = 0.03
"""A learning rate at which pretrained weights do not stay what they are."""
NEXT_BEST = ".best"
"""The folder of the best policy until a checkpoint knows of it: a killed run goes back to that."""
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


def run_recipe(
    recipe: Recipe,
    resume: str | Path | None = None,
    *,
    trust: Trust = (),
    until: int | None = None,
) -> Result:
    """Run a recipe in its folder.

    Args:
        recipe: The settings.
        resume: None: start anew, in a folder without a run. "auto": go on from the last whole
            checkpoint, or start if there is none. A checkpoint's folder: go on from that one.
            "changed", or "changed:FOLDER": likewise, though settings, prompts, model or scorers
            are others than before; what differs is told.
        trust: Modules and packages whose functions may run, besides those of files.
        until: End after so many steps in all, as if no more were wanted, to go on one day.

    Raises:
        SettingsError, OSError, ValueError: before anything is trained: for settings that do not
            fit the model, the data or the earlier part of the run; for a folder in use.
        CheckpointError: if there are checkpoints, but none is whole.
        OSError: if the disk is full; the last checkpoint is good then.
    """
    folder = RunFolder(Path(recipe.out).expanduser())
    accelerator = make_accelerator(recipe.ppo.precision, recipe.ppo.collective_timeout)
    with told_to_peers(), opened(folder, resume, accelerator) as (checkpoint, notes):
        if checkpoint is not None:
            check_same(folder, recipe)  # before anything is loaded
        check_trackers(recipe.tracking.to)  # cheap, so it comes first
        with quiet_transformers():
            run = Run(recipe, Parts.of_recipe(recipe, accelerator, trust), folder)
        run.last_step = min(until or run.last_step, run.last_step)
        return run.train(checkpoint, notes)


class Run:
    """The steps of a training, and what is made of them.

    Args:
        recipe: How it goes, and what the parts were made of.
        parts: What it is made of.
        folder: Where it writes. None: nowhere, and random numbers are not seeded.
        on_step: Called as on_step(step, row) after each step, step counting from 1, on every
            process; the run ends if it returns what counts as true on any of them.
        on_finding: Gets what looks wrong, besides the screen; on the first process.

    Attributes:
        history: The figures of each step, earlier sessions included; with held-out prompts, those
            of step 0 come first.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Parts,
        folder: RunFolder | None,
        *,
        on_step: Callable[[int, Row], Any] | None = None,
        on_finding: Callable[[Finding], None] = lambda finding: None,
    ) -> None:
        self.recipe, self.parts, self.folder = recipe, parts, folder
        self.path = Path(recipe.out).expanduser()
        self.on_step, self.on_finding = on_step, on_finding
        self.last_step = recipe.total_steps
        """After which it ends in any case."""
        self.by_call = False
        """Whether objects made it, which no recipe can name."""
        self.trainer, self.loop = parts.trainer, parts.loop
        self.accelerator = self.trainer.accelerator
        self.main = folder is not None and self.accelerator.is_main_process
        if folder is not None:
            self.checkpoints = checkpoints.Checkpoints(folder.checkpoints, recipe.checkpoints.keep)
            states = {name: part.state_dict() for name, part in parts.stateful().items()}
            checkpoints.check_readable(states)
            _ = parts.fingerprints  # of the weights as they are now
        self.diagnosis = Diagnosis(self.trainer.config, precision=self.trainer.precision)
        self.history: list[Row] = []
        self.resumed_at: int | None = None
        self.before: Row = {}
        self.after: Row = {}
        self.measured: list[Sample] = []
        """Responses to the held-out prompts at the last evaluation."""
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

    def train(self, checkpoint: Path | None = None, notes: Sequence[str] = ()) -> Result:
        """Make the steps that are left, then save the policy, the summary and the report.

        Args:
            checkpoint: What to go on from; None: start.
            notes: What to tell first.
        """
        if checkpoint is not None:
            notes = [*notes, *self._go_on_from(checkpoint)]
        recipe, loop, tracking = self.recipe, self.loop, self.recipe.tracking
        total = recipe.total_steps
        self.started = time.perf_counter()
        with ExitStack() as stack:
            quiet = recipe.quiet or not self.main
            display = Display(total, first_step=loop.steps_done, quiet=quiet)
            self.display = stack.enter_context(display)
            trackers = Trackers(
                tracking.to if self.main else (),
                out=self.path,
                project=tracking.project,
                run_name=tracking.name,
                config=settings.as_mapping(recipe),
                resume_step=self.resumed_at,
            )
            self.trackers = stack.enter_context(closing(trackers))
            first = processes_told(self.accelerator)
            for note in [first, *notes, *self._introduction(), *trackers.notes]:
                display.note(note)
            interrupt = GracefulStop()
            if self.folder is not None:
                stack.enter_context(interrupt)
            if self.resumed_at is None:
                self._begin()
            reason = self.stopped
            while reason is None and loop.steps_done < self.last_step:
                enough = self._saved_if_it_fails(self._step)
                asked = self._any(interrupt.asked)
                reason = self.stopped or ("`on_step` ended it" if enough else None)
                last = reason is not None or loop.steps_done == self.last_step
                if last or asked or loop.steps_done % recipe.checkpoints.every == 0:
                    self._write_checkpoint(last=loop.steps_done == total)
                if asked and reason is None and loop.steps_done < total:
                    return self._end("interrupted", finished=False)
            return self._end(reason or f"all {loop.steps_done} steps are made")

    def _begin(self) -> None:
        """Measure and write what stands before the first step."""
        parts = self.parts
        if self.folder is not None:
            set_seed(parts.seed % 2**32)  # of what a reward, or a model, may draw from
        if self.main:
            self.folder.cut({})  # of a start that never came to its first checkpoint
        look, sampler = self.diagnosis.look_at_start, self.loop.sampler
        self._tell(look(parts.model, parts.tokenizer, sampler=sampler))
        row: Row = dict(FIRST_ROW)
        if parts.held_out is not None:
            row |= self._evaluate()
            self.before = self.after
        self.display.row(row)
        if self.main:  # not before: a start whose scorer fails at once is no run
            self.folder.write("recipe.yaml", settings.dump(self.recipe))
        self._write_row(row)
        self._remember(row)
        self._tell(self.diagnosis.look(row))

    def _saved_if_it_fails(self, step: Callable[[], bool]) -> bool:
        """Make a step; if it fails, take it back and save what was before, and say where."""
        if self.folder is None or self.accelerator.num_processes > 1:
            return step()  # the other processes wait elsewhere than in a write
        done, own = self.loop.steps_done, copy.deepcopy(self._own_state())
        undo = undoing.copied(self.trainer, wholly=self._can_undo)
        try:
            return step()
        except (Exception, Stopped) as error:  # a second Ctrl-C is to end at once
            made = self.loop.steps_done
            whole = made > done or undo()
            if made and whole and made not in map(checkpoints.step_of, self.checkpoints.all()):
                with suppress(OSError):  # what failed first is told
                    self._write_checkpoint(None if made > done else own)
            there = self.checkpoints.all()[-1:]
            error.add_note(where_it_stands(error, there, self._to_go_on, whole=whole))
            raise

    @cached_property
    def _can_undo(self) -> bool:
        return undoing.has_room(self.trainer)

    def _step(self) -> bool:
        """Make a step, and return whether it was enough for `on_step`."""
        loop, recipe, stop = self.loop, self.recipe, self.recipe.stop
        row = loop.step()
        step, measures = loop.steps_done, self.parts.held_out is not None
        row = {"step": step, "episodes": step * self.trainer.config.batch_size} | row
        if stop.kl is not None and row.get("objective/kl", 0.0) > stop.kl:
            self.stopped = f"the KL, {row['objective/kl']:.1f} nats, is above stop.kl, {stop.kl}"
        due = step % recipe.eval_every == 0 or step == self.last_step or bool(self.stopped)
        try:
            if measures and due:
                row |= self._evaluate()
            self._remember(row)
            enough = self._any(bool(self.on_step and self.on_step(step, self.history[-1])))
            if measures and enough and not due:
                row |= self._evaluate()  # the last one, as it turns out
        finally:  # the step is made, whatever fails after it
            self._write_row(row)
            if self.main:
                scores = [round(score, 4) for score in loop.all_scores.tolist()]
                self.folder.add("scores", {"step": step, "scores": scores})
                kept = self._rollouts(recipe.keep_rollouts)
                self.folder.add("rollouts", *({"step": step} | sample for sample in kept))
        assert loop.rollout is not None
        assert loop.scored is not None
        self._tell(self.diagnosis.look(row, loop.rollout, loop.scores, loop.scored.parts))
        self.display.row(row)
        if not self.display.console.quiet:
            for query, response in pairs_of(loop.rollout)[:1]:
                self.display.sample(query, response, loop.scores[0].item())
        if stop.patience is not None and self.without_gain >= stop.patience:
            self.stopped = self.stopped or (
                f"{self.without_gain} evaluations in a row were no better than that of step "
                f"{self.best_step} (stop.patience)"
            )
        return enough

    def _evaluate(self) -> Row:
        """Measure on the held-out prompts; keep the policy if it is the best so far."""
        assert self.parts.held_out is not None
        self.measured, figures = self.parts.held_out.measure()
        self.after = figures
        step = self.loop.steps_done
        if self.main:
            rows = [{"step": step} | sample for sample in self.measured]
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
            self._save_policy(NEXT_BEST)

    def samples(self) -> list[Sample]:
        """Return the responses of the last evaluation; if there is none, of the last batch."""
        return self.measured or self._rollouts(None)

    def _rollouts(self, most: int | None) -> list[Sample]:
        """Return the first responses of the last batch, if there are texts."""
        rollout, scored = self.loop.rollout, self.loop.scored
        if rollout is None or scored is None or rollout.response_texts is None:
            return []
        return samples_of(rollout, scored)[:most]

    def _any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        meet()  # `on_step` may have taken its time on one
        if flag:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _remember(self, *rows: Mapping[str, Any]) -> None:
        """Add figures to the history; what metrics.jsonl has no number for is NaN."""
        for row in rows:
            if row["step"] > 0 or self.parts.held_out is not None:
                named = {name: value for name, value in row.items() if name != "episodes"}
                self.history.append(
                    {k: math.nan if v is None else float(v) for k, v in named.items()}
                )

    # -- what is written -------------------------------------------------------------------------

    def _write_row(self, row: Row) -> None:
        if self.main:
            self.folder.add("metrics", row)
            self.trackers.log(row, int(row["step"]))

    def _tell(self, findings: list[Finding]) -> None:
        """Show what looks wrong, once."""
        for finding in findings:
            self.display.finding(finding)
            if self.main:
                self.folder.add("warnings", finding.row())
            if self.accelerator.is_main_process:
                self.on_finding(finding)

    def _save_policy(self, name: str) -> None:
        """Write the policy as plain transformers loads it, whole or not at all."""
        told: dict[str, Any] = {}
        if self.folder is not None and add_whole_weights(self.parts.model, told) and self.main:
            with checkpoints.replaced_folder(self.path / name) as partial, quiet_transformers():
                self.parts.model.save_pretrained(partial, **told)
                beside = partial / self.folder.critic.name
                if name == "policy" and beside.is_dir():
                    with checkpoints.replaced_folder(self.folder.critic) as moved:
                        shutil.copytree(beside, moved, dirs_exist_ok=True)
                    shutil.rmtree(beside)
                if name != "policy":
                    (partial / BEST_STEP).write_text(f"{self.loop.steps_done}\n")
        if self.folder is not None:
            meet()

    def _end(self, reason: str, *, finished: bool = True) -> Result:
        """Write how the run ended, and return it."""
        if finished:
            self._save_policy("policy")
        steps, note = self.loop.steps_done, self.display.note
        measured = steps == 0 or self.after != self.before  # else by no evaluation since the start
        summary = {
            "before": self.before,
            "after": self.after if measured else {},
            "best": {"step": self.best_step, self.recipe.checkpoints.best or "": self.best},
            "steps": steps,
            "total_steps": self.recipe.total_steps,
            "seconds": self._seconds(),
            "finished": finished,
            "reason": reason,
            "weights": self.parts.reward_weights,
            "parameters": self.parts.parameters,
            "trained": sum(weight.numel() for weight in self.trainer.trainable),
            "precision": self.trainer.precision.replace("no", "fp32"),
            "processes": self.accelerator.num_processes,
            "versions": VERSIONS,
            "ended": time.strftime("%Y-%m-%d %H:%M"),
        }
        if self.main:
            self.folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
        if self.main and finished:
            report = write_report([self.path], self.path)
            if not self.recipe.quiet:
                self.display.console.print(*before_after_tables(*read_runs([self.path])))
            took, all_made = duration(summary["seconds"]), self.last_step == self.recipe.total_steps
            begin = f"Finished in {took}: {reason}"
            if not all_made:
                begin = f"{steps} of {self.recipe.total_steps} steps are made, in {took}"
            note(f"{begin}. The tuned model is in {self.folder.policy}/; look at {report}.")
            if self.recipe.profile is not None:
                note(f"Where the time went is in {self.recipe.profile}/.")
        elif not finished:
            note(f"Stopped after step {steps}. Go on with: {self._to_go_on()}")
        return Result(self.path, self.parts.model, steps, summary, not finished)

    def _to_go_on(self, resume: str = "auto") -> str:
        if self.by_call:
            return f'the same call with resume="{resume}"'
        flag = "--resume" if resume == "auto" else f"--resume-{resume}"
        command = f"trl train {shlex.quote(str(self.folder.recipe))} {flag}"
        return command + flags_to_go_on(self.recipe, self.path)

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def _introduction(self) -> Iterator[str]:
        """Yield what the run is, and what the user may not expect of its settings."""
        recipe, config = self.recipe, self.trainer.config
        if recipe.episodes is not None and (rest := recipe.episodes % config.batch_size):
            yield (
                f"{recipe.episodes} episodes are {recipe.total_steps} whole steps of "
                f"{config.batch_size}: {rest} are left out."
            )
        if isinstance(rate := config.learning_rate, float) and rate >= TOO_FAST:
            yield f"ppo.learning_rate {rate:g} breaks most models: leave it out, or try 1e-5."
        yield from busy_told(self.accelerator)
        trained = sum(weight.numel() for weight in self.trainer.trainable)
        yield (
            f"{config.algorithm.upper()} on {recipe.model.name}: "
            f"{self.parts.parameters / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of them "
            f"trained, {self.trainer.precision.replace('no', 'fp32')}; "
            f"{self.parts.prompts}; in {self.path}/."
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        return {"random": random_state()} | self.parts.own_state()

    def _write_checkpoint(self, own: dict[str, Any] | None = None, *, last: bool = False) -> None:
        """Write all that the rest of the run depends on, as plain values and tensors.

        Args:
            own: Of this process, if it is not as it is now.
            last: Whether no step is to follow: the optimiser's state may then be left out.
        """
        if self.folder is None:
            return
        own_states = gather_object([own or self._own_state()])
        of_all = self.parts.state_dict() if self.main or self.parts.sharded else {}
        if last and of_all and not self.recipe.checkpoints.keep_optimizer:
            of_all["trainer"]["optimizer"], self.checkpoints.keep = None, 1
        of_all, parts = taken_apart(of_all)
        state: dict[str, Any] = {"step": self.loop.steps_done}
        if self.main:
            state |= {
                "format": FORMAT,
                "recipe": settings.as_mapping(self.recipe),
                **of_all,
                "of_each_process": own_states,
                "diagnosis": self.diagnosis.state_dict(),
                "figures": {"before": self.before, "after": self.after},
                "best": (self.best, self.best_step, self.without_gain, self._best_figure()),
                "stopped": (self.stopped, settings.as_mapping(self.recipe.stop)),
                "files": self.folder.record(),
                "versions": VERSIONS,
                "seconds": self._seconds(),
            }
        write_together(self.checkpoints, state, parts, self.accelerator)
        if self.main:
            self._settle_best()
        self.accelerator.wait_for_everyone()

    def _settle_best(self) -> None:
        """Let the best policy that the checkpoint knows of, and no later one, be in its place."""
        later, best = self.path / NEXT_BEST, self.folder.best
        checkpoints.put_back(best.with_name(".best.old"))
        if best_step(later) == self.best_step:
            checkpoints.remove(best)
            later.rename(best)
        checkpoints.remove(later)

    def _go_on_from(self, checkpoint: Path) -> list[str]:
        """Bring everything to where the checkpoint was written; return what to tell of it.

        Raises:
            SettingsError: if the settings are not those of the run so far.
            CheckpointError: if it is of another model, or, unless that is wanted, of a run of other
                parts.
        """
        check_same(self.folder, self.recipe)
        state = read_state(checkpoint)
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{checkpoint} was written by trl {state['versions']['trl']}, in a format that "
                "this version does not read."
            )
        if problem := self.parts.misfit(state):
            raise CheckpointError(f"{checkpoint} {problem}")
        if state["trainer"]["optimizer"] is None and state["step"] < self.recipe.total_steps:
            raise CheckpointError(
                f"{checkpoint} is the end of a run, without the state of the optimiser: no more "
                "steps can be made from it. Start another run on the tuned model, in "
                f"{self.folder.policy}; `keep_optimizer` keeps that state."
            )
        told = told_changes(checkpoint, state, self.recipe, self.parts, self.folder)
        if self.folder.changes and "prompts" in self.parts.others(state):
            state["loop"] |= {"order": [], "stream": None}  # a new pass begins, over those of now
        own, others = own_of(state, self.accelerator)
        self.parts.load_state_dict(put_together(state, checkpoint, self.parts.model), own)
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
            told += self.folder.cut(state["files"], state["step"])
            self.folder.write("recipe.yaml", settings.dump(self.recipe))
            (self.path / "summary.json").unlink(missing_ok=True)
            checkpoints.remove(self.folder.policy)  # of a later step, if it is there
            for path in self.checkpoints.all():
                if checkpoints.step_of(path) > state["step"]:  # of steps made again, or damaged
                    checkpoints.remove(path)
            self._settle_best()
        meet()
        if self._any(self.main and best_step(self.folder.best) > state["step"]):
            if self.best_step == state["step"]:
                self._save_policy("best")
            else:
                self.best, self.best_step, self.without_gain = None, 0, 0
                told.append(f"{self.folder.best} was of a later step: it is deleted.")
                checkpoints.remove(self.folder.best) if self.main else None
        self._remember(*self.folder.rows("metrics"))
        set_random_state(own["random"], self.parts.seed + state["step"])
        if (told := told + others) and self.recipe.quiet and self.main:
            warnings.warn(" ".join(told), stacklevel=4)
        return [*told, going_on(checkpoint, state, self.recipe)]

    def _best_figure(self) -> tuple[str | None, str]:
        return self.recipe.checkpoints.best, self.recipe.checkpoints.mode
