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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trl.anatomy import is_encoder_decoder, without_dropout
from trl.batch import Rollout, TokenLists
from trl.config import PPOConfig, closest
from trl.core import masked_whiten
from trl.models.adapters import check_enabled
from trl.models.checks import check_device, check_finite, check_fits, check_models
from trl.models.gradients import Gradients
from trl.models.memory import keep_freed_memory
from trl.models.precision import (
    LOW_PRECISION,
    check_accelerator,
    exit_after_gloo,
    make_accelerator,
)
from trl.models.reference import ReferenceKind, make_reference
from trl.models.response import ResponseModel, ResponseOutput
from trl.models.working_weights import WorkingWeights
from trl.optimization.adam import gradient_norm, make_adam, trainable_weights
from trl.optimization.algorithms import Counts, compose, kl_kind
from trl.optimization.clock import Clock
from trl.optimization.inputs import Pretraining, pretraining_rollout, rollout_and_scores
from trl.optimization.kl import AdaptiveKLController, FixedKLController
from trl.optimization.losses import token_mean
from trl.optimization.objective import Targets, objective
from trl.optimization.piecewise_adam import LowGradient, can_update_in_pieces, update_in_pieces
from trl.optimization.rewards import (
    RunningMoments,
    missing_eos_penalty,
    normalize_scores,
    token_rewards,
)
from trl.optimization.state import check_state, load_optimizer_state, optimizer_state
from trl.optimization.statistics import step_statistics, totals
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
        pretraining: Texts for `config.pretraining_coef`: given a number of rows, returns so many
            1-D tensors of token ids. Each process asks for its share; give each other texts.
        **ppo_params: Fields of `PPOConfig`, also by their names of 2020 (`lr`, `lam`, `target`,
            `horizon`, `adap_kl_ctrl`). A name close to one of them is a TypeError; others
            are ignored with a warning, since notebooks of that time pass their whole settings.

    Attributes:
        config: The settings in force.
        algorithm: What the settings make of it; another `Algorithm` may take its place.
        kl_ctl: The KL controller; its `.value` is the coefficient β of the next step.
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
        *,
        optimizer: torch.optim.Optimizer | None = None,
        accelerator: Accelerator | None = None,
        pretraining: Pretraining | None = None,
        **ppo_params: Any,
    ) -> None:
        self.config = config = _resolve_config(config, ppo_params)
        self.algorithm = compose(config)
        check_models(model, ref_model)
        if ref_model == "none" and config.init_kl_coef != 0:
            raise ValueError(
                f"`init_kl_coef` must be 0 without a reference, got {config.init_kl_coef}: set it, "
                "or leave `ref_model` out."
            )
        if config.pretraining_coef and is_encoder_decoder(model):
            raise ValueError(
                "`pretraining_coef` must be 0 for an encoder-decoder model, whose pretraining is "
                f"not to go on with a text, got {config.pretraining_coef}."
            )
        if pretraining is not None and not config.pretraining_coef:
            raise ValueError("`pretraining_coef` must be > 0 with `pretraining`, got 0.")
        self.pretraining = pretraining

        self.accelerator = accelerator or make_accelerator(config.precision)
        check_accelerator(self.accelerator, config.precision)
        exit_after_gloo()
        if config.keep_freed_memory and self.accelerator.device.type == "cpu":
            keep_freed_memory()
        # Kept here: the accelerators of a process share one state, which a later one may change.
        self.precision = self.accelerator.mixed_precision
        exact_division("minibatch_size", config.update_size, self.accelerator.num_processes)
        if config.pretraining_rows is not None:
            rows, processes = config.pretraining_rows, self.accelerator.num_processes
            exact_division("pretraining_rows", rows, processes)
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
        self.trainable = trainable_weights(model, optimizer)
        self.resting: list[nn.Parameter] = []  # those of them that the step at hand leaves alone
        # Processes exchange gradients of the weights themselves, where autograd leaves them.
        self.alone = self.policy is self.own
        self.optimizer = self.accelerator.prepare_optimizer(
            optimizer or make_adam(self.trainable, config)
        )
        self.kl_ctl = (
            AdaptiveKLController(config.init_kl_coef, config.kl_target, config.kl_horizon)
            if config.adaptive_kl
            else FixedKLController(config.init_kl_coef)
        )
        self.score_moments = RunningMoments()
        self.steps_done = 0
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
            The stats of the step: floats and numpy arrays by the names of the 2020 trainer; those
            of returns and values only if the algorithm has a critic.

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
        config = self.config
        warming_up = self.steps_done < config.value_warmup_steps
        rollout, scores, texts = self._checked(query, response, scores, response_masks)

        with ExitStack() as stack:
            self._settle_what_is_trained(stack, warming_up)
            models = [self.model] + ([self.ref_model] if self.ref_model else [])
            stack.enter_context(without_dropout(*models))
            if self.alone:
                stack.enter_context(self.working.in_use())
            with clock.part("policy"):
                rollout = self.with_trunk_states(rollout)
                old = self.before_update(rollout)
            with clock.part("reference"):
                ref_logprobs = self.reference_logprobs(rollout, old)
            check_finite("model", old.logprobs)
            check_finite("ref_model", ref_logprobs)
            clock.lap("forward_pass")

            mask, kl_coef = rollout.response_mask, self.kl_ctl.value
            kl_in_loss = self.algorithm.kl_in == "loss"
            moments, scores = self.normalized(self.judged(scores, rollout.ended))
            rewards, non_score_rewards = token_rewards(
                old.logprobs,
                ref_logprobs,
                scores,
                mask,
                kl_coef=0.0 if kl_in_loss else kl_coef,
                kl_estimator=kl_kind(config, self.algorithm),
            )
            clock.lap("compute_rewards")

            advantages, returns = self.advantages(rewards, old.values, mask, rollout.group_ids)
            targets = Targets(
                old.logprobs,
                old.values,
                advantages,
                returns,
                ref_logprobs if kl_in_loss and self.reference else None,
            )
            updates = self.optimize(rollout, targets, texts, only_values=warming_up)
            clock.lap("optimize_step")

        stats = self.statistics(
            rollout, scores, old, ref_logprobs, non_score_rewards, returns, updates
        )
        if self.reference and not warming_up:  # β steers a policy that moves
            self.kl_ctl.update(stats["objective/kl"], len(scores) * self.accelerator.num_processes)
        self.score_moments = moments
        self.steps_done += 1
        clock.lap("calc_stats")
        return stats | clock.stats()

    def _settle_what_is_trained(self, stack: ExitStack, warming_up: bool) -> None:
        """Find the weights that this step trains, and keep the others at rest until it ends."""
        head = list(self.model.v_head.parameters())
        self.resting = []
        if warming_up:
            of_head = {id(weight) for weight in head}
            self.resting = [w for w in self.model.parameters() if id(w) not in of_head]
        elif not self.algorithm.critic:
            self.resting = head
        if self.alone:
            stack.enter_context(_without_gradient(self.resting))
        # Anew for every step: a user may have frozen some weights since, or watch a gradient.
        self.trainable = trainable_weights(self.model, self.optimizer)
        if not self.alone:  # processes wait for the gradient of every weight: it is dropped later
            at_rest = {id(weight) for weight in self.resting}
            self.trainable = [w for w in self.trainable if id(w) not in at_rest]
        self.gradients = Gradients(
            self.model,
            self.trainable,
            self.working.weights,
            keep_low=self.accelerator.scaler is None
            and can_update_in_pieces(self.optimizer.optimizer),
        )
        self.working.gradients = self.gradients

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
        logprobs, values = rollout.behaviour_logprobs, rollout.values
        if values is None and logprobs is not None and not self.algorithm.critic:
            values = torch.zeros_like(logprobs)  # nobody asks for them
        if logprobs is None or values is None or not self.config.reuse_recorded:
            return self.forward_pass(self.policy, rollout, self.working)
        columns = (logprobs, values, torch.zeros_like(logprobs))
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

    def judged(self, scores: Tensor, ended: Tensor | None) -> Tensor:
        """Return the scores with the penalty for responses that did not end by themselves."""
        config = self.config
        if config.missing_eos_penalty is None:
            return scores
        return missing_eos_penalty(
            scores, ended, config.missing_eos_penalty, replace=config.missing_eos_replaces
        )

    def normalized(self, scores: Tensor) -> tuple[RunningMoments, Tensor]:
        """Return the running moments with these scores, and the scores as configured.

        For scores [B, R] of single tokens the moments are those of their sums [B].
        """
        config = self.config
        moments = copy.deepcopy(self.score_moments)
        if config.center_scores or config.scale_scores:
            moments.update(self._gathered(totals(scores)))
        scores = normalize_scores(
            scores,
            moments,
            center=config.center_scores,
            scale=config.scale_scores,
            clip=config.clip_scores,
        )
        return moments, scores

    def advantages(
        self, rewards: Tensor, values: Tensor, mask: Tensor, group_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return advantages, whitened if the algorithm does, and returns [B, R] if it has any."""
        config, algorithm = self.config, self.algorithm
        if config.whiten_rewards:
            rewards = self._whitened(rewards, mask, shift_mean=False)
        advantages, returns = algorithm.estimate(rewards, values, mask, group_ids, config)
        if algorithm.whiten:
            advantages = self._whitened(advantages, mask, shift_mean=True)
        return advantages, returns

    def _whitened(self, values: Tensor, mask: Tensor, *, shift_mean: bool) -> Tensor:
        """Whiten over the batch of all processes."""
        everyone = masked_whiten(self._gathered(values), self._gathered(mask), shift_mean)
        first = self.accelerator.process_index * len(values)
        return everyone[first : first + len(values), : values.shape[1]]

    # -- optimise --------------------------------------------------------------------------------

    def optimize(
        self,
        rollout: Rollout,
        targets: Targets,
        texts: Sequence[Rollout] = (),
        *,
        only_values: bool = False,
    ) -> list[Update]:
        """Update the policy over shuffled minibatches, `ppo_epochs` times.

        Args:
            rollout: B rows.
            targets: What to learn from it.
            texts: For each update, what to keep predicting; none: nothing.
            only_values: Train the values, and nothing else.
        """
        config = self.config
        updates: list[Update] = []
        with self.gradients.collect() if self.alone else nullcontext():
            for _ in range(config.ppo_epochs):
                squares = tokens = 0.0
                for rows in self._minibatches(rollout):
                    text = texts[len(updates)] if texts else None
                    update = self._accumulate_gradient(rollout, rows, targets, text, only_values)
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
        return iter(rollout.shuffled_rows(self.shuffle).split(self._local_update_size))

    @property
    def _local_update_size(self) -> int:
        """Rollouts of one update on this process."""
        processes = self.accelerator.num_processes
        return exact_division("minibatch_size", self.config.update_size, processes)

    def _accumulate_gradient(
        self,
        rollout: Rollout,
        rows: Tensor,
        targets: Targets,
        text: Rollout | None,
        only_values: bool,
    ) -> Update:
        """Compute the gradient of one minibatch, in passes that fit, and its statistics.

        Every pass divides by the counts of the whole minibatch of all processes, so that the
        gradient depends neither on the size of a pass nor on the number of processes.
        """
        if self.alone:
            self.gradients.start()
        else:
            self.policy.zero_grad()  # what an interrupted step, or the caller, may have left
        surprise = None if text is None else self._pretraining_gradient(text)
        mask = rollout.response_mask[rows]
        counts = Counts(*self.accelerator.reduce((mask.sum(), mask.any(1).sum())))
        parts = []
        passes = list(self._micro_batches(rollout, rows))
        for index, chosen in enumerate(passes):
            part = rollout.select(chosen)
            with self._exchange(index == len(passes) - 1):
                with self.clock.part("forward"):
                    loss, pass_stats = self.loss(
                        self.policy(part),
                        targets.select(chosen, part.responses.shape[1]),
                        part.response_mask,
                        counts,
                        only_values=only_values,
                    )
                self._backward(loss)
            parts.append(pass_stats)
        if self.alone:
            self.gradients.finish()
        for weight in self.resting:
            weight.grad = None
        update = Update.of_passes(parts, float(counts.tokens), self.accelerator.reduce)
        if surprise is not None:
            update.means["loss/pretraining"] = float(self.accelerator.reduce(surprise))
            update.means["loss/total"] += (
                self.config.pretraining_coef * update.means["loss/pretraining"]
            )
        return update

    def loss(
        self,
        new: ResponseOutput,
        targets: Targets,
        mask: Tensor,
        counts: Counts,
        *,
        only_values: bool = False,
    ) -> tuple[Tensor, PassStats]:
        """Return a pass's share of the loss of its minibatch, and its statistics: `objective`."""
        loss, pass_stats = objective(
            new,
            targets,
            mask,
            counts,
            algorithm=self.algorithm,
            config=self.config,
            kl_coef=self.kl_ctl.value,
            only_values=only_values,
        )
        if self.resting and not self.alone:  # a gradient of 0, which all processes wait for
            loss = loss + 0.0 * (new.logprobs.sum() + new.values.sum())
        return loss, pass_stats

    def _pretraining_gradient(self, text: Rollout) -> Tensor:
        """Add the gradient of pretraining_coef · mean_t −log π(token), at temperature 1.

        Returns:
            This process's share of the mean [].
        """
        tokens = self.accelerator.reduce(text.response_mask.sum())
        shares = []
        for chosen in self._micro_batches(text):
            part = text.select(chosen)
            with self._exchange(False):
                with self.clock.part("forward"), _temperature_1(self.own):
                    share = token_mean(-self.policy(part).logprobs, part.response_mask, tokens)
                self._backward(self.config.pretraining_coef * share)
            shares.append(share.detach())
        return torch.stack(shares).sum()

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context for a pass; processes exchange gradients in the last of an update."""
        return nullcontext() if last else self.accelerator.no_sync(self.policy)

    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of a pass."""
        with self.clock.part("backward"):
            # Processes average their gradients, and each holds its share of one mean.
            self.accelerator.backward(loss * self.accelerator.num_processes)

    def _apply(self, update: Update, *, stop: bool) -> None:
        """Apply the gradient that has been accumulated, if it is sound."""
        scaler = self.accelerator.scaler  # of fp16; None at other precisions
        stepped = False
        try:
            wild = update.means["policy/mean_ratio"] > self.config.ratio_threshold
            update.grad_norm, factor = self._clip_gradient()
            scaled = scaler is not None  # which skips overflown updates itself
            if not math.isfinite(update.means["loss/total"]) or not (
                scaled or math.isfinite(update.grad_norm)
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
                self._update_in_pieces(factor)
                # A fused optimiser skips inside of its kernel, which accelerate does not see.
                skipped = self.optimizer.step_was_skipped
                update.applied = math.isfinite(update.grad_norm) and not skipped
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

    def _clip_gradient(self) -> tuple[float, float]:
        """Clip the gradient to `max_grad_norm`.

        Returns:
            Its norm before, and the factor that gradients in low precision have yet to get.
        """
        most = self.config.max_grad_norm or float("inf")
        if not self.alone or self.accelerator.scaler is not None:
            return float(self.accelerator.clip_grad_norm_(self.trainable, most)), 1.0
        gradients = [weight.grad for weight in self.trainable if weight.grad is not None]
        norm = gradient_norm([*gradients, *(gradient for _, gradient in self.gradients.low)])
        factor = most / norm if norm > most else 1.0
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return norm, factor

    def _update_in_pieces(self, factor: float) -> None:
        """Update the weights whose gradients are in low precision, and all working copies."""
        low = self.gradients.low
        with_copies = [LowGradient(w, gradient, self.working.copy_of(w)) for w, gradient in low]
        update_in_pieces(self.optimizer.optimizer, with_copies, factor)
        self.working.refresh({id(weight) for weight, _ in low})

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
                "reuse_recorded=False, or `behaviour_logprobs` of the rollout to None."
            )

    # -- stats -----------------------------------------------------------------------------------

    def statistics(
        self,
        rollout: Rollout,
        scores: Tensor,
        old: ResponseOutput,
        ref_logprobs: Tensor,
        non_score_rewards: Tensor,
        returns: Tensor | None,
        updates: Sequence[Update],
    ) -> Stats:
        """Return the stats of the step, less those of time: see `step_statistics`."""
        return step_statistics(
            scores=scores,
            ended=rollout.ended,
            old=old,
            ref_logprobs=ref_logprobs if self.reference else None,
            non_score_rewards=non_score_rewards,
            returns=returns,
            mask=rollout.response_mask,
            updates=updates,
            kl_coef=self.kl_ctl.value,
            gathered=self._gathered,
        )

    # -- the state of a run ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs, beside the policy's weights, to go on exactly as it would have.

        Plain values and tensors on the CPU, copied: `torch.load(..., weights_only=True)` reads
        what `torch.save` makes of them. To resume: build the trainer on the model that the run
        began with, so that the reference is the same; load the policy's weights into that model;
        then call `load_state_dict`. A learning-rate schedule has a state of its own.
        """
        scaler = self.accelerator.scaler
        return {
            "steps_done": self.steps_done,
            "kl_controller": self.kl_ctl.state_dict(),
            "score_moments": self.score_moments.state_dict(),
            "shuffle": self.shuffle.get_state(),
            "optimizer": optimizer_state(self.optimizer),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: if it is not the state of such a trainer; nothing has changed then.
        """
        scaler = self.accelerator.scaler
        check_state(state, self.optimizer, scaled=scaler is not None)
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.steps_done = state["steps_done"]
        self.kl_ctl.load_state_dict(state["kl_controller"])
        self.score_moments.load_state_dict(state["score_moments"])
        self.shuffle.set_state(state["shuffle"].cpu())
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])

    # -- processes and input ---------------------------------------------------------------------

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes; their widths may differ."""
        if self.accelerator.num_processes == 1:
            return tensor
        if tensor.ndim > 1:
            tensor = self.accelerator.pad_across_processes(tensor, dim=1)
        return self.accelerator.gather(tensor)

    def _checked(
        self,
        query: TokenLists | Rollout,
        response: Any,
        scores: Any,
        response_masks: Any,
    ) -> tuple[Rollout, Tensor, list[Rollout]]:
        """Return what `_checked_here` does, or raise, on every process."""
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
    ) -> tuple[Rollout, Tensor, list[Rollout]]:
        """Return rollout, scores and pretraining texts on the trainer's device, or raise."""
        rollout, scores = rollout_and_scores(
            query, response, scores, response_masks, config=self.config, algorithm=self.algorithm
        )
        device = self.accelerator.device
        rollout = rollout.to(device)  # its parts may lie on several, a query on the CPU say
        texts = self._pretraining_texts(len(rollout))
        for name, model in (("model", self.model), ("ref_model", self.ref_model)):
            if model is not None:
                check_fits(model, rollout)
                check_device(model, name, device)
        self.kl_ctl.check_steps(len(rollout) * self.accelerator.num_processes)
        return rollout, scores.to(device), [text.to(device) for text in texts]

    def _pretraining_texts(self, rows: int) -> list[Rollout]:
        """Draw the pretraining texts of each update of a step on so many rows; none: no list."""
        config = self.config
        if not config.pretraining_coef or self.steps_done < config.value_warmup_steps:
            return []
        if self.pretraining is None:
            raise ValueError(
                f"`pretraining` must be given with pretraining_coef={config.pretraining_coef}, got "
                "None: pass PPOTrainer(..., pretraining=...) a function from a number of rows to "
                "so many 1-D tensors of token ids."
            )
        sizes = [len(part) for part in torch.arange(rows).split(self._local_update_size)]
        if config.pretraining_rows is not None:
            own = config.pretraining_rows // self.accelerator.num_processes
            sizes = [own] * len(sizes)
        texts = [pretraining_rollout(self.pretraining, size) for size in sizes * config.ppo_epochs]
        for text in texts:
            check_fits(self.model, text)
        return texts


def exact_division(name: str, rows: int, processes: int) -> int:
    """Return the rows of each process, or raise if they cannot share them evenly."""
    if rows % processes:
        raise ValueError(
            f"`{name}` must be a multiple of the number of processes, got {rows} for {processes}."
        )
    return rows // processes


@contextmanager
def _without_gradient(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, the weights require no gradient."""
    trained = [weight for weight in weights if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@contextmanager
def _temperature_1(model: ResponseModel) -> Iterator[None]:
    """Inside, the model does not divide its logits."""
    own, model.temperature = model.temperature, 1.0
    try:
        yield
    finally:
        model.temperature = own


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
    mistyped = [name for name in unknown if closest(name, known)]
    if mistyped:
        raise TypeError(
            "; ".join(
                f"PPOTrainer has no setting `{name}`.{closest(name, known)}" for name in mistyped
            )
        )
    if unknown:
        named = ", ".join(f"`{name}`" for name in unknown)
        warnings.warn(
            f"PPOTrainer ignores {named}: no such field in PPOConfig.",
            stacklevel=3,
        )
    return PPOConfig.from_kwargs(**{k: v for k, v in ppo_params.items() if k not in unknown})
