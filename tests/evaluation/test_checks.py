from dataclasses import replace

import pytest

from tests.evaluation.rollouts import make_rollout
from trl.evaluation import FormatScorer, JsonScorer, RegexScorer, ScoringError, score

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}


def found(scorer, texts, **columns):
    rollout = make_rollout(*[("q", text) for text in texts], lengths=[1] * len(texts))
    columns = {name: tuple(values) for name, values in columns.items()}
    return score(scorer, replace(rollout, columns=columns)).scores.tolist()


def test_json_fits_its_schema():
    texts = {
        '{"name": "Ada"}': 1,
        ' {"name": "Ada", "age": 36}\n': 1,
        'Here:\n```json\n{"name": "Ada"}\n```\nDone.': 1,
        "{}": 0,
        '{"name": "Ada", "age": true}': 0,
        '{"name": "Ada"} and more': 0,
        '{"name": "Ada", "name": "Eve"}': 0,
        '{"name": "Ada", "weight": NaN}': 0,
    }
    assert found(JsonScorer(PERSON, seconds=10), list(texts)) == list(texts.values())


def test_json_is_equal_to_the_column():
    texts = ['{"a": [1, 2]}', '{"a": [2, 1]}', "1.0", "true", '"x"']
    right = ['{"a": [1, 2]}', {"a": [1, 2]}, 1, 1, "x"]
    scorer = JsonScorer(key="right", seconds=10)
    assert found(scorer, texts, right=right) == [1, 0, 1, 0, 1]
    assert found(scorer, [scorer.right(value) for value in right], right=right) == [1] * 5


def test_json_fits_schema_and_column():
    scorer = JsonScorer(
        {"$defs": {"n": {"type": "number"}}, "$ref": "#/$defs/n"}, "right", seconds=10
    )
    assert found(scorer, ["1", '"x"', "2"], right=[1, "x", 1]) == [1, 0, 0]


def test_a_pattern_is_searched_for():
    assert found(RegexScorer(r"^yes\b", seconds=10), ["yes, it is", "oh yes"]) == [1, 0]
    scorer = RegexScorer(r"#### (-?[0-9]+)", key="n", seconds=10)
    assert found(scorer, ["#### 5\n#### 7", "#### 7 #### 5", "7"], n=[7, 7, 7]) == [1, 0, 0]


def test_a_pattern_that_never_ends_is_no_match():
    assert found(RegexScorer(r"^(a+)+$", seconds=1), ["a" * 50 + "b"]) == [0]


def test_parts_stand_in_their_order():
    texts = {
        "<think>hm</think>\n\n<answer>4</answer> ": 1,
        "<think>a\nb</think><answer>4</answer>": 1,
        "<think> </think><answer>4</answer>": 0,
        "<think>hm</think><answer>4</answer> so": 0,
        "so <think>hm</think><answer>4</answer>": 0,
        "<answer>4</answer><think>hm</think>": 0,
        "<think>hm<think></think><answer>4</answer>": 0,
        "<think>hm</think><answer>4": 0,
        "<answer>4</answer>": 0,
    }
    assert found(FormatScorer(), list(texts)) == list(texts.values())
    assert found(FormatScorer(["answer"]), ["<answer>4</answer>"]) == [1]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: JsonScorer(), "`schema` must be a JSON Schema as a dict, got None: or give `key`"),
        (lambda: JsonScorer({"type": "thing"}), "`schema` must be a JSON Schema, got 'thing' is"),
        (
            lambda: JsonScorer({"a": {1, 2}}),
            "`schema` must be a JSON Schema, got Object of type set",
        ),
        (lambda: RegexScorer("(a"), r"`pattern` must be a regular expression, got '\(a': missing"),
        (lambda: FormatScorer([]), "`tags` must be names that differ"),
        (lambda: FormatScorer(["a", "a"]), "`tags` must be names that differ, got"),
    ],
)
def test_what_cannot_work_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize("scorer", [JsonScorer(key="no"), RegexScorer("a", key="no")])
def test_a_column_that_is_not_there_is_named(scorer):
    with pytest.raises(ScoringError, match=r"must find the column 'no' .* got \['yes'\]"):
        found(scorer, ["a"], yes=["a"])
