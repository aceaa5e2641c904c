"""Measuring a policy on prompts that it is not trained on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from trl.anatomy import without_dropout
from trl.batch import Rollout
from trl.compute.peers import meet
from trl.environments import episode_figures
from trl.evaluation.metrics import checks_of
from trl.evaluation.scores import Scorer, queries_of, score, words_of
from trl.ppo import PPOTrainer
from trl.rollout.sampler import Sampler
from trl.scored import Scored
from trl.training.loop import Row, mean_of_each

FIGURES = ("kl", "length", "ended", "distinct_2")
"""Figures of an evaluation besides rewards."""


Sample = dict[str, Any]
"""A response to one held-out prompt, and how it was judged: a line of samples.jsonl.

`prompt`, `response` and `reward`, NaN if nothing has a say; of a chat `messages` too, with their
roles; `kl`, Σ_t (log π − log π_ref) in nats; `length` in tokens; `ended`, whether it ended by
itself rather than at the limit of its length; with an environment, `episode`, see
`Rollout.episodes`; `parts`, what each scorer gave, with the figures
that scorers keep of their own; and `notes`, if they keep texts.
"""


class HeldOut:
    """Writes and judges one response to each of the same prompts, with the same random numbers.

    Args:
        trainer: Of the policy.
        sampler: Of one response to each prompt.
        scorer: Judges them.
        prompts: At least one.
    """

    def __init__(
        self, trainer: PPOTrainer, sampler: Sampler, scorer: Scorer, prompts: Sequence[Any]
    ) -> None:
        self.trainer, self.sampler, self.scorer = trainer, sampler, scorer
        self.prompts = list(prompts)

    def measure(self) -> tuple[list[Sample], Row]:
        """Judge the policy as it is now; in a distributed run each process takes its share.

        Returns:
            A sample for each prompt, and the figures of metrics.jsonl.
        """
        accelerator = self.trainer.accelerator
        processes, rank = accelerator.num_processes, accelerator.process_index
        # As many for each process: they wait for each other in every pass.
        rounds = -(-len(self.prompts) // processes)
        share = [(rank + processes * turn) % len(self.prompts) for turn in range(rounds)]
        found = self._measure_share(share)
        if processes > 1:
            found = gather_object(found)
        by_prompt = {index: (sample, tokens) for index, sample, tokens in found}
        samples, tokens = zip(*(by_prompt[i] for i in range(len(self.prompts))), strict=True)
        figures = _figures(samples, checks_of(self.scorer))
        return list(samples), figures | {"held_out/distinct_2": distinct_n(tokens)}

    @torch.no_grad()
    def _measure_share(self, share: list[int]) -> list[tuple[int, Sample, list[int]]]:
        """Return the index of each prompt, its sample and the tokens of the response."""
        trainer = self.trainer
        with trainer.sampling():
            prompts = [self.prompts[index] for index in share]
            # The same every time, on any number of processes.
            seeds = [self.sampler.seed * len(self.prompts) + index for index in share]
            rollout = self.sampler(trainer.model, prompts, seeds=seeds)
        scored = score(self.scorer, rollout)
        meet()  # a scorer may have waited for people or servers
        with without_dropout(*filter(None, (trainer.model, trainer.ref_model))):
            own = trainer.forward_pass(trainer.policy, rollout)
            kl = (own.logprobs - trainer.reference_logprobs(rollout, own)).sum(1)
        if trainer.reference is None:  # not measured, which is not the same as 0
            kl = kl.fill_(math.nan)
        samples = samples_of(rollout, scored, kl.tolist())
        return list(zip(share, samples, rollout.response_lists(), strict=True))


def samples_of(rollout: Rollout, scored: Scored, kl: Sequence[float] | None = None) -> list[Sample]:
    """Return a sample for each row of a rollout; without `kl`, none has one."""
    assert rollout.ended is not None
    columns: dict[str, Any] = {
        "prompt": queries_of(rollout),
        **({} if rollout.query_messages is None else {"messages": _plain(rollout)}),
        "response": rollout.response_texts,
        "reward": scored.totals.tolist(),
        **({} if kl is None else {"kl": kl}),
        "length": rollout.response_mask.sum(1).tolist(),
        "ended": rollout.ended.tolist(),
    }
    parts = {k: x.tolist() for k, x in {**scored.parts, **scored.figures}.items()}
    samples = []
    for row in range(len(rollout)):
        sample = {name: column[row] for name, column in columns.items()}
        of_row = {name: values[row] for name, values in parts.items()}
        sample["parts"] = {name: x for name, x in of_row.items() if not math.isnan(x)}
        if rollout.episodes is not None:
            sample["episode"] = rollout.episodes[row]
        if scored.notes:
            sample["notes"] = {name: texts[row] for name, texts in scored.notes.items()}
        samples.append(sample)
    return samples


def is_right(sample: Sample, checks: Sequence[str]) -> bool | None:
    """Tell whether all checks that have a say on a sample give it 1; None: none has a say."""
    scores = [sample["parts"][name] for name in checks if name in sample["parts"]]
    return all(score == 1 for score in scores) if scores else None


def _plain(rollout: Rollout) -> list[list[dict[str, str]]]:
    """Return the role and the words of each message of some chats."""
    return [
        [{"role": message["role"], "content": words_of(message)} for message in chat]
        for chat in rollout.query_messages or ()
    ]


def _figures(samples: Sequence[Sample], checks: Sequence[str]) -> Row:
    """Return the mean figures of samples, the median reward, and the share that is right."""
    parts = mean_of_each([sample["parts"] for sample in samples])
    rewards = [x for sample in samples if not math.isnan(x := sample["reward"])]
    whole = (
        {
            "held_out/reward/mean": statistics.fmean(rewards),
            "held_out/reward/median": statistics.median(rewards),
        }
        if rewards
        else {}
    )
    episodes = [sample["episode"] for sample in samples if "episode" in sample]
    right = [x for sample in samples if (x := is_right(sample, checks)) is not None]
    return {
        **whole,
        **({"held_out/accuracy": statistics.fmean(right)} if right else {}),
        **{f"held_out/reward/{name}": mean for name, mean in parts.items()},
        "held_out/kl": statistics.fmean(sample["kl"] for sample in samples),
        "held_out/length": statistics.fmean(sample["length"] for sample in samples),
        "held_out/ended": statistics.fmean(sample["ended"] for sample in samples),
        **{f"held_out/{name}": figure for name, figure in episode_figures(episodes).items()},
    }


def distinct_n(token_lists: Iterable[Sequence[Hashable]], n: int = 2) -> float:
    """Distinct-n (Li et al., arXiv:1510.03055): how little a set of texts repeats itself.

        distinct-n = (number of different n-grams) / (number of n-grams), over all texts together

    Deviation: the paper divides by the number of tokens. An n-gram does not reach across two texts.

    Args:
        token_lists: The tokens of each text, special tokens left out.
        n: Length of the n-grams.

    Returns:
        Between 0 and 1; 0 when no text has n tokens.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    grams = [
        tuple(tokens[start : start + n])
        for tokens in token_lists
        for start in range(len(tokens) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
