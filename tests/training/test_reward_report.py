"""What is measured of a reward model, by hand."""

import json
import math

import pytest

from trl.config.recipe import RewardRecipe
from trl.data.preferences import Preference
from trl.training.reward_report import calibration, measure, write_report


def test_the_calibration_error_by_hand():
    # Bins of 0.5, 0.6 and 0.9: (|1 − 0.55| + |0 − 0.65| + 2·|0.5 − 0.95|) / 4 = 2.0 / 4
    bins, error = calibration([0.55, 0.65, 0.95, 0.95], [True, False, True, False])
    assert error == pytest.approx(0.5)
    assert [(each["count"], each["accuracy"]) for each in bins] == [(1, 1.0), (1, 0.0), (2, 0.5)]
    assert bins[2]["confidence"] == pytest.approx(0.95)
    assert calibration([1.0], [True]) == ([{"count": 1, "confidence": 1.0, "accuracy": 1.0}], 0.0)


PREFERENCES = [
    Preference("", ("12345", "123"), (1, 0, 0)),  # the longer one won
    Preference("", ("12", "1234567890"), (3, 1, 0), 2.0),  # it lost
    Preference("", ("123456789", "1234567890"), (0, 1, 1)),  # like lengths
    Preference("", ("123456789", "1234567890"), (1, 1, 5)),  # nobody won
    Preference("", ("1", "12", "12"), (0, 0, 1, 0)),  # two are the longest
]
REWARDS = [[math.log(3), 0.0], [0.0, 1.0], [5.0, 7.0], [0.0, 1.0], [0.0, 0.0, 0.0]]


def test_what_is_measured_by_hand():
    found = measure(PREFERENCES, REWARDS)
    # The first and the third are right; of three equal rewards none is a choice.
    assert (found["decided"], found["tied"], found["accuracy"]) == (4, 1, 0.5)
    # 1, 0, 1, and half of the last
    assert found["length_rule"] == pytest.approx(2.5 / 4)
    assert (found["like_length"]["count"], found["like_length"]["accuracy"]) == (1, 1.0)
    assert found["like_length_rule"] == 1.0
    # p = 3/4 right; σ(1) = 0.7311 wrong; σ(2) = 0.8808 right; 1/3 wrong. The first two share a bin.
    error = (2 * abs(0.5 - (0.75 + 0.7310586) / 2) + (1 - 0.8807971) + 1 / 3) / 4
    assert found["ece"] == pytest.approx(error, abs=1e-6)
    assert [each["name"] for each in found["by_margin"]] == ["0", "2"]
    assert [each["accuracy"] for each in found["by_margin"]] == [2 / 3, 0.0]
    assert [each["name"] for each in found["by_agreement"]] == ["0.5", "0.75", "1"]
    assert sum(each["count"] for each in found["by_gap"]) == 4
    bias = found["length_bias"]
    assert bias["longest_chosen_by_model"] == 1.0
    assert bias["longest_chosen_by_people"] == pytest.approx((1 + 0.25 + 1 + 0.5 + 1) / 5)
    assert bias["accuracy_where_longest_won"] == 1.0
    assert bias["accuracy_where_it_lost"] == 0.0
    # Rewards and lengths less their means within each: Σxy / √(Σx²·Σy²).
    pairs = [(math.log(3) / 2, 1.0), (0.5, 4.0), (1.0, 0.5), (0.5, 0.5)]  # of two responses each
    xy = 2 * sum(x * y for x, y in pairs)
    xx, yy = 2 * sum(x * x for x, _ in pairs), 2 * sum(y * y for _, y in pairs) + 2 / 3
    assert bias["reward_and_length"] == pytest.approx(xy / math.sqrt(xx * yy))


def test_the_page_says_when_it_is_no_better_than_length(tmp_path):
    recipe = RewardRecipe(train="a.jsonl")
    more = {"train_preferences": 1000, "std": 2.0}
    write_report(tmp_path, recipe, measure(PREFERENCES, REWARDS) | more)
    page = (tmp_path / "report.md").read_text()
    assert "Not better than length alone" in page
    assert "| the model | 50.0 % | 15.0 to 85.0 % | 4 |" in page
    assert "| the longer text wins | 62.5 % |" in page
    many = [Preference("", ("12", "1"), (n % 2, 1 - n % 2, 0)) for n in range(100)]
    found = measure(many, [[float(n % 2), 0.5] for n in range(100)])
    json.dumps(found)
    write_report(tmp_path, recipe, found | more)
    assert "Not better" not in (tmp_path / "report.md").read_text()


def test_of_nothing_that_was_decided_there_is_no_figure(tmp_path):
    found = measure([Preference("", ("a", "b"), (1, 1, 0))], [[0.0, 1.0]])
    assert found["accuracy"] is found["length_rule"] is None
    assert found["ece"] == 0
    path = write_report(tmp_path, RewardRecipe(), found | {"train_preferences": 1, "std": 1.0})
    assert "| the model | – |" in path.read_text()
