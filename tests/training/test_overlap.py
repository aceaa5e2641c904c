"""Scoring one part of a batch while the next one is written."""

import math
import threading
import time

import pytest
import torch

from tests.families import tiny_model
from tests.training.test_loop import SMALL, tokenizer
from trl.batch import Rollout
from trl.config import PPOConfig
from trl.evaluation import FunctionScorer, ScoringError, WeightedSum
from trl.models.with_value_head import load_policy
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.scored import Scored
from trl.training.loop import Loop
from trl.training.one_call import train
from trl.training.overlap import Overlap

PROMPTS = ["w3 w4", "w5", "w6 w9 w10", "w7 w8", "w11"]


def count_w7(texts):
    return [float(text.split().count("w7")) for text in texts]


def length_of_each(texts):
    return [float(len(text)) for text in texts]


def parts_of(rollout, sizes):
    return [rollout.select(rows) for rows in torch.arange(len(rollout)).split(sizes)]


def sampled(group_size=1):
    sampler = Sampler(tokenizer(), max_new_tokens=(2, 9), group_size=group_size)
    return sampler(tiny_model("llama"), PROMPTS)


def judged(scorer, parts):
    with Overlap(scorer) as overlap:
        for part in parts:
            overlap.add(part)
        return overlap.result()


@pytest.mark.parametrize("group_size", [1, 2])
def test_parts_together_are_the_whole(group_size):
    rollout = sampled(group_size)
    size = 2 * group_size
    scorer = WeightedSum({count_w7: 1.0, length_of_each: 0.1})
    whole, scored = judged(scorer, parts_of(rollout, size))
    expected = scorer(rollout)
    torch.testing.assert_close(scored.scores, expected.scores)
    torch.testing.assert_close(scored.parts, expected.parts)
    assert scored.means() == expected.means()
    assert whole.texts == rollout.texts
    for name in (
        "queries",
        "query_mask",
        "responses",
        "response_mask",
        "behaviour_logprobs",
        "ended",
    ):
        assert torch.equal(getattr(whole, name), getattr(rollout, name)), name


def test_scores_of_single_tokens_are_as_wide_as_the_whole():
    rollout = sampled()
    scorer = FunctionScorer(lambda rows: [[float(t) for t in row] for row in rows], on="tokens")
    _, scored = judged(scorer, parts_of(rollout, 2))
    torch.testing.assert_close(scored.scores, rollout.responses.float() * rollout.response_mask)


def of_some_rows(rollout: Rollout):
    """Has a figure of some rows, as scorers of controls do, and one that parts may lack."""
    length = rollout.response_mask.sum(1).float()
    chosen = torch.tensor(["w7" in text for text in rollout.texts])
    figures = {"chosen": torch.where(chosen, length, math.nan)}
    if chosen.all():
        figures["all"] = length
    return Scored(length, figures=figures)


def test_means_are_those_of_the_rows_not_of_the_parts():
    rollout = sampled(group_size=3)
    expected = of_some_rows(rollout).means()
    assert list(expected) == ["chosen"]
    _, scored = judged(of_some_rows, parts_of(rollout, 1))
    means = scored.means()
    assert means["chosen"] == expected["chosen"] == means["all"]


def test_an_error_names_the_rows_of_the_whole_and_ends_the_writing():
    rollout = sampled()
    calls = []

    def broken(texts):
        calls.append(len(texts))
        if len(calls) == 2:
            return [float("nan") if row == 1 else 0.0 for row in range(len(texts))]
        return [0.0] * len(texts)

    with pytest.raises(ScoringError, match="finite|NaN|nan") as caught:
        judged(FunctionScorer(broken), parts_of(rollout, 2))
    assert caught.value.rows == (3,)

    def always_broken(texts):
        raise ValueError("no")

    written = []

    def slowly():
        for part in parts_of(rollout, 1) * 100:
            yield part
            written.append(part)
            time.sleep(0.01)

    with pytest.raises(ScoringError):
        judged(FunctionScorer(always_broken), slowly())
    assert len(written) < 50


def test_a_scorer_is_never_called_twice_at_a_time_and_in_order():
    at_work, seen = threading.Lock(), []

    def watch(texts):
        assert at_work.acquire(blocking=False)
        time.sleep(0.01)
        seen.extend(texts)
        at_work.release()
        return [0.0] * len(texts)

    rollout = sampled()
    judged(FunctionScorer(watch), parts_of(rollout, 1))
    assert seen == list(rollout.texts)


def trainer():
    return PPOTrainer(load_policy(tiny_model("llama")), config=PPOConfig(**SMALL))


def rows_of(parts, group_size):
    policy = trainer()
    sampler = Sampler(tokenizer(), max_new_tokens=6, group_size=group_size)
    loop = Loop(policy, sampler, FunctionScorer(count_w7), PROMPTS * 4, parts=parts)
    return [loop.step() for _ in range(3)], policy


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_loop_in_parts_trains_as_one_without(group_size):
    plain, whole = rows_of(1, group_size)
    split, parts = rows_of(2, group_size)
    for before, after in zip(plain, split, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            if not name.startswith(("time/", "tokens_per_second")):
                assert after[name] == pytest.approx(before[name], abs=1e-4, nan_ok=True), name
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_part_is_scored_while_the_next_one_is_written():
    """Each of the two waits for the other: without overlap neither would come."""
    scoring, writing_on = threading.Event(), threading.Event()

    def waits(texts):
        scoring.set()
        assert writing_on.wait(60)
        return count_w7(texts)

    class WatchedSampler(Sampler):
        written = 0

        def _sample(self, *given):
            if self.written:
                assert scoring.wait(60)
                writing_on.set()
            self.written += 1
            return super()._sample(*given)

    sampler = WatchedSampler(tokenizer(), max_new_tokens=6)
    Loop(trainer(), sampler, FunctionScorer(waits), PROMPTS * 4, parts=4).step()
    assert sampler.written == 4


def test_train_takes_parts_and_says_what_they_may_be():
    settings = {"steps": 1, "tokenizer": tokenizer(), "max_new_tokens": 4, **SMALL}
    _, history = train(tiny_model("llama"), PROMPTS * 2, count_w7, parts=8, **settings)
    assert history[0]["response/length"] <= 4
    for parts in (0, 9, 2.0, True):
        with pytest.raises(ValueError, match=r"`parts` must be (an integer > 0|<= the .*\(8\))"):
            train(tiny_model("llama"), PROMPTS * 2, count_w7, parts=parts, **settings)
