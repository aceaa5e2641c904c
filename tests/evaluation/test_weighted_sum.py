import pytest
import torch

import trl
from tests.evaluation.rollouts import make_rollout
from trl.evaluation import (
    FunctionScorer,
    JsonScorer,
    MathScorer,
    ScoringError,
    WeightedSum,
    score,
)
from trl.evaluation.weighted_sum import check_columns
from trl.scored import Scored

ROLLOUT = make_rollout(("a ", "red"), ("a ", "green"), lengths=[3, 4], holes=[(0, 1), (1, 3)])


def ones(texts):
    return [1.0 for _ in texts]


def lengths(texts):
    return [len(text) for text in texts]


def by_token(tokens):
    return [[0.5] * len(row) for row in tokens]


def test_scores_by_hand():
    total = WeightedSum([(lengths, 2.0), (FunctionScorer(ones), -0.5)])
    # 2·5 − 0.5 and 2·7 − 0.5
    found = score(total, ROLLOUT)
    assert found.scores.tolist() == [9.5, 13.5]
    assert {name: part.tolist() for name, part in found.parts.items()} == {
        "lengths": [5.0, 7.0],
        "ones": [1.0, 1.0],
    }
    assert found.means() == {"lengths": 6.0, "ones": 1.0}


def test_a_part_without_a_say_on_a_row_leaves_it_to_the_others():
    def says(*rows):
        return lambda texts: [len(text) if row in rows else None for row, text in enumerate(texts)]

    rollout = make_rollout(("a ", "red"), ("a ", "green"), ("the ", "blue"))  # 5, 7, 8 letters
    found = score(WeightedSum([(says(0, 1), 1.0), (says(1), 10.0)]), rollout)
    assert found.counted.tolist() == [True, True, False]
    assert found.scores.tolist() == [5.0, 77.0, 0.0]
    assert str(found.totals.tolist()) == "[5.0, 77.0, nan]"
    assert found.means() == {"<lambda>": 6.0, "<lambda> 2": 7.0}
    assert str(found.parts["<lambda> 2"].tolist()) == "[nan, 7.0, nan]"
    # One that is only measured has no say; one that has all leaves no row out.
    assert score(WeightedSum([(says(0), 1.0), (ones, 0.0)]), rollout).counted.tolist() == [1, 0, 0]
    assert score(WeightedSum([(says(0), 1.0), (ones, 1.0)]), rollout).counted is None
    assert score(WeightedSum([(says(), 1.0)]), rollout).means() == {}
    by_tokens = FunctionScorer(lambda tokens: [[2.0], None, [3.0] * 3], on="tokens")
    found = score(WeightedSum([(by_tokens, 1.0), (says(0, 2), 1.0)]), rollout)
    assert found.scores.tolist() == [[7.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 3.0, 11.0]]
    assert found.counted.tolist() == [True, False, True]


def test_a_dictionary_of_scorers():
    assert WeightedSum({lengths: 1.0, ones: 1.0})(ROLLOUT).scores.tolist() == [6.0, 8.0]


def test_a_score_joins_rewards_at_the_last_counted_token():
    total = WeightedSum([(ones, 10.0), (FunctionScorer(by_token, on="tokens"), 2.0)])
    # counted: tokens 0 and 2 of the first response, 0 … 2 of the second; each has 2·0.5
    found = score(total, ROLLOUT)
    assert found.scores.tolist() == [[1.0, 0.0, 11.0, 0.0], [1.0, 1.0, 11.0, 0.0]]
    # two and three tokens of 0.5 each
    assert found.means() == {"ones": 1.0, "by_token": 1.25}


def test_rewards_alone():
    part = FunctionScorer(by_token, on="tokens")
    total = WeightedSum([(part, 1.0), (part, 1.0)])
    found = total(ROLLOUT)
    assert found.scores.tolist() == [[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    assert found.means() == {"by_token": 1.25, "by_token 2": 1.25}


def test_sums_of_sums():
    total = WeightedSum([(WeightedSum([(lengths, 1.0)]), 3.0)])
    found = total(ROLLOUT)
    assert found.scores.tolist() == [15.0, 21.0]
    assert found.means() == {"WeightedSum": 6.0, "lengths": 6.0}  # what the parts tell stays
    figure = {"long": torch.tensor([0.0, 1.0])}
    total = WeightedSum([(lambda rollout: Scored([1.0, 2.0], figures=figure), 2.0), (ones, 1.0)])
    assert total(ROLLOUT).scores.tolist() == [3.0, 5.0]
    assert total(ROLLOUT).means() == {"<lambda>": 1.5, "ones": 1.0, "long": 0.5}


def test_a_part_that_fails_is_named():
    part = FunctionScorer(lambda texts: [1.0, float("nan")], name="part")
    total = WeightedSum([(lengths, 1.0), (part, 1.0)])
    with pytest.raises(ScoringError, match="^part must give finite numbers.*row 1: 'a green'"):
        total(make_rollout(("b ", "blue"), ("a ", "green")))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None])
def test_bad_weights(weight):
    with pytest.raises(ValueError, match="`weight of lengths` must be a finite number"):
        WeightedSum([(lengths, weight)])


def test_bad_parts():
    with pytest.raises(ValueError, match="`parts` must have at least one scorer"):
        WeightedSum([])
    with pytest.raises(TypeError, match="`reward` must be a scorer or a function, got 'sentiment'"):
        WeightedSum({"sentiment": 1.0})


def test_rewards_are_not_the_parts_own_tensors():
    kept = torch.zeros(2)

    def scorer(rollout):
        return kept

    found = WeightedSum([(scorer, 1.0)])(ROLLOUT)
    found.scores.add_(1)
    found.parts["scorer"].add_(1)
    assert torch.equal(kept, torch.zeros(2))


@pytest.mark.parametrize("parts", [None, "lengths", 1.0, lengths, [(lengths, 1.0, 2.0)]])
def test_what_is_no_list_of_pairs_is_named(parts):
    with pytest.raises(TypeError, match=r"`parts` must be .*WeightedSum\(\[\(scorer, 1.0\)"):
        WeightedSum(parts)


def test_what_has_no_weight_has_the_weight_1():
    found = WeightedSum([lengths, (lengths, -0.5)])(ROLLOUT)
    assert torch.equal(found.scores, 0.5 * WeightedSum({lengths: 1.0})(ROLLOUT).scores)


def test_a_weight_is_no_flag():
    with pytest.raises(ValueError, match="`weight of lengths` must be a finite number, got True"):
        WeightedSum([(lengths, True)])


@pytest.mark.parametrize("scorer", [MathScorer("anwser"), JsonScorer(key="anwser")])
def test_a_column_that_no_row_has_is_told_before_anything_is_loaded(scorer):
    words = r"must find the column 'anwser' .* got \['answer'\].* Did you mean `answer`\?"
    with pytest.raises(ValueError, match=words):
        check_columns(WeightedSum([scorer]), lambda: [["answer"]])
    with pytest.raises(ValueError, match=words):  # a model that is nowhere is not looked for
        trl.train("nowhere", [{"prompt": "1 + 1 =", "answer": "2"}], scorer)
    check_columns(scorer, lambda: [["anwser"]])
    check_columns(JsonScorer(schema={}), lambda: pytest.fail("it needs no column"))
