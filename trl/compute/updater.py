"""How the weights of a policy are updated: alone, by many processes, or sharded over many.

with updater.for_step(at_rest):         what this step trains; the others stay as they are
    updater.start()                     an update: gradients count from zero
    with updater.one_pass(last):        forward and backward
        updater.backward(loss, output)
    updater.finish()                    the gradient is whole
    norm = updater.clip(most)
    updater.apply()                     unless the update is to be left out
    updater.end()                       in any case
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trl.anatomy import called_modules, instead
from trl.batch import ResponseOutput
from trl.compute.gradients import kept_gradients
from trl.compute.peers import watch_peers
from trl.compute.piecewise_adam import LowGradient, can_update_in_pieces, update_in_pieces
from trl.compute.precision import (
    LOW_PRECISION,
    check_accelerator,
    dither,
    ditherer,
    exit_after_gloo,
    make_accelerator,
)
from trl.compute.sharding import (
    check_can_shard,
    check_plain_processes,
    gathered,
    shard,
    take_from_first,
    without_memory,
)
from trl.compute.working_weights import WorkingWeights
from trl.config import PPOConfig
from trl.config.algorithms import FACTS
from trl.config.errors import refuse
from trl.kernels.gradients import Gradients
from trl.kernels.memory import give_back_at_once, give_back_memory, keep_freed_memory
from trl.kernels.sharded import own_part
from trl.kernels.stored import bring_in
from trl.models.critic import critic_of, value_head_of
from trl.models.head import constant_weights
from trl.models.reference import Reference, ReferenceKind, as_at_start, make_reference
from trl.models.response import ResponseModel
from trl.optimization.adam import gradient_norm, make_adam, trainable_weights

_NO_DROPOUT = {"use_reentrant": False, "preserve_rng_state": False}


def make_updater(
    model: nn.Module,
    config: PPOConfig,
    optimizer: torch.optim.Optimizer | None,
    accelerator: Accelerator | None,
    *,
    shard: bool = False,
    offload: bool = False,
) -> Updater:
    """Return the updater for as many processes as there are, with the policy on its device.

    Args:
        model: The policy.
        config: Its precision, temperature, and the settings of Adam.
        optimizer: None: Adam over the policy's trainable weights.
        accelerator: None: one made for the precision.
        shard: Let each process hold its part of the weights; a single one holds them all.
        offload: Hold the parts, and what the optimiser keeps, in the CPU's memory.
    """
    if offload and not shard:
        refuse("offload", "be False for weights that are not sharded", "True", "set shard=True too")
    accelerator = accelerator or make_accelerator(config.precision, config.collective_timeout)
    check_plain_processes(accelerator)
    check_accelerator(accelerator, config.precision)
    exit_after_gloo()
    watch_peers(accelerator, config.collective_timeout)
    if critic_of(model) is not None and not FACTS[config.algorithm].critic:
        rule = f"be 'same' with algorithm={config.algorithm!r}, which trains no values"
        refuse("critic", rule, "one of its own")
    sharded = shard and accelerator.num_processes > 1
    if sharded:
        check_can_shard(model, accelerator)
    if accelerator.device.type == "cpu":
        if sharded:
            give_back_at_once()
        elif config.keep_freed_memory:
            keep_freed_memory()
    if not sharded:
        bring_in(model.parameters())
        dither(model, LOW_PRECISION.get(accelerator.mixed_precision))
    responder = ResponseModel(model, config.temperature)
    if accelerator.num_processes > 1:
        handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
        handler.gradient_as_bucket_view = True  # or each gradient would be there twice
        if any(_may_leave_out(each.plain) for each in responder.readers):
            handler.find_unused_parameters = True
        accelerator.ddp_handler = handler
    # No DDP around it then, and no device that would hold all of it.
    apart = {"device_placement": False, "evaluation_mode": True} if sharded else {}
    policy = accelerator.prepare_model(responder, **apart)
    trainable = trainable_weights(model, optimizer)
    optimizer = accelerator.prepare_optimizer(
        optimizer or make_adam(trainable, config, value_head_of(model).parameters())
    )
    kind = Sharded if sharded else OneProcess if policy is responder else ManyProcesses
    return kind(responder, policy, optimizer, accelerator, trainable, offload)


@dataclass(eq=False)
class Updater:
    """What both kinds have in common.

    Attributes:
        reference: What the KL is measured against, see `make_reference`.
        precision: Of autocast. Kept here: the accelerators of a process share one state, which a
            later one may change.
        gradients: Those of the step at hand.
    """

    responder: ResponseModel
    """The one around the policy."""
    policy: nn.Module
    """What to call for a pass of it."""
    optimizer: AcceleratedOptimizer
    accelerator: Accelerator
    """Owns device, precision and processes."""
    trainable: list[nn.Parameter]
    """The weights that the step at hand trains, or the next."""
    offload: bool = False
    """Whether the parts of sharded weights are in the CPU's memory between passes."""
    places: ClassVar[bool | None] = None
    """Whether a model is brought to the device as a whole; None: if the accelerator does so."""
    copied: ClassVar[Callable[[ResponseModel], ResponseModel] | None] = None
    """Makes the copy that is the reference, see `make_reference`."""
    _factor = 1.0
    """By which the gradient of the update at hand was clipped."""

    def __post_init__(self) -> None:
        self.model = self.responder.model
        self.precision = self.accelerator.mixed_precision
        self._low = LOW_PRECISION.get(self.precision)
        self._working = WorkingWeights(self.model, self._low)
        self._sampling = self._stepped = False
        self._know_weights()

    def _know_weights(self) -> None:
        self._known = {weight: (weight.shape, weight.dtype) for weight in self.model.parameters()}

    def make_reference(self, ref_model: nn.Module | ReferenceKind | None) -> Reference | None:
        """Make the reference for the policy as it is now: see `trl.models.reference`."""
        self.reference = reference = make_reference(
            self.model, self.responder, ref_model, self.copied
        )
        self._working_reference = self._working
        if reference is not None and reference.model is None:
            reference.module = self.policy
        elif reference is not None:
            self._working_reference = WorkingWeights(reference.model, self._low)
            if reference.kind == "copy":
                self._working_reference.replace()
            how = {"device_placement": self.places, "evaluation_mode": True}
            reference.module = self.accelerator.prepare_model(reference.module, **how)
        return reference

    # -- passes without gradient -----------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """Return a context in which models compute at this precision."""
        low = self._low
        return torch.autocast(self.accelerator.device.type, low, enabled=low is not None)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, models compute at this precision; their weights must not change."""
        outer, self._sampling = self._sampling, True
        try:
            with self.autocast(), self.responder.quick.in_use(), self._working.packed():
                yield
        finally:
            self._sampling = outer

    @contextmanager
    def as_critic(self) -> Iterator[nn.Module]:
        """Yield what gives the values alone inside: a critic of its own, in quick passes."""
        with self._working.in_use(), self.autocast():
            yield self.responder.critic

    def in_use(self) -> AbstractContextManager[None]:
        """Return a context in which several passes of the policy are quick."""
        return self._working.in_use()

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """Yield what answers as the reference inside, in quick passes."""
        switches = self.reference.model is None  # its weights may have other numbers inside
        try:
            with self.reference.switched():
                if switches:
                    self._working.refresh()
                # A head that is trained is centred by a mean that changes from step to step.
                apart = self.reference.kind == "shared-trunk"
                with (
                    self._working_reference.in_use(),
                    constant_weights(apart=apart),
                    self.responder.without_critic(),
                ):
                    yield self.reference.module
        finally:
            if switches:
                self._working.refresh()

    # -- an update -------------------------------------------------------------------------------

    def _settle(self, at_rest: Sequence[nn.Parameter]) -> None:
        """Find the weights that a step trains, and give back what those before have left."""
        give_back_memory()
        if self._sampling:
            raise RuntimeError("`step` must be called outside of `sampling()`: it changes weights.")
        weights = dict(self.model.named_parameters())
        others = [  # the optimiser knows the old ones
            f"another `{name}` {list(weight.shape)} of {weight.dtype}"
            for name, weight in weights.items()
            if self._known.get(weight) != (weight.shape, weight.dtype)
        ]
        if others or len(weights) != len(self._known):
            fix = "resize it, add an adapter or a head before, and make a new trainer"
            got = others[0] if others else f"{len(weights)} in place of {len(self._known)}"
            refuse("model", "keep the weights that the trainer was made with", got, fix)
        readers = self.responder.readers
        self._recomputed = [part for each in readers for part in _recomputed_layers(each.plain)]
        self._at_rest, rest = at_rest, set(at_rest)
        # Anew for every step: a user may have frozen some weights since, or watch a gradient.
        trainable = trainable_weights(self.model, self.optimizer)
        self.trainable = [weight for weight in trainable if weight not in rest]

    def start(self) -> None:
        """Begin an update: gradients count from zero."""
        self.gradients.start()

    @contextmanager
    def one_pass(self, last: bool) -> Iterator[None]:
        """Run a pass forward and backward inside; `last` of its update or not.

        Layers for which `gradient_checkpointing_enable` was called keep their input alone, and are
        computed again going backward, with the same kernels. transformers itself does so in
        training mode only, which has dropout.
        """
        with ExitStack() as stack:
            for reader in self.responder.readers if self._recomputed else ():
                stack.enter_context(reader.quick.in_use())
            for layer in self._recomputed:
                again = partial(checkpoint, layer.forward, **_NO_DROPOUT)
                stack.enter_context(instead(layer, again))
            yield

    def backward(self, loss: Tensor, output: ResponseOutput) -> None:
        """Add the gradient of a pass, given its share of the loss and what the policy gave."""
        give_back_memory()  # nowhere is more in use
        # Processes average their gradients, and each holds its share of one mean.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def finish(self) -> None:
        """End the passes of an update: the gradient is whole."""
        self.gradients.finish()

    def clip(self, most: float | None) -> float:
        """Clip the gradient to a norm of `most`, None: do not; return its norm before."""
        if self.skips_overflow:
            return float(self.accelerator.clip_grad_norm_(self.trainable, most or math.inf))
        parts = [own_part(weight.grad) for weight in self.trainable if weight.grad is not None]
        norm = self._norm(parts)
        self._factor = most / norm if most and norm > most else 1.0
        if self._factor < 1:
            torch._foreach_mul_(parts, self._factor)
        return norm

    def _norm(self, parts: list[Tensor]) -> float:
        return gradient_norm(parts)

    @property
    def skips_overflow(self) -> bool:
        """Whether a gradient that is not finite is looked after: by the scaler of fp16."""
        return self.accelerator.scaler is not None

    def apply(self) -> bool:
        """Apply the gradient, and return whether that was done: fp16 skips what overflows."""
        self.optimizer.step()
        self._stepped = True
        # A fused optimiser skips inside of its kernel, which accelerate does not see.
        return not self.optimizer.step_was_skipped

    def end(self) -> None:
        """End an update, whether it was applied or not."""
        if self.skips_overflow and not self._stepped:
            self.accelerator.scaler.update()  # or it would refuse to unscale the next gradient
        self._stepped = False


class ManyProcesses(Updater):
    """Processes exchange gradients of the weights themselves, where autograd leaves them, also
    those of copies in low precision, which stand in for the weights.
    """

    @contextmanager
    def for_step(self, at_rest: Sequence[nn.Parameter]) -> Iterator[None]:
        """Train all but `at_rest` inside. Its gradient is waited for, and dropped."""
        self._settle(at_rest)
        # Nothing is copied in float32, nor of weights that are sharded.
        copies = self._working.in_use(joined=True) if self._working.weights else nullcontext()
        with self._collected() as self.gradients, copies:
            yield

    def _collected(self) -> AbstractContextManager[Gradients]:
        return kept_gradients(self.model, self.trainable, [], exchanged=True)

    @contextmanager
    def one_pass(self, last: bool) -> Iterator[None]:
        """Processes exchange gradients in the last pass of an update."""
        exchange = nullcontext() if last else self.accelerator.no_sync(self.policy)
        with super().one_pass(last), exchange:
            yield

    def backward(self, loss: Tensor, output: ResponseOutput) -> None:
        """Add the gradient of a pass; that of all weights, since all processes wait for it."""
        if self._at_rest:
            loss = loss + 0.0 * (output.logprobs.sum() + output.values.sum())
        super().backward(loss, output)

    def finish(self) -> None:
        """End the passes of an update: what is at rest has no gradient."""
        for weight in self._at_rest:
            weight.grad = None

    def apply(self) -> bool:
        """Apply the gradient, and let the copies follow."""
        applied = super().apply()
        self._working.refresh()
        return applied


class Sharded(ManyProcesses):
    """Each process holds a part of every weight, of its gradient, and of what the optimiser keeps.

    Gradients are exchanged after every pass: to keep them for the last would take a whole one.
    """

    places = False
    copied = staticmethod(without_memory)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer.state:
            fix = "make it anew, and load its state by `load_state_dict` of the trainer"
            refuse("optimizer", "have made no step yet with `shard`", "one that has", fix)
        take_from_first(self.model, self.accelerator.device)
        self._working = WorkingWeights(self.model, None)

    def make_reference(self, ref_model: nn.Module | ReferenceKind | None) -> Reference | None:
        """Make the reference while all weights can be read, then shard both."""
        if isinstance(ref_model, nn.Module):
            check_can_shard(ref_model, self.accelerator)
            take_from_first(ref_model, self.accelerator.device)
        with self._uncached():
            for reader in self.responder.readers:
                reader.try_layouts()
        reference = super().make_reference(ref_model)
        names = {weight: name for name, weight in self.model.named_parameters()}
        self._leaves_out = _may_leave_out(self.responder.plain)
        cut = partial(shard, accelerator=self.accelerator, low=self._low, offload=self.offload)
        cut(self.responder, change=ditherer(self.model, self._low))
        if reference is not None and reference.kind == "copy":
            cut(reference.module, filled_from=self.model)
        elif reference is not None and reference.model is not None:
            with self._uncached():
                reference.module.try_layouts()
            cut(reference.module)
        self.policy.set_reduce_scatter_unused_params(self._leaves_out)
        parts = dict(self.model.named_parameters())
        for group in self.optimizer.param_groups:
            group["params"] = [parts[names[weight]] for weight in group["params"]]
        self.trainable = trainable_weights(self.model, self.optimizer)
        self._know_weights()
        if reference is not None and reference.kind in ("adapter-at-start", "shared-trunk"):
            reference.switched = as_at_start(self.model)
        return reference

    def _uncached(self) -> torch.autocast:
        """Return autocast that keeps no copies of weights, which would be all of them."""
        low, kind = self._low, self.accelerator.device.type
        return torch.autocast(kind, low, enabled=low is not None, cache_enabled=False)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, every process holds all weights; they must not change."""
        with nullcontext() if self._sampling else gathered(self.policy), super().sampling():
            yield

    @contextmanager
    def as_critic(self) -> Iterator[nn.Module]:
        """Yield a critic of its own; its embeddings and heads are the root's, and whole inside."""
        self.policy.unshard()
        try:
            with super().as_critic() as critic:
                yield critic
        finally:
            self.policy.reshard()

    @contextmanager
    def for_step(self, at_rest: Sequence[nn.Parameter]) -> Iterator[None]:
        """Train all but `at_rest` inside; a pass that fails leaves nothing gathered."""
        try:
            with super().for_step(at_rest):
                yield
        except BaseException:
            self.policy.reset_iter_state()
            raise

    def one_pass(self, last: bool) -> AbstractContextManager[None]:
        """Run a pass forward and backward inside, in which all processes take part."""
        return Updater.one_pass(self, last)

    def finish(self) -> None:
        """End the passes of an update: what no process has used has no gradient, and rests.

        FSDP2 gives it zeros, by which weight decay and Adam's moments would change it.
        """
        super().finish()
        if not self._leaves_out:
            return
        weights = [weight for weight in self.trainable if weight.grad is not None]
        used = torch.stack([own_part(weight.grad).any() for weight in weights]).int()
        used = used.to(self.accelerator.device)
        torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
        for weight, was_used in zip(weights, used.tolist(), strict=True):
            weight.grad = weight.grad if was_used else None

    def _collected(self) -> AbstractContextManager[Gradients]:
        return Gradients([], [], self.model.parameters()).collect()

    def _norm(self, parts: list[Tensor]) -> float:
        square = torch.tensor(gradient_norm(parts) ** 2, device=self.accelerator.device)
        return float(self.accelerator.reduce(square).sqrt())


class OneProcess(Updater):
    """Gradients stay where they were computed, those of copies in low precision."""

    @contextmanager
    def for_step(self, at_rest: Sequence[nn.Parameter]) -> Iterator[None]:
        """Train all but `at_rest` inside, which requires no gradient there."""
        frozen = [weight for weight in at_rest if weight.requires_grad]
        keep_low = not self.skips_overflow and can_update_in_pieces(self.optimizer.optimizer)
        try:
            for weight in frozen:
                weight.requires_grad_(False)
            self._settle(at_rest)
            received = self._working.weights
            with (
                kept_gradients(self.model, self.trainable, received, keep_low=keep_low) as kept,
                self._working.in_use(),
            ):
                self.gradients = self._working.gradients = kept
                yield
        finally:
            for weight in frozen:
                weight.requires_grad_(True)

    def _norm(self, parts: list[Tensor]) -> float:
        return gradient_norm([*parts, *(gradient for _, gradient in self.gradients.low)])

    def apply(self) -> bool:
        """Apply the gradient, clip what is in low precision, and let the copies follow."""
        applied = super().apply()
        low = [LowGradient(w, grad, self._working.copies[w]) for w, grad in self.gradients.low]
        update_in_pieces(self.optimizer.optimizer, low, self._factor)
        self._working.refresh({one.weight for one in low})
        return applied


def _may_leave_out(plain: PreTrainedModel) -> bool:
    """Return whether a pass may leave out weights that are trained: of an expert that gets no
    token, or of what reads images. Processes would wait for their gradients.
    """
    used = {weight for part in called_modules(plain) for weight in part.parameters(recurse=False)}
    experts = any("expert" in type(part).__name__.lower() for part in plain.modules())
    return experts or any(w.requires_grad and w not in used for w in plain.parameters())


def _recomputed_layers(plain: PreTrainedModel) -> list[nn.Module]:
    """Return the layers for which gradient checkpointing is enabled.

    Raises:
        ValueError: if it is enabled for a model that has it in its own way.
    """
    enabled = [part for part in plain.modules() if getattr(part, "gradient_checkpointing", False)]
    layers = [part for part in enabled if isinstance(part, GradientCheckpointingLayer)]
    if enabled and not layers:
        got, fix = type(plain).__name__, "call gradient_checkpointing_disable()"
        refuse("model", "have layers that gradient checkpointing can compute again", got, fix)
    return layers
