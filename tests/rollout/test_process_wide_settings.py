"""Another default dtype or device of the process changes nothing: a rollout knows its own."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoTokenizer

from trl import CausalLMWithValueHead, ClassifierScorer, Sampler, WeightedSum, starter
from trl.batch import Rollout
from trl.evaluation import ControlScorer, score
from trl.scored import Scored

QUERIES = ["[a] It was", "[b] I saw the film", "[a] x"]


def each_token(rollout):
    return [[0.1] * counted for counted in rollout.response_mask.sum(1).tolist()]


def each_response(texts):
    return [0.3] * len(texts)


@pytest.fixture(scope="module")
def parts():
    """A tokenizer, a policy and a scorer, made before anything is set."""
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    policy = CausalLMWithValueHead.from_pretrained(starter.LANGUAGE_MODEL)
    classifier = ClassifierScorer(starter.CLASSIFIER, label="POSITIVE", output="log_odds")
    ranges = {"[a] ": (0.0, 0.3), "[b] ": (0.7, 0.9)}
    control = ControlScorer(classifier, ranges, weights={"[a] ": 0.7}, scale=0.3)
    return tokenizer, policy, control


def found(parts, path) -> Iterator[torch.Tensor]:
    """All tensors that come out of sampling, scoring, and what is done with a rollout."""
    tokenizer, policy, control = parts
    sampler = Sampler(
        tokenizer, max_new_tokens=(3, 9), group_size=2, max_rows=3, stop_strings=["the"]
    )
    rollout = sampler(policy, QUERIES)
    yield from rollout.tensors().values()
    summed = WeightedSum([(control, 1.0), (each_response, 0.5)])
    per_token = WeightedSum([(control, 1.0), (each_token, 0.5)])
    judged = [score(scorer, rollout) for scorer in (control, summed, per_token)]
    for scored in (*judged, Scored.concat(judged[:2])):
        yield from (scored.scores, *scored.parts.values(), *scored.figures.values())
    rollout.save(path)
    halves = Rollout.concat(list(rollout.split(2)))
    for other in (Rollout.load(path), halves, rollout.select([0, 3])):
        yield from other.tensors().values()
    yield from rollout.micro_batches(max_rows=2, max_tokens=40)
    yield rollout.shuffled_rows(torch.Generator().manual_seed(0))
    queries = [row[mask] for row, mask in zip(rollout.queries, rollout.query_mask, strict=True)]
    end = tokenizer.eos_token_id
    lists = {"eos_token_id": end, "group_ids": [1, 1, 2, 2, 3, 3]}
    again = Rollout.from_lists(queries, rollout.responses, **lists)
    again.check()
    yield from again.tensors().values()


@pytest.fixture(scope="module")
def expected(parts, tmp_path_factory):
    return list(found(parts, tmp_path_factory.mktemp("expected") / "rollout"))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_defaults_of_the_process_change_nothing(parts, expected, default, tmp_path):
    assert len(expected) > 40
    try:
        if isinstance(default, str):  # holds no numbers: whatever is made there is noticed
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        got = list(found(parts, tmp_path / "rollout"))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for tensor, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, tensor, rtol=0, atol=0, equal_nan=True)
