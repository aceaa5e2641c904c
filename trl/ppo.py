"""Proximal policy optimisation of a language model: the second of the seed's two doors.

    trainer = PPOTrainer(model, ref_model, batch_size=64)
    stats = trainer.step(query, response, scores)

One `step` follows Ziegler et al. (arXiv:1909.08593): forward → rewards → advantages → optimise →
stats. The formulas are in `trl.optimization`, the model's side in `trl.models`.

Where this differs from the 2020 trainer:
 1. An update takes `minibatch_size` rollouts, not one (1 brings the old way back).
 2. Advantages are whitened over the whole batch, not within one sample.
 3. Rows may have any lengths; padding counts nowhere.
 4. The entropy in the stats is that of response tokens only.
 5. Gradients are clipped, and an update with wild importance ratios is skipped.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trl.anatomy import language_model, vocabulary_size, without_dropout
from trl.batch import Rollout, TokenLists, score_tensor
from trl.config import PPOConfig, closest
from trl.core import masked_mean, masked_var, masked_whiten
from trl.models.adapters import check_enabled
from trl.models.checks import (
    check_apart,
    check_device,
    check_fits,
    check_left_padding,
    check_policy,
)
from trl.models.gradients import Gradients
from trl.models.memory import keep_freed_memory
from trl.models.precision import LOW_PRECISION, MIXED_PRECISION, make_accelerator
from trl.models.reference import ReferenceKind, make_reference
from trl.models.response import ResponseModel, ResponseOutput
from trl.models.working_weights import WorkingWeights
from trl.optimization.advantages import gae
from trl.optimization.kl import AdaptiveKLController, FixedKLController
from trl.optimization.losses import clipped_policy_loss, clipped_value_loss, token_mean
from trl.optimization.rewards import RunningMoments, normalize_scores, token_rewards
from trl.optimization.update import PassStats, Update

__all__ = ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer"]

Stats = dict[str, Any]

# Mean |log ratio| of the very first minibatch above which something is wrong, not just rounded.
RATIO_TOLERANCE = {"no": 1e-3, "bf16": 0.1, "fp16": 0.1}


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
        **ppo_params: Fields of `PPOConfig`, also by their names of 2020 (`lr`, `lam`, `target`,
            `horizon`, `adap_kl_ctrl`). Unknown ones are named in a warning and left out, since
            notebooks of that time pass their whole settings.

    Attributes:
        config: The settings in force.
        kl_ctl: The KL controller; its `.value` is the coefficient β of the next step.
        accelerator: Owns device, precision and processes.
        optimizer: The optimiser.

    Raises:
        TypeError, ValueError: for a model or a setting that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | ReferenceKind | None = None,
        config: PPOConfig | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
        **ppo_params: Any,
    ) -> None:
        self.config = config = _resolve_config(config, ppo_params)
        check_policy(model, "model")
        if isinstance(ref_model, nn.Module):
            check_policy(ref_model, "ref_model")
        _check_pair(model, ref_model)
        for each in (model, ref_model):
            if isinstance(each, nn.Module):
                check_left_padding(language_model(each))
        if ref_model == "none" and config.init_kl_coef != 0:
            raise ValueError(
                f"`init_kl_coef` must be 0 without a reference, got {config.init_kl_coef}: set it, "
                "or leave `ref_model` out."
            )

        self.accelerator = accelerator or make_accelerator(config.precision)
        _check_accelerator(self.accelerator, config)
        if config.keep_freed_memory and self.accelerator.device.type == "cpu":
            keep_freed_memory()
        # Kept here: the accelerators of a process share one state, which a later one may change.
        self.precision = self.accelerator.mixed_precision
        exact_division(config.update_size, self.accelerator.num_processes)
        self.model = model
        self.own = ResponseModel(model, config.temperature)
        self.policy = self.accelerator.prepare_model(self.own)
        # After the policy is on its device, where a copy is then made.
        dtype = LOW_PRECISION.get(self.precision)
        self.working = WorkingWeights(model, dtype)
        self.reference = make_reference(model, self.own, ref_model)
        self.working_reference = self._working_reference(dtype)
        self.ref_model = self.reference.model if self.reference else None
        if self.ref_model is not None:
            self.reference.module = self.accelerator.prepare_model(
                self.reference.module, evaluation_mode=True
            )
        elif self.reference:
            self.reference.module = self.policy
        self.trainable = _trainable(model, optimizer)
        # Processes exchange gradients of the weights themselves, where autograd leaves them.
        self.alone = self.policy is self.own
        self.optimizer = self.accelerator.prepare_optimizer(
            optimizer or _adam(self.trainable, config)
        )
        self.kl_ctl = (
            AdaptiveKLController(config.init_kl_coef, config.kl_target, config.kl_horizon)
            if config.adaptive_kl
            else FixedKLController(config.init_kl_coef)
        )
        self.score_moments = RunningMoments()
        self._sampling = False
        self.clock = Clock()
        self.shuffle = torch.Generator().manual_seed(config.seed)

    def _working_reference(self, dtype: torch.dtype | None) -> WorkingWeights:
        """Return the working weights of the reference, those that are not the policy's."""
        if self.reference is None or self.reference.kind == "adapters-off":
            return self.working
        if self.reference.kind == "shared-trunk":
            return WorkingWeights(self.own.trunk.reference_layers, dtype)
        working = WorkingWeights(self.reference.model, dtype)
        if self.reference.kind == "copy":
            working.replace()
        return working

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
                1-D tensors) one for each response token, whose sum is the score.
            response_masks: B masks shaped like the responses, True on the tokens that the policy
                wrote; the others (the output of a tool, another speaker) are read but not trained.

        Returns:
            The stats of the step: floats and numpy arrays by the names of the 2020 trainer.

        Raises:
            TypeError, ValueError: for bad input; nothing has changed then.
            FloatingPointError: if a loss or gradient is not finite; the weights are those after
                the last good update.
        """
        clock = self.clock
        clock.restart()
        if self._sampling:
            raise RuntimeError("`step` must be called outside of `sampling()`: it changes weights.")
        check_enabled(self.model)
        rollout, scores = self._checked(query, response, scores, response_masks)
        # Anew for every step: a user may have frozen some weights since, or watch a gradient.
        self.trainable = _trainable(self.model, self.optimizer)
        self.gradients = Gradients(self.model, self.trainable, self.working.weights)
        self.working.gradients = self.gradients

        with ExitStack() as stack:
            models = [self.model] + ([self.ref_model] if self.ref_model else [])
            stack.enter_context(without_dropout(*models))
            if self.alone:
                stack.enter_context(self.working.in_use())
            with clock.part("policy"):
                rollout = self.with_trunk_states(rollout)
                old = self.before_update(rollout)
            with clock.part("reference"):
                ref_logprobs = self.reference_logprobs(rollout, old)
            _check_finite("model", old.logprobs)
            _check_finite("ref_model", ref_logprobs)
            clock.lap("forward_pass")

            mask = rollout.response_mask
            moments, scores = self.normalized(scores)
            rewards, non_score_rewards = token_rewards(
                old.logprobs,
                ref_logprobs,
                scores,
                mask,
                kl_coef=self.kl_ctl.value,
                kl_estimator=self.config.kl_estimator,
            )
            clock.lap("compute_rewards")

            advantages, returns = self.advantages(rewards, old.values, mask)
            updates = self.optimize(rollout, old, advantages, returns)
            clock.lap("optimize_step")

        stats = self.statistics(
            scores, old, ref_logprobs, non_score_rewards, returns, mask, updates
        )
        if self.reference:
            self.kl_ctl.update(stats["objective/kl"], len(scores) * self.accelerator.num_processes)
        self.score_moments = moments
        clock.lap("calc_stats")
        return stats | clock.stats()

    def autocast(self) -> torch.autocast:
        """Return a context in which models compute at the trainer's precision, as for sampling."""
        dtype = LOW_PRECISION.get(self.precision)
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype is not None)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, models compute at the trainer's precision; their weights must not change."""
        outer, self._sampling = self._sampling, True
        try:
            with self.autocast(), self.own.quick.in_use(), self.working.packed():
                yield
        finally:
            self._sampling = outer

    # -- forward ---------------------------------------------------------------------------------

    @torch.no_grad()
    def forward_pass(
        self, model: nn.Module, rollout: Rollout, working: WorkingWeights | None = None
    ) -> ResponseOutput:
        """Return log-probs, values and entropies [B, R] under `model`, in passes that fit."""
        whole = ResponseOutput(
            *(torch.zeros_like(rollout.responses, dtype=torch.float32) for _ in range(3))
        )
        with working.in_use() if working else nullcontext():
            for rows in self._micro_batches(rollout):
                part = model(rollout.select(rows))
                for target, source in zip(whole, part, strict=True):
                    target[rows, : source.shape[1]] = source
        return whole

    def before_update(self, rollout: Rollout) -> ResponseOutput:
        """Return what the policy gives before its first update: recorded, or computed now."""
        recorded = rollout.logprobs is not None and rollout.values is not None
        if not (recorded and self.config.reuse_recorded):
            return self.forward_pass(self.policy, rollout, self.working)
        columns = (rollout.logprobs, rollout.values, torch.zeros_like(rollout.logprobs))
        return ResponseOutput(*(torch.where(rollout.response_mask, x, 0.0) for x in columns))

    def reference_logprobs(self, rollout: Rollout, old: ResponseOutput) -> Tensor:
        """Return the reference's log-probs [B, R]; the policy's own if there is no reference."""
        if self.reference is None:
            return old.logprobs
        with self.reference.switched():
            return self.forward_pass(
                self.reference.module, rollout, self.working_reference
            ).logprobs

    @torch.no_grad()
    def with_trunk_states(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the states that its passes start from, if layers are frozen."""
        if self.own.trunk is None:
            return rollout
        whole: Tensor | None = None
        columns = rollout.queries.shape[1]
        with self.autocast():
            for rows in self._micro_batches(rollout):
                part = self.own.trunk_states(rollout.select(rows))
                if whole is None:
                    shape = rollout.input_ids[:, :-1].shape
                    whole = part.new_zeros(*shape, part.shape[-1])
                first, last = rollout.window(rows)
                whole[rows, first : columns + last - 1] = part
        return replace(rollout, trunk_states=whole)

    def _micro_batches(self, rollout: Rollout, rows: Tensor | None = None) -> Iterator[Tensor]:
        return rollout.micro_batches(
            rows, max_rows=self.config.forward_batch_size, max_tokens=self.config.token_budget
        )

    # -- rewards and advantages ------------------------------------------------------------------

    def normalized(self, scores: Tensor) -> tuple[RunningMoments, Tensor]:
        """Return the running moments with these scores, and the scores as configured.

        For scores [B, R] of single tokens the moments are those of their sums [B].
        """
        config = self.config
        moments = copy.deepcopy(self.score_moments)
        if config.center_scores or config.scale_scores:
            moments.update(self._gathered(_totals(scores)))
        scores = normalize_scores(
            scores,
            moments,
            center=config.center_scores,
            scale=config.scale_scores,
            clip=config.clip_scores,
        )
        return moments, scores

    def advantages(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return whitened advantages and returns [B, R]."""
        config = self.config
        if config.whiten_rewards:
            rewards = self._whitened(rewards, mask, shift_mean=False)
        advantages, returns = gae(
            rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
        )
        return self._whitened(advantages, mask, shift_mean=True), returns

    def _whitened(self, values: Tensor, mask: Tensor, *, shift_mean: bool) -> Tensor:
        """Whiten over the batch of all processes."""
        everyone = masked_whiten(self._gathered(values), self._gathered(mask), shift_mean)
        first = self.accelerator.process_index * len(values)
        return everyone[first : first + len(values), : values.shape[1]]

    # -- optimise --------------------------------------------------------------------------------

    def optimize(
        self, rollout: Rollout, old: ResponseOutput, advantages: Tensor, returns: Tensor
    ) -> list[Update]:
        """Update the policy over shuffled minibatches, `ppo_epochs` times."""
        config = self.config
        updates: list[Update] = []
        with self.gradients.collect() if self.alone else nullcontext():
            for _ in range(config.ppo_epochs):
                squares = tokens = 0.0
                for rows in self._minibatches(rollout):
                    update = self._accumulate_gradient(rollout, rows, old, advantages, returns)
                    if not updates:
                        self._check_first_ratio(update)
                    squares += update.means["policy/approxkl"] * update.tokens
                    tokens += update.tokens
                    limit = config.max_approxkl
                    too_far = limit is not None and squares / tokens > limit
                    with self.clock.part("optimizer"):
                        self._apply(update, stop=too_far)
                    updates.append(update)
                    if too_far:
                        return updates
        return updates

    def _minibatches(self, rollout: Rollout) -> Iterator[Tensor]:
        """Yield the shuffled rows of each update; the last may be smaller.

        Responses to one query stay together: it is then computed once for all of them.
        """
        local = exact_division(self.config.update_size, self.accelerator.num_processes)
        return iter(rollout.shuffled_rows(self.shuffle).split(local))

    def _accumulate_gradient(
        self,
        rollout: Rollout,
        rows: Tensor,
        old: ResponseOutput,
        advantages: Tensor,
        returns: Tensor,
    ) -> Update:
        """Compute the gradient of one minibatch, in passes that fit, and its statistics.

        Every pass divides by the token count of the whole minibatch of all processes, so that the
        gradient depends neither on the size of a pass nor on the number of processes.
        """
        if self.alone:
            self.gradients.start()
        else:
            self.policy.zero_grad()  # what an interrupted step, or the caller, may have left
        processes = self.accelerator.num_processes
        tokens = self.accelerator.reduce(rollout.response_mask[rows].sum())
        parts = []
        passes = list(self._micro_batches(rollout, rows))
        for index, chosen in enumerate(passes):
            last = index == len(passes) - 1
            with self.accelerator.no_sync(self.policy) if not last else nullcontext():
                part = rollout.select(chosen)
                width = part.responses.shape[1]
                with self.clock.part("forward"):
                    loss, pass_stats = self.loss(
                        self.policy(part),
                        ResponseOutput(*(column[chosen, :width] for column in old)),
                        advantages[chosen, :width],
                        returns[chosen, :width],
                        part.response_mask,
                        tokens,
                    )
                with self.clock.part("backward"):
                    # Processes average their gradients, and each holds its share of one mean.
                    self.accelerator.backward(loss * processes)
                parts.append(pass_stats)
        if self.alone:
            self.gradients.finish()
        return Update.of_passes(parts, float(tokens), self.accelerator.reduce)

    def loss(
        self,
        new: ResponseOutput,
        old: ResponseOutput,
        advantages: Tensor,
        returns: Tensor,
        mask: Tensor,
        tokens: Tensor,
    ) -> tuple[Tensor, PassStats]:
        """The loss of PPO: clipped policy objective, clipped value loss, entropy bonus.

            L = mean_t L_π + vf_coef · mean_t L_V − entropy_coef · mean_t H

        Args:
            new: Log-probs, values, entropies [B, R] under the weights now.
            old: The same under the weights that the responses were scored with.
            advantages: [B, R] whitened.
            returns: [B, R] targets of the values.
            mask: [B, R].
            tokens: Number of tokens that the means are over.
        """
        config = self.config
        policy_loss, ratio, clipped = clipped_policy_loss(
            new.logprobs,
            old.logprobs,
            advantages,
            cliprange=config.cliprange,
            cliprange_high=config.cliprange_high,
        )
        value_loss, value_clipped = clipped_value_loss(
            new.values, old.values, returns, cliprange_value=config.cliprange_value
        )
        log_ratio = new.logprobs - old.logprobs
        means = {
            "loss/policy": policy_loss,
            "loss/value": value_loss,
            "policy/entropy": new.entropy,
            "policy/approxkl": 0.5 * log_ratio.square(),
            "policy/policykl": log_ratio,
            "policy/abs_log_ratio": log_ratio.abs(),
            "policy/mean_ratio": ratio,
            "policy/clipfrac": clipped.float(),
            "val/vpred": new.values,
            "val/error": (new.values - returns).square(),
            "val/clipfrac": value_clipped.float(),
        }
        means = {name: token_mean(column, mask, tokens) for name, column in means.items()}
        total = means["loss/policy"] + config.vf_coef * means["loss/value"]
        if config.entropy_coef:
            total = total - config.entropy_coef * means["policy/entropy"]
        means["loss/total"] = total
        detached = {name: mean.detach() for name, mean in means.items()}
        return total, PassStats(detached, ratio.detach()[mask], advantages[mask])

    def _apply(self, update: Update, *, stop: bool) -> None:
        """Apply the gradient that has been accumulated, if it is sound."""
        scaler = self.accelerator.scaler  # of fp16; None at other precisions
        stepped = False
        try:
            wild = update.means["policy/mean_ratio"] > self.config.ratio_threshold
            norm = self.accelerator.clip_grad_norm_(
                self.trainable, self.config.max_grad_norm or float("inf")
            )
            update.grad_norm = float(norm)
            scaled = scaler is not None  # which skips overflown updates itself
            if not np.isfinite(update.means["loss/total"]) or not (
                scaled or np.isfinite(update.grad_norm)
            ):
                raise FloatingPointError(
                    f"the loss is {update.means['loss/total']} and the gradient's norm is "
                    f"{update.grad_norm}: this update was not applied, the model holds the last "
                    "good weights. Lower `learning_rate`, or check the scores for outliers."
                )
            update.applied = not (wild or stop)
            if update.applied:
                self.optimizer.step()
                stepped = True
                self.working.refresh()
                update.applied = not self.optimizer.step_was_skipped
            elif wild:
                warnings.warn(
                    f"an update was skipped: its mean importance ratio is "
                    f"{update.means['policy/mean_ratio']:.1f}, more than `ratio_threshold` "
                    f"{self.config.ratio_threshold}. If this goes on, lower `learning_rate`.",
                    stacklevel=4,
                )
        finally:
            if scaler is not None and not stepped:
                scaler.update()  # or it would refuse to unscale the next gradient
            if not self.alone:
                self.policy.zero_grad()

    def _check_first_ratio(self, update: Update) -> None:
        """Raise if the policy does not give its own log-probs back before the first update.

        Until then the ratio is 1 by definition, up to rounding.
        """
        gap = update.means["policy/abs_log_ratio"]
        allowed = RATIO_TOLERANCE.get(self.precision, 0.1)
        if gap > allowed:
            raise RuntimeError(
                f"before the first update the log-probs differ by {gap:.3g} on average from those "
                f"of the forward pass a moment ago (allowed: {allowed} at {self.precision}). "
                "The model is not a fixed function of its input: look for dropout that "
                "`model.eval()` does not turn off, noise, or weights changed meanwhile. If the "
                "rollout carries log-probs of another policy or temperature, set "
                "reuse_recorded=False, or `logprobs` of the rollout to None."
            )

    # -- stats -----------------------------------------------------------------------------------

    def statistics(
        self,
        scores: Tensor,
        old: ResponseOutput,
        ref_logprobs: Tensor,
        non_score_rewards: Tensor,
        returns: Tensor,
        mask: Tensor,
        updates: list[Update],
    ) -> Stats:
        """Return the 30 stats of the 2020 trainer, less those of time, and some more."""
        scores = self._gathered(_totals(scores))
        logprobs, values = self._gathered(old.logprobs), self._gathered(old.values)
        ref_logprobs, non_score_rewards = (
            self._gathered(x) for x in (ref_logprobs, non_score_rewards)
        )
        returns, mask = self._gathered(returns), self._gathered(mask)
        if self.reference is None:  # not measured, which is not the same as 0
            ref_logprobs = torch.full_like(logprobs, float("nan"))
        kl = logprobs - ref_logprobs  # [B, R], 0 outside the mask
        stats = {
            "objective/kl": kl.sum(1).mean(),
            "objective/kl_dist": kl,
            "objective/logprobs": logprobs,
            "objective/ref_logprobs": ref_logprobs,
            "objective/kl_coef": self.kl_ctl.value,
            "objective/entropy": -logprobs.sum(1).mean(),
            "objective/scores": scores.mean(),
            "ppo/mean_non_score_reward": non_score_rewards.sum(1).mean(),
            "ppo/returns/mean": masked_mean(returns, mask),
            "ppo/returns/var": masked_var(returns, mask),
            "ppo/val/mean": masked_mean(values, mask),
            "ppo/val/var": masked_var(values, mask),
            "ppo/updates": sum(update.applied for update in updates),
            "ppo/skipped_updates": sum(not update.applied for update in updates),
            "ppo/grad_norm": float(np.mean([update.grad_norm for update in updates])),
            "ppo/first_log_ratio": updates[0].means["policy/abs_log_ratio"],
            "ppo/policy/ratio": torch.cat([update.ratio for update in updates]),
            "ppo/policy/advantages": torch.cat([update.advantages for update in updates]),
            "ppo/policy/advantages_mean": float(
                np.mean([float(update.advantages.mean()) for update in updates])
            ),
        }
        for name in updates[0].means:
            if name not in ("policy/abs_log_ratio", "policy/mean_ratio"):
                stats[f"ppo/{name}"] = float(np.mean([update.means[name] for update in updates]))
        variance = float(stats["ppo/returns/var"])
        stats["ppo/val/var_explained"] = (
            1 - stats["ppo/val/error"] / variance if variance > 0 else 0.0
        )
        return {name: _to_numpy(value) for name, value in stats.items()}

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes; their widths may differ."""
        if self.accelerator.num_processes == 1:
            return tensor
        if tensor.ndim > 1:
            tensor = self.accelerator.pad_across_processes(tensor, dim=1)
        return self.accelerator.gather(tensor)

    # -- input -----------------------------------------------------------------------------------

    def _checked(
        self,
        query: TokenLists | Rollout,
        response: Any,
        scores: Any,
        response_masks: Any,
    ) -> tuple[Rollout, Tensor]:
        """Return a rollout and its scores on the trainer's device, or raise, on every process."""
        checked, problem = None, None
        try:
            checked = self._checked_here(query, response, scores, response_masks)
        except (TypeError, ValueError) as error:
            problem = error
        rows = torch.tensor([len(checked[0]) if checked else 0], device=self.accelerator.device)
        everyone = self._gathered(rows)
        if checked is None:
            raise problem or AssertionError
        if not everyone.all():
            raise ValueError("another process was given bad input; its own message says what.")
        if everyone.unique().numel() > 1:
            raise ValueError(
                f"every process must pass the same number of rows, got {everyone.tolist()}: "
                "split the batch evenly."
            )
        return checked

    def _checked_here(
        self, query: Any, response: Any, scores: Any, response_masks: Any
    ) -> tuple[Rollout, Tensor]:
        """Return a rollout and its scores on the trainer's device, or raise."""
        if isinstance(query, Rollout):
            if response is not None and scores is not None:
                raise TypeError("`step(rollout, scores)` takes two arguments, got a third.")
            if response_masks is not None:
                raise TypeError("`response_masks` must be None beside a Rollout, which has a mask.")
            rollout, scores = query, response if scores is None else scores
            rollout.check()
        elif query is None or response is None:
            raise TypeError(
                "`query` and `response` must be tensors, or lists of tensors, of token ids: "
                "step(query, response, scores) or step(rollout, scores)."
            )
        else:
            rollout = Rollout.from_lists(query, response, response_masks=response_masks)
        if scores is None:
            raise TypeError("`scores` must be given: one number for each response.")
        scores = score_tensor(scores, rollout)
        if scores.ndim == 2 and self.config.center_scores:
            raise ValueError(
                "`center_scores` must be False with scores for single tokens: every token would "
                "get the same constant. Set it to False, or give one score for each response."
            )
        device = self.accelerator.device
        for name, model in (("model", self.model), ("ref_model", self.ref_model)):
            if model is not None:
                check_fits(model, rollout)
                check_device(model, name, device)
        self.kl_ctl.check_steps(len(rollout) * self.accelerator.num_processes)
        return rollout.to(device), scores.to(device)


class Clock:
    """Seconds of each phase of a step, and of the parts of a phase that come again and again.

    On a GPU a part ends when its work is handed over, not when it is done, unless a profile waits.

    Attributes:
        around: Called with the name of a part; returns a context for it to run in. A profile sets
            its own; by default there is nothing around a part but the look at the clock.
    """

    def __init__(self) -> None:
        self.around: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the phase `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the part `name` of the phase that runs."""
        with self.around(name):
            started = time.perf_counter()
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def stats(self) -> Stats:
        """Return the phases, their parts and the total as `time/ppo/…`, in seconds."""
        phases = self.seconds | {"total": self.last - self.start}
        return {f"time/ppo/{name}": seconds for name, seconds in phases.items()}


def exact_division(update_size: int, processes: int) -> int:
    """Return the rollouts of one update on each process, or raise if they cannot share evenly."""
    if update_size % processes:
        raise ValueError(
            f"`minibatch_size` must be a multiple of the number of processes, got {update_size} "
            f"for {processes}."
        )
    return update_size // processes


def _resolve_config(config: PPOConfig | None, ppo_params: dict[str, Any]) -> PPOConfig:
    """Return the config, or build it from keyword arguments."""
    if config is not None:
        if not isinstance(config, PPOConfig):
            raise TypeError(
                f"`config` must be a PPOConfig, got {type(config).__name__}: the order is "
                "PPOTrainer(model, ref_model, config), and a dict goes in as **settings."
            )
        if ppo_params:
            raise TypeError(
                f"pass settings in `config` or as keyword arguments, not both; got "
                f"{sorted(ppo_params)} beside `config`: use dataclasses.replace(config, ...)."
            )
        return config
    known = PPOConfig.known_names()
    unknown = [name for name in ppo_params if name not in known]
    if unknown:
        named = ", ".join(f"`{name}`{closest(name, known)}" for name in unknown)
        warnings.warn(
            f"PPOTrainer leaves out what is not a field of PPOConfig: {named}", stacklevel=3
        )
    return PPOConfig.from_kwargs(**{k: v for k, v in ppo_params.items() if k not in unknown})


def _totals(scores: Tensor) -> Tensor:
    """Return the score of each response [B], given that or the scores of its tokens [B, R]."""
    return scores if scores.ndim == 1 else scores.sum(1)


def _check_pair(model: nn.Module, ref_model: Any) -> None:
    """Raise unless the two models can be policy and reference."""
    if not hasattr(model, "v_head"):
        raise TypeError(
            f"`model` must have a value head (`v_head`), got {type(model).__name__}: wrap it in "
            "CausalLMWithValueHead(model), or load it with "
            "CausalLMWithValueHead.from_pretrained(...)."
        )
    if not isinstance(ref_model, nn.Module):
        return
    if model is ref_model:
        raise ValueError(
            "`ref_model` must be another object than `model`, else both are trained and the KL "
            "is always 0: load the model twice, or leave `ref_model` out for a frozen copy."
        )
    check_apart(model, ref_model)
    sizes = [vocabulary_size(each) for each in (model, ref_model)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`model` and `ref_model` must have the same vocabulary, got {sizes[0]} and "
            f"{sizes[1]} tokens."
        )


def _check_accelerator(accelerator: Accelerator, config: PPOConfig) -> None:
    """Raise if the accelerator would do something else than the config says."""
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "`accelerator` must have gradient_accumulation_steps 1, got "
            f"{accelerator.gradient_accumulation_steps}: the trainer accumulates by itself, set "
            "`forward_batch_size` or `token_budget`."
        )
    wanted = MIXED_PRECISION.get(config.precision, accelerator.mixed_precision)
    if wanted != accelerator.mixed_precision:
        raise ValueError(
            f"`precision` must agree with the accelerator's, got {config.precision!r} and "
            f"{accelerator.mixed_precision!r}: leave `precision` at 'auto'."
        )


def _check_finite(name: str, logprobs: Tensor) -> None:
    """Raise if a model gives log-probs that are not numbers, before anything is changed by them."""
    if not logprobs.isfinite().all():
        row = int((~logprobs.isfinite()).any(1).nonzero()[0])
        raise FloatingPointError(
            f"`{name}` must give finite log-probs, got {logprobs[row].min().item()} in row {row}: "
            "its weights hold NaN, or it forbids a token of the response. Nothing was changed."
        )


def _trainable(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    """Return the weights that are trained: those that require a gradient and are optimised."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if optimizer is not None:
        owned = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        weights = [weight for weight in weights if id(weight) in owned]
    if not weights:
        raise ValueError(
            "`model` must have weights to train, but none has requires_grad=True"
            + (" and is in `optimizer`." if optimizer is not None else ".")
        )
    return weights


def _adam(weights: list[nn.Parameter], config: PPOConfig) -> torch.optim.Optimizer:
    """Return Adam over `weights`, with one kernel for all of them where there is one."""
    fused = all(weight.device.type in ("cpu", "cuda", "mps") for weight in weights)
    return torch.optim.Adam(weights, lr=config.learning_rate, eps=config.adam_eps, fused=fused)


def _to_numpy(value: Any) -> float | np.ndarray:
    """Return a tensor as a float or numpy array, detached from everything."""
    if not isinstance(value, Tensor):
        return float(value)
    return value.item() if value.ndim == 0 else value.float().cpu().numpy()
