"""pass@k, majority@k and intervals, by hand and against what counts every draw."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl.evaluation import FormatScorer, FunctionScorer, MathScorer, RegexScorer, WeightedSum
from trl.evaluation.metrics import bootstrap, checks_of, majority_at_k, pass_at_k


@pytest.mark.parametrize(
    ("k", "expected"),
    # 1 − C(6, k)/C(8, k): 6/8, 15/28, 15/70, and of 8 draws two are right for sure.
    [(1, 1 / 4), (2, 13 / 28), (4, 55 / 70), (8, 1.0)],
)
def test_pass_at_k_of_two_right_among_eight(k, expected):
    assert pass_at_k(8, 2, k) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_keeps_its_digits_for_many_samples():
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12)
    exact = 1 - Fraction(math.comb(99_990, 100), math.comb(100_000, 100))
    assert pass_at_k(100_000, 10, 100) == pytest.approx(float(exact), rel=1e-9)
    assert str(pass_at_k(5, 0, 2)) == "0.0"


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), *[st.integers(0, n)] * 2)))
def test_pass_at_k_counts_the_draws_with_a_right_one(numbers):
    n, c, k = numbers
    k = max(1, k)
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def naive_majority(answers, scores, k):
    """What `majority_at_k` is, by looking at every draw."""
    rows = list(zip(answers, scores, strict=True))
    mean = {
        answer: float(np.mean([score for other, score in rows if other == answer]))
        for answer in answers
    }
    total, draws = 0.0, list(itertools.combinations(answers, k))
    for draw in draws:
        votes = Counter(answer for answer in draw if answer)
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        total += sum(mean[answer] for answer in best) / max(1, len(best))
    return total / len(draws)


@pytest.mark.parametrize(
    ("answers", "scores", "k", "expected"),
    [
        (["a", "a", "b"], [1, 1, 0], 1, 2 / 3),
        (["a", "a", "b"], [1, 1, 0], 2, 2 / 3),  # aa 1, ab ½, ab ½
        (["a", "a", "b"], [1, 1, 0], 3, 1.0),
        (["a", "b", "b"], [1, 0, 0], 3, 0.0),
        (["a", "b", "c"], [1, 0, 0], 3, 1 / 3),
        (["a", None, ""], [1, 1, 1], 2, 2 / 3),  # no answer has no vote, and no score
        ([None], [1], 1, 0.0),
        (["a", "a"], [1, 0], 1, 0.5),  # one answer that was scored in two ways
    ],
)
def test_majority_at_k_by_hand(answers, scores, k, expected):
    assert majority_at_k(answers, scores, k) == pytest.approx(expected, abs=1e-12)


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 1)), min_size=1, max_size=7
    ),
    st.integers(1, 7),
)
def test_majority_at_k_is_the_mean_over_every_draw(rows, k):
    answers, scores = zip(*rows, strict=True)
    k = min(k, len(rows))
    expected = naive_majority(answers, scores, k)
    assert majority_at_k(answers, scores, k) == pytest.approx(expected, abs=1e-9)


def test_majority_at_k_of_many_samples():
    answers = ["x"] * 600 + ["y"] * 400
    scores = [1.0] * 600 + [0.0] * 400
    assert majority_at_k(answers, scores, 1) == pytest.approx(0.6, rel=1e-9)
    assert majority_at_k(answers, scores, 3) == pytest.approx(
        sum(math.comb(600, i) * math.comb(400, 3 - i) for i in (2, 3)) / math.comb(1000, 3),
        rel=1e-9,
    )
    assert majority_at_k(answers, scores, 1000) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_at_most_the_number_of_samples(k):
    told = f"`k` must be from 1 to the number of samples, 3, got {k}"
    with pytest.raises(ValueError, match=told):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match=told):
        majority_at_k(["a"] * 3, [1.0] * 3, k)
    with pytest.raises(ValueError, match="`right` must be from 0 to the number of samples, 3"):
        pass_at_k(3, 4, 1)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0)
    hits = 0
    for trial in range(120):
        low, high = bootstrap(draws.binomial(1, 0.3, size=40), seed=trial, resamples=100)
        hits += low <= 0.3 <= high
    assert 0.88 < hits / 120 < 0.98


def test_an_interval_is_that_of_the_seed_and_figures_are_drawn_alike():
    values = np.array([[0.0, 1.0, np.nan], [1.0, 0.0, np.nan], [1.0, 0.0, 3.0], [0.0, 1.0, np.nan]])
    low, high = bootstrap(values, seed=3)
    assert np.array_equal(low, bootstrap(values, seed=3)[0], equal_nan=True)
    assert low[0] == 1 - high[1]  # one is the other turned about
    assert np.isnan([low[2], high[2]]).all()  # of a single value there is none
    alone, _ = bootstrap(values[:, 0], seed=3)
    assert alone == low[0]
    assert np.isnan(bootstrap([])).all()


def test_checks_are_what_compares():
    parts = [MathScorer(), FormatScorer(["a"]), RegexScorer("a"), FunctionScorer(lambda texts: [])]
    assert checks_of(WeightedSum([(part, 1.0) for part in parts])) == ["math", "regex"]
    assert checks_of(parts[0]) == []
