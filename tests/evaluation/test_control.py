import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.rollouts import make_rollout, without_texts
from tests.evaluation.test_classifier import make_model, make_tokenizer, with_logits
from tests.strategies import properties
from trl.evaluation import ClassifierScorer, ScoringError, WeightedSum, score
from trl.evaluation.control import ControlScorer, range_reward

TARGETS = {"[-] ": (0.0, 0.25), "[0] ": (0.35, 0.65), "[+] ": (0.75, 1.0)}
PREFIXES = list(TARGETS)
PAIRS = [(prefix + "the film ", "was good") for prefix in PREFIXES]

# log p / (1 − p) of 3/4 is log 3, of 13/20 it is log 13/7; of 1 − p it is the negative.
LOG_3, LOG_13_7 = 1.0986123, 0.6190392


def classifier_of(model, **settings):
    return ClassifierScorer(model, make_tokenizer(), label=1, **settings)


def saying(log_odds, **settings):
    """A scorer whose classifier finds the same log-odds in every text."""
    return ControlScorer(classifier_of(with_logits([0.0, log_odds])), TARGETS, **settings)


@pytest.mark.parametrize(
    ("log_odds", "negative", "neutral", "positive"),
    [
        # −log 3 − 0; log 13/7 − 0; 0 − log 3
        (0.0, -LOG_3, LOG_13_7, -LOG_3),
        # −log 3 − 1; log 13/7 − 1; 1 − log 3
        (1.0, -2.0986123, -0.3809608, -0.0986123),
        # −log 3 + 1; −1 + log 13/7; −1 − log 3
        (-1.0, -0.0986123, -0.3809608, -2.0986123),
        # 2 − log 3
        (2.0, -3.0986123, -1.3809608, 0.9013877),
        # 9 − log 3 and more are cut at 3, −9 − log 3 at −4
        (9.0, -4.0, -4.0, 3.0),
        (-9.0, 3.0, -4.0, -4.0),
    ],
)
def test_rewards_by_hand(log_odds, negative, neutral, positive):
    expected = torch.tensor([negative, neutral, positive])
    low, high = torch.tensor(list(TARGETS.values())).T
    rewards = range_reward(torch.full((3,), log_odds), low, high, best=3.0, worst=-4.0)
    torch.testing.assert_close(rewards, expected, rtol=1e-6, atol=1e-6)
    scorer = saying(log_odds, best=3.0, worst=-4.0, scale=2.0)
    found = score(scorer, make_rollout(*PAIRS)).scores
    torch.testing.assert_close(found, 2 * expected, rtol=1e-6, atol=1e-6)


ends = st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(lambda pair: pair[0] < pair[1])


@properties
@given(ends, st.floats(-8, 8), st.floats(-8, 8))
def test_the_reward_is_positive_inside_bounded_and_changes_no_faster_than_the_log_odds(
    twentieths, first, second
):
    low, high = (torch.tensor([end / 20]).double() for end in twentieths)
    one, other = (
        range_reward(torch.tensor([x]).double(), low, high, best=0.5, worst=-2.0).item()
        for x in (first, second)
    )
    assert -2.0 <= one <= 0.5
    probability = 1 / (1 + math.exp(-first))
    if abs(probability - low) > 1e-6 and abs(probability - high) > 1e-6:
        assert (one > 0) == (low < probability < high)
    assert abs(one - other) <= abs(first - second) + 1e-6


@properties
@given(ends, st.floats(-8, 8))
def test_the_opposite_label_has_the_opposite_range(twentieths, log_odds):
    low, high = (torch.tensor([end / 20]).double() for end in twentieths)
    x = torch.tensor([log_odds]).double()
    rewards = range_reward(x, low, high, best=1.0, worst=-1.0)
    torch.testing.assert_close(rewards, range_reward(-x, 1 - high, 1 - low, best=1.0, worst=-1.0))


def test_the_classifier_reads_the_text_without_the_prefix():
    # The words stand in the vocabulary: seen, the prefixes would change the scores.
    targets = {"bad ": (0.0, 0.3), "great ": (0.6, 1.0)}
    classifier = classifier_of(make_model(), output="logit")
    rollout = make_rollout(("bad a film ", "was bad "), ("great the story", " great "))
    texts = ["a film was bad ", "the story great "]
    x = classifier_of(make_model(), output="log_odds")(texts)
    # 3/7 and 3/2 are the odds of 0.3 and 0.6.
    expected = torch.stack([math.log(3 / 7) - x[0], x[1] - math.log(3 / 2)])
    found = ControlScorer(classifier, targets, best=99.0, worst=-99.0)(rollout).scores
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert classifier.output == "logit"
    seen = classifier_of(make_model(), output="log_odds")(list(rollout.texts))
    assert (seen - x).abs().min() > 0.01


def test_only_the_prefix_at_the_start_goes_and_it_goes_once():
    classifier = classifier_of(make_model(), output="log_odds")
    rollout = make_rollout(("bad bad film bad ", "bad "))
    found = ControlScorer(classifier, {"bad ": (0.5, 1.0)}, best=99.0, worst=-99.0)(rollout).scores
    # The odds of 1/2 are 1: the reward is x itself.
    torch.testing.assert_close(found, classifier(["bad film bad bad "]), rtol=1e-5, atol=1e-6)


def test_the_longest_prefix_counts():
    targets = {"very ": (0.0, 0.25), "very very ": (0.75, 1.0)}
    for order in (targets, dict(reversed(targets.items()))):
        scorer = ControlScorer(classifier_of(with_logits([0.0, 5.0])), order, worst=-1.0, best=0.5)
        rollout = make_rollout(("very good ", "film"), ("very very good ", "film"))
        assert scorer(rollout).scores.tolist() == [-1.0, 0.5]


def test_the_shares_of_hits():
    scorer = saying(0.5, best=1.0)
    pairs = [PAIRS[1], PAIRS[0], PAIRS[1], PAIRS[1], PAIRS[2]]
    found = scorer(make_rollout(*pairs))
    # P = 0.62 is inside 0.35 … 0.65 and nowhere else.
    assert found.means() == {"hit": 0.6, "hit/[0]": 1.0, "hit/[-]": 0.0, "hit/[+]": 0.0}
    assert found.figures["hit"].tolist() == [1, 0, 1, 1, 0]
    torch.testing.assert_close(
        found.figures["hit/[0]"], torch.tensor([1, math.nan, 1, 1, math.nan]), equal_nan=True
    )
    assert scorer(make_rollout(PAIRS[2])).means() == {"hit": 0.0, "hit/[+]": 0.0}


def test_just_outside_is_no_hit():
    scorer = saying(1.0)
    # P = 0.731 lies between 0.65 and 0.75.
    found = scorer(make_rollout(*PAIRS))
    assert found.scores.tolist() == pytest.approx([-1.0, -0.3809608, -0.0986123])
    assert set(found.means().values()) == {0.0}


def test_a_short_response_misses():
    scorer = saying(0.0, min_tokens=3, worst=-1.5, scale=2.0)
    rollout = make_rollout(*[PAIRS[1]] * 3, lengths=[2, 3, 4], holes=[(2, 0), (2, 1)])
    # The third has four tokens, of which two count.
    assert scorer(rollout).scores.tolist() == pytest.approx([-3.0, 2 * LOG_13_7, -3.0], rel=1e-6)
    assert scorer(rollout).means() == {"hit": 1 / 3, "hit/[0]": 1 / 3}


def test_the_classifiers_own_settings_hold():
    long = "the story was great with a good film"
    cut = classifier_of(make_model(), output="log_odds", max_length=5)
    rollout = make_rollout(("[0] the story was great ", "with a good film"))
    # [CLS] and [SEP] leave room for the last three words of the eight.
    expected = classifier_of(make_model(), output="log_odds")(["a good film"])
    targets = {"[0] ": (0.5, 1.0)}
    found = ControlScorer(cut, targets, best=99.0, worst=-99.0)(rollout).scores
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - classifier_of(make_model(), output="log_odds")([long])).abs().min() > 0.01


def test_the_order_of_rows_does_not_matter():
    classifier = classifier_of(make_model())
    rollout = make_rollout(*PAIRS, ("[0] a ", "bad story"), lengths=[2, 2, 2, 2])
    scorer = ControlScorer(classifier, TARGETS)
    order = torch.tensor([2, 0, 3, 1])
    before, after = scorer(rollout), scorer(rollout.select(order))
    torch.testing.assert_close(after.scores, before.scores[order], rtol=1e-5, atol=1e-6)
    assert after.means() == before.means()


def test_a_part_of_a_sum():
    scorer = saying(0.0, name="sentiment")
    total = WeightedSum([(scorer, 2.0)])
    found = total(make_rollout(PAIRS[1]))
    assert found.scores.tolist() == pytest.approx([2 * LOG_13_7], rel=1e-6)
    assert found.parts["sentiment"].tolist() == pytest.approx([LOG_13_7], rel=1e-6)
    assert list(found.means()) == ["sentiment", "hit", "hit/[0]"]
    assert saying(0.0).name == "control"


def test_a_query_without_prefix():
    rollout = make_rollout(PAIRS[0], ("a film [0] ", "good"))
    rule = r"begin with one of the prefixes '\[-\] ', '\[0\] ', '\[\+\] ', got 'a film \[0\] '"
    with pytest.raises(ValueError, match=rule):
        saying(0.0)(rollout)
    with pytest.raises(ScoringError, match="^control raised ValueError: each query must " + rule):
        score(saying(0.0), rollout)


def test_a_rollout_without_texts():
    with pytest.raises(ScoringError, match="the rollout must have texts"):
        saying(0.0)(without_texts(make_rollout(*PAIRS)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "`targets` must have at least one prefix"),
        ({"a": (0.5, 0.5)}, r"`targets\['a'\]` must be a pair with low < high, got \(0.5, 0.5\)"),
        *(
            (wrong, "`targets` must be a mapping of prefix: .low, high., two numbers .* 0 and 1")
            for wrong in (
                {"": (0.0, 1.0)},
                {"a": (0.9, 0.1)},
                {"a": (-0.1, 0.1)},
                {"a": (0.1, 1.1)},
                {"a": (0.1, math.nan)},
                {"a": ("0", 1.0)},
                {"a": 0.5},
                {"a": (0.0, 0.5, 1.0)},
                {"a": (False, True)},
                {1: (0.0, 1.0)},
                [("a", (0.0, 1.0))],
            )
        ),
    ],
)
def test_bad_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        ControlScorer(classifier_of(make_model()), targets)


def test_bad_settings_are_named_together():
    with pytest.raises(ValueError, match="`scale` must.*`best` must.*`worst` must.*`min_tokens`"):
        saying(0.0, scale=0.0, best=-1.0, worst=1.0, min_tokens=1.5)
    with pytest.raises(ValueError, match="`worst` must be a finite number < 0, got -inf"):
        saying(0.0, worst=-math.inf)
    with pytest.raises(TypeError, match="`classifier` must be a ClassifierScorer, got function"):
        ControlScorer(lambda texts: texts, TARGETS)


def test_a_weight_multiplies_the_reward_of_its_prefix():
    plain = saying(0.0, best=3.0, worst=-4.0)
    weighted = saying(0.0, best=3.0, worst=-4.0, weights={"[0] ": 2.0})
    rollout = make_rollout(*PAIRS)
    more, usual = score(weighted, rollout), score(plain, rollout)
    assert torch.equal(more.scores, usual.scores * torch.tensor([1, 2.0, 1]))
    assert more.means() == usual.means()
    with pytest.raises(ValueError, match=r"`weights` must name prefixes .*'\[neutral\]'"):
        saying(0.0, weights={"[neutral]": 2.0})
    with pytest.raises(
        ValueError, match=r"`weights` must be a mapping of prefix: number > 0, got .*0"
    ):
        saying(0.0, weights={"[0] ": 0})
