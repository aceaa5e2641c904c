"""Proximal policy optimisation of a language model: the second of the seed's two doors.

    trainer = PPOTrainer(model, ref_model, batch_size=64)
    stats = trainer.step(query, response, scores)

One `step` follows Ziegler et al. (arXiv:1909.08593): forward → rewards → advantages → optimise →
stats. The formulas are in `trl.optimization`, the model's side in `trl.models`. The relatives of
PPO that `PPOConfig.algorithm` names run the same step: see `trl.optimization.algorithms`.

Where this differs from the 2020 trainer:
 1. An update takes `minibatch_size` rollouts, not one (1 brings the old way back).
 2. Advantages are whitened over the whole batch, not within one sample.
 3. Rows may have any lengths; padding counts nowhere.
 4. The entropy in the stats is that of response tokens only.
 5. Gradients are clipped, and an update with wild importance ratios is skipped.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trl.anatomy import is_encoder_decoder, language_model, response_start, without_dropout
from trl.batch import ResponseOutput, Rollout, TokenLists
from trl.compute.budget import with_token_budget
from trl.compute.passes import gradient_passes, prepared, response_output, text_passes
from trl.compute.precision import check_first_ratio
from trl.compute.processes import (
    checked_everywhere,
    gathered,
    rows_that_count,
    scores_differ,
    share_of,
    whitened,
)
from trl.compute.updater import make_updater
from trl.config import PPOConfig, moved
from trl.config.errors import refuse
from trl.fit import out_of_memory_told
from trl.models.adapters import check_enabled
from trl.models.checks import are_finite, check_device, check_finite, check_fits, check_models
from trl.models.critic import critic_of, value_weights
from trl.models.reference import ReferenceKind
from trl.optimization.adam import set_rate
from trl.optimization.algorithms import Counts, compose, kl_kind
from trl.optimization.auto_rate import AutoRate
from trl.optimization.clock import Clock
from trl.optimization.corrections import check_prob_error
from trl.optimization.inputs import Pretraining, draw_texts, recorded_output, rollout_and_scores
from trl.optimization.kl import AdaptiveKLController, FixedKLController
from trl.optimization.losses import positive_weights, token_mean
from trl.optimization.objective import Targets, objective
from trl.optimization.rewards import RunningMoments, adjusted_scores, token_rewards
from trl.optimization.samples import Doubt
from trl.optimization.settings import resolve_config
from trl.optimization.state import check_state, fitting_state, optimizer_state
from trl.optimization.statistics import step_statistics, totals
from trl.optimization.update import PassStats, Update, checked_loss
from trl.optimization.value_pretraining import ValuePretraining

__all__ = ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer"]

Stats = dict[str, Any]

_LOST = "has made weights that are NaN or infinite, so load those that were saved last"


class PPOTrainer:
    """Tunes a language model with a value head by PPO, given queries, responses and scores.

    Args:
        model: The policy: a `CausalLMWithValueHead`, `Seq2SeqLMWithValueHead` or
            `GPT2HeadWithValueModel`. What is trained of it is float32.
        ref_model: What the KL penalty is measured against: a model, with or without a value head,
            or a kind of `trl.models.reference`. None: what suits the policy as it is now: its
            weights with the adapter switched off, its frozen layers with a second top, or else a
            frozen copy.
        config: Settings. None: made from `ppo_params`.
        optimizer: None: Adam over the policy's trainable weights.
        accelerator: None: one made for `config.precision`.
        pretraining: Texts for `config.pretraining_coef`: given a number of rows, returns so many
            1-D tensors of token ids. Each process asks for its share; give each other texts.
        shard: Let each process hold its part of every weight of policy and reference, both of which
            are changed for it (torch's FSDP2, see docs/howto/sharding.md). All processes then
            sample, save and score at the same time. One process alone holds all.
        offload: Hold these parts, and what the optimiser keeps, in the CPU's memory: a device then
            has gathered layers only. Needs `shard`.
        **ppo_params: Fields of `PPOConfig`, also by their names of 2020 (`lr`, `lam`, `target`,
            `horizon`, `adap_kl_ctrl`). A name close to one of them is a TypeError; others
            are ignored with a warning, since notebooks of that time pass their whole settings.

    Attributes:
        config: The settings in force.
        algorithm: What the settings make of it; another `Algorithm` may take its place.
        kl_ctl: The KL controller; its `.value` is the coefficient β of the next step.
        auto_rate: Sets the rate of updates with learning_rate="auto"; else None.
        way_factor: Factor on the way of a step then, √target: what a schedule changes.
        steps_done: Steps so far.
        accelerator: Owns device, precision and processes.
        optimizer: The optimiser.
        pretraining: See above.

    Raises:
        TypeError, ValueError: for a model or a setting that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | ReferenceKind | None = None,
        config: PPOConfig | None = None,
        *older: Any,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
        pretraining: Pretraining | None = None,
        shard: bool = False,
        offload: bool = False,
        **ppo_params: Any,
    ) -> None:
        if older or isinstance(model, PPOConfig):
            got = "the order of older releases of TRL, (config, model, ref_model, tokenizer)"
            rule = "stand first: PPOTrainer(model, ref_model, config)"
            refuse("model", rule, got, "the tokenizer belongs to Sampler", error=TypeError)
        self.config = config = resolve_config(config, ppo_params)
        self.algorithm = compose(config)
        check_models(model, ref_model)
        if ref_model == "none" and config.init_kl_coef != 0:
            fix = "set it, or leave `ref_model` out"
            refuse("init_kl_coef", "be 0 without a reference", config.init_kl_coef, fix)
        self._encodes = is_encoder_decoder(model)
        if config.pretraining_coef and self._encodes:
            rule = "be 0 for an encoder-decoder, whose pretraining is not to go on with a text"
            refuse("pretraining_coef", rule, config.pretraining_coef)
        if pretraining is not None and not config.pretraining_coef:
            refuse("pretraining_coef", "be > 0 with `pretraining`", "0")
        self.pretraining = pretraining

        parts: Any = {"shard": shard, "offload": offload}
        self.updater = make_updater(model, config, optimizer, accelerator, **parts)
        self.config = config = with_token_budget(config, self.updater)
        self.reference = self.updater.make_reference(ref_model)
        self.accelerator, self.precision = self.updater.accelerator, self.updater.precision
        self.model, self.policy = model, self.updater.policy
        self.ref_model = self.reference.model if self.reference else None
        share = partial(share_of, self.accelerator)
        self._update_rows = share("minibatch_size", config.update_size)
        self._text_rows = (rows := config.pretraining_rows) and share("pretraining_rows", rows)
        self.kl_ctl = FixedKLController(config.init_kl_coef)
        if config.adaptive_kl:
            beta, target, horizon = config.init_kl_coef, config.kl_target, config.kl_horizon
            self.kl_ctl = AdaptiveKLController(beta, target, horizon)
        self.auto_rate = AutoRate.of(config, self.precision)
        self.way_factor = 1.0
        self.score_moments = RunningMoments()
        self.value_pretraining = ValuePretraining(config.in_force("value_pretraining") or 0)
        self.steps_done = 0
        self._doubt = Doubt()
        self.clock = Clock()
        self.shuffle = torch.Generator().manual_seed(config.seed)

    def __getattr__(self, name: str) -> Any:
        what = moved.METHODS.get(name)
        told = what and moved.told(f"PPOTrainer.{name}", what)
        raise AttributeError(told or f"PPOTrainer has no attribute {name!r}.")

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser."""
        return self.updater.optimizer

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The weights that are trained."""
        return self.updater.trainable

    @property
    def warming_up(self) -> bool:
        """Whether the step at hand, or the next, trains the values alone."""
        first = self.steps_done < self.config.value_warmup_steps
        return self.algorithm.critic and (first or not self.value_pretraining.over)

    @out_of_memory_told("taking a step of PPO")
    def step(
        self,
        query: TokenLists | Rollout,
        response: TokenLists | Tensor | Sequence[float] | None = None,
        scores: Tensor | Sequence[float] | None = None,
        *,
        response_masks: Sequence[Tensor] | Tensor | None = None,
    ) -> Stats:
        """Run one PPO step: `step(query, response, scores)` or `step(rollout, scores)`.

        Args:
            query: B 1-D tensors of token ids of any lengths, a tensor [B, Q], or a `Rollout`.
            response: B 1-D tensors of token ids of any lengths, or a tensor [B, R].
            scores: [B] one number for each response, higher is better; or [B, R] (also a list of
                1-D tensors) one for each response token, whose sum is the score. None in a list:
                nothing has a say on that response. The step is then that of a batch without it,
                nor, where responses are compared, without one that is left alone in its group.
            response_masks: B masks shaped like the responses, True on the tokens that the policy
                wrote; the others (the output of a tool, another speaker) are read but not trained.

        Returns:
            The stats of the step: floats and numpy arrays by the names of the 2020 trainer; those
            of returns and values only if the algorithm has a critic. If nothing has a say on any
            response, there is no update, and a warning says so.

        Raises:
            TypeError, ValueError: for bad input; nothing has changed then.
            RuntimeError: inside of `sampling()`, or if the recorded log-probs are not those of the
                policy.
            FloatingPointError: if a loss or gradient is not finite; the weights are those after
                the last good update, unless that one has made them NaN or infinite, as it says.
        """
        clock = self.clock
        clock.restart()
        given = partial(self._checked, query, response, scores, response_masks)
        groups = self.algorithm.groups
        rollout, scores, says, texts = checked_everywhere(self.accelerator, given, groups=groups)
        counting = rows_that_count(self.accelerator, rollout, scores, says)
        if counting is None:
            return self._no_update(len(rollout))
        rollout, scores, counted = counting
        models = [model for model in (self.model, self.ref_model) if model is not None]
        with (
            torch.inference_mode(False),  # wherever it is called
            torch.enable_grad(),
            without_dropout(*models),
            self.updater.for_step(self._at_rest()),
        ):
            with clock.part("policy"):
                rollout = prepared(self.updater, rollout, self.config)
                old = self.before_update(rollout)
            with clock.part("reference"):
                ref_logprobs = self.reference_logprobs(rollout, old)
            check_finite("model", old.logprobs)
            check_finite("ref_model", ref_logprobs)
            if doubt := self._doubt.of(rollout, old, self.config.temperature):
                warnings.warn(doubt, stacklevel=3)
            clock.lap("forward_pass")

            mask, in_reward = rollout.response_mask, self.algorithm.kl_in == "reward"
            sums = totals(scores)  # as they were given
            moments, scores = self.normalized(scores, rollout.ended, mask, counted)
            kl_coef, kind = self.kl_ctl.value * in_reward, kl_kind(self.config, self.algorithm)
            rewards, non_score_rewards = token_rewards(
                old.logprobs, ref_logprobs, scores, mask, kl_coef=kl_coef, kl_estimator=kind
            )
            clock.lap("compute_rewards")

            mask = mask if counted is None else mask & counted[:, None]
            targets = self.targets(rollout, old, ref_logprobs, rewards, mask, sums)
            updates = self.optimize(rollout, targets, texts)
            if not are_finite(self.trainable):
                raise FloatingPointError(f"the last update {_LOST}. Lower `learning_rate`.")
            clock.lap("optimize_step")

        of_all = partial(gathered, self.accelerator, counted=counted)
        stats = step_statistics(
            rollout, scores, targets, non_score_rewards, updates, self.kl_ctl.value, of_all
        )
        if self.reference and not self.warming_up:  # β steers a policy that moves
            self.kl_ctl.update(stats["objective/kl"], len(stats["objective/kl_dist"]))
        if self.warming_up:
            self.value_pretraining.count(stats["ppo/val/var_explained"])
        self.score_moments = moments
        self.steps_done += 1
        clock.lap("calc_stats")
        return stats | (self.auto_rate.stats() if self.auto_rate else {}) | clock.stats()

    def _no_update(self, rows: int) -> Stats:
        """End a step on so many rows that all do not count."""
        what = f"`scores` must be numbers for some responses, got None for all {rows}"
        warnings.warn(f"{what}: this step makes no update.", stacklevel=4)
        self.steps_done += 1
        return {"ppo/updates": 0.0, "ppo/skipped_updates": 0.0} | self.clock.stats()

    def autocast(self) -> torch.autocast:
        """Return a context in which models compute at the trainer's precision, as for sampling."""
        return self.updater.autocast()

    def sampling(self) -> AbstractContextManager[None]:
        """Inside, models compute at the trainer's precision; their weights must not change."""
        return self.updater.sampling()

    # -- forward ---------------------------------------------------------------------------------

    @out_of_memory_told("scoring responses with a model")
    def forward_pass(self, model: nn.Module, rollout: Rollout) -> ResponseOutput:
        """Return log-probs, values and entropies [B, R] under `model`, in passes that fit."""
        return response_output(model, rollout, self.config)

    def before_update(self, rollout: Rollout) -> ResponseOutput:
        """Return what the policy gives before its first update; its log-probs are `old_logprobs`.

        That is where the ratio starts. With `reuse_recorded` they are the `behaviour_logprobs`,
        what has been recorded by whatever wrote the tokens: the two are then equal. Else, or if
        nothing was recorded, the policy computes them anew.
        """
        if self.reuses(rollout):
            return recorded_output(rollout)
        with self.updater.in_use():
            return self.forward_pass(self.policy, rollout)

    def reuses(self, rollout: Rollout) -> bool:
        """Whether what was recorded stands for what the policy gives before its first update."""
        known = rollout.values is not None or not self.algorithm.critic
        return self.config.reuse_recorded and known and rollout.behaviour_logprobs is not None

    def reference_logprobs(self, rollout: Rollout, old: ResponseOutput) -> Tensor:
        """Return the reference's log-probs [B, R]; the policy's own if there is no reference."""
        if self.reference is None:
            return old.logprobs
        with self.updater.as_reference() as reference:
            return self.forward_pass(reference, rollout).logprobs

    # -- rewards and advantages ------------------------------------------------------------------

    def normalized(
        self,
        scores: Tensor,
        ended: Tensor | None = None,
        mask: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> tuple[RunningMoments, Tensor]:
        """Return the running moments with these scores, and the scores as configured.

        For scores [B, R] of single tokens the moments are those of their sums [B].

        Args:
            scores: [B] or [B, R].
            ended: [B] whether the responses ended by themselves: others may lose a penalty.
            mask: [B, R] their tokens, for scores of single tokens.
            counted: [B] which rows count; None: all.
        """
        moments = copy.deepcopy(self.score_moments)
        how: Any = {"ended": ended, "mask": mask}
        how["gathered"] = partial(gathered, self.accelerator, counted=counted)
        return moments, adjusted_scores(scores, moments, self.config, **how)

    def targets(
        self,
        rollout: Rollout,
        old: ResponseOutput,
        ref_logprobs: Tensor,
        rewards: Tensor,
        mask: Tensor,
        scores: Tensor,
    ) -> Targets:
        """Return what the updates learn from, for the tokens [B, R] of the mask; the scores [B] as
        they were given say which responses are good.
        """
        advantages, returns = self.advantages(rewards, old.values, mask, rollout.group_ids)
        measured = ref_logprobs if self.reference else None
        sampled = None if self.reuses(rollout) else rollout.behaviour_logprobs
        if self.auto_rate:
            ids = rollout.group_ids if self.algorithm.groups else None
            self.auto_rate.learns = scores_differ(self.accelerator, scores, ids, mask.any(1))
        positive = positive_weights(scores, mask, self.config, self.accelerator.reduce)
        learned = advantages, returns, measured, sampled, positive
        return Targets(old.logprobs, old.values, mask, *learned)

    def advantages(
        self, rewards: Tensor, values: Tensor, mask: Tensor, group_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return advantages, whitened if the algorithm does, and returns [B, R] if it has any."""
        if self.config.whiten_rewards:
            rewards = whitened(self.accelerator, rewards, mask, shift_mean=False)
        advantages, returns = self.algorithm.estimate(rewards, values, mask, group_ids, self.config)
        if (critic := self.algorithm.critic) != (returns is not None):
            rule = f"give returns if, and only if, its `critic` is True, not {critic}"
            refuse("algorithm.estimate", rule, "None" if returns is None else "returns")
        if self.algorithm.whiten:
            advantages = whitened(self.accelerator, advantages, mask)
        return advantages, returns

    # -- optimise --------------------------------------------------------------------------------

    def optimize(
        self, rollout: Rollout, targets: Targets, texts: Sequence[Rollout] = ()
    ) -> list[Update]:
        """Update the policy over shuffled minibatches, `ppo_epochs` times.

        Args:
            rollout: B rows.
            targets: What to learn from it.
            texts: For each update, what to keep predicting; none: nothing.
        """
        order = self.shuffle.get_state()
        try:
            return list(self._updates(rollout, targets, texts))
        except BaseException:
            self.shuffle.set_state(order)  # another try draws the same
            raise

    def _updates(
        self, rollout: Rollout, targets: Targets, texts: Sequence[Rollout]
    ) -> Iterator[Update]:
        """Make one update after the other, and yield what is known of each."""
        made, limit = 0, self.config.max_approxkl or math.inf
        auto = None if self.warming_up else self.auto_rate
        if auto:
            updates = self.config.ppo_epochs * math.ceil(len(rollout) / self._update_rows)
            auto.begin(updates, self.way_factor)
        for _ in range(self.config.ppo_epochs):
            squares = tokens = 0.0
            for rows in self._minibatches(rollout):
                update = self._gradient(rollout, rows, targets, texts[made] if texts else None)
                if made == 0:
                    low = any(w.dtype != torch.float32 for w in self.model.parameters())
                    precision = "bf16" if low and self.precision == "no" else self.precision
                    check_first_ratio(update.means["policy/abs_log_ratio"], precision)
                    check_first_ratio(update.means.get("val/gap", 0.0), precision, "values")
                    check_prob_error(update.means, self.config)
                made += 1
                squares += update.means["policy/approxkl"] * update.tokens
                tokens += update.tokens
                too_far = squares / tokens > limit
                if auto:
                    set_rate(self.optimizer, auto.measured(update.means["policy/approxkl"]))
                    too_far |= auto.too_far
                with self.clock.part("optimizer"):
                    self._apply(update, stop=too_far)
                if auto and update.applied:
                    auto.applied()
                yield update
                if too_far:
                    return
        if auto and made == 1:  # no later update has measured what it did
            set_rate(self.optimizer, auto.measured(self._approxkl(rollout, targets)))

    def _approxkl(self, rollout: Rollout, targets: Targets) -> float:
        """Return ½·mean((log π − log π_old)²) over the tokens of all processes."""
        with self.updater.responder.without_critic():
            new, mask = self.forward_pass(self.policy, rollout), targets.mask
        squares = torch.where(mask, (new.logprobs - targets.old_logprobs).square(), 0.0)
        total, tokens = self.accelerator.reduce(torch.stack([squares.sum(), mask.sum()]))
        return float(0.5 * total / tokens)

    def _minibatches(self, rollout: Rollout) -> tuple[Tensor, ...]:
        """Return the shuffled rows of each update; the last may be smaller.

        Responses to one query stand side by side: it is then computed once for most of them.
        """
        return rollout.shuffled_rows(self.shuffle).split(self._update_rows)

    def _gradient(
        self, rollout: Rollout, rows: Tensor, targets: Targets, text: Rollout | None
    ) -> Update:
        """Compute the gradient of one minibatch, in passes that fit, and its statistics.

        Every pass divides by the counts of the whole minibatch of all processes, so that the
        gradient depends neither on the size of a pass nor on the number of processes.
        """
        self.updater.start()
        surprise = None if text is None else self._pretraining_gradient(text)
        mask = targets.mask[rows]
        counts = Counts(*self.accelerator.reduce((mask.sum(), mask.any(1).sum())))
        parts: list[PassStats] = []
        passes = gradient_passes(self.updater, rollout, targets, rows, self.config)
        for part, of_part, last in passes:
            with self.updater.one_pass(last):
                with self.clock.part("forward"):
                    new = self.policy(part)
                    loss, pass_stats = checked_loss(self.loss(new, of_part, of_part.mask, counts))
                with self.clock.part("backward"):
                    self.updater.backward(loss, new)
            parts.append(pass_stats)
        self.updater.finish()
        update = Update.of_passes(parts, float(counts.tokens), self.accelerator.reduce)
        if surprise is not None:
            update.means["loss/pretraining"] = mean = float(self.accelerator.reduce(surprise))
            update.means["loss/total"] += self.config.pretraining_coef * mean
        return update

    def loss(
        self, new: ResponseOutput, targets: Targets, mask: Tensor, counts: Counts
    ) -> tuple[Tensor, PassStats]:
        """Return a pass's share of the loss of its minibatch, and its statistics: `objective`."""
        how: Any = {"kl_coef": self.kl_ctl.value, "only_values": self.warming_up}
        return objective(new, targets, mask, counts, self.algorithm, self.config, **how)

    def _pretraining_gradient(self, text: Rollout) -> Tensor:
        """Add the gradient of pretraining_coef · mean_t −log π(token), at temperature 1.

        Returns:
            This process's share of the mean [].
        """
        tokens = self.accelerator.reduce(text.response_mask.sum())
        shares = []
        for part, mask in text_passes(self.updater, text, self.config):
            with self.updater.one_pass(last=False), self.updater.responder.without_critic():
                with self.clock.part("forward"):
                    output = self.policy(part, temperature=1.0)
                    share = token_mean(-output.logprobs, mask, tokens)
                with self.clock.part("backward"):
                    self.updater.backward(self.config.pretraining_coef * share, output)
            shares.append(share.detach())
        return torch.stack(shares).sum()

    def _apply(self, update: Update, *, stop: bool) -> None:
        """Apply the gradient of an update, if it is sound and not to `stop`."""
        total, ratio = update.means["loss/total"], update.means["policy/mean_ratio"]
        wild = ratio > self.config.ratio_threshold
        try:
            update.grad_norm = self.updater.clip(self.config.max_grad_norm)
            sound = math.isfinite(update.grad_norm)
            if not math.isfinite(total) or not (sound or self.updater.skips_overflow):
                found = f"the loss is {total} and the gradient's norm is {update.grad_norm}"
                kept = "this update was not applied, the model holds the last good weights"
                kept = kept if are_finite(self.trainable) else f"an earlier update {_LOST}"
                fix = "Lower `learning_rate`, or check the scores for outliers."
                raise FloatingPointError(f"{found}: {kept}. {fix}")
            if not wild and not stop:
                update.applied = self.updater.apply() and sound
            elif wild:
                most = f"`ratio_threshold` {self.config.ratio_threshold}"
                mean = f"its mean importance ratio is {ratio:.1f}, more than {most}"
                fix = "If this goes on, lower `learning_rate`."
                warnings.warn(f"an update was skipped: {mean}. {fix}", stacklevel=4)
        finally:
            self.updater.end()

    # -- the state of a run ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs, beside the policy's weights, to go on exactly as it would have.

        Plain values and tensors on the CPU, copied: `torch.load(..., weights_only=True)` reads
        what `torch.save` makes of them. To resume: build the trainer on the model that the run
        began with, so that the reference is the same; load the policy's weights into that model;
        then call `load_state_dict`. A learning-rate schedule has a state of its own. Of sharded
        weights each process gets its parts, for `torch.distributed.checkpoint`.
        """
        scaler = self.accelerator.scaler
        large = {"optimizer": optimizer_state(self.optimizer)}
        return self.small_state() | large | {"scaler": scaler and scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: if it is not the state of such a trainer; nothing has changed then.
        """
        scaler = self.accelerator.scaler
        scaled, auto = scaler is not None, self.auto_rate is not None
        check_state(state, self.optimizer, scaled=scaled, auto=auto)
        kept = fitting_state(self.optimizer, state["optimizer"]["state"])  # a copy
        self.optimizer.load_state_dict(kept)
        self.load_small_state(state)
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])

    def small_state(self) -> dict[str, Any]:
        """Return what a step changes besides weights, optimiser and scaler, copied."""
        parts = {name: part and part.state_dict() for name, part in self._parts().items()}
        return {"steps_done": self.steps_done, "shuffle": self.shuffle.get_state(), **parts}

    def load_small_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `small_state` returned, on the same trainer or one like it."""
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])
        self.steps_done = state["steps_done"]
        self.shuffle.set_state(state["shuffle"].cpu())

    def _parts(self) -> dict[str, Any]:
        parts = {"kl_controller": self.kl_ctl, "score_moments": self.score_moments}
        return parts | {"auto_rate": self.auto_rate, "value_pretraining": self.value_pretraining}

    # -- what a step is given --------------------------------------------------------------------

    def _at_rest(self) -> list[nn.Parameter]:
        """Return the weights that the step at hand leaves alone."""
        of_values = value_weights(self.model)
        if self.warming_up:
            return [weight for weight in self.model.parameters() if weight not in of_values]
        return [] if self.algorithm.critic else list(of_values)

    def _checked(self, *arguments: Any) -> tuple[Rollout, Tensor, Tensor | None, list[Rollout]]:
        """Return rollout and scores on the trainer's device, which rows count, and pretraining
        texts; or raise.
        """
        check_enabled(self.model)
        start = response_start(language_model(self.model)) if self._encodes else ()
        rollout, scores, counted = rollout_and_scores(
            *arguments, config=self.config, algorithm=self.algorithm, start=start
        )
        device = self.accelerator.device
        rollout = rollout.to(device)  # its parts may lie on several, a query on the CPU say
        models = {"model": self.model, "ref_model": self.ref_model, "critic": critic_of(self.model)}
        for name, model in models.items():
            if model is not None:
                check_fits(model, rollout)
                check_device(model, name, device)
        self.kl_ctl.check_steps(len(rollout) * self.accelerator.num_processes)
        texts: list[Rollout] = []
        if self.config.pretraining_coef and not self.warming_up:
            sizes = len(rollout), self._update_rows, self._text_rows
            texts = draw_texts(self.pretraining, self.config, *sizes)
        for text in texts:
            check_fits(self.model, text)
        return rollout, scores.to(device), counted, [text.to(device) for text in texts]
