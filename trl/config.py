"""What a user can set: frozen dataclasses, checked when they are made.

The text under a field is its only documentation: the command line shows it as help. Nothing here
imports torch, so that a configuration can be read, checked and printed in a moment.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

T = TypeVar("T")

OLD_SPELLINGS = {
    "lr": "learning_rate",
    "lam": "gae_lambda",
    "target": "kl_target",
    "horizon": "kl_horizon",
    "adap_kl_ctrl": "adaptive_kl",
    "mini_batch_size": "minibatch_size",
}
"""The parameter names of the first trl (the last one: of its releases 0.4 to 0.11), and ours."""

OTHER_IDEAS = {"target_kl": "max_approxkl", "early_stopping": "max_approxkl"}
"""Settings of releases 0.4 to 0.11 whose idea has another form here, and where to look."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean …?' for the known name nearest to `name`, or nothing."""
    known = list(known)
    renamed = OLD_SPELLINGS.get(name) or OTHER_IDEAS.get(name)
    match = [renamed] if renamed in known else difflib.get_close_matches(name, known, 1, 0.7)
    return f" Did you mean `{match[0]}`?" if match else ""


def reject_unknown_fields(cls: type[T]) -> type[T]:
    """Make the constructor of a dataclass name the field nearest to an unknown one."""
    generated = cls.__init__
    known = [entry.name for entry in fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(generated)
    def checked(self: T, *args: Any, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise TypeError(
                "; ".join(
                    f"{cls.__name__} has no field `{name}`.{closest(name, known)}"
                    for name in unknown
                )
            )
        generated(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[assignment]
    return cls


class Problems:
    """Collects everything wrong with one configuration, to report it in one error."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.found: list[str] = []

    def number(
        self,
        name: str,
        value: object,
        rule: str,
        holds: Callable[[float], bool],
        *,
        whole: bool = False,
        optional: bool = False,
    ) -> None:
        """Check that `value` is a finite number (an integer if `whole`) for which `holds`."""
        if value is None and optional:
            return
        kind = numbers.Integral if whole else numbers.Real
        if (
            isinstance(value, bool)
            or not isinstance(value, kind)
            or not math.isfinite(float(value))
            or not holds(float(value))
        ):
            what = "an integer" if whole else "a finite number"
            also = " or None" if optional else ""
            self.found.append(f"`{name}` must be {what} {rule}{also}, got {value!r}.")

    def flag(self, name: str, value: object) -> None:
        """Check that `value` is True or False."""
        if not isinstance(value, bool):
            self.found.append(f"`{name}` must be True or False, got {value!r}.")

    def choice(self, name: str, value: object, allowed: Iterable[str]) -> None:
        """Check that `value` is one of `allowed`."""
        options = list(allowed)
        if value not in options:
            hint = closest(value, options) if isinstance(value, str) else ""
            self.found.append(f"`{name}` must be one of {options}, got {value!r}.{hint}")

    def report(self) -> None:
        """Raise one ValueError that lists every problem found, if there are any."""
        if self.found:
            raise ValueError(f"{self.owner}: " + " ".join(self.found))


def _positive(value: float) -> bool:
    return value > 0


def _not_negative(value: float) -> bool:
    return value >= 0


def _share(value: float) -> bool:
    return 0 <= value <= 1


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class PPOConfig:
    """Settings of `PPOTrainer`. The defaults are those of the 2020 trainer where it had one."""

    learning_rate: float = 1.41e-5
    """Step size of Adam."""
    adam_eps: float = 1e-8
    """Adam's ε. Ziegler et al. use 1e-5, which makes the first updates several times smaller."""

    adaptive_kl: bool = True
    """Move the KL coefficient so that the KL to the reference comes near `kl_target`."""
    init_kl_coef: float = 0.2
    """Weight β of the KL penalty at the start (all along if `adaptive_kl` is off)."""
    kl_target: float = 6.0
    """KL to the reference that the controller aims at, in nats per response."""
    kl_horizon: float = 10_000.0
    """How slowly the controller moves, in episodes (responses)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the token KL in the reward; k1 = log π − log π_ref is the sound choice there."""

    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """λ of generalized advantage estimation."""
    cliprange: float = 0.2
    """ε of the policy's clipped objective."""
    cliprange_high: float | None = None
    """Upper ε if it is to differ from `cliprange` (clip-higher, DAPO); None: the same."""
    cliprange_value: float = 0.2
    """How far a new value may move from the value at rollout before its loss is clipped."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    batch_size: int = 256
    """Rollouts per step, over all processes. `step` takes what it is given, also a last, smaller
    batch; this number sets the default of `minibatch_size`."""
    forward_batch_size: int | None = 16
    """Most rows in one forward (and backward) pass. Changes speed and memory, never the numbers.
    None: only `token_budget` limits a pass."""
    token_budget: int = 16_384
    """Most tokens, padding included, in one forward (and backward) pass."""
    minibatch_size: int | None = None
    """Rollouts per optimiser update, over all processes. None: a quarter of `batch_size`.
    The 2020 trainer used 1."""
    ppo_epochs: int = 4
    """Passes over the batch in each step."""

    reuse_recorded: bool = True
    """Take the log-probs and values that a sampler has recorded in the `Rollout`, rather than
    compute them again before the first update. They must be those of the policy as it is now, at
    the trainer's temperature, up to rounding: `step` raises if they are not."""
    temperature: float = 1.0
    """Temperature the responses were sampled with; scoring divides the logits by it too."""
    whiten_rewards: bool = False
    """Give the token rewards of a batch variance 1 (their mean stays), as Ziegler et al. do."""
    center_scores: bool = False
    """Subtract the running mean of the scores."""
    scale_scores: bool = False
    """Divide the scores by their running standard deviation."""
    clip_scores: float | None = None
    """Clip the scores (after centring and scaling) to ± this number."""

    max_grad_norm: float | None = 1.0
    """Clip the gradient of an update to this norm; None: no clipping."""
    ratio_threshold: float = 10.0
    """Skip an update whose mean importance ratio exceeds this (and count it in the stats)."""
    max_approxkl: float | None = None
    """Stop the step's remaining updates once ½·mean((log π − log π_old)²) over the tokens seen in
    this epoch exceeds this; None: never."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products; weights and optimiser state are always float32.
    auto: bf16 where the hardware is fast at it, else fp32."""
    keep_freed_memory: bool = True
    """On a Linux CPU, let the process keep freed memory for its next tensors: faster by a sixth."""
    seed: int = 0
    """Seed of the minibatch shuffle."""

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> PPOConfig:
        """Build a config from keyword arguments, the spellings of 2020 included.

        Raises:
            TypeError: for an unknown name (with the nearest known one).
            ValueError: for a bad value, or a setting given under both its names.
        """
        settings: dict[str, Any] = {}
        for name, value in kwargs.items():
            ours = OLD_SPELLINGS.get(name, name)
            if ours in settings:
                raise ValueError(
                    f"`{ours}` is given twice, under its own name and as in 2020: keep one."
                )
            settings[ours] = value
        return cls(**settings)

    @classmethod
    def known_names(cls) -> list[str]:
        """Return every name that `from_kwargs` accepts."""
        return [entry.name for entry in fields(cls)] + list(OLD_SPELLINGS)

    @property
    def update_size(self) -> int:
        """Rollouts per optimiser update: `minibatch_size` or its default."""
        return self.minibatch_size or max(1, self.batch_size // 4)

    def __post_init__(self) -> None:
        problems = Problems("PPOConfig")
        for name in ("learning_rate", "adam_eps", "kl_target", "kl_horizon", "temperature"):
            problems.number(name, getattr(self, name), "> 0", _positive)
        problems.number("cliprange", self.cliprange, "> 0 and <= 1", lambda x: 0 < x <= 1)
        problems.number("cliprange_value", self.cliprange_value, "> 0", _positive)
        for name in ("init_kl_coef", "vf_coef", "entropy_coef"):
            problems.number(name, getattr(self, name), ">= 0", _not_negative)
        for name in ("gamma", "gae_lambda"):
            problems.number(name, getattr(self, name), "between 0 and 1", _share)
        for name in ("batch_size", "token_budget", "ppo_epochs"):
            problems.number(name, getattr(self, name), "> 0", _positive, whole=True)
        for name in ("minibatch_size", "forward_batch_size"):
            value = getattr(self, name)
            problems.number(name, value, "> 0", _positive, whole=True, optional=True)
        for name in ("cliprange_high", "max_grad_norm", "max_approxkl", "clip_scores"):
            problems.number(name, getattr(self, name), "> 0", _positive, optional=True)
        problems.number("ratio_threshold", self.ratio_threshold, "> 1", lambda value: value > 1)
        problems.number("seed", self.seed, ">= 0", _not_negative, whole=True)
        for name in (
            "adaptive_kl",
            "whiten_rewards",
            "center_scores",
            "scale_scores",
            "reuse_recorded",
            "keep_freed_memory",
        ):
            problems.flag(name, getattr(self, name))
        problems.choice("kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        problems.choice("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Settings of `trl demo`: tune a language model to write positive film reviews."""

    model: str | None = None
    """Policy: a folder or a hub name; None: the starter GPT-2 that ships with trl."""
    reward_model: str | None = None
    """Sentiment classifier: a folder or a hub name; None: the one that ships with trl."""
    label: str = "POSITIVE"
    """Label of the classifier that is rewarded."""
    reward: Literal["logit", "probability", "log_odds"] = "logit"
    """The reward: the label's logit, as in 2020, its probability or its log-odds."""
    prompts: str | None = None
    """Text file with one prompt a line, a part of which is held out; None: review openings."""
    max_new_tokens: int = 20
    """Tokens of each response."""
    steps: int = 190
    """PPO steps."""
    held_out: int = 256
    """Held-out prompts for the evaluation before and after (at least 128 make a fair mean)."""
    eval_every: int = 25
    """Measure on the held-out prompts every so many steps."""
    seed: int = 0
    """Seed of prompts, sampling and shuffling."""
    out: str = "runs/demo"
    """Folder for the config, metrics, samples, picture and tuned policy."""
    profile: str | None = None
    """Folder for where the time went: a table, and traces of two steps; None: not looked at."""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            learning_rate=2e-4,
            adaptive_kl=False,
            init_kl_coef=0.052,
            vf_coef=0.5,
            batch_size=128,
            minibatch_size=32,
            forward_batch_size=128,
            ppo_epochs=1,
        )
    )
    """Settings of the PPO trainer; its `seed` is the one above."""

    def __post_init__(self) -> None:
        problems = Problems("DemoConfig")
        for name in ("max_new_tokens", "steps", "held_out", "eval_every"):
            problems.number(name, getattr(self, name), "> 0", _positive, whole=True)
        problems.number("seed", self.seed, ">= 0", _not_negative, whole=True)
        problems.choice("reward", self.reward, ("logit", "probability", "log_odds"))
        if not isinstance(self.ppo, PPOConfig):
            problems.found.append(f"`ppo` must be a PPOConfig, got {type(self.ppo).__name__}.")
        problems.report()
