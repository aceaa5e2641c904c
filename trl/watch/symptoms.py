"""What a diagnosis looks for: each symptom is one object, made of the check below its words.

    @symptom(
        "What is seen: {some} of it.",
        "The most frequent cause.",
        "Another one.",
        fix="What to set.",
        explained_by=("other",),
    )
    def name_of_it(run: History) -> Seen:
        '''Where its threshold comes from.'''
        some = run.over(3, "some/figure", min)
        return {"some": some} if some > 7 else None

A threshold is chosen such that a healthy run does not reach it by chance: a mean is compared with
its own noise, and a state must last for some steps. Findings come in the order of this file.
`trl.watch.at_start` has those that can be known before the first step.
"""

from __future__ import annotations

import math
import statistics
from statistics import fmean

from trl.config.algorithms import FACTS
from trl.watch import at_start
from trl.watch.history import (
    REWARD_STEPS,
    SURE,
    History,
    Seen,
    Symptom,
    correlation,
    is_constant,
    learned,
    symptom,
)


@symptom(
    "{names} not a finite number.",
    "The learning rate is too large and the weights have run away.",
    "A score is infinite, or so large that its square overflows.",
    "fp16: numbers beyond 65,504 overflow.",
    fix="Go back to the last checkpoint with a lower `ppo.learning_rate`; set `ppo.clip_scores` if "
    "scores have outliers, and `ppo.precision: fp32` (or bf16) in place of fp16.",
)
def not_a_number(run: History) -> Seen:
    """A figure that was a number before, or must be one."""
    names = ", ".join(f"`{name}`" for name in run.broken[:5])
    return {"names": f"{names} {'is' if len(run.broken) == 1 else 'are'}"} if names else None


@symptom(
    "One step changed the policy beyond recognition: approxkl {change:.3g} (usual: 1e-4 to 2e-2).",
    "The learning rate is too large.",
    "There are too many updates on one batch.",
    fix="Lower `ppo.learning_rate` ten times; `ppo.max_approxkl: 0.05` stops a step too far.",
)
def update_too_large(run: History) -> Seen:
    """Half the mean squared change of log π: tokens change their probability by e, in the mean."""
    change = run.latest("ppo/policy/approxkl")
    return {"change": change} if change > 0.5 else None


@symptom(
    "The KL to the reference is negative: {mean:.2f} ± {error:.2f} nats per response over the last "
    "{steps} steps. A real KL is never below 0, so what is scored is not what was sampled.",
    "The sampler cuts the distribution: top_k, top_p, min_new_tokens, or a generation_config.",
    "Responses were sampled at another temperature than `ppo.temperature`.",
    "Padding, or tokens that the policy did not write, are inside the response mask.",
    "The rollout carries log-probs of another policy.",
    fix="Leave top_k, top_p and min_new_tokens of the Sampler at their defaults and give it the "
    "temperature of `ppo.temperature`. With a sampler of your own set `ppo.reuse_recorded: false`, "
    "and pass `response_masks` to `step`.",
)
def negative_kl(run: History) -> Seen:
    """Nats per response. k1 = Σ log π − log π_ref of a response is negative by chance, its mean
    over a batch of B has the variance 2·KL/B while the KL is small. The mean of ten batches is
    least far from −0.1 at a KL of 0.1: (0.1 + 0.1) / √(0.2/10B), 4 standard errors for B = 8.
    """
    mean = run.over(10, "objective/kl")
    error = run.over(10, "objective/kl", statistics.stdev) / math.sqrt(10)
    sure = mean <= min(-0.1, -SURE * error)
    return {"mean": mean, "error": error, "steps": 10} if sure else None


@symptom(
    "Before the first update of a step, log π differs by {ratio:.2g} in the mean from what was "
    "recorded (rounding explains {allowed:g}): the ratios of PPO should start at 1.",
    "The sampler computes at another precision: sample inside of `trainer.sampling()`.",
    "The rollout carries log-probs of slightly other weights, such as of a server.",
    "The model is not quite a fixed function of its input: noise, experts chosen by the rest of "
    "the batch, kernels whose result depends on padding.",
    fix="Set `ppo.reuse_recorded: false`: log-probs are then computed again by the trainer, at the "
    "price of a forward pass. If it stays, try `ppo.precision: fp32`.",
)
def ratio_not_one(run: History) -> Seen:
    """Mean |log ratio| of the first minibatch. Measured with the starter GPT-2: 5e-7 while the
    sampler runs inside of `trainer.sampling()`, at fp32 and bf16; about 0.03 between two roundings
    of bf16. The trainer stops the run at 1e-3 and 0.1. A single step may be off by one token, so
    the median of some is compared.
    """
    allowed = 1e-4 if run.precision == "no" else 0.05
    ratio = run.over(5, "ppo/first_log_ratio", statistics.median)
    return {"ratio": ratio, "allowed": allowed} if ratio > allowed else None


@symptom(
    "All responses of a batch get the same score, {score:.4g}, and have done so for {steps} steps: "
    "there is nothing to learn from but the KL.",
    "The scorer does not see the response: it reads the query alone, or a cut-off text.",
    "The reward is never won: too rare, or out of the policy's reach.",
    "The policy writes the same text again and again.",
    "`ppo.clip_scores` cuts all scores to one number.",
    fix="Score a few texts by hand, good and bad ones. For a rare reward begin with easier "
    "prompts, give part of it for a part of the way, or raise `ppo.batch_size`.",
)
def constant_score(run: History) -> Seen:
    """A reward that is seldom won gives a batch or two of zeros by chance. One that has been learnt
    is won by all.
    """
    spreads, means = run.window(3, "reward/std"), run.window(3, "reward/mean")
    equal = spreads and means and all(map(is_constant, spreads, means))
    wrong = equal and run.config.batch_size > 1 and not learned(run)
    return {"score": means[-1], "steps": 3} if wrong else None


@symptom(
    "All responses of the batch got the same score, {score:.4g}, and {updates:.0f} updates of full "
    "strength were made of it (approxkl {change:.2g}): advantages are whitened, so that what the "
    "value head has got wrong, and the KL, is all that they teach.",
    "The reward is seldom won, or nearly always: in a small batch all responses are alike.",
    "The scorer does not see the response, or `ppo.clip_scores` cuts all scores to one number.",
    fix="Raise `ppo.batch_size`, mix in prompts of another difficulty, or use a finer reward. With "
    "an algorithm without a value head (`ppo.algorithm`) such a batch teaches nothing but the KL.",
)
def updates_without_signal(run: History) -> Seen:
    """One batch is enough: each such one moves the policy as far as any other, to no end."""
    updates, score = run.latest("ppo/updates"), run.latest("reward/mean")
    equal = run.latest("objective/constant_scores") == 1 and run.config.batch_size > 1
    trains = updates > 0 and run.steps > run.config.value_warmup_steps
    if not equal or not trains or not FACTS[run.config.algorithm].critic or learned(run):
        return None
    return {"score": score, "updates": updates, "change": run.latest("ppo/policy/approxkl")}


@symptom(
    "The responses to each prompt all get the same score, for {steps} steps: advantages are 0.",
    "Prompts are too easy or too hard: all responses win, or none does.",
    "The reward has few values, and the groups are too small to show a difference.",
    "The policy gives the same response to a prompt every time.",
    fix="Raise `sampling.group_size`, mix in prompts of another difficulty, use a finer reward, or "
    "take an algorithm with a value head.",
    explained_by=("constant_score",),
)
def no_group_signal(run: History) -> Seen:
    """As with constant scores, a batch or two may be so by chance, and all if it is learnt."""
    equal = run.over(3, "batch/equal_groups", min) == 1
    wrong = equal and FACTS[run.config.algorithm].groups and not learned(run)
    return {"steps": 3} if wrong else None


@symptom(
    "No update was applied for {steps} steps ({skipped:.0f} skipped in the last): no learning.",
    "`ppo.max_approxkl` is so small that the first update exceeds it.",
    "The importance ratios are wild from the start: recorded log-probs are not the policy's.",
    "fp16: gradients overflow in every update.",
    fix="Raise `ppo.max_approxkl`, set `ppo.reuse_recorded: false`, or `ppo.precision: bf16`.",
)
def updates_skipped(run: History) -> Seen:
    """The scale of fp16 begins with a step or two of overflow, until it has come down."""
    none = run.over(3, "ppo/updates", max) == 0 and run.over(3, "ppo/skipped_updates", min) > 0
    return {"steps": 3, "skipped": run.latest("ppo/skipped_updates")} if none else None


@symptom(
    "The entropy of the policy has fallen from {start:.2f} to {now:.2g} nats per token: it is "
    "nearly sure of every token and explores no more.",
    "The KL penalty is too weak for this reward.",
    "The learning rate is too large, or there are too many updates on each batch.",
    "The reward has one best text, which the policy has found: then the training has ended.",
    fix="Go back to an earlier checkpoint with a larger `ppo.init_kl_coef` or a smaller "
    "`ppo.learning_rate`; fewer `ppo.ppo_epochs` or an `ppo.entropy_coef` of 0.001 to 0.01 help.",
)
def entropy_collapsed(run: History) -> Seen:
    """A language model that still says different things keeps 2 to 4 nats per token; the starter
    GPT-2 goes from 3.9 to 3.4 in a good run. Instruction-tuned models begin below half a nat, hence
    the share of the start.
    """
    start = run.first.get("ppo/policy/entropy", 0.0)
    low = run.over(3, "ppo/policy/entropy", max) <= min(0.5, 0.25 * start)
    return {"start": start, "now": run.latest("ppo/policy/entropy")} if low else None


@symptom(
    "The responses repeat themselves: {how}.",
    "The reward model likes this text, which no person would: look at the samples.",
    "The KL penalty is too weak, so that the policy may leave the language behind.",
    "The learning rate is too large: one update has broken the model.",
    fix="Raise `ppo.init_kl_coef` (or lower `ppo.kl_target`), lower `ppo.learning_rate`, and add a "
    "reward that repetition costs something. Go back to a checkpoint before it.",
)
def repeated_text(run: History) -> Seen:
    """Good runs keep 0.75 to 0.95 of the distinct-2 of their start; at 0.04 every text is the same.
    Large batches of long texts begin lower, hence the share. Or one text is most of a batch. Where
    most responses are JSON, its signs and keys are to be the same in all.
    """
    how = []
    if run.over(3, "batch/json", min) > 0.5:
        return None
    for name, steps, what in (
        ("batch/distinct_2", 3, "of the last batches"),
        ("held_out/distinct_2", 1, "on the held-out prompts"),
    ):
        now, start = run.latest(name), run.first.get(name, 0.0)
        if run.over(steps, name, max) < min(0.2, 0.3 * start):
            pairs = f"only {now:.1%} of the token pairs {what} differ"
            how.append(f"{pairs} (distinct-2; {start:.0%} at the start)")
    if run.over(3, "batch/same_response", min) > 0.5:
        how.append(f"{run.latest('batch/same_response'):.0%} of the responses are the same text")
    return {"how": ", and ".join(how)} if how else None


@symptom(
    "The KL to the reference is {kl:.1f} nats per response, {times:.1f} times `kl_target` (its "
    "coefficient is now {now:.3g}): the policy moves faster than the controller can follow.",
    "The coefficient begins too small for this reward.",
    "`ppo.kl_horizon` is long for the size of the batches.",
    "The learning rate is too large.",
    fix="Raise `ppo.init_kl_coef` or `ppo.kl_target`, shorten `ppo.kl_horizon`, or lower the rate.",
)
def kl_above_target(run: History) -> Seen:
    """Three times `kl_target`: an adaptive coefficient should not let the KL reach that."""
    times = run.over(5, "objective/kl") / run.config.kl_target
    if not run.config.adaptive_kl or run.config.init_kl_coef == 0 or not times > 3:
        return None
    now = run.latest("objective/kl_coef")
    return {"kl": times * run.config.kl_target, "times": times, "now": now}


@symptom(
    "The KL penalty, {penalty:.3g} of a response, outweighs what scores differ by, {spread:.3g}, "
    "and the reward does not rise: the policy is taught to stay where it is.",
    "`ppo.init_kl_coef` was chosen for scores of another size.",
    "The policy has moved far, by too large a step, and is pulled back.",
    fix="Lower `ppo.init_kl_coef` (0.05 suits scores with a spread of 1), or set "
    "`ppo.scale_scores: true`, which gives them that.",
    explained_by=("constant_score", "kl_runaway", "kl_above_target"),
)
def penalty_outweighs_reward(run: History) -> Seen:
    """Five steps in the mean. Good runs have up to the spread, once they have learnt."""
    spread = 1.0 if run.config.scale_scores else run.over(5, "reward/std")
    penalty = run.over(5, "objective/kl") * run.over(5, "objective/kl_coef")
    return {"penalty": penalty, "spread": spread} if penalty > spread and not learned(run) else None


@symptom(
    "The KL has been {side} `kl_target` for {steps} steps, and its coefficient has hardly moved, "
    "from {first:.3g} to {now:.3g}: it cannot act within this run.",
    "`ppo.kl_horizon` is long for the size of the batches: it counts responses.",
    fix="Shorten `ppo.kl_horizon` to some ten times `ppo.batch_size`, or set "
    "`ppo.adaptive_kl: false` and choose `ppo.init_kl_coef`.",
    explained_by=("kl_above_target", "learning_rate_too_small", "updates_skipped"),
)
def coefficient_cannot_act(run: History) -> Seen:
    """20 steps of one side, by more than the controller's limit of a fifth, and less than 5 %."""
    ratios = [kl / run.config.kl_target for kl in run.window(20, "objective/kl")]
    above, below = min(ratios, default=0) > 1.2, max(ratios, default=1) < 0.8
    first, now = run.first.get("objective/kl_coef", 0.0), run.latest("objective/kl_coef")
    moves = run.config.adaptive_kl and first > 0 and run.steps > run.config.value_warmup_steps + 20
    if not moves or not (above or below) or abs(now / first - 1) > 0.05:
        return None
    return {"side": "above" if above else "below", "steps": 20, "first": first, "now": now}


@symptom(
    "The KL to the reference has gone from {before:.1f} to {now:.1f} nats per response in {steps} "
    "steps: the policy leaves its language behind, and the reward model what it was trained on.",
    "`ppo.init_kl_coef` is 0, or so small beside the rewards that nothing holds the policy back.",
    "The learning rate is too large, or there are too many updates on each batch.",
    "The scores are large: they outweigh the KL.",
    fix="Raise `ppo.init_kl_coef` (0.05 to 0.2 for scores of the size of 1), lower "
    "`ppo.learning_rate`, or set `ppo.scale_scores: true`; `stop.kl` ends a run at a KL.",
    explained_by=("kl_above_target", "update_too_large"),
)
def kl_runaway(run: History) -> Seen:
    """Published runs end at 4 to 20 nats per response of 24 to 53 tokens; those at 50 to 85 wrote
    gibberish that the reward model liked (arXiv:2403.17031): 30 nats, and half a nat per token.
    Growth by a quarter in ten steps is steep.
    """
    values = run.window(10, "objective/kl", least=4)
    if not values:
        return None
    before, now = values[0], fmean(values[-3:])
    far = now > max(30.0, 0.5 * run.latest("response/length"))
    steep = now >= 1.25 * before
    return {"before": before, "now": now, "steps": len(values)} if far and steep else None


@symptom(
    "The mean reward has fallen from {best:.3g} to {now:.3g}, by {times:.1f} standard deviations.",
    "The learning rate is too large: an update has broken the policy.",
    "The KL coefficient has grown and pulls the policy back.",
    "The value head misleads the policy (see its explained variance).",
    "Prompts have become harder, if they come in an order.",
    fix="Go back to the best checkpoint with a lower `ppo.learning_rate`, fewer `ppo.ppo_epochs` "
    "or a larger `ppo.batch_size`; `ppo.max_approxkl: 0.05` stops a step that goes too far.",
    explained_by=("update_too_large",),
)
def reward_falling(run: History) -> Seen:
    """A standard deviation of the scores of a batch, and more than luck. The best batch so far is
    also a lucky one: by four standard errors of its mean, at the most.
    """
    now, spread = run.over(REWARD_STEPS, "reward/mean"), run.over(REWARD_STEPS, "reward/std")
    best, size = run.best_reward or 0.0, run.config.batch_size
    error = run.over(REWARD_STEPS, "reward/mean", statistics.stdev) / 2
    luck = 4 * max(spread / math.sqrt(size), error)
    if size == 1 or not best - now > spread + luck:
        return None
    return {"best": best, "now": now, "times": (best - now) / spread if spread else math.inf}


@symptom(
    "The reward has risen, from {first:.3g} to {now:.3g}, at {nats:.1f} nats of KL for each token: "
    "the texts are no longer what the model would write, and perhaps no language.",
    "The reward can be won by texts that nobody means; what it was trained on is far away.",
    "The KL penalty is too weak for this reward.",
    fix="Read some samples. Raise `ppo.init_kl_coef`, and give the reward a part that broken texts "
    "do not win.",
    explained_by=("kl_runaway", "repeated_text", "entropy_collapsed"),
)
def texts_break(run: History) -> Seen:
    """Good runs of this library end at 0.2 to 0.6 nats per token; published ones at about 1.5 to 2
    wrote gibberish (arXiv:2403.17031).
    """
    nats = run.over(3, "objective/kl") / max(run.over(3, "response/length"), 1.0)
    seen = {
        "nats": nats,
        "first": run.first.get("reward/mean", 0.0),
        "now": run.latest("reward/mean"),
    }
    return seen if nats > 1.5 and learned(run) else None


@symptom(
    "Of the answers to chats, {share:.0%} end by themselves, over {steps} steps: the others are "
    "cut off at {length:.0f} tokens, in the middle of a sentence, and scored like that.",
    "The limit, `sampling.max_new_tokens`, is shorter than an answer of this model.",
    fix="Raise `sampling.max_new_tokens` (in Python max_new_tokens=...), ask for short answers in "
    "the prompt, or set `ppo.missing_eos_penalty`.",
    explained_by=("never_ends",),
)
def answers_cut(run: History) -> Seen:
    """Five steps from the start on; a model that continues texts need not end."""
    share, length = run.over(5, "response/ended"), run.over(5, "response/length")
    cut = run.latest("batch/chats") == 1 and run.over(5, "response/ended", max) <= 0.1
    return {"share": share, "steps": 5, "length": length} if cut else None


@symptom(
    "Nothing was learnt in {steps} steps: the reward is {now:.3g}, as it was at the start "
    "({first:.3g}), though the policy has moved by {kl:.2g} nats per response.",
    "The reward is noise to this policy: too rare, too coarse, or not about what it can change.",
    "There are few responses in a step, so that luck decides.",
    "The KL penalty holds the policy, or the learning rate is small.",
    fix="Read samples of high and of low reward: could you tell them apart? Raise "
    "`ppo.batch_size`, give part of the reward for a part of the way, lower `ppo.init_kl_coef`.",
    explained_by=(
        *("constant_score", "no_group_signal", "penalty_outweighs_reward", "updates_skipped"),
        *("learning_rate_too_small", "reward_falling", "updates_without_signal", "rate_at_bound"),
    ),
)
def nothing_learned(run: History) -> Seen:
    """The last 20 of 40 steps in the mean, against the noise of the first and of the best five."""
    rewards, first = run.window(40, "reward/mean")[20:], run.first.get("reward/mean", 0.0)
    best, warm_up = run.best_reward or 0.0, run.config.value_warmup_steps
    noise = run.first.get("reward/std", math.inf) / math.sqrt(run.config.batch_size)
    if not rewards or run.steps < 40 + warm_up or max(best, fmean(rewards)) - first > SURE * noise:
        return None
    kl = run.latest("objective/kl")
    return {"steps": run.steps, "now": fmean(rewards), "first": first, "kl": kl}


@symptom(
    "Hardly a response ends by itself: {now:.0%} of the last batch{before}; the others are cut off "
    "at the limit of their length.",
    "The limit is shorter than what is to be said.",
    "The reward likes long responses.",
    "The policy has no reason to write the EOS token: untrained in it, or the penalty is small.",
    fix="Raise `sampling.max_new_tokens`, or give unfinished responses a penalty with "
    "`ppo.missing_eos_penalty`; `sampling.stop_strings` end a response too.",
)
def never_ends(run: History) -> Seen:
    """At most 2 % of five batches end by themselves; half did at the start, or all should."""
    start, now = run.first.get("response/ended", 0.0), run.latest("response/ended")
    should = start >= 0.5 or run.config.missing_eos_penalty is not None
    if not should or not run.over(5, "response/ended", max) <= 0.02:
        return None
    return {"now": now, "before": f", {start:.0%} at the start" if start > 0.02 else ""}


@symptom(
    "Responses have become {how}, and the reward goes with the length (correlation {correlation}).",
    "The reward model takes length for quality.",
    "A sum over tokens or a penalty makes length pay.",
    "The task does ask for it: then all is well.",
    fix="Read some samples. If length alone is rewarded, subtract it: a second reward, a function "
    "of the text with a negative weight; or lower `sampling.max_new_tokens`.",
)
def length_exploited(run: History) -> Seen:
    """The mean length has changed by half, with a correlation of 0.8 to the mean reward over the
    last 30 steps, and of 0.3 to the score inside of a batch, all of one sign.
    """
    start, now = run.first.get("response/length", 0.0), run.over(5, "response/length")
    sign = 1 if now > start else -1
    lengths, rewards = run.window(30, "response/length"), run.window(30, "reward/mean")
    over_steps = correlation(lengths, rewards) or 0.0
    within = run.window(10, "batch/score_length", least=1)
    inside = fmean(within or [sign]) * sign
    if abs(now - start) < 0.5 * start or start == 0 or over_steps * sign < 0.8 or inside < 0.3:
        return None
    also = f", and {fmean(within):+.2f} inside of a batch" if within else ""
    how = f"{'longer' if sign > 0 else 'shorter'}, from {start:.0f} to {now:.0f} tokens"
    return {"how": how, "correlation": f"{over_steps:+.2f} over 30 steps{also}"}


@symptom(
    "The clip cuts off {share:.0%} of the tokens (over {steps} steps): most have no more gradient.",
    "The learning rate is too large.",
    "There are too many updates on one batch.",
    "`ppo.cliprange` is small.",
    fix="Lower `ppo.learning_rate` or `ppo.ppo_epochs`, or raise `ppo.minibatch_size`.",
    explained_by=("update_too_large",),
)
def clip_fraction(run: History) -> Seen:
    """Share of tokens whose gradient the clip has cut off. Good runs have 0.01 to 0.3."""
    share = run.over(3, "ppo/policy/clipfrac")
    return {"share": share, "steps": 3} if share > 0.4 else None


@symptom(
    "The gradient's norm has been {norm:.3g} or more for {steps} steps, {times:.0f} times "
    "`ppo.max_grad_norm`: updates are cut short, and the sample with the largest error leads them.",
    "The scores are far larger than 1, so that the value loss outweighs the rest.",
    "The value head is far from the returns at the start.",
    "Single scores are outliers.",
    fix="Set `ppo.scale_scores: true` or `ppo.clip_scores`, or lower `ppo.vf_coef`.",
)
def gradient_clipped(run: History) -> Seen:
    """Adam does not see the scale of a gradient but it does see which samples decide it; norms of 1
    to 20 times the limit are common at the start.
    """
    limit, norm = run.config.max_grad_norm, run.over(10, "ppo/grad_norm", min)
    return (
        {"norm": norm, "steps": 10, "times": norm / limit} if limit and norm > 50 * limit else None
    )


@symptom(
    "After {steps} steps the values explain nothing of the returns (explained variance {mean:.2f}, "
    "`{name}`): advantages are as noisy as without a value head.",
    "The value head learns too slowly: its weight in the loss, or the learning rate, is small.",
    "`ppo.cliprange_value` is small against the size of the rewards: values may hardly move.",
    "The rewards are far from the size of 1.",
    "The score can hardly be told from what has been read so far.",
    fix="Raise `ppo.vf_coef` (to 0.5 or 1) or `ppo.cliprange_value`, set `ppo.scale_scores: true`, "
    "let it learn first (`ppo.value_warmup_steps`), or take an algorithm without a value head.",
    explained_by=("constant_score", "updates_skipped"),
)
def value_not_learning(run: History) -> Seen:
    """The value head of the starter GPT-2 explains nothing for 9 steps, a third of the variance
    after 16; after 30 steps, the last ten must be above 0 in the mean, or the reward has risen.
    """
    names = ("ppo/val/explained_variance", "ppo/val/var_explained")
    for name in names:
        if run.window(30, name):
            mean = run.over(10, name)
            wrong = mean <= 0 and not learned(run)
            return {"steps": run.steps, "mean": mean, "name": name} if wrong else None
    return None


@symptom(
    "Updates hardly change the policy: approxkl is at most {change:.1g} over {steps} steps (usual "
    "is 1e-4 to 2e-2, in bf16 from 1.2e-3 on), and the reward stays at {reward:.3g}.",
    "The learning rate is too small for this model; an adapter needs ten times that of weights.",
    "The schedule has brought it to 0.",
    "Few weights are trained.",
    fix="Raise `ppo.learning_rate`, three times at a time; look at `schedule.kind` and "
    "`schedule.final`, and at what of the model is trained.",
    explained_by=("entropy_collapsed", "constant_score", "updates_skipped"),
)
def learning_rate_too_small(run: History) -> Seen:
    """Half the mean squared change of log π. Good runs have an approxkl of 1e-4 to 2e-2. bf16 gives
    1e-4 to 4e-4 by rounding alone for a small model, up to 1.2e-3 for one of 135M parameters
    (measured at a learning rate of 1e-9), while the KL stays at 0.01. A policy that has come
    somewhere, and stays there at the end of its schedule, has a KL.
    """
    change, rewards = run.over(20, "ppo/policy/approxkl", max), run.window(20, "reward/mean")
    small = {"no": 1e-6, "bf16": 1.2e-3, "fp16": 1e-5}.get(run.precision, 0.0)
    if not rewards or run.steps < 20 + run.config.value_warmup_steps or not change < small:
        return None
    gain = fmean(rewards[10:]) - fmean(rewards[:10])
    noise = math.sqrt(2 / 10) * statistics.stdev(rewards)
    if run.latest("objective/kl") > 0.05 or abs(gain) > SURE * noise:
        return None
    return {"change": change, "steps": 20, "reward": fmean(rewards)}


@symptom(
    "The rate that sets itself has been at its {bound} bound, {rate:.1g}, for {steps} steps.",
    "At the highest: what is trained hardly moves the policy, or its gradient has vanished.",
    "At the lowest: the smallest update goes too far, as in a precision that is too coarse.",
    fix="Move the bound, `ppo.auto_rate_bounds`, or write a `ppo.learning_rate`; look at "
    "`ppo/grad_norm`, and at what of the model is trained.",
    explained_by=("constant_score", "updates_skipped"),
)
def rate_at_bound(run: History) -> Seen:
    """The first steps may pass a bound on their way: five in turn do not."""
    values = run.window(5, "ppo/auto_rate/at_bound")
    if not values or values[0] == 0 or len(set(values)) > 1:
        return None
    low, high = run.config.auto_rate_bounds
    bound, rate = ("highest", high) if values[0] > 0 else ("lowest", low)
    return {"bound": bound, "rate": rate, "steps": len(values)}


@symptom(
    "`{part}` has given {score:.4g} to every response of {steps} steps: it teaches nothing.",
    "What it asks for never happens: too rare, or out of the policy's reach.",
    "It does not find what it looks for: another format of the answer, another column.",
    "All responses have what it asks for.",
    fix="Score a few texts by hand, good and bad ones (`trl score`); give a part of it for a part "
    "of the way, show the form in the prompt, or leave it out.",
    explained_by=("constant_score",),
)
def part_never_varies(run: History) -> Seen:
    """Of several scorers, one that has given the same from the first step on. A penalty may never
    be incurred, which is as it should be.
    """
    for name in (name.removeprefix("part/") for name in run.first if name.startswith("part/")):
        scores, spread = run.last[f"part/{name}"], run.over(10, f"spread/{name}", max)
        if len(scores) == 10 and spread == 0 and len(set(scores)) == 1 and "penalty" not in name:
            return {"part": name, "score": scores[0], "steps": 10}
    return None


@symptom(
    "No tool was called in the {count} conversations of {steps} steps.",
    "The policy has never seen how a call is written: it answers by itself.",
    "It writes calls in another form than `environment.call_format`, and they are not read.",
    "The question does not need the tool, or the prompt does not speak of it.",
    fix="Read some conversations (`trl sample`, or rollouts.jsonl). Show a call in the prompt, "
    "best one that was answered, and take the `call_format` that the model writes by itself.",
)
def no_tool_called(run: History) -> Seen:
    """16 conversations and two batches: a policy that calls in a tenth of them would have called by
    now with a probability of 0.8, and learns slowly in any case.
    """
    steps = max(2, -(-16 // run.config.batch_size))
    silent = run.over(steps, "episode/tool_calls", max) == 0 and run.latest("batch/tools") == 1
    if not silent or learned(run):
        return None
    return {"count": steps * run.config.batch_size, "steps": steps}


@symptom(
    "Of the conversations of {steps} steps, {share:.0%} were cut at a limit ({limits}): they never "
    "came to an end.",
    "The limits are shorter than what it takes: `environment.max_turns`, `environment.max_tokens`, "
    "or `sampling.max_new_tokens` for a turn.",
    "The policy does not come to the point, or calls a tool again and again.",
    "The environment never says that it is done.",
    fix="Read some conversations (`trl sample`, or rollouts.jsonl), and raise the limit that they "
    "meet, or let the prompt say what ends them.",
)
def conversations_cut(run: History) -> Seen:
    """All but one in fifty of 16 conversations and two batches."""
    steps = max(2, -(-16 // run.config.batch_size))
    of_each = {name: run.over(steps, f"stop/{name}") for name in ("turns", "tokens", "tool_calls")}
    share = sum(of_each.values())
    if not share >= 0.98 or learned(run):
        return None
    limits = ", ".join(f"{name} {x:.0%}" for name, x in of_each.items() if x)
    return {"share": share, "steps": steps, "limits": limits}


_ALL = (*globals().values(), *vars(at_start).values())
SYMPTOMS = tuple(each for each in _ALL if isinstance(each, Symptom))
"""All of the above, in their order, and those that can be known before the first step."""
