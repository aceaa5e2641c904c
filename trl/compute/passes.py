"""Passes without gradient over a rollout, in parts that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from trl.batch import ResponseOutput, Rollout
from trl.compute.updater import Updater
from trl.config import PPOConfig


def micro_batches(
    rollout: Rollout, config: PPOConfig, rows: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield the rows of each pass over a rollout, or over the given rows of it."""
    return rollout.micro_batches(
        rows, max_rows=config.forward_batch_size, max_tokens=config.token_budget
    )


@torch.no_grad()
def response_output(model: nn.Module, rollout: Rollout, config: PPOConfig) -> ResponseOutput:
    """Return log-probs, values and entropies [B, R] under a `ResponseModel`."""
    whole = [torch.zeros_like(rollout.responses, dtype=torch.float32) for _ in range(3)]
    for rows in micro_batches(rollout, config):
        part = model(rollout.select(rows))
        for target, source in zip(whole, part[:3], strict=True):
            target[rows, : source.shape[1]] = source
    return ResponseOutput(*whole)


@torch.no_grad()
def with_trunk_states(updater: Updater, rollout: Rollout, config: PPOConfig) -> Rollout:
    """Return the rollout with the states that its passes start from, if layers are frozen."""
    responder = updater.responder
    if responder.trunk is None:
        return rollout
    whole: Tensor | None = None
    columns = rollout.queries.shape[1]
    with updater.autocast():
        for rows in micro_batches(rollout, config):
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
