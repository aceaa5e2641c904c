import asyncio
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import tiny_gpt2
from tests.evaluation.rollouts import make_rollout, without_texts
from trl import Sampler, starter
from trl.evaluation import (
    ClassifierScorer,
    EndpointScorer,
    FormatScorer,
    FunctionScorer,
    JsonScorer,
    LengthPenalty,
    MathScorer,
    RegexScorer,
    ScoringError,
    WeightedSum,
    score,
)
from trl.evaluation.scores import pairs_of, texts_of

NAN, INF = float("nan"), float("inf")
ROLLOUT = make_rollout(("a ", "red"), ("a ", "green"), ("the ", "blue"))  # 1, 2 and 3 tokens


def gives(found):
    def scorer(rollout):
        return found

    return scorer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_scores_become_float32_on_the_cpu(dtype):
    scores = score(gives(torch.tensor([1, 0, 1], dtype=dtype)), ROLLOUT).scores
    assert torch.equal(scores, torch.tensor([1.0, 0.0, 1.0]))
    assert scores.dtype == torch.float32


def test_what_a_scorer_gives_is_copied_and_leaves_its_graph():
    kept = torch.zeros(3, requires_grad=True)
    scores = score(gives(kept), ROLLOUT).scores
    scores += 1
    assert torch.equal(kept, torch.zeros(3))
    with torch.inference_mode():
        inferred = torch.ones(3)
    scores = score(gives(inferred), ROLLOUT).scores
    (torch.ones((), requires_grad=True) * scores).sum().backward()


def test_rewards_for_each_token_keep_their_places():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [2.0, 3.0, 0.0], [4.0, 5.0, 6.0]])
    assert torch.equal(score(gives(rewards), ROLLOUT).scores, rewards)


def test_a_scorer_may_be_async_and_return_a_list():
    async def scorer(rollout):
        return [1, 2.5, True]

    assert score(scorer, ROLLOUT).scores.tolist() == [1.0, 2.5, 1.0]


def test_the_texts_of_a_rollout():
    assert texts_of(ROLLOUT) == ["a red", "a green", "the blue"]
    assert pairs_of(ROLLOUT)[2] == ("the ", "blue")
    with pytest.raises(ScoringError, match=r"must have texts.*sample with Sampler\(tokenizer\)"):
        texts_of(without_texts(ROLLOUT))


@pytest.mark.parametrize(
    ("found", "message", "rows"),
    [
        (torch.zeros(2), r"real numbers of the shape \[3\].*got torch.float32 \[2\]", ()),
        (torch.zeros(3, 1), r"or \[3, 3\].*got torch.float32 \[3, 1\]", ()),
        (torch.zeros(3, dtype=torch.complex64), r"got torch.complex64 \[3\]", ()),
        (torch.tensor([0.0, NAN, 0.0]), "finite numbers, got nan for 1 of 3", (1,)),
        (torch.tensor([-INF, 0.0, NAN]), "finite numbers, got -inf for 2 of 3", (0, 2)),
        # too large for float32
        (torch.tensor([0.0, 0.0, 1e300], dtype=torch.float64), "finite numbers, got inf", (2,)),
        (
            torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]]),
            "0 where no token counts, got 0.5 at token 2 of row 1",
            (1,),
        ),
        (torch.ones(3, 3), "0 where no token counts, got 1.0 at token 1 of row 0", (0, 1)),
        ([1.0, 2.0], "one number for each of the 3 responses, got a list of 2", ()),
        (None, "one number for each of the 3 responses, got None, not a list", ()),
        ([1.0, None, "2"], r"each of the 3 responses, got '2': return numbers, as of float", (2,)),
    ],
)
def test_what_is_no_score_is_refused_and_the_texts_named(found, message, rows):
    with pytest.raises(ScoringError, match=f"^scorer must give .*{message}") as caught:
        score(gives(found), ROLLOUT)
    assert caught.value.rows == rows
    for row, text in enumerate(texts_of(ROLLOUT)):
        assert (f"row {row}: '{text}'" in str(caught.value)) == (row in rows)


def test_scores_whose_squares_are_infinite_are_refused():
    """Their variance is, and what is divided by it 0: nothing was learnt, silently."""
    with pytest.raises(ScoringError, match="must give numbers up to 1e.15.*, got 1e.20"):
        score(gives([0.0, 1e20, 0.0]), ROLLOUT)


def test_an_exception_is_the_cause_and_any_text_may_be_at_fault():
    def scorer(rollout):
        return [1 / 0]

    with pytest.raises(ScoringError) as caught:
        score(scorer, ROLLOUT)
    assert str(caught.value) == (
        "scorer raised ZeroDivisionError: division by zero (test_scores.py, line "
        f"{scorer.__code__.co_firstlineno + 1}, in scorer). Which text is at fault is unknown; it "
        "was one of row 0: 'a red', row 1: 'a green', row 2: 'the blue'."
    )
    assert caught.value.rows == (0, 1, 2)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_interruption_is_no_failure_of_the_scorer():
    def scorer(rollout):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(scorer, ROLLOUT)


def test_three_texts_are_shown_without_their_middle():
    rollout = make_rollout(*((f"prompt {row} " + "x" * 99, "y" * 99 + " end") for row in range(5)))
    with pytest.raises(ScoringError) as caught:
        score(gives(torch.full((5,), NAN)), rollout)
    # 40 characters of each end: "prompt 0 " has 9, " end" has 4
    shown = ", ".join(f"row {row}: 'prompt {row} {'x' * 31} … {'y' * 36} end'" for row in range(3))
    assert str(caught.value).endswith(f"At fault: {shown}, and 2 more.")
    assert caught.value.rows == (0, 1, 2, 3, 4)


def test_without_texts_the_tokens_are_shown():
    found = torch.tensor([0.0, NAN, 0.0])
    with pytest.raises(ScoringError, match=r"At fault: row 1: tokens \[10, 11\]\.$"):
        score(gives(found), without_texts(ROLLOUT))


def test_the_error_travels_between_processes():
    with pytest.raises(ScoringError) as caught:
        score(gives(torch.tensor([NAN, 0.0, 0.0])), ROLLOUT)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.rows == (0,)


@pytest.mark.parametrize("kind", [StopIteration, asyncio.CancelledError, GeneratorExit])
def test_whatever_ends_a_scorer_is_named(kind):
    def scorer(rollout):
        raise kind

    with pytest.raises(ScoringError if kind is not GeneratorExit else kind) as caught:
        score(scorer, ROLLOUT)
    if kind is not GeneratorExit:  # that is for generators, no failure
        assert f"scorer raised {kind.__name__} (test_scores.py, line " in str(caught.value)
        assert isinstance(caught.value.__cause__, kind)


def test_a_column_of_scores_says_how_to_make_it_flat():
    with pytest.raises(ScoringError, match=r"got torch.float32 \[3, 1\]: use scores.squeeze\(-1\)"):
        score(gives(torch.zeros(3, 1)), ROLLOUT)
    # A list of lists of one says no less: it is one number for each response.
    assert score(gives([[0.0], [1.0], [2.0]]), ROLLOUT).scores.tolist() == [0.0, 1.0, 2.0]


def test_texts_that_stand_apart_are_read_and_shown_with_a_space():
    rollout = replace(make_rollout(("w3 w4", "w31 w17"), ("a", "b")), texts_apart=True)
    assert texts_of(rollout) == ["w3 w4 w31 w17", "a b"]
    assert pairs_of(rollout)[0] == ("w3 w4", "w31 w17")
    with pytest.raises(ScoringError, match="row 0: 'w3 w4 w31 w17'"):
        score(gives([NAN, 0.0]), rollout)


# --- a scorer reads, and does not write ---------------------------------------------------------


def cuts_the_mask(rollout):
    rollout.response_mask[:, 1:] = False
    return [0.0] * len(rollout)


def writes_by_numpy(rollout):
    rollout.responses.numpy()[0, 0] = 3
    return [0.0] * len(rollout)


def writes_into_the_data(rollout):
    rollout.values.data.zero_()
    return [0.0] * len(rollout)


def writes_numbers_by_numpy(rollout):
    rollout.values.numpy()[0, 0] = 3
    return [0.0] * len(rollout)


def puts_another_field_there(rollout):
    object.__setattr__(rollout, "group_ids", torch.tensor([0, 0]))
    return [0.0] * len(rollout)


def writes_into_a_large_array(rollout):
    for image in rollout.columns["images"]:
        image[1000] = 7
    return [0.0] * len(rollout)


def scales_values(rollout):
    rollout.values.mul_(2)
    return [0.0] * len(rollout)


def answers_in_the_chat(rollout):
    rollout.query_messages[0].append({"role": "assistant", "content": "no"})
    return [0.0] * len(rollout)


async def sorts_a_column(rollout):
    rollout.columns["answers"][1].sort()
    return [0.0] * len(rollout)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("scorer", "field"),
    [
        (cuts_the_mask, "response_mask"),
        (writes_by_numpy, "responses"),
        (scales_values, "values"),
        (answers_in_the_chat, "query_messages"),
        (sorts_a_column, "columns"),
        (writes_into_the_data, "values"),
        (writes_numbers_by_numpy, "values"),
        (puts_another_field_there, "group_ids"),
        (writes_into_a_large_array, "columns"),
    ],
)
def test_a_scorer_that_writes_into_its_rollout_is_named(scorer, field, wrapped):
    rollout = make_rollout(("a", "b"), ("c", "d"), lengths=[3, 2])
    rollout = replace(
        rollout,
        values=torch.ones(2, 3) * rollout.response_mask,
        query_messages=([{"role": "user", "content": "a"}], [{"role": "user", "content": "c"}]),
        columns={"answers": ([2, 1], [2, 1]), "images": (np.zeros(2000), torch.zeros(2000))},
    )
    name = scorer.__name__
    with pytest.raises(ScoringError, match=f"^{name} must leave the rollout .* its {field}: chang"):
        score(WeightedSum([(scorer, 1.0)]) if wrapped else scorer, rollout)


def test_a_scorer_of_an_inference_rollout_is_taken():
    with torch.inference_mode():
        rollout = make_rollout(("a", "b"), ("c", "d"))
    assert score(lambda rollout: [1.0, 2.0], rollout).scores.tolist() == [1.0, 2.0]


# --- halves of characters -----------------------------------------------------------------------

HALF = "a film \ud83d"


def test_half_a_surrogate_pair_is_refused_by_name():
    message = r"`{}` must be valid Unicode, got 'a film \\ud83d': use text.encode"
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    sampler = Sampler(tokenizer, max_new_tokens=2)
    policy = tiny_gpt2()
    with pytest.raises(ValueError, match=message.format(r"queries\[1\]")):
        sampler(policy, ["whole", HALF])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=message.format(r"queries\[0\]")):
        sampler(policy, [[{"role": "user", "content": HALF}]])
    with pytest.raises(ValueError, match=message.format(r"stop_strings\[0\]")):
        Sampler(tokenizer, stop_strings=[HALF])
    rollout = make_rollout(("a", "b"), (HALF, ""))
    classifier = ClassifierScorer(starter.CLASSIFIER)
    with pytest.raises(ValueError, match=message.format(r"texts\[1\]")):
        classifier(["whole", HALF])
    for scorer in (classifier, EndpointScorer("http://localhost:1")):
        with pytest.raises(ScoringError, match=message.format(r"texts\[1\]")):
            score(scorer, rollout)
    assert score(lambda rollout: [1.0, 2.0], rollout).scores.tolist() == [1.0, 2.0]


SCHEMA = {"type": "object", "required": ["name"]}
JSON = ['{"name": "Ann"}', "Ann"]


def answers_right(completions, answer):
    return [float(right in text) for text, right in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(
    ("scorer", "texts", "columns"),
    [
        (JsonScorer(SCHEMA), JSON, {}),
        (FormatScorer(["a"]), ["<a>b</a>", "b"], {}),
        (RegexScorer("[0-9]+", "answer"), ["It is 42", "It is 4"], {"answer": ["42", "5"]}),
        (MathScorer(), [("6 · 7?", "42"), ("2 + 2?", "5")], {"answer": [42, 4]}),
        (FunctionScorer(answers_right), ["It is 42", "no"], {"answer": ("42", "5")}),
        (WeightedSum([JsonScorer(SCHEMA), LengthPenalty(8, 4)]), JSON, {}),  # which has no say
    ],
)
def test_scorers_can_be_tried_by_hand(scorer, texts, columns):
    assert scorer(texts, **columns).scores.tolist() == [1.0, 0.0]
    assert score(scorer, texts, **columns).totals.tolist() == [1.0, 0.0]


def test_by_hand_a_query_may_be_a_chat():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    seen = []

    def reward(prompts, completions, texts):
        seen.extend(zip(prompts, completions, texts, strict=True))
        return [0.0] * len(texts)

    FunctionScorer(reward)([(chat, "Hi."), ("Who?", "I.")])
    assert seen == [
        (chat, [{"role": "assistant", "content": "Hi."}], "Be brief.\n\nHello?\n\nHi."),
        (
            [{"role": "user", "content": "Who?"}],
            [{"role": "assistant", "content": "I."}],
            "Who?\n\nI.",
        ),
    ]


@pytest.mark.parametrize(
    ("scorer", "given", "columns", "message"),
    [
        (JsonScorer(SCHEMA), "{}", {}, r"`responses` must be texts, .*got '{}': scorer\(\[text\]"),
        (JsonScorer(SCHEMA), [], {}, "`responses` must be texts"),
        (JsonScorer(SCHEMA), [("a", "b", "c")], {}, "`responses` must be texts"),
        (MathScorer(), ["42"], {}, r"column 'answer'.*by hand: texts, answer=\[…\]"),
        (MathScorer(), ["42"], {"answer": "42"}, "`answer` must be a list of 1 values.*got '42'"),
        (MathScorer(), ["42"], {"answer": [1, 2]}, "`answer` must be a list of 1 values"),
        (MathScorer(), ROLLOUT, {"answer": [1] * 3}, "`columns` must be left out beside a rollout"),
        (FunctionScorer(answers_right), ["42"], {}, r"by hand: texts, answer=\[...\]"),
        (FunctionScorer(len, on="tokens"), ["42"], {}, "must have tokens.*was made of texts"),
        (FunctionScorer(lambda completion_ids: [0.0]), ["42"], {}, "must have tokens"),
    ],
)
def test_what_cannot_be_scored_by_hand_is_refused_in_words(scorer, given, columns, message):
    with pytest.raises((TypeError, ValueError, ScoringError), match=message):
        scorer(given, **columns)


def test_async_parts_of_a_sum_are_waited_for_together():
    met = []

    async def one(texts):
        met.append(asyncio.get_running_loop())
        for _ in range(50):  # until the other one has begun
            if len(met) < 2:
                await asyncio.sleep(0)
        return [float(len(met) == 2)] * len(texts)

    async def two(rollout):
        return await one(rollout.texts)

    scored = WeightedSum([one, two, JsonScorer(SCHEMA)])(ROLLOUT)
    assert scored.parts["one"].tolist() == scored.parts["two"].tolist() == [1.0] * 3
    assert list(scored.parts) == ["one", "two", "json"]
    assert met[0] is met[1]


def test_of_async_parts_the_one_that_fails_is_named_and_none_goes_on():
    ended = []

    async def waits(texts):
        try:
            await asyncio.sleep(600)
        finally:
            ended.append("waits")

    async def breaks(texts):
        raise KeyError("score")

    def breaks_at_once(texts):
        raise KeyError("score")

    async def writes(rollout):
        rollout.responses[0, 0] = 7
        return [0.0] * len(rollout)

    with pytest.raises(ScoringError, match="^breaks raised KeyError"):
        WeightedSum([waits, breaks])(ROLLOUT)
    assert ended == ["waits"]
    with pytest.raises(ScoringError, match="^breaks_at_once raised KeyError"):
        WeightedSum([waits, breaks_at_once])(ROLLOUT)  # before the other has begun
    with pytest.raises(ScoringError, match="^writes must leave the rollout as it is"):
        WeightedSum([writes])(make_rollout(("a ", "red")))


def test_a_function_scorer_with_a_call_of_its_own_is_called():
    class Doubled(FunctionScorer):
        def __call__(self, rollout):
            return 2 * super().__call__(rollout).scores

    assert score(Doubled(lambda texts: [1.0] * 3), ROLLOUT).scores.tolist() == [2.0] * 3
