"""Losses of a reward model, by hand, beside a plain loop, and on people who are made up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from trl.optimization.preferences import centring_loss, choice_loss, tie_strength


def loss(rewards, votes, margin=0.0, nu=0.0):
    """The loss of one prompt all of whose responses are there."""
    row = torch.tensor([rewards], dtype=torch.float64)
    votes = torch.tensor([votes], dtype=torch.float64)
    present = torch.ones_like(row, dtype=torch.bool)
    margins = torch.tensor([margin], dtype=torch.float64)
    return choice_loss(row, votes, present, margins, nu=nu).item()


def test_bradley_terry_by_hand():
    # r_1 − r_2 = ln 3: p_1 = 3/4, p_2 = 1/4.
    assert loss([1 + math.log(3), 1.0], [1, 0, 0]) == pytest.approx(0.2876820724517809)  # ln 4/3
    assert loss([1 + math.log(3), 1.0], [0, 1, 0]) == pytest.approx(1.3862943611198906)  # ln 4


def test_a_margin_by_hand():
    # r_1 − r_2 − m = ln 3 − ln 6 = ln 1/2: p_1 = 1/3.
    assert loss([math.log(3), 0.0], [1, 0, 0], math.log(6)) == pytest.approx(1.0986122886681098)
    # Who preferred the second is to see it ahead by m: −ln 3 − ln 6 = ln 1/18: p_2 = 1/19.
    assert loss([math.log(3), 0.0], [0, 1, 0], math.log(6)) == pytest.approx(2.9444389791664403)


def test_ties_by_hand():
    # r = ln 4, 0 and ν = 1: 4 : 1 : √4 = 2, so the probabilities are 4/7, 1/7 and 2/7.
    rewards = [math.log(4), 0.0]
    assert loss(rewards, [1, 0, 0], nu=1) == pytest.approx(0.5596157879354227)  # ln 7/4
    assert loss(rewards, [0, 1, 0], nu=1) == pytest.approx(1.9459101490553132)  # ln 7
    assert loss(rewards, [0, 0, 1], nu=1) == pytest.approx(1.2527629684953680)  # ln 7/2


def test_several_votes_by_hand():
    # p_1 = 3/4: two votes for the first and one for the second, 2 ln 4/3 + ln 4.
    assert loss([math.log(3), 0.0], [2, 1, 0]) == pytest.approx(1.9616585060234525)


def test_the_best_of_four_by_hand():
    # e^r = 1, 2, 3, 4: the third is chosen with probability 3/10.
    rewards = [math.log(each) for each in (1, 2, 3, 4)]
    assert loss(rewards, [0, 0, 1, 0, 0]) == pytest.approx(1.2039728043259361)  # ln 10/3


def test_no_vote_for_none_where_there_are_no_ties():
    assert loss([0.0, 0.0], [0, 0, 1]) == math.inf


def test_the_centre_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 9.0], [-1.0, 1.0, 2.0]])
    present = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(centring_loss(rewards, present), torch.tensor([9.0, 4.0]))


def test_the_strength_of_ties_by_hand():
    # 3 of 9 votes are ties: where rewards are equal, ν/(2 + ν) = 1/3 for ν = 1.
    votes = torch.tensor([[2.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    assert tie_strength(votes, torch.ones(2, 2, dtype=torch.bool)) == pytest.approx(1.0)
    assert tie_strength(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool)) == 0.0


def twin(rewards, votes, margin, nu):
    """The loss of one prompt as the docstring has it."""
    mean = sum(rewards) / len(rewards)
    total = 0.0
    for k, count in enumerate(votes[:-1]):
        ahead = math.exp(rewards[k] - margin)
        others = sum(math.exp(each) for j, each in enumerate(rewards) if j != k)
        total -= count * math.log(ahead / (ahead + others + nu * math.exp(mean)))
    tie = nu * math.exp(mean)
    return total - votes[-1] * math.log(tie / (sum(map(math.exp, rewards)) + tie))


counts = st.integers(0, 3)


@st.composite
def prompts(draw):
    size = draw(st.integers(2, 4))
    rewards = draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size))
    votes = draw(st.lists(counts, min_size=size + 1, max_size=size + 1))
    return rewards, votes, draw(st.floats(0, 3))


@properties
@given(st.lists(prompts(), min_size=1, max_size=4), st.floats(0.1, 5), st.floats(-50, 50))
def test_a_batch_is_each_of_its_prompts(rows, nu, shift):
    most = max(len(rewards) for rewards, _, _ in rows)
    rewards = torch.full((len(rows), most), 1e3, dtype=torch.float64)
    votes = torch.zeros(len(rows), most + 1, dtype=torch.float64)
    for row, (each, cast, _) in enumerate(rows):
        rewards[row, : len(each)] = torch.tensor(each, dtype=torch.float64)
        votes[row, : len(each)], votes[row, -1] = torch.tensor(cast[:-1]), cast[-1]
    present = rewards != 1e3
    rewards.requires_grad_()
    margins = torch.tensor([margin for _, _, margin in rows], dtype=torch.float64)
    found = choice_loss(rewards, votes, present, margins, nu=nu)
    expected = torch.tensor([twin(*row, nu) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # Only differences count, so the gradients of a prompt add up to 0; and there are none beside.
    torch.testing.assert_close(choice_loss(rewards + shift, votes, present, margins, nu=nu), found)
    found.sum().backward()
    assert rewards.grad[~present].eq(0).all()
    torch.testing.assert_close(rewards.grad.sum(1), torch.zeros_like(expected), atol=1e-9, rtol=0)


# -- people who are made up -----------------------------------------------------------------------

FEATURES = 8


def made_up(pairs, seed, strength=1.0):
    """Differences [N, F] of the features of two responses, and what they are worth."""
    generator = torch.Generator().manual_seed(seed)
    worth = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    worth *= strength / worth.norm()
    apart = torch.randn(pairs, FEATURES, generator=generator, dtype=torch.float64)
    return generator, worth, apart


def fitted(apart, votes, margins=None, nu=0.0):
    """Weights of a linear reward, the likeliest but for a weak prior."""
    weights = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")
    present = torch.ones(len(apart), 2, dtype=torch.bool)

    def closure():
        optimizer.zero_grad()
        rewards = torch.stack([apart @ weights, torch.zeros(len(apart))], 1)
        total = choice_loss(rewards, votes, present, margins, nu=nu).sum()
        total = total + 0.05 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(closure)
    return weights.detach()


def error(weights, worth):
    """1 − the cosine of what was found to what is true: the scale of a reward is free."""
    return 1 - torch.nn.functional.cosine_similarity(weights, worth, dim=0).item()


def errors(compare, repeats=12):
    """Mean error of two fits over made-up people."""
    both = [compare(seed) for seed in range(repeats)]
    return [sum(each) / repeats for each in zip(*both, strict=True)]


def test_people_who_see_no_difference_teach_too():
    def compare(seed):
        generator, worth, apart = made_up(60, seed, strength=2.0)
        delta, nu = apart @ worth, 4.0
        weights = torch.stack([delta, torch.zeros(60), delta / 2 + math.log(nu)], 1).softmax(1)
        answers = torch.multinomial(weights, 1, generator=generator)
        votes = torch.zeros(60, 3, dtype=torch.float64).scatter(1, answers, 1.0)
        present = torch.ones(60, 2, dtype=torch.bool)
        ignored = votes.clone()
        ignored[:, 2] = 0
        taught = fitted(apart, votes, nu=tie_strength(votes, present))
        return error(taught, worth), error(fitted(apart, ignored), worth)

    with_ties, without = errors(compare)
    assert with_ties < 0.8 * without


def test_margins_teach_how_much_better():
    def compare(seed):
        _, worth, apart = made_up(40, seed)
        delta = apart @ worth
        apart = apart * delta.sign()[:, None]  # the first is the better one
        votes = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).expand(40, 3)
        margins = 3 * delta.abs()
        return error(fitted(apart, votes, margins), worth), error(fitted(apart, votes), worth)

    with_margins, without = errors(compare)
    assert with_margins < 0.8 * without


def test_several_votes_teach_more_than_that_of_most():
    def compare(seed):
        generator, worth, apart = made_up(60, seed)
        shares = (apart @ worth).sigmoid()
        first = torch.bernoulli(shares.expand(9, -1), generator=generator).sum(0)
        votes = torch.stack([first, 9 - first, torch.zeros(60)], 1).double()
        most = torch.nn.functional.one_hot((first < 4.5).long(), 3).double()
        return error(fitted(apart, votes), worth), error(fitted(apart, most), worth)

    soft, hard = errors(compare)
    assert soft < 0.8 * hard
