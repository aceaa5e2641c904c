"""What is wrong with a run, in words: what is seen, why that usually is, and what to set.

    diagnosis = Diagnosis(config.ppo, precision=trainer.precision)
    for finding in diagnosis.look_at_start(policy, tokenizer):
        print(finding)
    for ...:
        row = {"step": step} | loop.step()
        for finding in diagnosis.look(row):
            print(finding)

Each finding is said once in a run. A threshold is chosen such that a healthy run does not reach it
by chance: a mean is compared with its own noise, and a state must last for some steps. Where a
threshold comes from is said beside it. docs/metrics.md explains the figures themselves.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from trl.anatomy import language_model
from trl.batch import Rollout
from trl.config import PPOConfig

__all__ = ["Diagnosis", "Finding"]

Row = Mapping[str, Any]

# --- thresholds ---------------------------------------------------------------------------------

KEPT = 40
"""Values of each figure that are kept: the longest window below, and some to spare."""

NEGATIVE_KL = -0.1
"""Nats per response. k1 = Σ log π − log π_ref of a response is negative by chance, its mean over a
batch of B has the variance 2·KL/B while the KL is small. The mean of ten batches is least far from
this at a KL of 0.1: (0.1 + 0.1) / √(0.2/10B), 4 standard errors for batches of 8."""
NEGATIVE_KL_STEPS = 10
SURE = 3.0
"""Standard errors by which a mean must lie beyond a bound, so that it is not noise."""

RATIO_FLOOR = {"no": 1e-4, "bf16": 0.05, "fp16": 0.05}
"""Mean |log ratio| of the first minibatch. Measured with the starter GPT-2: 5e-7 while the sampler
runs inside of `trainer.sampling()`, at fp32 and bf16; about 0.03 between two roundings of bf16. The
trainer stops the run at 1e-3 and 0.1. A single step may be off by one token, so the median of some
is compared."""
RATIO_STEPS = 5

CONSTANT = 1e-4
"""Spread of the scores of a batch, relative to their size: what rounding leaves of equal ones."""
CONSTANT_STEPS = 3
"""A reward that is seldom won gives a batch or two of zeros by chance."""

ENTROPY_SHARE, ENTROPY_LEVEL = 0.25, 0.5
"""Share of its start, and nats per token, below which the entropy counts as collapsed: a language
model that still says different things keeps 2 to 4 nats; the starter GPT-2 goes from 3.9 to 3.4 in
a good run. Instruction-tuned models begin below the level, hence the share."""
ENTROPY_STEPS = 3

DISTINCT_SHARE, DISTINCT_LEVEL = 0.3, 0.2
"""Share of its start, and distinct-2, below which a batch repeats itself. Good runs keep 0.75 to
0.95 of it; at 0.04 every text is the same. Large batches of long texts begin lower."""
SAME_SHARE, SAME_TOKENS, SAME_ROWS = 0.5, 5, 8
"""Share of a batch that one response may make up; shorter ones (yes, no) and smaller batches are
not counted."""
REPEATED_STEPS = 3
ROWS_READ = 256
"""Responses of a batch that are compared with each other, at most."""

VALUE_STEPS, VALUE_WINDOW = 30, 10
"""The value head of the starter GPT-2 explains nothing for 9 steps, a third of the variance after
16; after so many steps, the last so many must be above 0 in the mean."""

KL_TARGETS = 3.0
"""Multiples of `kl_target` that an adaptive coefficient should not let the KL reach."""
KL_LEVEL, KL_PER_TOKEN = 30.0, 0.5
"""Nats per response, and per token. Published runs end at 4 to 20 nats for 24 to 53 tokens; those
at 50 to 85 wrote gibberish that the reward model liked (arXiv:2403.17031)."""
KL_RISE, KL_STEPS = 1.25, 10
"""Growth over so many steps that is steep."""

ENDED_BEFORE, ENDED_FEW, ENDED_STEPS = 0.5, 0.02, 5
"""Share of responses that used to end by themselves, and that do so no more."""

SKIPPED_STEPS = 3
"""fp16 begins with a step or two of overflow, until its scale has come down."""

GRADIENT_TIMES, GRADIENT_STEPS = 50.0, 10
"""Multiples of `max_grad_norm`. Adam does not see the scale of a gradient but it does see which
samples decide it; norms of 1 to 20 times the limit are common at the start."""

REWARD_FALL = 1.0
"""Fall of the mean reward, in standard deviations of the scores of a batch."""
REWARD_STEPS = 5

LENGTH_DRIFT, LENGTH_CORRELATION, LENGTH_WITHIN, LENGTH_STEPS = 0.5, 0.8, 0.3, 30
"""Change of the mean length, relative to its start; its correlation with the mean reward over so
many steps, and with the score inside of a batch."""

SMALL_APPROXKL = {"no": 1e-6, "bf16": 5e-4, "fp16": 1e-5}
SMALL_KL, SMALL_STEPS = 0.05, 20
"""Half the mean squared change of log π, the KL to the reference, and steps. Good runs have an
approxkl of 1e-4 to 2e-2; bf16 gives 2e-4 to 4e-4 by the rounding of its weights alone (measured at
a learning rate of 1e-8), while the KL stays at 0.01. A policy that has come somewhere, and stays
there at the end of its schedule, has a KL."""
LARGE_APPROXKL = 0.5
"""The same, for an update that is too large: tokens change their probability by e, in the mean."""
CLIPFRAC, CLIPFRAC_STEPS = 0.4, 3
"""Share of tokens whose gradient the clip has cut off. Good runs have 0.01 to 0.3."""

ESSENTIAL = ("reward/mean", "ppo/loss/total", "ppo/grad_norm", "ppo/policy/approxkl")
"""Figures that are never NaN; others may not be measured in some settings."""

EXPLAINED = {
    "learning_rate_too_small": ("entropy_collapsed", "constant_score", "updates_skipped"),
    "value_not_learning": ("constant_score", "updates_skipped"),
    "no_group_signal": ("constant_score",),
    "clip_fraction": ("update_too_large",),
    "kl_runaway": ("kl_above_target",),
}
"""Findings that say nothing new beside another one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a run that its owner should know."""

    name: str
    """What it is, in one word: `negative_kl`, ...."""
    step: int
    """When it was seen; 0: before the first step."""
    seen: str
    """What is seen, with the numbers."""
    causes: tuple[str, ...]
    """Why that usually is, the most frequent cause first."""
    fix: str
    """What to set or to look at."""

    def row(self) -> dict[str, Any]:
        """Return it as plain values, a line of a JSON file."""
        return asdict(self) | {"causes": list(self.causes)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Finding:
        """Return what `row` was made of."""
        return cls(**{**row, "causes": tuple(row["causes"])})

    def __str__(self) -> str:
        causes = "".join(f"\n  {place}. {cause}" for place, cause in enumerate(self.causes, 1))
        return f"{self.seen}\nUsual causes:{causes}\nWhat to do: {self.fix}"


Words = tuple[str, tuple[str, ...], str]
"""What is seen, the causes, and what to do."""


class Diagnosis:
    """Watches the figures of a run.

    Args:
        config: The settings of PPO.
        precision: That of the trainer, as `PPOTrainer.precision` has it.
        compares_groups: The algorithm takes the responses to one prompt as each other's baseline
            (RLOO, GRPO): groups with equal scores then teach nothing.
        must_end: Responses should end by themselves. None: if there is a penalty for those that do
            not.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        precision: str = "no",
        compares_groups: bool = False,
        must_end: bool | None = None,
    ) -> None:
        self.config = config
        self.precision = precision
        self.compares_groups = compares_groups
        if must_end is None:
            must_end = getattr(config, "missing_eos_penalty", None) is not None
        self.must_end = must_end
        self.history = History()
        self.found: list[str] = []

    def look(
        self, row: Row, rollout: Rollout | None = None, scores: Tensor | None = None
    ) -> list[Finding]:
        """Take in the figures of a step, and return what is new.

        Args:
            row: Figures by name, as `Loop.step` gives them, and `step`. Some may be missing.
            rollout: The responses of the step, for what only the texts show.
            scores: [B] or [B, R] their scores.

        Returns:
            Findings that were not returned before.
        """
        figures = _figures(row)
        if rollout is not None:
            figures |= _of_texts(rollout)
            if scores is not None:
                figures |= _of_scores(rollout, scores)
        broken = self.history.add(figures)
        step = int(row.get("step", self.history.steps))
        found = [
            self._finding(name, step, words)
            for name, check in CHECKS.items()
            if name not in self.found and (words := check(self)) is not None
        ]
        if broken and "not_a_number" not in self.found:
            found.insert(0, self._finding("not_a_number", step, _not_a_number(broken)))
        names = self.found + [finding.name for finding in found]
        found = [
            finding
            for finding in found
            if not any(other in names for other in EXPLAINED.get(finding.name, ()))
        ]
        self.found += [finding.name for finding in found]
        return found

    def look_at_start(
        self, policy: nn.Module, tokenizer: Any = None, *, sampler: Any = None
    ) -> list[Finding]:
        """Return what can be known before the first step.

        A padding token that is the EOS is none of it: padding is told by masks, never by its token,
        and the EOS that ends a response is inside of its mask.

        Args:
            policy: The model that is trained.
            tokenizer: Its tokenizer.
            sampler: The `Sampler` that writes the responses.
        """
        at_start = {
            "sampler_cuts": _sampler_cuts(sampler),
            "generation_config_cuts": _generation_config_cuts(policy),
            "no_end": _no_end(policy, tokenizer, sampler) if self.must_end else None,
            "kl_coef_stays_0": _kl_coef_stays_0(self.config),
        }
        found = [
            self._finding(name, 0, words)
            for name, words in at_start.items()
            if words is not None and name not in self.found
        ]
        self.found += [finding.name for finding in found]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain values."""
        return {"found": list(self.found), **self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.found = list(state["found"])
        self.history.load_state_dict(state)

    def _finding(self, name: str, step: int, words: Words) -> Finding:
        seen, causes, fix = words
        return Finding(name, step, seen, causes, fix)


class History:
    """The last values of each figure, and its first one."""

    def __init__(self) -> None:
        self.steps = 0
        self.first: dict[str, float] = {}
        self.best_reward: float | None = None
        """The highest mean of `REWARD_STEPS` batches, or the first batch."""
        self._last: dict[str, list[float]] = {}

    def add(self, figures: Mapping[str, float]) -> list[str]:
        """Take in the figures of a step; return the names of those that should be numbers."""
        self.steps += 1
        broken = []
        for name, value in figures.items():
            if math.isfinite(value):
                self.first.setdefault(name, value)
                self._last[name] = [*self._last.get(name, []), value][-KEPT:]
            elif name in self.first or name in ESSENTIAL:
                broken.append(name)
        if "reward/mean" in self.first:
            best = self.first["reward/mean"] if self.best_reward is None else self.best_reward
            recent = self.last("reward/mean", REWARD_STEPS)
            self.best_reward = max(best, statistics.fmean(recent)) if recent else best
        return broken

    def last(self, name: str, count: int) -> list[float]:
        """Return the last values of a figure, or none if there are not so many."""
        values = self._last.get(name, [])
        return values[-count:] if len(values) >= count else []

    def count(self, name: str) -> int:
        """Return how many values are kept of a figure."""
        return len(self._last.get(name, []))

    def state_dict(self) -> dict[str, Any]:
        """Return the values, copied."""
        return {
            "steps": self.steps,
            "first": dict(self.first),
            "best_reward": self.best_reward,
            "last": {name: list(values) for name, values in self._last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.steps = int(state["steps"])
        self.first = dict(state["first"])
        self.best_reward = state["best_reward"]
        self._last = {name: list(values) for name, values in state["last"].items()}


# --- figures of one step ------------------------------------------------------------------------

WATCHED = (
    "reward/mean",
    "reward/std",
    "response/length",
    "response/ended",
    "objective/kl",
    "objective/kl_coef",
    "ppo/policy/entropy",
    "ppo/policy/approxkl",
    "ppo/policy/clipfrac",
    "ppo/first_log_ratio",
    "ppo/grad_norm",
    "ppo/updates",
    "ppo/skipped_updates",
    "ppo/val/explained_variance",
    "ppo/val/var_explained",
    "ppo/loss/total",
    "held_out/distinct_2",
)


def _figures(row: Row) -> dict[str, float]:
    """Return the figures that are watched, and those that may turn out not to be numbers."""
    numbers = {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return {
        name: value
        for name, value in numbers.items()
        if name in WATCHED or (name.startswith(("reward/", "objective/", "ppo/", "response/")))
    }


def _of_texts(rollout: Rollout) -> dict[str, float]:
    """Return distinct-2 of the responses, and the share of the most frequent one."""
    mask = rollout.response_mask[:ROWS_READ].cpu()
    tokens = rollout.responses[:ROWS_READ].cpu()
    both = mask[:, 1:] & mask[:, :-1]
    pairs = (tokens[:, :-1].long() << 32 | tokens[:, 1:].long())[both]
    figures = {"batch/distinct_2": pairs.unique().numel() / pairs.numel()} if len(pairs) else {}
    if len(mask) >= SAME_ROWS:
        texts = [tuple(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]
        text, times = Counter(texts).most_common(1)[0]
        share = times / len(texts) if len(text) >= SAME_TOKENS else 0.0
        figures["batch/same_response"] = share
    return figures


def _of_scores(rollout: Rollout, scores: Tensor) -> dict[str, float]:
    """Return the correlation of score and length, and the share of groups with equal scores.

    Nothing if the scores are those of all processes, and the rollout is that of one.
    """
    scores = scores.detach().cpu().double()
    scores = scores if scores.ndim == 1 else scores.sum(1)
    if len(scores) != len(rollout):
        return {}
    lengths = rollout.response_mask.sum(1).cpu().double()
    correlation = _correlation(scores.tolist(), lengths.tolist())
    figures = {} if correlation is None else {"batch/score_length": correlation}
    if rollout.group_ids is not None:
        groups = [scores[rollout.group_ids.cpu() == group] for group in rollout.group_ids.unique()]
        equal = [_is_constant(float(group.std(correction=0)), group) for group in groups]
        figures["batch/equal_groups"] = sum(equal) / len(equal)
    return figures


def _is_constant(spread: float, scores: Tensor | float) -> bool:
    size = float(scores.abs().max()) if isinstance(scores, Tensor) else abs(scores)
    return spread <= CONSTANT * size + 1e-7


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None if one of the two does not change."""
    try:
        return statistics.correlation(first, second)
    except statistics.StatisticsError:
        return None


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


# --- what to look for ---------------------------------------------------------------------------


def _not_a_number(names: Sequence[str]) -> Words:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return (
        f"{shown} {'is' if len(names) == 1 else 'are'} not a finite number.",
        (
            "The learning rate is too large and the weights have run away.",
            "A score is infinite, or so large that its square overflows.",
            "fp16: numbers beyond 65,504 overflow.",
        ),
        "Go back to the last checkpoint with a lower `ppo.learning_rate`; set `ppo.clip_scores` "
        "if scores have outliers, and `ppo.precision: fp32` (or bf16) in place of fp16.",
    )


def _negative_kl(run: Diagnosis) -> Words | None:
    values = run.history.last("objective/kl", NEGATIVE_KL_STEPS)
    if not values:
        return None
    mean = _mean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    if mean > NEGATIVE_KL or mean > -SURE * error:
        return None
    return (
        f"The KL to the reference is negative: {mean:.2f} ± {error:.2f} nats per response over the "
        f"last {len(values)} steps. A real KL is never below 0, so what is scored is not what was "
        "sampled.",
        (
            "The sampler cuts the distribution: top_k, top_p, min_new_tokens, or generate() with "
            "the model's own generation_config.",
            "Responses were sampled at another temperature than `ppo.temperature`.",
            "Padding, or tokens that the policy did not write, are inside the response mask.",
            "The rollout carries log-probs of another policy.",
        ),
        "Leave top_k, top_p and min_new_tokens of the Sampler at their defaults and give it the "
        "temperature of `ppo.temperature`. With a sampler of your own set "
        "`ppo.reuse_recorded: false`, and pass `response_masks` to `step`.",
    )


def _ratio_not_one(run: Diagnosis) -> Words | None:
    values = run.history.last("ppo/first_log_ratio", RATIO_STEPS)
    allowed = RATIO_FLOOR.get(run.precision, RATIO_FLOOR["bf16"])
    if not values or statistics.median(values) <= allowed:
        return None
    return (
        f"Before the first update of a step, log π differs by {statistics.median(values):.2g} in "
        f"the mean from what was recorded (rounding explains {allowed:g}): the ratios of PPO "
        "should start at 1.",
        (
            "The sampler computes at another precision than the trainer: sample inside of "
            "`trainer.sampling()`.",
            "The rollout carries log-probs of slightly other weights, such as of a server.",
            "The model is not quite a fixed function of its input: noise, experts chosen by the "
            "rest of the batch, kernels whose result depends on padding.",
        ),
        "Set `ppo.reuse_recorded: false`: log-probs are then computed again by the trainer, at the "
        "price of a forward pass. If it stays, try `ppo.precision: fp32`.",
    )


def _constant_score(run: Diagnosis) -> Words | None:
    if run.config.batch_size == 1:
        return None
    spreads = run.history.last("reward/std", CONSTANT_STEPS)
    means = run.history.last("reward/mean", CONSTANT_STEPS)
    if not spreads or not means or not all(map(_is_constant, spreads, means)):
        return None
    return (
        f"All responses of a batch get the same score, {means[-1]:.4g}, and have done so for "
        f"{len(spreads)} steps: there is nothing to learn from but the KL.",
        (
            "The scorer does not see the response: it reads the query alone, or a cut-off text.",
            "The reward is never won: too rare, or out of the policy's reach.",
            "The policy writes the same text again and again.",
            "`ppo.clip_scores` cuts all scores to one number.",
        ),
        "Score a few texts by hand, good and bad ones. For a rare reward begin with easier "
        "prompts, give part of it for a part of the way, or raise `ppo.batch_size`.",
    )


def _no_group_signal(run: Diagnosis) -> Words | None:
    shares = run.history.last("batch/equal_groups", CONSTANT_STEPS)
    if not run.compares_groups or not shares or min(shares) < 1:
        return None
    return (
        f"The responses to each prompt all get the same score, for {len(shares)} steps: compared "
        "with each other, their advantages are 0.",
        (
            "Prompts are too easy or too hard: all responses win, or none does.",
            "The reward has few values, and the groups are too small to show a difference.",
            "The policy gives the same response to a prompt every time.",
        ),
        "Raise `sampling.group_size`, mix in prompts of another difficulty, use a finer reward, or "
        "take an algorithm with a value head.",
    )


def _entropy_collapsed(run: Diagnosis) -> Words | None:
    values = run.history.last("ppo/policy/entropy", ENTROPY_STEPS)
    if not values:
        return None
    start, now = run.history.first["ppo/policy/entropy"], max(values)
    if now > ENTROPY_LEVEL or now > ENTROPY_SHARE * start:
        return None
    return (
        f"The entropy of the policy has fallen from {start:.2f} to {values[-1]:.2g} nats per "
        "token: it is nearly sure of every token and explores no more.",
        (
            "The KL penalty is too weak for this reward.",
            "The learning rate is too large, or there are too many updates on each batch.",
            "The reward has one best text, which the policy has found: then this is the end of the "
            "training.",
        ),
        "Go back to an earlier checkpoint with a larger `ppo.init_kl_coef` or a smaller "
        "`ppo.learning_rate`; fewer `ppo.ppo_epochs`, or an `ppo.entropy_coef` of 0.001 to 0.01, "
        "help too.",
    )


def _repeated_text(run: Diagnosis) -> Words | None:
    seen = []
    for name, steps, what in (
        ("batch/distinct_2", REPEATED_STEPS, "of the last batches"),
        ("held_out/distinct_2", 1, "on the held-out prompts"),
    ):
        values = run.history.last(name, steps)
        start = run.history.first.get(name, 0.0)
        if values and max(values) < min(DISTINCT_LEVEL, DISTINCT_SHARE * start):
            seen.append(
                f"only {values[-1]:.1%} of the token pairs {what} differ (distinct-2; "
                f"{start:.0%} at the start)"
            )
    shares = run.history.last("batch/same_response", REPEATED_STEPS)
    if shares and min(shares) > SAME_SHARE:
        seen.append(f"{shares[-1]:.0%} of the responses are the same text")
    if not seen:
        return None
    return (
        f"The responses repeat themselves: {', and '.join(seen)}.",
        (
            "The reward model likes this text, which no person would: look at the samples.",
            "The KL penalty is too weak, so that the policy may leave the language behind.",
            "The learning rate is too large: one update has broken the model.",
        ),
        "Raise `ppo.init_kl_coef` (or lower `ppo.kl_target`), lower `ppo.learning_rate`, and add a "
        "reward that repetition costs something. Go back to a checkpoint before it.",
    )


def _value_not_learning(run: Diagnosis) -> Words | None:
    for name in ("ppo/val/explained_variance", "ppo/val/var_explained"):
        values = run.history.last(name, VALUE_STEPS)
        if values:
            break
    else:
        return None
    mean = _mean(values[-VALUE_WINDOW:])
    if mean > 0:
        return None
    return (
        f"After {run.history.steps} steps the values explain nothing of the returns (explained "
        f"variance {mean:.2f}, `{name}`): advantages are as noisy as without a value head.",
        (
            "The value head learns too slowly: its weight in the loss, or the learning rate, is "
            "small.",
            "`ppo.cliprange_value` is small against the size of the rewards, so that values may "
            "move a little only.",
            "The rewards are far from the size of 1.",
            "The score can hardly be told from what has been read so far.",
        ),
        "Raise `ppo.vf_coef` (0.1 to 0.5 or 1) or `ppo.cliprange_value`, or set "
        "`ppo.scale_scores: true`; `ppo.value_warmup_steps` lets it learn first. Or take another "
        "`ppo.algorithm`, without a value head.",
    )


def _kl_above_target(run: Diagnosis) -> Words | None:
    config = run.config
    values = run.history.last("objective/kl", 5)
    if not values or not config.adaptive_kl or config.init_kl_coef == 0:
        return None
    mean = _mean(values)
    if mean <= KL_TARGETS * config.kl_target:
        return None
    weight = run.history.last("objective/kl_coef", 1)
    now = f" (its coefficient is now {weight[0]:.3g})" if weight else ""
    return (
        f"The KL to the reference is {mean:.1f} nats per response, {mean / config.kl_target:.1f} "
        f"times `kl_target`{now}: the policy moves faster than the controller can follow.",
        (
            "The coefficient begins too small for this reward.",
            "`ppo.kl_horizon` is long for the size of the batches.",
            "The learning rate is too large.",
        ),
        "Raise `ppo.init_kl_coef`, shorten `ppo.kl_horizon`, or lower `ppo.learning_rate`. If so "
        "much KL is wanted, raise `ppo.kl_target`.",
    )


def _kl_runaway(run: Diagnosis) -> Words | None:
    values = run.history.last("objective/kl", min(KL_STEPS, run.history.count("objective/kl")))
    if len(values) < 4:
        return None
    now, before = _mean(values[-3:]), values[0]
    length = run.history.last("response/length", 1)
    level = max(KL_LEVEL, KL_PER_TOKEN * length[0] if length else 0.0)
    if now <= level or now < KL_RISE * before:
        return None
    free = run.config.init_kl_coef == 0
    return (
        f"The KL to the reference has gone from {before:.1f} to {now:.1f} nats per response in "
        f"{len(values)} steps: the policy is leaving its language behind, and the reward model "
        "what it was trained on.",
        (
            "`ppo.init_kl_coef` is 0: nothing holds the policy to the reference."
            if free
            else "`ppo.init_kl_coef` is too small for the size of the rewards.",
            "The learning rate is too large, or there are too many updates on each batch.",
            "The scores are large: they outweigh the KL.",
        ),
        f"{'Set' if free else 'Raise'} `ppo.init_kl_coef` (0.05 to 0.2 for scores of the size of "
        "1), lower `ppo.learning_rate`, or set `ppo.scale_scores: true`; `stop.kl` ends a run at a "
        "KL.",
    )


def _never_ends(run: Diagnosis) -> Words | None:
    values = run.history.last("response/ended", ENDED_STEPS)
    if not values or max(values) > ENDED_FEW:
        return None
    start = run.history.first["response/ended"]
    if not run.must_end and start < ENDED_BEFORE:
        return None
    before = f", {start:.0%} at the start" if start > ENDED_FEW else ""
    return (
        f"Hardly a response ends by itself: {values[-1]:.0%} of the last batch{before}; the others "
        "are cut off at the limit of their length.",
        (
            "The limit is shorter than what is to be said.",
            "The reward likes long responses.",
            "The policy has no reason to write the EOS token: it was not trained to, or the "
            "penalty is small beside the scores.",
        ),
        "Raise `sampling.max_new_tokens`, or give unfinished responses a penalty with "
        "`ppo.missing_eos_penalty`; `sampling.stop_strings` end a response too.",
    )


def _updates_skipped(run: Diagnosis) -> Words | None:
    applied = run.history.last("ppo/updates", SKIPPED_STEPS)
    skipped = run.history.last("ppo/skipped_updates", SKIPPED_STEPS)
    if not applied or not skipped or max(applied) > 0 or min(skipped) == 0:
        return None
    return (
        f"No update was applied in the last {len(applied)} steps, {skipped[-1]:.0f} of the last "
        "one's were skipped: the policy does not learn.",
        (
            "`ppo.max_approxkl` is so small that the first update exceeds it.",
            "The importance ratios are wild from the start: recorded log-probs are not those of "
            "the policy.",
            "fp16: gradients overflow in every update.",
        ),
        "Raise `ppo.max_approxkl` or leave it out, set `ppo.reuse_recorded: false`, or "
        "`ppo.precision` to bf16 or fp32.",
    )


def _gradient_clipped(run: Diagnosis) -> Words | None:
    limit = run.config.max_grad_norm
    values = run.history.last("ppo/grad_norm", GRADIENT_STEPS)
    if not limit or not values or min(values) <= GRADIENT_TIMES * limit:
        return None
    return (
        f"The gradient's norm has been {min(values):.3g} or more for {len(values)} steps, "
        f"{min(values) / limit:.0f} times `ppo.max_grad_norm`: every update is cut to a small part "
        "of itself, and the sample with the largest error decides its direction.",
        (
            "The scores are far larger than 1, so that the value loss outweighs the rest.",
            "The value head is far from the returns at the start.",
            "Single scores are outliers.",
        ),
        "Set `ppo.scale_scores: true` or `ppo.clip_scores`, or lower `ppo.vf_coef`.",
    )


def _reward_falling(run: Diagnosis) -> Words | None:
    values = run.history.last("reward/mean", REWARD_STEPS)
    spreads = run.history.last("reward/std", REWARD_STEPS)
    best = run.history.best_reward
    if not values or not spreads or best is None or run.config.batch_size == 1:
        return None
    now, spread = _mean(values), _mean(spreads)
    # The best batch so far is also a lucky one: by four standard errors of its mean, at the most.
    luck = 4 * max(spread / math.sqrt(run.config.batch_size), statistics.stdev(values) / 2)
    if best - now <= REWARD_FALL * spread + luck:
        return None
    return (
        f"The mean reward has fallen from {best:.3g} to {now:.3g}, by "
        f"{(best - now) / spread if spread else math.inf:.1f} standard deviations of the scores "
        "in a batch.",
        (
            "The learning rate is too large: an update has broken the policy.",
            "The KL coefficient has grown and pulls the policy back.",
            "The value head misleads the policy (see its explained variance).",
            "Prompts have become harder, if they come in an order.",
        ),
        "Go back to the best checkpoint with a lower `ppo.learning_rate`, fewer `ppo.ppo_epochs` "
        "or a larger `ppo.batch_size`; `ppo.max_approxkl: 0.05` stops a step that goes too far.",
    )


def _length_exploited(run: Diagnosis) -> Words | None:
    lengths = run.history.last("response/length", LENGTH_STEPS)
    rewards = run.history.last("reward/mean", LENGTH_STEPS)
    if not lengths or not rewards:
        return None
    start, now = run.history.first["response/length"], _mean(lengths[-5:])
    drift = now / start - 1 if start else 0.0
    correlation = _correlation(lengths, rewards)
    if abs(drift) < LENGTH_DRIFT or correlation is None or correlation * drift < 0:
        return None
    within = run.history.last(
        "batch/score_length", min(10, run.history.count("batch/score_length"))
    )
    inside = _mean(within) if within else None
    if abs(correlation) < LENGTH_CORRELATION or (
        inside is not None and (abs(inside) < LENGTH_WITHIN or inside * drift < 0)
    ):
        return None
    also = "" if inside is None else f", and {inside:+.2f} inside of a batch"
    return (
        f"Responses have become {'longer' if drift > 0 else 'shorter'}, from {start:.0f} to "
        f"{now:.0f} tokens, and the reward goes with the length (correlation {correlation:+.2f} "
        f"over {len(lengths)} steps{also}).",
        (
            "The reward model takes length for quality.",
            "A sum over tokens or a penalty makes length pay.",
            "The task does ask for it: then all is well.",
        ),
        "Read some samples. If length alone is rewarded, subtract it: a second reward, a function "
        "of the text with a negative weight; or lower `sampling.max_new_tokens`.",
    )


def _learning_rate_too_small(run: Diagnosis) -> Words | None:
    changes = run.history.last("ppo/policy/approxkl", SMALL_STEPS)
    rewards = run.history.last("reward/mean", SMALL_STEPS)
    warming_up = run.history.steps < SMALL_STEPS + getattr(run.config, "value_warmup_steps", 0)
    if not changes or not rewards or warming_up:
        return None
    kl = run.history.last("objective/kl", 1)
    if max(changes) >= SMALL_APPROXKL.get(run.precision, 0.0) or (kl and kl[0] > SMALL_KL):
        return None
    half = SMALL_STEPS // 2
    gain = _mean(rewards[half:]) - _mean(rewards[:half])
    noise = math.sqrt(2 / half) * statistics.stdev(rewards)
    if abs(gain) > SURE * noise:
        return None
    return (
        f"Updates hardly change the policy: approxkl is at most {max(changes):.1g} over "
        f"{SMALL_STEPS} steps (1e-4 to 2e-2 is usual), and the reward stays at "
        f"{_mean(rewards):.3g}.",
        (
            "The learning rate is too small for this model, or for an adapter, which needs ten "
            "times that of whole weights.",
            "The schedule has brought it to 0.",
            "Few weights are trained.",
        ),
        "Raise `ppo.learning_rate`, three times at a time; look at `schedule.kind` and "
        "`schedule.final`, and at what of the model is trained.",
    )


def _update_too_large(run: Diagnosis) -> Words | None:
    values = run.history.last("ppo/policy/approxkl", 1)
    if not values or values[0] <= LARGE_APPROXKL:
        return None
    return (
        f"One step has changed the policy beyond recognition: approxkl {values[0]:.3g} (1e-4 to "
        "2e-2 is usual).",
        (
            "The learning rate is too large.",
            "There are too many updates on one batch.",
        ),
        "Lower `ppo.learning_rate`, ten times at first; `ppo.max_approxkl: 0.05` stops a step that "
        "goes too far.",
    )


def _clip_fraction(run: Diagnosis) -> Words | None:
    values = run.history.last("ppo/policy/clipfrac", CLIPFRAC_STEPS)
    if not values or _mean(values) <= CLIPFRAC:
        return None
    return (
        f"The clip cuts off {_mean(values):.0%} of the tokens (over {len(values)} steps): most of "
        "a batch has no more gradient.",
        (
            "The learning rate is too large.",
            "There are too many updates on one batch.",
            "`ppo.cliprange` is small.",
        ),
        "Lower `ppo.learning_rate` or `ppo.ppo_epochs`, or raise `ppo.minibatch_size`.",
    )


CHECKS: dict[str, Callable[[Diagnosis], Words | None]] = {
    "update_too_large": _update_too_large,
    "negative_kl": _negative_kl,
    "ratio_not_one": _ratio_not_one,
    "constant_score": _constant_score,
    "no_group_signal": _no_group_signal,
    "updates_skipped": _updates_skipped,
    "entropy_collapsed": _entropy_collapsed,
    "repeated_text": _repeated_text,
    "kl_above_target": _kl_above_target,
    "kl_runaway": _kl_runaway,
    "reward_falling": _reward_falling,
    "never_ends": _never_ends,
    "length_exploited": _length_exploited,
    "clip_fraction": _clip_fraction,
    "gradient_clipped": _gradient_clipped,
    "value_not_learning": _value_not_learning,
    "learning_rate_too_small": _learning_rate_too_small,
}
"""What is looked for in each step, by the name of the finding."""


# --- before the first step ----------------------------------------------------------------------

CUTS: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
}
"""Settings of a `generation_config` that change what `generate` draws from, and where they do not.
"""


def _sampler_cuts(sampler: Any) -> Words | None:
    cuts = getattr(sampler, "cuts", ())
    if not cuts:
        return None
    return (
        f"The sampler draws from a cut distribution ({', '.join(cuts)}), training scores the "
        "model's whole one.",
        ("The settings of generation for users were taken over for training.",),
        "Leave top_k, top_p and min_new_tokens of the Sampler at their defaults to train. The KL "
        "that is measured can be driven negative otherwise.",
    )


def _generation_config_cuts(policy: nn.Module) -> Words | None:
    config = getattr(language_model(policy), "generation_config", None)
    values = {name: getattr(config, name, None) for name in CUTS}
    named = [f"{name}={value}" for name, value in values.items() if value not in CUTS[name]]
    if not named:
        return None
    return (
        f"The policy's generation_config has {', '.join(named)}. Sampler does not use them: it "
        "draws from the model's whole distribution, which is the one that is trained. `generate` "
        "does, also with the tuned model.",
        ("They came with the model, for the text that users see.",),
        "Judge the run by its own samples. To see the same with `generate`, pass do_sample=True, "
        "top_k=0, top_p=1.0 and the temperature of `ppo.temperature`. If you train on what "
        "`generate` wrote, pass them there too, or the KL goes negative.",
    )


def _no_end(policy: nn.Module, tokenizer: Any, sampler: Any) -> Words | None:
    config = getattr(language_model(policy), "generation_config", None)
    eos = [getattr(source, "eos_token_id", None) for source in (tokenizer, config)]
    if sampler is not None:
        eos = [*eos, True] if sampler.stop else []
    if any(token is not None for token in eos):
        return None
    return (
        "Responses are to end by themselves, but nothing can end one: there is no EOS token and "
        "no stop string.",
        ("The tokenizer has no EOS token.", "`sampling.eos` is off."),
        "Set `sampling.eos: true` and give the tokenizer an eos_token, or set "
        "`sampling.stop_strings`.",
    )


def _kl_coef_stays_0(config: PPOConfig) -> Words | None:
    if not config.adaptive_kl or config.init_kl_coef != 0:
        return None
    return (
        "`ppo.adaptive_kl` is on and `ppo.init_kl_coef` is 0: the controller multiplies, so the "
        "coefficient stays 0 and `ppo.kl_target` does nothing.",
        ("The KL penalty was switched off by its coefficient alone.",),
        "Set `ppo.adaptive_kl: false` to say so, or a small `ppo.init_kl_coef` such as 0.01 for "
        "the controller to move.",
    )
