"""A critic of its own: a second language model, whose value head answers in place of the policy's.

It is a model with a value head like any other, as the policy's attribute `critic`; nobody asks it
for logits. What is frozen of it and the same as in the policy, the base below an adapter or the
lower layers, is the policy's own memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trl.anatomy import language_model, vocabulary_size
from trl.config.errors import refuse
from trl.models.value_head import ValueHead


def copied(pretrained_model: nn.Module) -> nn.Module:
    """Return a copy of a language model, with its adapter if it has one, for the critic's trunk.

    Its frozen weights, and a head of its own, are the same tensors.
    """
    plain = language_model(pretrained_model)
    same: dict[int, Any] = {
        id(weight): weight for weight in pretrained_model.parameters() if not weight.requires_grad
    }
    head = plain.get_output_embeddings()
    if not _is_tied(plain):
        same[id(head)] = head
    return copy.deepcopy(pretrained_model, same)


def fit(critic: nn.Module, policy: nn.Module) -> None:
    """Let a critic share with the policy what is the same and frozen in both.

    Raises:
        ValueError: if it is one for other tokens, or the policy itself.
    """
    plain, theirs = language_model(critic), language_model(policy)
    if plain is theirs:
        refuse("critic", "be another model than the policy", fix="load it twice, or set 'copy'")
    sizes = [vocabulary_size(model) for model in (plain, theirs)]
    if sizes[0] < sizes[1]:
        got = f"{sizes[0]} tokens, and the policy {sizes[1]}"
        fix = "take a model with the policy's tokenizer, since it reads the policy's token ids"
        refuse("critic", "know the tokens of the policy", got, fix)
    heads = [model.get_output_embeddings() for model in (plain, theirs)]
    if not _is_tied(plain) and heads[0] is not heads[1]:  # nobody asks for logits
        heads[0].requires_grad_(False)
        if heads[0].weight.shape == heads[1].weight.shape:
            plain.set_output_embeddings(heads[1])
    of_policy = dict(theirs.named_parameters())
    for name, weight in list(plain.named_parameters()):
        other = of_policy.get(name)
        if other is None or weight.requires_grad or other.requires_grad:
            continue
        alike = weight.device == other.device and weight.dtype == other.dtype
        if alike and torch.equal(weight, other):
            owner, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(owner), attribute, other)


def shares_trunk(policy: nn.Module) -> bool:
    """Return whether all that is frozen of the policy's critic is the policy's own."""
    own = set(language_model(policy).parameters())
    weights = language_model(policy.critic).parameters()
    return all(weight.requires_grad or weight in own for weight in weights)


def critic_of(model: nn.Module) -> nn.Module | None:
    """Return the policy's critic of its own; None: its own hidden states give the values."""
    return getattr(model, "critic", None)


def value_head_of(model: nn.Module) -> ValueHead:
    """Return the value head of a policy, or that of its critic."""
    critic = critic_of(model)
    return (model if critic is None else critic).v_head


def value_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of a policy that are there for values alone: a head, or a whole critic."""
    if (critic := critic_of(model)) is None:
        return set(model.v_head.parameters())
    return set(critic.parameters()) - set(model.pretrained_model.parameters())


@contextmanager
def without_critic(policy: nn.Module) -> Iterator[None]:
    """Take the critic off a policy inside."""
    critic = critic_of(policy)
    if critic is None:
        yield
        return
    policy.critic = None
    try:
        yield
    finally:
        policy.critic = critic


def _is_tied(plain: nn.Module) -> bool:
    """Return whether the language head has the weight of the embedding."""
    head, embedding = plain.get_output_embeddings(), plain.get_input_embeddings()
    return head.weight is embedding.weight
