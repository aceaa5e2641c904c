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
from dataclasses import dataclass, fields
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
    """Make the constructor of a dataclass name the field nearest to an unknown one.

    It also takes a list where a field holds a tuple: settings do not change.
    """
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
        generated(self, *map(_fixed, args), **{k: _fixed(v) for k, v in kwargs.items()})

    cls.__init__ = checked  # type: ignore[assignment]
    return cls


def _fixed(value: Any) -> Any:
    """Return tuples for lists, in mappings too."""
    if isinstance(value, list):
        return tuple(_fixed(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _fixed(entry) for key, entry in value.items()}
    return value


class SettingsError(ValueError):
    """What is wrong with a configuration, all at once.

    Attributes:
        owner: The name of the dataclass, or of the file.
        found: A sentence for each problem, which begins with the name of the field.
    """

    def __init__(self, owner: str, found: list[str]) -> None:
        super().__init__(f"{owner}: " + " ".join(found))
        self.owner = owner
        self.found = found


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

    def text(self, name: str, value: object, *, optional: bool = False) -> None:
        """Check that `value` is a text that is not empty."""
        if value is None and optional:
            return
        if not isinstance(value, str) or not value:
            also = " or None" if optional else ""
            self.found.append(f"`{name}` must be a text{also}, not an empty one, got {value!r}.")

    def texts(self, name: str, value: object) -> None:
        """Check that `value` is a tuple of texts; it may have none."""
        fits = isinstance(value, tuple) and all(isinstance(entry, str) and entry for entry in value)
        if not fits:
            self.found.append(f"`{name}` must be a list of texts, got {value!r}.")

    def whole_range(self, name: str, value: object, *, optional: bool = False) -> None:
        """Check that `value` is two integers > 0 in order."""
        if value is None and optional:
            return
        whole = (
            isinstance(value, tuple)
            and len(value) == 2
            and all(isinstance(end, int) and not isinstance(end, bool) for end in value)
        )
        if not whole or not 0 < value[0] <= value[1]:  # type: ignore[index]
            also = " or None" if optional else ""
            self.found.append(
                f"`{name}` must be two integers > 0, [least, most]{also}, got {value!r}."
            )

    def share_range(self, name: str, value: object) -> None:
        """Check that `value` is two numbers between 0 and 1 in order."""
        numeric = (
            isinstance(value, tuple)
            and len(value) == 2
            and all(isinstance(end, numbers.Real) and not isinstance(end, bool) for end in value)
        )
        if not numeric or not 0 <= value[0] < value[1] <= 1:  # type: ignore[index]
            self.found.append(
                f"`{name}` must be two numbers between 0 and 1, [low, high], got {value!r}."
            )

    def section(self, name: str, value: object, cls: type, *, optional: bool = False) -> None:
        """Check that `value` is an instance of the dataclass of a section."""
        if not isinstance(value, cls) and not (optional and value is None):
            also = " or None" if optional else ""
            got = type(value).__name__
            self.found.append(f"`{name}` must be a {cls.__name__}{also}, got {got}.")

    def add(self, problem: str) -> None:
        """Add a problem in words: it begins with the name of the field, in backticks."""
        self.found.append(problem)

    def report(self) -> None:
        """Raise one SettingsError that lists every problem found, if there are any."""
        if self.found:
            raise SettingsError(self.owner, self.found)


def is_positive(value: float) -> bool:
    """Tell whether the number is above 0."""
    return value > 0


def is_not_negative(value: float) -> bool:
    """Tell whether the number is 0 or above."""
    return value >= 0


def is_share(value: float) -> bool:
    """Tell whether the number is between 0 and 1."""
    return 0 <= value <= 1


WITHOUT_CRITIC = ("rloo", "grpo", "dr_grpo", "reinforce++")
"""The algorithms that train no value function."""

OF_WHOLE_RESPONSES = ("rloo", "grpo", "dr_grpo")
"""Those whose advantages are the same for all tokens of a response."""

KL_IN_LOSS = ("grpo", "dr_grpo")
"""Those that have the KL penalty in the loss, unless told otherwise."""


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class PPOConfig:
    """Settings of `PPOTrainer`. The defaults are those of the 2020 trainer where it had one."""

    algorithm: Literal["ppo", "rloo", "grpo", "dr_grpo", "reinforce++"] = "ppo"
    """How to learn from the scores. All but ppo do without a value function: `vf_coef`,
    `gae_lambda` and `cliprange_value` then have no meaning. rloo, grpo and dr_grpo compare several
    responses to each query (group_size of the sampler). See docs/papers.md."""
    policy_loss: Literal["clip", "gspo", "cispo"] | None = None
    """Loss of the policy: clipped ratios of tokens, of responses (GSPO), or clipped weights that
    keep every gradient (CISPO). None: the algorithm's, which is clip for all."""
    aggregate: Literal["token", "sequence", "sequence_sum", "constant"] | None = None
    """Average of the losses: all tokens alike; mean of the responses' means; mean of the responses'
    sums; those divided by `aggregate_length`. None: token for ppo and reinforce++, sequence for
    grpo, sequence_sum for rloo and dr_grpo."""
    aggregate_length: int | None = None
    """What aggregate="constant" divides a response's sum by: the most tokens that a response may
    have (the sampler's max_new_tokens), so that the loss has the size of a token's."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss of a bad token that became likelier: −c·advantage (3 in the paper);
    None: no bound."""

    learning_rate: float = 1.41e-5
    """Step size of Adam."""
    adam_eps: float = 1e-8
    """Adam's ε. Ziegler et al. use 1e-5, which makes the first updates several times smaller."""
    tf_adam: bool = False
    """Add ε as TensorFlow's Adam does, outside of the bias correction: what Ziegler et al. ran."""

    adaptive_kl: bool = True
    """Move the KL coefficient so that the KL to the reference comes near `kl_target`."""
    init_kl_coef: float = 0.2
    """Weight β of the KL penalty at the start (all along if `adaptive_kl` is off)."""
    kl_target: float = 6.0
    """KL to the reference that the controller aims at, in nats per response."""
    kl_horizon: float = 10_000.0
    """How slowly the controller moves, in episodes (responses)."""
    kl_in: Literal["reward", "loss"] | None = None
    """Where the KL penalty stands: in the reward of each token, or in the loss, where its gradient
    is that of the policy now. None: loss for grpo and dr_grpo, else reward."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the token KL. None: k1 = log π − log π_ref in the reward, where it is the sound
    choice, and k3 in the loss, where k1 would have a gradient of mean 0."""

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
    value_warmup_steps: int = 0
    """In the first so many steps train the value head alone; the policy and β stay as they are."""
    pretraining_coef: float = 0.0
    """Weight of −log π, mean per token, of texts from the trainer's `pretraining` (InstructGPT's
    PPO-ptx)."""
    pretraining_rows: int | None = None
    """Such texts in each update, over all processes. None: as many as it has rollouts."""

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
    missing_eos_penalty: float | None = None
    """What a response that did not end by itself loses, in units of the score; None: nothing."""
    missing_eos_replaces: bool = False
    """Let minus the penalty take the place of such a response's score (Ziegler et al.), rather
    than subtract the penalty from it (TRL)."""
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
            problems.number(name, getattr(self, name), "> 0", is_positive)
        problems.number("cliprange", self.cliprange, "> 0 and <= 1", lambda x: 0 < x <= 1)
        problems.number("cliprange_value", self.cliprange_value, "> 0", is_positive)
        for name in ("init_kl_coef", "vf_coef", "entropy_coef", "pretraining_coef"):
            problems.number(name, getattr(self, name), ">= 0", is_not_negative)
        for name in ("gamma", "gae_lambda"):
            problems.number(name, getattr(self, name), "between 0 and 1", is_share)
        for name in ("batch_size", "token_budget", "ppo_epochs"):
            problems.number(name, getattr(self, name), "> 0", is_positive, whole=True)
        for name in (
            "minibatch_size",
            "forward_batch_size",
            "aggregate_length",
            "pretraining_rows",
        ):
            value = getattr(self, name)
            problems.number(name, value, "> 0", is_positive, whole=True, optional=True)
        for name in ("cliprange_high", "max_grad_norm", "max_approxkl", "clip_scores"):
            problems.number(name, getattr(self, name), "> 0", is_positive, optional=True)
        problems.number("dual_clip", self.dual_clip, "> 1", lambda x: x > 1, optional=True)
        problems.number(
            "missing_eos_penalty", self.missing_eos_penalty, ">= 0", is_not_negative, optional=True
        )
        name, steps = "value_warmup_steps", self.value_warmup_steps
        problems.number(name, steps, ">= 0", is_not_negative, whole=True)
        problems.number("ratio_threshold", self.ratio_threshold, "> 1", lambda value: value > 1)
        problems.number("seed", self.seed, ">= 0", is_not_negative, whole=True)
        for name in (
            "adaptive_kl",
            "tf_adam",
            "missing_eos_replaces",
            "whiten_rewards",
            "center_scores",
            "scale_scores",
            "reuse_recorded",
            "keep_freed_memory",
        ):
            problems.flag(name, getattr(self, name))
        problems.choice("algorithm", self.algorithm, ("ppo", *WITHOUT_CRITIC))
        for name, allowed in (
            ("policy_loss", ("clip", "gspo", "cispo")),
            ("aggregate", ("token", "sequence", "sequence_sum", "constant")),
            ("kl_in", ("reward", "loss")),
            ("kl_estimator", ("k1", "k2", "k3")),
        ):
            if getattr(self, name) is not None:
                problems.choice(name, getattr(self, name), allowed)
        problems.choice("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        if not problems.found:  # else what contradicts what cannot be told
            problems.found += self._contradictions()
        problems.report()

    def _contradictions(self) -> list[str]:
        """Return what is wrong with settings that each are in order."""
        found = []
        named = f"algorithm={self.algorithm!r}"
        if self.algorithm in WITHOUT_CRITIC and self.whiten_rewards:
            found.append(
                f"`whiten_rewards` must be False with {named}, which has no critic that the scale "
                "of token rewards would matter to: use scale_scores."
            )
        if self.algorithm in WITHOUT_CRITIC and self.value_warmup_steps:
            found.append(
                f"`value_warmup_steps` must be 0 with {named}, which trains no values, got "
                f"{self.value_warmup_steps}."
            )
        elif self.value_warmup_steps and self.vf_coef == 0:
            found.append(
                "`vf_coef` must be > 0 with value_warmup_steps, got 0: nothing is trained."
            )
        if self.algorithm in OF_WHOLE_RESPONSES and self.gamma != 1:
            found.append(
                f"`gamma` must be 1 with {named}, whose advantages are of whole responses, got "
                f"{self.gamma}."
            )
        kl_in = self.kl_in or ("loss" if self.algorithm in KL_IN_LOSS else "reward")
        if kl_in == "loss" and self.kl_estimator == "k1":
            found.append(
                "`kl_estimator` must be 'k2' or 'k3' with the KL in the loss, got 'k1', whose "
                "gradient has mean 0 there: nothing would hold the policy. Or set kl_in='reward'."
            )
        if self.aggregate == "constant" and self.aggregate_length is None:
            found.append(
                "`aggregate_length` must be given with aggregate='constant', got None: set it to "
                "the most tokens a response may have."
            )
        if self.aggregate != "constant" and self.aggregate_length is not None:
            found.append(
                f"`aggregate_length` must be None unless aggregate='constant', got "
                f"{self.aggregate_length} with aggregate={self.aggregate!r}."
            )
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            found.append(
                f"`dual_clip` must be None with policy_loss='cispo', which clips weights, got "
                f"{self.dual_clip}."
            )
        if self.missing_eos_replaces and self.missing_eos_penalty is None:
            found.append(
                "`missing_eos_penalty` must be given with missing_eos_replaces=True, got None."
            )
        if self.pretraining_rows is not None and self.pretraining_coef == 0:
            found.append(
                f"`pretraining_coef` must be > 0 with pretraining_rows={self.pretraining_rows}, "
                "got 0."
            )
        return found
