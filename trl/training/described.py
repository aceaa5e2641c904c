"""What a recipe says of objects that were given in Python, as far as it can."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from trl import evaluation, starter
from trl.anatomy import language_model
from trl.config import SettingsError
from trl.config.errors import hidden
from trl.config.recipe import (
    ARGUMENTS,
    ENVIRONMENT,
    HUMAN,
    STARTER,
    EnvironmentConfig,
    LoRAConfig,
    RewardConfig,
)
from trl.environments import EnvironmentReward, Episodes
from trl.models.critic import critic_of, value_head_of
from trl.models.value_head import BinsValueHead, MLPValueHead
from trl.rollout.sampler import Sampler

MORE_THAN_LORA = "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"
"""Settings of an adapter for which a recipe has no words."""


def reward_config(scorer: Any, title: str, weight: float) -> RewardConfig:
    """Return the kind and the settings of a scorer; else the place of its function or class."""
    how = {"title": title, "weight": weight}
    try:
        return RewardConfig(**(_known(scorer) or _place(scorer)), **how)
    except SettingsError:  # such as one that has no name
        return RewardConfig(**_place(scorer), **how)


def _known(scorer: Any) -> dict[str, Any]:
    """Return what names a scorer of trl in a recipe; nothing: nothing does."""
    for kind, name in evaluation.CHECKS.items():
        if type(scorer) is getattr(evaluation, name):
            return {"kind": kind, "arguments": _arguments(scorer)}
    if type(scorer) is evaluation.HumanScorer:
        has = {"question": scorer.question, "per_item": scorer.per_item, "timeout": scorer.timeout}
        return {"kind": HUMAN, "name": str(scorer.path), "arguments": has}
    if type(scorer) is EnvironmentReward:
        return {"kind": ENVIRONMENT}
    models = {"reward_model": evaluation.RewardModelScorer, "steps": evaluation.StepScorer}
    for kind, cls in models.items():
        if type(scorer) is cls:
            own = {k: v for k, v in _arguments(scorer).items() if k in ARGUMENTS[kind]}
            return {"kind": kind, "name": scorer.model.name_or_path, "arguments": own}
    if type(scorer) is evaluation.FunctionScorer and "separator" in (own := _arguments(scorer)):
        return _place(scorer) | {"arguments": {"separator": own["separator"]}}
    if type(scorer) is evaluation.EndpointScorer:
        return {"kind": "endpoint", "name": hidden(scorer.given)}
    if type(scorer) is evaluation.ClassifierScorer:
        name, labels = scorer.model.name_or_path, scorer.model.config.id2label
        name = STARTER if name == str(starter.CLASSIFIER) else name
        label = str(labels.get(scorer.label, scorer.label))
        return {"kind": "classifier", "name": name, "label": label, "output": scorer.output}
    return {}


def _arguments(scorer: Any) -> dict[str, Any]:
    """Return what a scorer was made with that is not so anyway.

    What it is called is its title; what is no attribute is not for a recipe to say.
    """
    has = vars(scorer) | {"name": None}
    return {
        each.name: has[each.name]
        for each in inspect.signature(type(scorer)).parameters.values()
        if has.get(each.name) not in (None, each.default, {})
    }


def environment_config(sampler: Sampler) -> EnvironmentConfig | None:
    """Return what a recipe would say of an environment and of tools; None: there are none."""
    if not isinstance(sampler, Episodes):
        return None
    environment, tools, seconds, *_ = sampler.world.made_of
    several = environment.values() if isinstance(environment, Mapping) else [environment]
    names = [_place(each)["name"] for each in several if each is not None]
    return EnvironmentConfig(
        name=", ".join(names) or None,
        tools=tuple(_place(tool)["name"] for tool in tools),
        seconds=seconds,
        **asdict(sampler.limits),
    )


def _place(scorer: Any) -> dict[str, Any]:
    """Return module and name of a scorer's function, or of its class."""
    function = getattr(scorer, "function", scorer)
    named = function if hasattr(function, "__qualname__") else type(function)
    return {"kind": "function", "name": f"{named.__module__}:{named.__qualname__}"}


def lora_config(policy: nn.Module) -> LoRAConfig | None:
    """Return the adapter that is trained; None: there is none, or it is no plain LoRA."""
    adapters = getattr(getattr(policy, "pretrained_model", None), "peft_config", {})
    for adapter in adapters.values():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind == "LORA" and not any(getattr(adapter, name, None) for name in MORE_THAN_LORA):
            layers = adapter.target_modules
            return LoRAConfig(
                rank=adapter.r,
                alpha=float(adapter.lora_alpha),
                dropout=adapter.lora_dropout,
                target_modules=layers if isinstance(layers, str) else ",".join(sorted(layers)),
            )
    return None


def values_config(policy: nn.Module, critic: Any) -> dict[str, Any]:
    """Return what a recipe would say of the critic, and of its head.

    Args:
        policy: The policy.
        critic: What was given as its critic.
    """
    head = value_head_of(policy)
    named = {"critic": "same"}
    if (own := critic_of(policy)) is not None:
        inner = language_model(own)
        by_name = isinstance(critic, (str, os.PathLike)) and critic != "same"
        named["critic"] = (
            os.fspath(critic) if by_name else inner.name_or_path or type(inner).__name__
        )
    if isinstance(head, BinsValueHead):
        ends = float(head.centres[0]), float(head.centres[-1])
        return named | {"value_head": "bins", "value_range": ends}
    return named | ({"value_head": "mlp"} if isinstance(head, MLPValueHead) else {})
