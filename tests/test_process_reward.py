"""The benchmark of pay at the end of a step, and of the response: it runs, both pay the same."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from trl import FunctionScorer, Sampler
from trl.batch import Rollout

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import process_reward


def test_both_arms_pay_the_same_at_other_places():
    tokenizer = process_reward.make_tokenizer()
    texts = "a;bc;d", "ba;b;c", ";;ac;b"
    tokens = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    rollout = Rollout.from_lists([torch.tensor([0])] * 3, tokens)
    changes = {"query_texts": ("a",) * 3, "response_texts": texts}
    rollout = replace(rollout, **changes, decode=Sampler(tokenizer).text_of)
    step, end = (
        FunctionScorer(pay, separator=";")(rollout) for pay in process_reward.PAYS.values()
    )
    assert step.totals.tolist() == end.totals.tolist() == [1, 0, 1]
    assert step.scores.argmax(1).tolist() == [1, 0, 4]  # where the first step has ended


def test_a_step_of_each_arm_learns_without_an_error():
    for pay in process_reward.PAYS:
        shares = process_reward.learn(pay, 0, 2, batch=8)
        assert len(shares) <= 2
        assert all(0 <= share <= 1 for share in shares)
