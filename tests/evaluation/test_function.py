import asyncio
import dataclasses
import functools
import json
import re
from datetime import date
from pathlib import Path

import numpy
import pytest
import torch

import trl
from tests.evaluation.rollouts import make_rollout, without_texts
from trl import PPOConfig, starter
from trl.batch import Rollout
from trl.compute.precision import make_accelerator
from trl.config.recipe import DataConfig, Recipe, RewardConfig, SamplingConfig
from trl.evaluation import FunctionScorer, ScoringError, as_scorer, score
from trl.training.fingerprints import checksum
from trl.training.parts import Parts

NAN = float("nan")
NOT_A_LIST = "not a list: a reward is called once for all responses, and returns a list of"
ROLLOUT = make_rollout(("a ", "red"), ("a ", "green"), ("the ", "blue"))  # 1, 2 and 3 tokens


def lengths(texts):
    return [len(text) for text in texts]


def test_what_the_function_sees():
    seen = []

    def reward(batch):
        seen.append(batch)
        return [0.0] * len(batch)

    rollout = make_rollout(("a ", "red"), ("the ", "blue"), lengths=[2, 4], holes=[(1, 1), (1, 2)])
    for on in ("texts", "pairs", "tokens"):
        FunctionScorer(reward, on=on)(rollout)
    assert seen == [
        ["a red", "the blue"],
        [("a ", "red"), ("the ", "blue")],
        [[10, 11], [10, 13]],  # the tokens that the policy did not write are left out
    ]


@pytest.mark.parametrize(
    "kind", [list, tuple, numpy.array, torch.tensor, iter, lambda x: [torch.tensor(v) for v in x]]
)
def test_one_number_for_each_response(kind):
    scores = FunctionScorer(lambda texts: kind([0.5, -1.0, 2.0]))(ROLLOUT).scores
    assert torch.equal(scores, torch.tensor([0.5, -1.0, 2.0]))
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("kind", [list, numpy.array, torch.tensor])
def test_one_reward_for_each_counted_token(kind):
    rollout = make_rollout(("q", "r"), ("q", "s"), lengths=[2, 4], holes=[(1, 1)])
    found = FunctionScorer(lambda tokens: [kind([1.0, 2.0]), kind([3.0, 4.0, 5.0])], on="tokens")
    expected = [[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 4.0, 5.0]]  # 0 at padding and at the hole
    assert found(rollout).scores.tolist() == expected


def test_tokens_need_no_texts():
    scorer = FunctionScorer(lengths, on="tokens")
    assert scorer(without_texts(ROLLOUT)).scores.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ScoringError, match="the rollout must have texts"):
        FunctionScorer(lengths)(without_texts(ROLLOUT))


class AsyncObject:
    async def __call__(self, texts):
        await asyncio.sleep(0)
        return lengths(texts)


async def in_parallel(texts, extra=0):
    async def one(text):
        await asyncio.sleep(0)
        return len(text) + extra

    return await asyncio.gather(*map(one, texts))


@pytest.mark.parametrize(
    "function",
    [in_parallel, functools.partial(in_parallel, extra=0), AsyncObject(), lambda t: in_parallel(t)],
)
def test_async_functions(function):
    scorer = FunctionScorer(function)
    assert scorer(ROLLOUT).scores.tolist() == [5.0, 7.0, 8.0]

    async def notebook():  # where an event loop is running already
        return scorer(ROLLOUT)

    assert asyncio.run(notebook()).scores.tolist() == [5.0, 7.0, 8.0]


async def fails_late(texts):
    await asyncio.sleep(0)
    raise TimeoutError


def fails(texts):
    raise KeyError("score")


def fails_deep(texts):
    return (lambda text: json.loads(text))(texts[0])  # the standard library raises


@pytest.mark.parametrize(
    ("function", "cause", "message"),
    [
        (
            fails,
            KeyError,
            r"^fails raised KeyError: 'score' \(test_function.py, line \d+, in fails\)\. Which",
        ),
        (
            fails_late,
            TimeoutError,
            r"^fails_late raised TimeoutError \(test_function.py, line \d+, in fails_late\)\.",
        ),
        (fails_deep, ValueError, r"\(test_function.py, line \d+, in <lambda>\)\. Which text"),
    ],
)
def test_a_function_that_raises_is_named_with_its_texts(function, cause, message):
    with pytest.raises(ScoringError, match=message) as caught:
        FunctionScorer(function)(ROLLOUT)
    assert isinstance(caught.value.__cause__, cause)
    assert "row 0: 'a red', row 1: 'a green', row 2: 'the blue'" in str(caught.value)


@pytest.mark.parametrize(
    ("found", "message", "rows"),
    [
        ([1.0, 2.0], "each of the 3 responses, got a list of 2.$", ()),
        ([], "each of the 3 responses, got a list of 0.$", ()),
        (1.0, f"got the number 1.0, {NOT_A_LIST}", ()),
        (numpy.array(1.0), f"got the number 1.0, {NOT_A_LIST}", ()),
        (torch.tensor(1.0), r"got torch.float32 \[\]", ()),
        ({"a": 1, "b": 2, "c": 3}, "each of the 3 responses, got {'a': 1", ()),
        ({1.0, 2.0, 3.0}, "each of the 3 responses, got {1.0", ()),
        ("123", "each of the 3 responses, got '123', not a list", ()),
        ([1.0, "2", 3.0], "each of the 3 responses, got '2'", (1,)),
        ([{"score": 1.0}] * 3, "each of the 3 responses, got {'score': 1.0}", (0, 1, 2)),
        ([1.0, 2j, 3.0], "each of the 3 responses, got 2j", (1,)),
        ([1.0, NAN, NAN], "finite numbers, got nan for 2 of 3 responses", (1, 2)),
        ([[1.0], [2.0, NAN], [3.0] * 3], "finite numbers, got nan for 1 of 3", (1,)),
        ([1.0, [2.0, 3.0], 4.0], "got both: lists for 1 of 3", (1,)),
        ([[1.0], [2.0], [3.0] * 3], "got a list of 1 for row 1, which has 2 tokens", (1,)),
        ([[1.0], [2.0, [3.0]], [4.0] * 3], r"got \[2.0, \[3.0\]\]", (1,)),
    ],
)
def test_what_is_no_score_is_refused_and_the_texts_named(found, message, rows):
    def reward(texts):
        return found

    with pytest.raises(ScoringError, match=f"^reward must give .*{message}") as caught:
        FunctionScorer(reward)(ROLLOUT)
    assert caught.value.rows == rows
    for row, text in enumerate(["a red", "a green", "the blue"]):
        assert (f"row {row}: '{text}'" in str(caught.value)) == (row in rows)


def one_pair(query, response):
    return [0.0]


class Scores:
    def one(self, texts, *, scale=1.0):
        return [scale] * len(texts)

    def two(self, query, response):
        return [0.0]


@pytest.mark.parametrize(
    "function", [lambda a, b, /: [], lambda *, texts: [], lambda: [], Scores.one, Scores.two]
)
def test_a_function_that_cannot_take_a_list_is_refused(function):
    with pytest.raises(TypeError, match=r"it gets one list of texts, and columns by .* names"):
        FunctionScorer(function)
    with pytest.raises(TypeError, match=r"it gets one list of \(query, response\) pairs, and"):
        FunctionScorer(function, on="pairs")


@pytest.mark.parametrize("function", [one_pair, Scores().two])
def test_a_function_of_one_pair_is_told_of_the_names_of_the_batch(function):
    with pytest.raises(ScoringError, match=r"asks for `response`, .*Did you mean `responses`\?"):
        FunctionScorer(function)(ROLLOUT)


@pytest.mark.parametrize(
    "function",
    [
        Scores().one,
        functools.partial(one_pair, "a"),
        lambda *texts: [0.0],
        lambda texts, scale=1.0, **more: [0.0],
        max,  # tells no signature
        torch.as_tensor,
    ],
)
def test_a_function_that_can_take_one_list_is_not(function):
    FunctionScorer(function)


COLUMNS = {"answer": ("red", "red", "blue"), "level": (1, 2, 3)}
WITH_COLUMNS = dataclasses.replace(ROLLOUT, columns=COLUMNS)


def by_parameter(texts, answer):
    assert texts == ["a red", "a green", "the blue"]
    return [float(a in text) for text, a in zip(texts, answer, strict=True)]


def as_in_trl(completions, answer, **kwargs):
    assert kwargs == {"level": [1, 2, 3]}
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def prompts_first(prompts, completions, *, answer, level=None, other="none"):
    assert (prompts, level, other) == (["a ", "a ", "the "], [1, 2, 3], "none")
    return as_in_trl(completions, answer, level=level)


async def later(pairs, answer):
    return [float(response == a) for (_, response), a in zip(pairs, answer, strict=True)]


@pytest.mark.parametrize(
    ("function", "on"),
    [(by_parameter, "texts"), (as_in_trl, "texts"), (prompts_first, "texts"), (later, "pairs")],
)
def test_columns_by_the_names_of_parameters(function, on):
    assert FunctionScorer(function, on=on)(WITH_COLUMNS).scores.tolist() == [1.0, 0.0, 1.0]


CHATS = (
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A colour?"}],
    [{"role": "user", "content": [{"type": "text", "text": "Sky?"}, {"type": "image"}]}],
    [{"role": "user", "content": "Grass?"}, {"role": "assistant", "content": "It is "}],
)
OF_CHATS = dataclasses.replace(
    make_rollout(("<|user|>A colour?", "red"), ("<|user|>Sky?", "blue"), ("<|user|>", "green")),
    query_messages=CHATS,
    columns=COLUMNS,
)


def test_a_chat_is_read_as_what_its_messages_say():
    texts = ["Be brief.\n\nA colour?\n\nred", "Sky?\n\nblue", "Grass?\n\nIt is green"]
    queries = ["Be brief.\n\nA colour?", "Sky?", "Grass?\n\nIt is "]
    responses = ["red", "blue", "green"]
    seen = {}

    def keep(**lists):
        seen.update(lists)
        return [1.0] * 3

    as_scorer(lambda whatever: keep(whatever=whatever))(OF_CHATS)
    as_scorer(lambda texts: keep(texts=texts))(OF_CHATS)
    as_scorer(lambda queries, responses: keep(queries=queries, responses=responses))(OF_CHATS)
    FunctionScorer(lambda batch: keep(batch=batch), on="pairs")(OF_CHATS)
    pairs = list(zip(queries, responses, strict=True))
    assert seen == {"whatever": texts, "texts": texts, "batch": pairs} | {
        "queries": queries,
        "responses": responses,
    }


# -- reward functions as TRL documents them --------------------------------------------------------


def by_length(completion_ids, **kwargs):
    return [-float(len(ids)) for ids in completion_ids]


def by_format(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.fullmatch("r.*|b.*", content) else 0.0 for content in contents]


def by_answer(prompts, completions, answer, **kwargs):
    assert [prompt[-1]["role"] for prompt in prompts] == ["user", "user", "assistant"]
    matches = [re.search("[a-z]+", completion[0]["content"]) for completion in completions]
    return [float(match[0] == right) for match, right in zip(matches, answer, strict=True)]


def with_logs(completions, log_metric, log_extra, level, **kwargs):
    log_metric("level", sum(level) / 3)
    log_extra("words", [len(completion) for completion in completions])
    return [0.5] * 3


def by_boxed(completions, answer, **kwargs):
    found = [re.search(r"(r\w+)$", completion[0]["content"]) for completion in completions]
    said = [match.group(1) if match else "" for match in found]
    return [1.0 if one == other else 0.0 for one, other in zip(said, answer, strict=True)]


def by_task(prompts, completions, level, **kwargs):
    rows = zip(prompts, completions, level, strict=True)
    return [float(len(completion)) if task == 2 else None for _, completion, task in rows]


def with_notes(completions, log_extra=None, **_):
    if log_extra:
        log_extra("said", [completion[0]["content"] for completion in completions])
        log_extra("graded", [1, None, 0])
    return [0.5] * 3


def as_pages_of_trl_call_it(completions_ids, **kwargs):
    return by_length(completions_ids)


async def later_of_trl(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return by_format(completions)


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        (by_length, [-1.0, -2.0, -3.0]),
        (by_format, [1.0, 1.0, 0.0]),
        (by_answer, [1.0, 0.0, 0.0]),
        (with_logs, [0.5, 0.5, 0.5]),
        (later_of_trl, [1.0, 1.0, 0.0]),
        (by_boxed, [1.0, 0.0, 0.0]),
        (by_task, [0.0, 1.0, 0.0]),
        (with_notes, [0.5, 0.5, 0.5]),
        (as_pages_of_trl_call_it, [-1.0, -2.0, -3.0]),
    ],
)
def test_reward_functions_of_trl_run_as_they_are(function, scores):
    found = score(as_scorer(function), OF_CHATS)
    assert found.scores.tolist() == scores
    means = {with_logs: {"level": 2.0, "words": 1.0}, with_notes: {"graded": 0.5}}
    assert found.means() == means.get(function, {})
    assert found.notes == ({"said": ("red", "blue", "green")} if function is with_notes else {})
    assert (found.counted is None) == (function is not by_task)


def test_what_is_logged_has_an_entry_for_each_response():
    def reward(texts, log_extra):
        log_extra("notes", ["a", "b"])
        return [0.0] * len(texts)

    with pytest.raises(ScoringError, match="^reward must give one number for each of the 3.*of 2"):
        score(as_scorer(reward), ROLLOUT)


def test_what_trl_gives_and_we_do_not_is_named_with_what_we_give():
    def reward(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    with pytest.raises(ScoringError, match="asks for `trainer_state`.*columns.*, log_metric"):
        score(as_scorer(reward), ROLLOUT)


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (lambda answer, completions: answer, ["red", "red", "blue"]),  # in any order
        (lambda texts, answer: texts, ["a red", "a green", "the blue"]),
        (lambda whatever, answer: whatever, ["a red", "a green", "the blue"]),
        (lambda rollout, answer: rollout.texts, ["a red", "a green", "the blue"]),
        (lambda answer, responses=None: responses, ["red", "green", "blue"]),
    ],
)
def test_a_first_parameter_gets_what_its_name_says(function, first):
    seen = []

    @functools.wraps(function)
    def reward(*lists, **named):
        seen.extend(function(*lists, **named))
        return [0.0] * 3

    score(as_scorer(reward), WITH_COLUMNS)
    assert seen == first


def test_a_name_of_ours_goes_over_a_column():
    rollout = dataclasses.replace(ROLLOUT, columns={"responses": ("1", "2", "3")})
    scorer = as_scorer(lambda texts, responses: [float(r == "red") for r in responses])
    with pytest.warns(UserWarning, match="under the name `responses`, not the column"):
        assert score(scorer, rollout).scores.tolist() == [1.0, 0.0, 0.0]


def test_on_goes_over_the_name_of_the_first_parameter():
    scorer = FunctionScorer(lambda completions: [len(pair) for pair in completions], on="pairs")
    assert scorer(ROLLOUT).scores.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("rollout", "there"), [(WITH_COLUMNS, "the columns answer, level:"), (ROLLOUT, "no columns:")]
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(rollout, there):
    def reward(texts, solution):
        return [0.0] * len(texts)

    with pytest.raises(ScoringError, match=f"^reward asks for `solution`.*with {there}"):
        score(as_scorer(reward), rollout)


def test_a_run_gives_the_reward_the_columns_of_its_rows():
    rows = [{"prompt": f"{n} It was", "answer": n, "at": date(2020, 1, 1)} for n in range(8)]
    seen = []

    def right(prompts, answer):
        seen.extend(zip(prompts, answer, strict=True))
        return [0.0] * len(prompts)

    settings = {"batch_size": 4, "ppo_epochs": 1, "max_new_tokens": 2, "steps": 2}
    trl.train(starter.LANGUAGE_MODEL, rows, right, **settings)
    assert sorted(seen) == [(f"{n} It was", n) for n in range(8)]
    # A checkpoint says which prompts it is of, whatever their columns hold.
    assert checksum(rows) != checksum([row | {"answer": "other"} for row in rows])


def test_a_recipe_gives_the_reward_the_columns_of_a_file(tmp_path):
    rows = [{"answer": n, "text": f"{n} It was", "level": [n, None]} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(
        "def right(texts, answer, **others):\n"
        "    rows = zip(texts, answer, others['level'], strict=True)\n"
        "    assert all(a == int(text.split()[1]) == level[0] for text, a, level in rows)\n"
        "    return answer\n"
    )
    recipe = Recipe(
        data=DataConfig(prompts=str(tmp_path / "rows.jsonl"), held_out=1, prefixes=("a ", "b ")),
        sampling=SamplingConfig(max_new_tokens=2),
        reward=(RewardConfig(kind="function", name=f"{tmp_path}/mine.py:right"),),
        ppo=PPOConfig(batch_size=16, ppo_epochs=1),
        steps=1,
    )
    parts = Parts.of_recipe(recipe, make_accelerator("fp32"))
    assert all(type(prompt) is str for prompt in parts.prompts.train)
    answers = [sample["reward"] for sample in parts.held_out.measure()[0]]
    answers += [parts.loop.step()["reward/mean"] * 16 / 2]
    assert sum(answers) == sum(range(9)) + answers[0]  # the one held out has two prefixes


def test_a_name_of_choice():
    with pytest.raises(ScoringError, match="^brevity raised"):
        FunctionScorer(fails, name="brevity")(ROLLOUT)


def test_bad_settings():
    with pytest.raises(ValueError, match="`on` must be one of .*got 'text'"):
        FunctionScorer(lengths, on="text")
    with pytest.raises(TypeError, match="`function` must be callable, got list"):
        FunctionScorer([1.0])


def test_a_function_of_texts_becomes_a_scorer():
    assert as_scorer(lengths)(ROLLOUT).scores.tolist() == [5.0, 7.0, 8.0]
    assert as_scorer(len).function is len  # which tells no name of its parameter that we know


class Typed:
    def __call__(self, batch: Rollout):
        return torch.zeros(len(batch))


def by_name(rollout):
    return torch.zeros(len(rollout))


@pytest.mark.parametrize("scorer", [FunctionScorer(lengths), Typed(), by_name])
def test_a_scorer_stays_as_it_is(scorer):
    assert as_scorer(scorer) is scorer


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("lvwerra/distilbert-imdb", r"got 'lvwerra/distilbert-imdb'.*ClassifierScorer\(model"),
        (Path("folder"), r"got PosixPath\('folder'\): pass .*RewardModelScorer\(model"),
        (None, "must be a scorer or a function, got None"),
        (torch.nn.Linear(1, 1), "got Linear.*: pass a function of a list"),
        (Typed, "got <class .*Typed"),
    ],
)
def test_what_does_not_say_how_to_score_is_refused(reward, message):
    with pytest.raises(TypeError, match=message):
        as_scorer(reward)


def test_a_function_of_one_text_is_told_that_it_gets_all():
    def one(text):
        return float(text.startswith("I"))

    with pytest.raises(
        ScoringError, match=r"'startswith'.*with the list of all texts, and"
    ) as found:
        score(as_scorer(one), ROLLOUT)
    assert "at fault" not in str(found.value)
