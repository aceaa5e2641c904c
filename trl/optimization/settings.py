"""The settings that a trainer was given: a config, or keyword arguments, also those of 2020."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from trl.config import PPOConfig, closest, moved
from trl.config.errors import refuse


def resolve_config(
    config: PPOConfig | None,
    ppo_params: Mapping[str, Any],
    make: Callable[..., PPOConfig] = PPOConfig.from_kwargs,
) -> PPOConfig:
    """Return the config, or build it from keyword arguments, by `make`.

    Raises:
        TypeError: for arguments of older releases, for both, for what is no config, and for a name
            close to that of a setting; another unknown name is ignored with a warning.
    """
    if older := [moved.told(k, moved.ARGUMENTS[k]) for k in ppo_params if k in moved.ARGUMENTS]:
        raise TypeError(" ".join(older))
    if not isinstance(config, PPOConfig | None):
        fix = "the order is PPOTrainer(model, ref_model, config), and a dict goes in as **settings"
        refuse("config", "be a PPOConfig", type(config).__name__, fix, error=TypeError)
    if config is not None and ppo_params:
        one = "pass settings in `config` or as keyword arguments, not both"
        fix = "use dataclasses.replace(config, ...)"
        raise TypeError(f"{one}; got {sorted(ppo_params)} beside `config`: {fix}.")
    if config is not None:
        return config
    known = PPOConfig.known_names()
    near = {name: closest(name, known) for name in ppo_params if name not in known}
    mistyped = [f"PPOTrainer has no setting `{name}`.{hint}" for name, hint in near.items() if hint]
    if mistyped:
        raise TypeError("; ".join(mistyped))
    if near:
        named = ", ".join(f"`{name}`" for name in near)
        warnings.warn(f"PPOTrainer ignores {named}: no such field in PPOConfig.", stacklevel=3)
    return make(**{k: v for k, v in ppo_params.items() if k not in near})
