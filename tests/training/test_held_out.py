"""Measuring on held-out prompts."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from tests.training.runs import make_parts, tiny_recipe
from trl.config.recipe import RewardConfig
from trl.training.held_out import distinct_n, is_right
from trl.training.parts import Parts, own_seed


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        ([[1, 2, 3]], 2, 1.0),  # 12 23
        ([[1, 1, 1, 1]], 2, 1 / 3),  # 11 11 11
        ([[1, 2], [1, 2]], 2, 1 / 2),  # the same bigram in two texts counts once
        ([[1, 2], [3, 4]], 2, 1.0),  # 2 3 is not a bigram: it crosses texts
        ([[5, 5], [5]], 1, 1 / 3),
        ([["a", "b", "a", "b"]], 3, 1.0),  # aba bab
        ([[1], []], 2, 0.0),
        ([], 2, 0.0),
    ],
)
def test_distinct_n_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5), st.integers(1, 3))
def test_distinct_n_is_a_share_and_falls_when_the_texts_are_repeated(texts, n):
    share = distinct_n(texts, n)
    assert 0 <= share <= 1
    assert distinct_n(texts * 2, n) == pytest.approx(share / 2)
    naive = [gram for text in texts for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    assert share * len(naive) == pytest.approx(len(list(itertools.groupby(sorted(naive)))))


def test_distinct_n_needs_a_length():
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        distinct_n([[1]], 0)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_no_process_has_the_seed_of_another_or_of_the_held_out_prompts(seed):
    for processes in (1, 2, 3, 8):
        ranks = range(processes)
        seeds = [
            own_seed(seed, SimpleNamespace(num_processes=processes, process_index=rank))
            for rank in ranks
        ]
        assert len({*seeds, seed + 1}) == processes + 1
        others = [
            own_seed(seed + 1, SimpleNamespace(num_processes=processes, process_index=rank))
            for rank in ranks
        ]
        assert not set(seeds) & set(others)
    assert own_seed(seed, SimpleNamespace(num_processes=1, process_index=0)) == seed


def test_a_measurement_is_the_mean_of_its_samples_and_changes_nothing(tmp_path):
    make_parts(tmp_path)
    parts = Parts.of_recipe(tiny_recipe(tmp_path, tmp_path / "run"), Accelerator())
    state = torch.get_rng_state()
    first, second = parts.held_out.measure(), parts.held_out.measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second  # the same random numbers, whatever was trained between
    assert [sample["prompt"] for sample in first[0]] == parts.prompts.held_out
    assert parts.held_out.sampler.seed == 1  # whatever the number of processes
    samples, figures = first
    for sample in samples:
        assert sample["kl"] == pytest.approx(0, abs=1e-4)  # the policy is the reference yet
        assert sample["reward"] == sample["parts"]["count_w7"]
        # The reward reads query and response.
        assert sample["reward"] == (sample["prompt"] + sample["response"]).split().count("w7")
    assert figures["held_out/reward/mean"] == sum(s["reward"] for s in samples) / 6
    parts.loop.step()
    assert parts.held_out.measure() != first


def test_accuracy_is_the_share_that_all_checks_call_right(tmp_path):
    make_parts(tmp_path)
    check = RewardConfig(kind="regex", arguments={"pattern": r"w12\b"})
    other = RewardConfig(kind="format", arguments={"tags": ["w"]}, weight=0.5)
    recipe = tiny_recipe(tmp_path, tmp_path / "run", reward=(check, other))
    samples, figures = Parts.of_recipe(recipe, Accelerator()).held_out.measure()
    right = [sample["parts"]["regex"] == 1 for sample in samples]
    assert figures["held_out/accuracy"] == sum(right) / 6
    assert 0 < sum(right) < 6
    recipe = tiny_recipe(tmp_path, tmp_path / "run", reward=(other,))
    _, figures = Parts.of_recipe(recipe, Accelerator()).held_out.measure()
    assert "held_out/accuracy" not in figures  # a form is nothing that is right or wrong


@pytest.mark.parametrize(
    ("parts", "expected"),
    [({"a": 1.0, "b": 1.0}, True), ({"a": 1.0, "b": 0.9}, False), ({"b": 1}, True), ({}, None)],
)
def test_a_check_without_a_say_does_not_count(parts, expected):
    assert is_right({"parts": parts | {"c": 0.0}}, ["a", "b"]) is expected
