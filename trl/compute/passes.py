"""Passes over a rollout, in parts that fit, and those without gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from trl.batch import ResponseOutput, Rollout
from trl.compute.sharding import even_passes
from trl.compute.updater import Updater
from trl.config import PPOConfig
from trl.optimization.objective import Targets


def micro_batches(
    rollout: Rollout, config: PPOConfig, rows: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield the rows of each pass over a rollout, or over the given rows of it."""
    return rollout.micro_batches(
        rows, max_rows=config.forward_batch_size, max_tokens=config.token_budget
    )


def gradient_passes(
    updater: Updater, rollout: Rollout, targets: Targets, rows: Tensor, config: PPOConfig
) -> Iterator[tuple[Rollout, Targets, bool]]:
    """Yield what each pass over the rows of a minibatch reads, what it learns, and if it is the
    last; nothing of passes that a process makes since another has more.
    """
    own = list(micro_batches(rollout, config, rows))
    passes = even_passes(updater.responder, own)
    for number, chosen in enumerate(passes):
        part = rollout.select(chosen)
        of_part = targets.select(chosen, part.responses.shape[1])
        if number >= len(own):
            of_part = of_part._replace(mask=torch.zeros_like(of_part.mask))
        yield part, of_part, number == len(passes) - 1


def text_passes(
    updater: Updater, text: Rollout, config: PPOConfig
) -> Iterator[tuple[Rollout, Tensor]]:
    """Yield what each pass over pretraining texts reads, and the mask of what counts of it."""
    own = list(micro_batches(text, config))
    for number, chosen in enumerate(even_passes(updater.responder, own)):
        part = text.select(chosen)
        yield part, part.response_mask & (number < len(own))


@torch.no_grad()
def response_output(model: nn.Module, rollout: Rollout, config: PPOConfig) -> ResponseOutput:
    """Return log-probs, values and entropies [B, R] under a `ResponseModel`."""
    whole = [torch.zeros_like(rollout.responses, dtype=torch.float32) for _ in range(3)]
    for rows in even_passes(model, list(micro_batches(rollout, config))):
        part = model(rollout.select(rows))
        for target, source in zip(whole, part[:3], strict=True):
            target[rows, : source.shape[1]] = source
    return ResponseOutput(*whole)


def prepared(updater: Updater, rollout: Rollout, config: PPOConfig) -> Rollout:
    """Return the rollout with what its passes need, and was not recorded."""
    return with_values(updater, with_trunk_states(updater, rollout, config), config)


@torch.no_grad()
def with_trunk_states(updater: Updater, rollout: Rollout, config: PPOConfig) -> Rollout:
    """Return the rollout with the states that its passes start from, if layers are frozen."""
    responder = updater.responder
    if responder.trunk is None:
        return rollout
    whole: Tensor | None = None
    columns = rollout.queries.shape[1]
    with updater.autocast():
        for rows in even_passes(responder, list(micro_batches(rollout, config))):
            part = responder.trunk_states(rollout.select(rows))
            if whole is None:
                whole = part.new_zeros(*rollout.input_ids[:, :-1].shape, part.shape[-1])
            first, last = rollout.window(rows)
            whole[rows, first : columns + last - 1] = part
    return replace(rollout, trunk_states=whole)


def with_values(updater: Updater, rollout: Rollout, config: PPOConfig) -> Rollout:
    """Return the rollout with the values of a critic of its own, if all else was recorded."""
    recorded = rollout.behaviour_logprobs is not None and config.reuse_recorded
    if updater.responder.critic is None or not recorded or rollout.values is not None:
        return rollout
    with updater.as_critic() as critic:
        return replace(rollout, values=response_output(critic, rollout, config).values)
