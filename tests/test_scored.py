"""Whether scores fit a rollout, judged once for `step` and for scorers."""

import math
from fractions import Fraction

import pytest
import torch

from tests.conftest import ragged
from tests.test_batch import recorded
from trl.batch import Rollout
from trl.config import PPOConfig
from trl.optimization.algorithms import ALGORITHMS
from trl.optimization.inputs import rollout_and_scores
from trl.scored import BadScores, Scored, totals

NAN = math.nan
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 0, 8, 0, 0], [9, 10, 0, 0, 0]])


def as_step_takes_them(rollout, scores):
    settings = {"config": PPOConfig(), "algorithm": ALGORITHMS["ppo"]}
    return rollout_and_scores(rollout, scores, None, None, **settings)[1]


@pytest.mark.parametrize(
    "scores",
    [
        torch.tensor([1, 2]),
        [1, 2.0],
        [torch.tensor(1.0), 2],
        [torch.tensor([1.0]), torch.tensor([2.0])],
        (1.0, 2.0),
        Scored(torch.tensor([1.0, 2.0])),
    ],
)
def test_scores_may_be_a_scored_a_tensor_or_numbers(scores):
    rollout = Rollout.from_lists(ragged([1, 2]), ragged([2, 1]))
    found = as_step_takes_them(rollout, scores)
    assert found.tolist() == [1.0, 2.0]
    assert found.dtype == torch.float32
    assert torch.equal(Scored.of(scores, rollout).scores, found)


@pytest.mark.parametrize(
    "scores",
    [
        [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10]],  # one for each token, those in the hole left out
        [[1, 2, 3, 4, 5], [6, 8], [9, 10]],  # one for each counted token
        torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 99, 99], [9, 10, 99, NAN, 99]]),
    ],
)
def test_scores_of_tokens_come_to_their_places(scores):
    assert torch.equal(as_step_takes_them(recorded(), scores), TOKENS.float())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            [[1.0] * 5, [1.0], [1.0] * 2],
            r"one for each token .* got a list of 1 for row 1, which has 2 tokens",
        ),
        ([[1.0] * 5, [1.0] * 3], r"3 responses, got a list of 2"),
        (torch.zeros(3, 4), r"or \[3, 5\], .* got torch.float32 \[3, 4\]"),
        ([[1.0] * 5, [1.0, 2.0, NAN], [1.0] * 2], "finite numbers, got nan .* in row 1"),
        ([1.0, [2.0, 3.0], 4.0], "got both: lists for 1 of 3 responses, in row 1"),
    ],
)
def test_bad_scores_are_named_alike_by_step_and_by_scorers(scores, message):
    for judge in (
        Scored.of,
        lambda found, rollout: as_step_takes_them(rollout, found),
    ):
        with pytest.raises(BadScores, match=f"^`scores` must be .*{message}"):
            judge(scores, recorded())


def test_none_in_a_list_has_no_say():
    found = Scored.of([1.0, None, [3.0]], recorded())
    assert found.scores.tolist() == [1.0, 0.0, 3.0]
    assert found.counted.tolist() == [True, False, True]
    both = Scored.concat(
        [found, Scored.of([None] * 3, recorded()), Scored.of([4, 5, 6], recorded())]
    )
    assert both.counted.tolist() == [True, False, True, *[False] * 3, *[True] * 3]
    assert Scored.of([[1] * 5, None, [9, 10]], recorded()).scores[1:].sum(1).tolist() == [0.0, 19.0]
    counted = torch.tensor([True, False, True])
    assert Scored.of(Scored([1, 2, 3], counted=counted), recorded()).scores.tolist() == [1, 0, 3]
    assert Scored.of(Scored([1, 2, 3], counted=counted | True), recorded()).counted is None
    for wrong in (counted[:2], counted.float(), [True] * 3):
        with pytest.raises(BadScores, match=r"`counted` as bool of the shape \[3\]"):
            Scored.of(Scored([1.0, 2.0, 3.0], counted=wrong), recorded())


def test_a_note_has_one_text_for_each_row():
    notes = {"said": ("a", "b")}
    with pytest.raises(BadScores, match="must be notes of 3 texts, got 2 for 'said'"):
        Scored.of(Scored([1.0, 2.0, 3.0], notes=notes), recorded())
    one, other = Scored(torch.ones(2), notes=notes), Scored(torch.ones(1))
    assert Scored.concat([one, other]).notes == {"said": ("a", "b", "")}


@pytest.mark.parametrize(
    "more", [{"parts": {"a": torch.zeros(2)}}, {"figures": {"a": torch.zeros(3, 5)}}]
)
def test_a_part_or_figure_has_one_number_for_each_row(more):
    with pytest.raises(BadScores, match=r"must be parts and figures of the shape \[3\], .* 'a'"):
        Scored.of(Scored([1.0, 2.0, 3.0], **more), recorded())


def test_means_are_of_the_rows_where_a_figure_counts():
    scored = Scored(
        torch.tensor([1.0, 2.0]),
        parts={"a": torch.tensor([3.0, 4.0])},
        figures={"some": torch.tensor([NAN, 5.0]), "none": torch.tensor([NAN, NAN])},
    )
    assert scored.means() == {"a": 3.5, "some": 5.0}
    assert scored.totals.tolist() == [1.0, 2.0]
    assert totals(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).tolist() == [3.0, 3.0]


def test_parts_of_a_rollout_are_joined_as_wide_as_the_widest():
    one = Scored(torch.tensor([[1.0], [2.0]]), parts={"a": torch.tensor([1.0, 2.0])})
    other = Scored(
        torch.tensor([[3.0, 4.0]]),
        parts={"a": torch.tensor([7.0])},
        figures={"b": torch.tensor([8.0])},
    )
    both = Scored.concat([one, other])
    assert both.scores.tolist() == [[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]]
    assert both.parts["a"].tolist() == [1.0, 2.0, 7.0]
    assert both.means() == pytest.approx({"a": 10 / 3, "b": 8.0})
    flat = Scored.concat([Scored(torch.tensor([1.0])), Scored(torch.tensor([2.0]))])
    assert flat.scores.tolist() == [1.0, 2.0]


def test_a_number_that_no_float_holds_is_bad_scores():
    rollout = Rollout.from_lists(torch.ones(2, 1).long(), torch.ones(2, 1).long())
    with pytest.raises(BadScores, match="one number for each of the 2 responses, got 1000"):
        Scored.of([1.0, 10**400], rollout)
    with pytest.raises(BadScores, match="finite numbers"):
        Scored.of([1.0, float("inf")], rollout)


@pytest.mark.parametrize("number", [2**1024, -(10**400), Fraction(10**400), Fraction(10**400, 3)])
def test_numbers_that_no_float_holds_are_refused(number):
    with pytest.raises(BadScores, match="one number for each of the 3 responses, got"):
        Scored.of([0.0, number, 1.0], recorded())


@pytest.mark.filterwarnings("ignore")  # of torch: they may change
@pytest.mark.parametrize(
    "made",
    [
        torch.ones(3).to_sparse,
        lambda: torch.ones(3, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(1)] * 3),
    ],
)
def test_tensors_whose_numbers_are_not_there_are_refused(made):
    with pytest.raises(BadScores, match="a tensor with all its numbers"):
        Scored.of(made(), recorded())
