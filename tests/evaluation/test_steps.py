"""Where the steps of a response end, and on which tokens what is said of them lands."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl import FunctionScorer, PPOConfig, Rollout, ScoringError, WeightedSum
from trl.config import SettingsError
from trl.environments import EnvironmentReward
from trl.evaluation.steps import Step, characters, of_steps, steps_of, steps_of_rows
from trl.optimization.algorithms import ALGORITHMS
from trl.optimization.rewards import RunningMoments, normalize_scores, token_rewards
from trl.scored import BadScores, Scored, totals


def rollout_of_bytes(*rows, masks=None, **more):
    """A rollout whose tokens are pieces of UTF-8, a list of them for each response to "q"."""
    known = [b"q", b"<eos>", *dict.fromkeys(piece for row in rows for piece in row)]

    def decode(query, response):
        assert query == ([] if more.get("episodes") else [0])
        return b"".join(known[i] for i in response if i != 1).decode("utf-8", "replace")

    tokens = [torch.tensor([known.index(piece) for piece in row]) for row in rows]
    rollout = Rollout.from_lists([torch.tensor([0])] * len(rows), tokens, response_masks=masks)
    texts = tuple(decode([0][: 0 if more.get("episodes") else 1], row.tolist()) for row in tokens)
    given = {"query_texts": ("q",) * len(rows), "response_texts": texts, "decode": decode}
    return replace(rollout, **given | more)


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("one\n\ntwo", [("one", 5), ("two", 8)]),
        ("one\n\ntwo\n\n", [("one", 5), ("two", 10)]),
        ("one", [("one", 3)]),  # no separator: one step
        ("", [("", 0)]),
        ("\n\n\n\n", [("\n\n\n\n", 4)]),
        ("\n\none\n\n \n\ntwo", [("one", 10), ("two", 13)]),  # what is blank is no step
        ("one\n\ntwo\n\n\n", [("one", 5), ("two", 11)]),
        ("é\n\n猫", [("é", 3), ("猫", 4)]),
    ],
)
def test_a_response_is_cut_into_steps(response, steps):
    assert steps_of(response, "\n\n") == [Step(*step) for step in steps]


def test_half_a_separator_at_the_limit_is_no_word_of_the_last_step():
    assert steps_of("one ###two ##", " ###", cut=True) == [Step("one", 7), Step("two", 13)]
    assert steps_of("one ###two ##", " ###")[1].text == "two ##"
    rows = rollout_of_bytes([b"a #"], [b"a #"], ended=torch.tensor([True, False]))
    assert [step.text for (step,) in steps_of_rows(rows, " ##")] == ["a #", "a"]


@pytest.mark.parametrize(
    ("row", "scores", "expected"),
    [
        # What ends a step belongs to it; the last one has the end of the response.
        ([b"a", b"\n\n", b"b", b"<eos>"], [1, 2], [0, 1, 0, 2]),
        # One token with the end of a step and the start of the next one.
        ([b"a", b".\n\nb", b"c"], [1, 2], [0, 1, 2]),
        # Of three steps, two end in the same token.
        ([b"a\n\nb\n\nc", b"d"], [1, 2, 4], [3, 4]),
        # A separator in two tokens; cut by the limit it is none.
        ([b"a\n", b"\nb", b"\n"], [1, 2], [0, 1, 2]),
        # Half a character is not there yet: 猫 in three bytes, behind the separator and in it.
        ([b"a", b"\n\n\xe7", b"\x8c", b"\xab"], [1, 2], [0, 1, 0, 2]),
        ([b"\xe7", b"\x8c", b"\xab\n", b"\n", b"b"], [1, 2], [0, 0, 0, 1, 2]),
        # Bytes that are no character, in the text as U+FFFD.
        ([b"\xff", b"\n\n", b"\xe7", b"b"], [1, 2], [0, 1, 0, 2]),
        # One step: where the score of a whole response is.
        ([b"a", b"b", b"<eos>"], [5], [0, 0, 5]),
    ],
)
def test_where_the_score_of_a_step_lands(row, scores, expected):
    other = [b"x"] * 6  # ragged
    rollout = rollout_of_bytes(row, other)
    scored = of_steps([scores, [7]], rollout, steps_of_rows(rollout, "\n\n"))
    assert scored.scores.tolist() == [expected + [0] * (6 - len(expected)), [0, 0, 0, 0, 0, 7]]
    assert scored.figures["steps"].tolist() == [len(scores), 1]


def test_turns_are_read_one_by_one_and_what_the_environment_said_is_left_out():
    row = [b"a", b"\n", b"b", b"HELLO", b"\xe7", b"\x8c\xab", b"\n", b"c", b"<eos>"]
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1])
    rewards = torch.tensor([[0, 0, 10.0, 0, 0, 0, 0, 0, 20.0]])
    rollout = rollout_of_bytes(
        row, masks=[mask], episodes=({"messages": []},), turn_rewards=rewards
    )
    rollout = replace(rollout, response_texts=("a\nb\n\n猫\nc",))
    assert [characters(rollout, 0)(n) for n in range(9)] == [0, 1, 2, 5, 5, 6, 7, 8, 8]
    steps = FunctionScorer(one_to_n, separator="\n")
    scored = steps(rollout)
    assert scored.scores.tolist() == [[0, 1, 2, 0, 0, 0, 3, 0, 4]]
    both = WeightedSum([(steps, 0.5), EnvironmentReward()])
    found = both(rollout)
    assert torch.equal(found.scores, 0.5 * scored.scores + rewards)
    assert found.totals.tolist() == [35.0]


def one_to_n(response_steps):
    return [[float(n + 1) for n in range(len(own))] for own in response_steps]


def test_a_function_scores_steps_rows_or_nothing():
    rollout = rollout_of_bytes([b"a", b"\n\n", b"b"], [b"c", b"d"], [b"e", b"\n\n", b"f"])
    columns = {"right": (1.0, 2.0, 3.0)}
    rollout = replace(rollout, columns=columns)

    def mixed(response_steps, right):
        assert response_steps == [["a", "b"], ["cd"], ["e", "f"]]
        return [[right[0], -1.0], None, right[2]]

    scored = FunctionScorer(mixed)(rollout)
    assert scored.scores.tolist() == [[0, 1, -1], [0, 0, 0], [0, 0, 3]]
    assert scored.counted.tolist() == [True, False, True]
    # numbers alone are those of whole responses; texts by hand have their sum
    assert FunctionScorer(lambda response_steps: [1, None, 2])(rollout).scores.tolist() == [1, 0, 2]
    assert FunctionScorer(one_to_n)(["a\n\nb", "c"]).scores.tolist() == [3, 1]
    assert FunctionScorer(one_to_n, separator="c")(["acb\n\n"]).scores.tolist() == [3]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            [[1.0], [1.0]],
            r"one number for each step of each response, got 1 for the 2 steps of row",
        ),
        ([[1.0, float("nan")], [1.0]], "finite numbers, got nan"),
        ([[1.0, None], [1.0]], "one number for each of the 2 responses"),
    ],
)
def test_bad_scores_of_steps_name_the_row(returned, message):
    rollout = rollout_of_bytes([b"a", b"\n\n", b"b"], [b"c"])
    with pytest.raises(ScoringError, match=message) as told:
        FunctionScorer(lambda response_steps: returned)(rollout)
    assert told.value.rows == (0,)


def test_what_is_needed_is_told():
    rollout = replace(rollout_of_bytes([b"a", b"\n\n", b"b"]), decode=None)
    with pytest.raises(ScoringError, match=r"must have `decode` .* got None: sample with Sampler"):
        FunctionScorer(one_to_n)(rollout)
    with pytest.raises(SettingsError, match="`separator` must"):
        FunctionScorer(one_to_n, separator="")
    with pytest.raises(ValueError, match="`separator` must be left out for a function without a"):
        FunctionScorer(len, separator=";")


# --- random tokenizations ---------------------------------------------------------------------

TEXTS = st.lists(st.sampled_from(["a", "é", "猫", " ", "\n", "\n\n", "#"]), max_size=12).map(
    "".join
)


@settings(max_examples=60, deadline=None)
@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 40), max_size=12),
    ended=st.booleans(),
    separator=st.sampled_from(["\n\n", "\n", "#"]),
)
def test_any_cut_into_tokens_keeps_sum_and_order(text, cuts, ended, separator):
    raw = text.encode()
    places = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    pieces = [raw[a:b] for a, b in pairwise(places)]
    row = [*pieces, b"<eos>"] if ended or not pieces else pieces
    rollout = rollout_of_bytes(row)
    (steps,) = steps_of_rows(rollout, separator)
    numbers = [float(2**n) for n in range(len(steps))]
    scored = of_steps([numbers], rollout, [steps])
    (found,) = scored.scores.reshape(1, -1).tolist()
    assert sum(found) == sum(numbers)
    # The naive twin: read the text again after each token, until the step is there.
    expected = [0.0] * len(row)
    for index, (step, number) in enumerate(zip(steps, numbers, strict=True)):
        token = next(
            n
            for n in range(len(row))
            if n == len(row) - 1
            or (
                index < len(steps) - 1
                and b"".join(row[: n + 1]).startswith(text[: step.end].encode())
            )
        )
        expected[token] += number
    assert found == expected


# --- what is made of them -----------------------------------------------------------------------


def test_step_scores_beside_a_score_of_the_whole_with_kl_in_the_reward():
    rollout = rollout_of_bytes([b"a", b"\n\n", b"b"], [b"c", b"d"])
    both = WeightedSum([(FunctionScorer(one_to_n), 1.0), (lambda responses: [10.0, 20.0], 0.5)])
    scored = both(rollout)
    # Steps 1 and 2 of the first, half of 10 at its end; 1 and half of 20 at the second's.
    assert scored.scores.tolist() == [[0, 1, 7], [0, 11, 0]]
    assert scored.totals.tolist() == [8, 11]
    logprobs, reference = torch.tensor([[-1.0, -2, -3], [-1, -1, 0]]), torch.full((2, 3), -2.0)
    rewards, kl = token_rewards(
        logprobs, reference, scored.scores, rollout.response_mask, kl_coef=0.1
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 1.0, 7.1], [-0.1, 10.9, 0.0]]))
    torch.testing.assert_close(kl.sum(1), torch.tensor([0.0, -0.2]), atol=1e-6, rtol=0)


def test_gae_knows_when_a_step_was_paid_and_groups_take_the_sum():
    mask, ids = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 0])
    early, late = torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.tensor([[0, 0, 1.0], [0, 0, 0]])
    config = PPOConfig(gae_lambda=0.5, gamma=1.0)
    gae = ALGORITHMS["ppo"].estimate
    found = [gae(r, torch.zeros(2, 3), mask, None, config).advantages for r in (early, late)]
    # λ = .5 and V = 0: what is paid t tokens later counts λ^t.
    assert [each[0].tolist() for each in found] == [[1, 0, 0], [0.25, 0.5, 1]]
    grpo = ALGORITHMS["grpo"].estimate
    alike = [grpo(r, None, mask, ids, config).advantages for r in (early, late)]
    torch.testing.assert_close(*alike)  # a group is compared by sums
    assert (alike[0][0] > 0).all()


def test_moments_are_of_sums_and_clipping_of_tokens():
    scores = torch.tensor([[0.0, 2.0, 4.0], [1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    moments = RunningMoments()
    moments.update(totals(scores))  # 6 and 2: mean 4, σ = √8
    found = normalize_scores(scores, moments, center=True, scale=True, mask=mask)
    torch.testing.assert_close(totals(found), torch.tensor([2.0, -2.0]) / 8**0.5)
    clipped = normalize_scores(scores, moments, clip=1.5)
    assert clipped.tolist() == [[0, 1.5, 1.5], [1, 1, 0]]


def test_scored_of_steps_joins_and_is_checked():
    rollout = rollout_of_bytes([b"a", b"\n\n", b"b"])
    scored = FunctionScorer(one_to_n)(rollout)
    both = Scored.concat([scored, Scored(torch.ones(2))])
    assert both.totals.tolist() == [3, 1, 1]
    with pytest.raises(BadScores, match="3 for the 2 steps of row 0"):
        of_steps([[1, 2, 3]], rollout, steps_of_rows(rollout, "\n\n"))
