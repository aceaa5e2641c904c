import json

import pytest

from trl.cli import main
from trl.config import SettingsError
from trl.config.recipe import RewardConfig
from trl.evaluation import cells
from trl.training.named import load_scorer
from trl.training.validation import problems_of

ROWS = [
    {
        "prompt": "12 + 30?",
        "answer": "42",
        "code": "def f(x): return x + 1",
        "tests": "assert f(1) == 2",
    },
    {
        "prompt": "1 / 2?",
        "answer": "0.5",
        "code": "def f(x): return x + 2",
        "tests": "assert f(1) == 3",
    },
    {
        "prompt": "2 / 4?",
        "answer": "1/2",
        "code": "def f(x): return x + 3",
        "tests": "assert f(1) == 4",
    },
]


@pytest.fixture(autouse=True, scope="module")
def shut_in():
    with cells.warden() as one:
        missing = one.missing
    if missing:
        pytest.skip(f"here answers are not kept from {', '.join(missing)}")


def columns(rows=ROWS):
    return {name: [row[name] for row in rows] for name in rows[0]}


def scorer(kind, **arguments):
    _, judge = load_scorer([RewardConfig(kind=kind, arguments=arguments)])
    return judge.parts[kind][0]


def test_right_answers_score_and_those_of_other_rows_do_not():
    # That 1/2 is 0.5 makes neither a wrong one: another row is.
    assert problems_of(scorer("math", seconds=10.0), columns()) == []
    assert problems_of(scorer("code", seconds=10.0), columns(), "code") == []
    assert problems_of(scorer("json", schema={}, seconds=10.0), columns(), "answer") == [
        "json: 1 right answers do not score 1: row 3: '1/2'."
    ]


def test_a_reward_that_anything_gets_is_found():
    always = [{**row, "tests": "assert True"} for row in ROWS]
    (told,) = problems_of(scorer("code", seconds=10.0), columns(always), "code")
    assert told.startswith("code: 3 wrong answers do not score 0: row 1: 'def f(x): return x + ")


def test_where_all_answers_are_the_same_none_is_wrong():
    same = [ROWS[0], ROWS[0]]
    assert problems_of(scorer("math"), columns(same)) == [
        "math: all right answers are the same, there is no wrong one to try."
    ]


def test_the_command_tells_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["score", str(path), "--validate"]
    assert main([*command, "--reward", "[{kind: math}]"]) == 0
    assert capsys.readouterr().out == "3 right answers score 1, and those of other rows 0.\n"
    assert main([*command, "code", "--reward", "[{kind: math}]"]) == 1
    assert "math: 3 right answers do not score 1: row 1: 'def f(x)" in capsys.readouterr().out
    assert main([*command, "--reward", "[{kind: code}]"]) == 2
    assert "`--validate` must name the column with right answers" in capsys.readouterr().err
    assert main([*command, "--reward", "[{kind: repetition}]"]) == 2
    assert "have a kind that checks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        ("math", {"kee": "a"}, "must be arguments of MathScorer: got an unexpected .* 'kee'"),
        ("length", {}, "must be arguments of LengthPenalty: missing .* 'max_tokens'"),
        ("json", {"schema": {"type": "x"}}, "arguments.schema` must be a JSON Schema"),
        ("code", {"allow_unisolated": True}, "add --allow-unisolated to the command"),
        ("math", {"seconds": -1}, "arguments.seconds` must be a finite number > 0, got -1"),
    ],
)
def test_arguments_in_a_recipe_are_checked(kind, arguments, told):
    with pytest.raises(SettingsError, match=told):
        scorer(kind, **arguments)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "math", "name": "x"}, "`name` must be left out for kind 'math', got 'x'"),
        ({"arguments": {"a": 1}}, "`arguments` must be left out for kind 'classifier'"),
    ],
)
def test_arguments_belong_to_the_kinds_that_check(settings, told):
    with pytest.raises(SettingsError, match=told):
        RewardConfig(**settings)


def test_who_reads_a_recipe_may_let_code_run_without_a_world_of_its_own(monkeypatch):
    class Bare(cells.Warden):
        def __init__(self, modules, isolated=True):
            super().__init__(modules, isolated=False)

    cells.end_all()
    monkeypatch.setattr(cells, "Warden", Bare)
    rewards = [RewardConfig(kind="code")]
    with pytest.raises(SettingsError, match=r"be true where code is not .* \(--allow-unisolated\)"):
        load_scorer(rewards)
    with pytest.warns(UserWarning, match="not kept from other processes"):
        load_scorer(rewards, ["--allow-unisolated"])
    cells.end_all()
