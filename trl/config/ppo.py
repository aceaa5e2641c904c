"""The settings of PPO: a frozen dataclass, checked when it is made.

The text under a field is its only documentation: the command line shows it as help. Nothing here
imports torch, so that a configuration can be read, checked and printed in a moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, SupportsFloat

from pydantic import Field

from trl.config.algorithms import FACTS, AlgorithmName, CorrectionName
from trl.config.errors import OLD_SPELLINGS, refuse
from trl.config.section import Contradiction, section
from trl.config.types import (
    AboveOne,
    Count,
    NotNegative,
    NumberRange,
    PlainRate,
    Positive,
    PositiveShare,
    Rate,
    RateRange,
    Share,
    Whole,
)


@section
class PPOConfig:
    """Settings of `PPOTrainer`. The defaults are those of the 2020 trainer where it had one."""

    algorithm: AlgorithmName = "ppo"
    """How to learn from the scores. vapo is ppo with other values for what is None below. The
    others do without a value function: `vf_coef`, `gae_lambda` and `cliprange_value` then have no
    meaning. rloo, grpo and dr_grpo compare several responses to each query (group_size of the
    sampler). See docs/papers.md."""
    policy_loss: Literal["clip", "gspo", "cispo"] | None = None
    """Loss of the policy: clipped ratios of tokens, of responses (GSPO), or clipped weights that
    keep every gradient (CISPO). None: the algorithm's, which is clip for all."""
    aggregate: Literal["token", "sequence", "sequence_sum", "constant"] | None = None
    """Average of the losses: all tokens alike; mean of the responses' means; mean of the responses'
    sums; those divided by `aggregate_length`. None: token for ppo, vapo and reinforce++, sequence
    for grpo, sequence_sum for rloo and dr_grpo."""
    aggregate_length: Count | None = None
    """What aggregate="constant" divides a response's sum by: the most tokens that a response may
    have (the sampler's max_new_tokens), so that the loss has the size of a token's."""
    dual_clip: AboveOne | None = None
    """Bound c > 1 on the loss of a bad token that became likelier: −c·advantage (3 in the paper);
    None: no bound."""

    learning_rate: Rate = 1.41e-5
    """Step size of Adam: it moves every weight by about as much. auto: the rate that makes the
    policy go as far in each step as `auto_approxkl` says; a schedule then scales that way."""
    auto_approxkl: Positive = 0.01
    """With learning_rate="auto": what ½·mean((log π − log π_old)²) is to be at the end of a step.
    A step whose updates go beyond four times as much leaves out the others."""
    auto_initial_rate: PlainRate = 3e-5
    """Where "auto" begins; the first update is a hundred times smaller, and measured."""
    auto_rate_bounds: RateRange = (1e-8, 1e-2)
    """Lowest and highest rate that "auto" may take."""
    value_learning_rate: PlainRate | None = None
    """Step size of the value head, if it is to have one of its own; None: `learning_rate`."""
    adam_eps: Annotated[float, Field(ge=1e-30)] = 1e-8
    """Adam's ε. Ziegler et al. use 1e-5, which makes the first updates several times smaller; of
    less than 1e-30 float32 makes 0, and divides by it."""
    tf_adam: bool = False
    """Add ε as TensorFlow's Adam does, outside of the bias correction: what Ziegler et al. ran."""

    adaptive_kl: bool = True
    """Move the KL coefficient so that the KL to the reference comes near `kl_target`."""
    init_kl_coef: NotNegative = 0.2
    """Weight β of the KL penalty at the start (all along if `adaptive_kl` is off)."""
    kl_target: Positive = 6.0
    """KL to the reference that the controller aims at, in nats per response."""
    kl_horizon: Positive = 10_000.0
    """How slowly the controller moves, in episodes (responses)."""
    kl_in: Literal["reward", "loss"] | None = None
    """Where the KL penalty stands: in the reward of each token, or in the loss, where its gradient
    is that of the policy now. None: loss for grpo and dr_grpo, else reward."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] | None = None
    """Estimator of the token KL; k3+ has the value of k3 and the gradient of k2. None: k1 = log π −
    log π_ref in the reward, where it is the sound choice, and k3 in the loss, where k1 would have
    a gradient of mean 0."""

    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """λ of generalized advantage estimation."""
    gae_lambda_value: Share | None = None
    """λ of the returns that the values are trained towards, if it is to differ (VC-PPO: 1, what
    really came). None: 1 for vapo, else the λ of the advantages."""
    length_adaptive: Positive | None = None
    """α of a λ that grows with the number l of tokens of a response, 1 − 1/max(α·l, 1), in place of
    `gae_lambda` (VAPO). None: 0.05 for vapo, else the same λ for all."""
    cliprange: PositiveShare = 0.2
    """ε of the policy's clipped objective."""
    cliprange_high: Positive | None = None
    """Upper ε if it is to differ from `cliprange` (clip-higher, DAPO). None: 0.28 for vapo, else
    the same."""
    cliprange_value: Positive | None = 0.2
    """How far a new value may move from the value at rollout before its loss is clipped; None: as
    far as it likes."""
    vf_coef: NotNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus."""
    value_warmup_steps: Whole = 0
    """In the first so many steps train the value head alone; the policy and β stay as they are."""
    value_pretraining: Whole | None = None
    """At first, on responses of the untuned policy, train the value head alone for as long as the
    explained variance of the returns rises, and for so many steps at most. None: 50 for vapo, else
    0."""
    positive_coef: NotNegative | None = None
    """Weight of −log π, mean per token, of the responses whose score is above `positive_above`
    (VAPO: what was right, imitated). None: 0.1 for vapo, else 0."""
    positive_above: float = 0.0
    """Scores above this, as they are given to the step, are those of positive responses."""
    pretraining_coef: NotNegative = 0.0
    """Weight of −log π, mean per token, of texts from the trainer's `pretraining` (InstructGPT's
    PPO-ptx)."""
    pretraining_rows: Count | None = None
    """Such texts in each update, over all processes. None: as many as it has rollouts."""

    batch_size: Count = 256
    """Rollouts per step, over all processes. `step` takes what it is given, also a last, smaller
    batch; this number sets the default of `minibatch_size`."""
    forward_batch_size: Count | None = 16
    """Most rows in one forward (and backward) pass. Changes speed and memory, never the numbers.
    None: only `token_budget` limits a pass."""
    token_budget: Count | None = None
    """Most tokens, padding included, in one forward (and backward) pass. None: what a quarter of
    the memory holds, 16,384 at most, as the model and the machine have it."""
    minibatch_size: Count | None = None
    """Rollouts per optimiser update, over all processes; the last one of an epoch has what is left.
    None: a quarter of `batch_size`. The 2020 trainer used 1."""
    ppo_epochs: Count = 4
    """Passes over the batch in each step."""

    reuse_recorded: bool = True
    """Take the log-probs and values that a sampler has recorded in the `Rollout`, rather than
    compute them again before the first update. They must be those of the policy as it is now, at
    the trainer's temperature, up to rounding: `step` raises if they are not."""
    correction: CorrectionName | None = None
    """How to correct for what really sampled, where recorded log-probs are not those that the step
    starts from (`reuse_recorded` is off, or no values were recorded): weights π_old/μ truncated for
    each token or each response (tis, sequence_tis), none for tokens where the ratio is far off
    (icepop), or where the probability (dppo) or the ratio (clip) has moved too far the way it is
    pushed, or none for responses whose mean ratio is off (geometric)."""
    correction_bounds: NumberRange | None = None
    """Between what the correction leaves a ratio as it is; for dppo, a probability's way. None:
    [0, 2] for tis and sequence_tis, [0.5, 5] for icepop, [-0.15, 0.15] for dppo, [0.8, 1.2] for
    clip, [0.99, 1.01] for geometric."""
    prob_error_warn: AboveOne | None = 1.05
    """Warn of recorded log-probs whose probabilities differ from the policy's by more than this
    factor, mean of exp|log π_old − log μ|; None: never. Looked at where `correction` acts."""
    prob_error_stop: AboveOne | None = 1.1
    """Raise an error then, before anything is changed; None: never, as for rollouts that are meant
    to be some steps old."""
    temperature: Positive = 1.0
    """Temperature the responses were sampled with; scoring divides the logits by it too."""
    missing_eos_penalty: NotNegative | None = None
    """What a response that did not end by itself loses, in units of the score; None: nothing."""
    missing_eos_replaces: bool = False
    """Let minus the penalty take the place of such a response's score (Ziegler et al.), rather
    than subtract the penalty from it (TRL)."""
    whiten_rewards: bool = False
    """Give the token rewards of a batch variance 1 (their mean stays), as Ziegler et al. do."""
    score_range: NumberRange | None = None
    """Lowest and highest score that there is: they become −1 and 1, before anything else is made of
    the scores, and what is beyond is cut off. None: the scores stay."""
    center_scores: bool = False
    """Subtract the running mean of the scores."""
    scale_scores: bool = False
    """Divide the scores by their running standard deviation."""
    clip_scores: Positive | None = None
    """Clip the scores (after centring and scaling) to ± this number."""

    max_grad_norm: Positive | None = 1.0
    """Clip the gradient of an update to this norm; None: no clipping."""
    ratio_threshold: AboveOne = 10.0
    """Skip an update whose mean importance ratio exceeds this (and count it in the stats)."""
    max_approxkl: Positive | None = None
    """Stop the step's remaining updates once ½·mean((log π − log π_old)²) over the tokens seen in
    this epoch exceeds this; None: never."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products; weights and optimiser state are always float32.
    auto: bf16 where the hardware is fast at it, else fp32."""
    keep_freed_memory: bool = True
    """On a Linux CPU, let the process keep freed memory for its next tensors: faster by a sixth."""
    collective_timeout: Positive = 600.0
    """Seconds that processes wait for each other, at most, in an exchange of gradients or figures;
    one that does not come ends the run. Scorers, environments and people are waited for without a
    limit, outside of exchanges."""
    seed: Whole = 0
    """Seed of the order of prompts and minibatches; `trl.train` takes it for all that is random.
    0 in a recipe: its `seed`."""

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
                refuse(ours, "be given once", "it under its own name and as in 2020", "keep one")
            settings[ours] = value
        return cls(**settings)

    @classmethod
    def that_learns(cls, *, reference: bool = True, **kwargs: Any) -> PPOConfig:
        """Build a config as `from_kwargs` does, over `learning_defaults` for what is not given."""
        given = {OLD_SPELLINGS.get(name, name): value for name, value in kwargs.items()}
        return cls.from_kwargs(**learning_defaults(given, reference=reference) | kwargs)

    @classmethod
    def known_names(cls) -> list[str]:
        """Return every name that `from_kwargs` accepts."""
        return [entry.name for entry in fields(cls)] + list(OLD_SPELLINGS)

    @property
    def update_size(self) -> int:
        """Rollouts per optimiser update: `minibatch_size` or its default."""
        return self.minibatch_size or max(1, self.batch_size // 4)

    def in_force(self, name: str) -> Any:
        """Return a setting, or if that is None what it is for this algorithm."""
        own = getattr(self, name)
        return FACTS[self.algorithm].settings.get(name) if own is None else own

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        named, facts = f"with algorithm={self.algorithm!r}", FACTS[self.algorithm]
        if self.whiten_rewards and not facts.critic:
            yield "whiten_rewards", f"be False {named}, which has no critic", "use scale_scores"
        for name in ("value_warmup_steps", "value_pretraining"):
            if getattr(self, name) and not facts.critic:
                yield name, f"be 0 {named}, which trains no values"
            if self.in_force(name) and facts.critic and self.vf_coef == 0:
                yield "vf_coef", f"be > 0 with {name}", "nothing is trained"
        for name in ("value_learning_rate", "gae_lambda_value", "length_adaptive"):
            if getattr(self, name) is not None and not facts.critic:
                yield name, f"be None {named}, which trains no values"
        if self.gamma != 1 and facts.groups:
            yield "gamma", f"be 1 {named}, whose advantages are of whole responses"
        if (self.kl_in or facts.kl_in) == "loss" and self.kl_estimator == "k1":
            rule = "be 'k2', 'k3' or 'k3+' with the KL in the loss: k1 has a gradient of mean 0"
            yield "kl_estimator", rule, "or set kl_in='reward'"
        if self.aggregate == "constant" and self.aggregate_length is None:
            fix = "set it to the most tokens a response may have"
            yield "aggregate_length", "be given with aggregate='constant'", fix
        if self.aggregate != "constant" and self.aggregate_length is not None:
            yield "aggregate_length", "be None unless aggregate='constant'"
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            yield "dual_clip", "be None with policy_loss='cispo', which clips weights"
        if self.missing_eos_replaces and self.missing_eos_penalty is None:
            yield "missing_eos_penalty", "be given with missing_eos_replaces=True"
        if self.correction_bounds is not None:
            one = 0 if self.correction == "dppo" else 1
            if self.correction is None:
                yield "correction_bounds", "be None without a correction"
            elif not self.correction_bounds[0] <= one <= self.correction_bounds[1]:
                yield "correction_bounds", f"hold {one}, what is right already"
        if self.score_range is not None and self.score_range[0] == self.score_range[1]:
            yield "score_range", "be two different numbers"
        if self.positive_above != 0 and not self.in_force("positive_coef"):
            yield "positive_coef", f"be > 0 with positive_above={self.positive_above}"
        if self.pretraining_rows is not None and self.pretraining_coef == 0:
            yield "pretraining_coef", f"be > 0 with pretraining_rows={self.pretraining_rows}"


HORIZON = 10
"""Steps in the horizon of the adaptive KL coefficient: it moves by up to 2 % a step."""


def group_size(algorithm: str) -> int:
    """Return how many responses to each prompt an algorithm has, unless told otherwise."""
    return 4 if algorithm in FACTS and FACTS[algorithm].groups else 1


def learning_defaults(given: Mapping[str, Any], *, reference: bool = True) -> dict[str, Any]:
    """Return what `trl.train` and recipes take for settings that are not given.

    `PPOTrainer` by hand keeps the defaults of 2020, which were those for GPT-2 on film reviews;
    these were chosen by what they teach other models: see docs/defaults.md.

    Args:
        given: Settings that are, by their names.
        reference: Whether there is one, for a KL to be measured against.
    """
    facts = FACTS.get(given.get("algorithm", "ppo"), FACTS["ppo"])
    defaults: dict[str, Any] = {
        "learning_rate": "auto",
        "batch_size": 32,
        "ppo_epochs": 1,
        "init_kl_coef": 0.05 if reference else 0.0,
        "adaptive_kl": False,
    }
    size = given.get("batch_size", defaults["batch_size"])
    if isinstance(size, SupportsFloat) and float(size) > 0:  # else it is refused
        defaults["kl_horizon"] = HORIZON * float(size)
    if not facts.groups and given.get("score_range") is None:  # groups compare their own
        defaults |= {"center_scores": True, "scale_scores": True}
    if facts.critic:
        defaults["gae_lambda"] = 1.0
        if given.get("learning_rate", "auto") == "auto":
            defaults["value_learning_rate"] = 1e-3
    return {name: value for name, value in defaults.items() if name not in given}


def sampling_contradictions(
    config: PPOConfig, group_size: int, parts: int, processes: int = 1
) -> Iterator[Contradiction]:
    """Yield what is wrong with a batch and how it is sampled.

    Args:
        config: Of the trainer.
        group_size: Responses to each query.
        parts: Of a batch, written and scored one after the other.
        processes: That share a batch.
    """
    share = group_size * processes
    if config.batch_size % share:
        of = "group_size" if processes == 1 else "group_size × processes"
        yield "batch_size", f"be a multiple of {of} ({share})"
    elif parts > config.batch_size // share:
        prompts = config.batch_size // share
        yield "parts", f"be <= the prompts of a step on one process ({prompts})", "lower it"
    if FACTS[config.algorithm].groups and group_size < 2:
        why = "which compares the responses to one prompt"
        yield "group_size", f"be > 1 with algorithm={config.algorithm!r}, {why}", "set 4, say"
