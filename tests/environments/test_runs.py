"""Environments in recipes and runs: trusted, saved, gone on with."""

import io
import json
from pathlib import Path

import pytest
import yaml

from trl import cli, starter
from trl.training import run

GAME = '''
import random

from trl.environments import Turn


class Game:
    """Says a number; a text with an "e" is a hit."""

    def reset(self, seed=None):
        self.left, self.number = 2, random.random()
        return f"The film number {int(self.number * 90)} was"

    def step(self, text: str) -> Turn:
        self.left -= 1
        return Turn(" and", reward=float("e" in text), done=self.left == 0)


def look_up(word: str) -> str:
    """Look a word up.

    Args:
        word: Of a film.
    """
    return word.upper()


def the(word: str) -> str:
    """Say what is behind it.

    Args:
        word: Behind it.
    """
    return f" <{word}> "


def turns(completions):
    return [float(len(messages)) for messages in completions]
'''
SMALL = {
    "environment": {"class": "game.py:Game", "max_turns": 3, "max_tokens": 40},
    "data": {"prompts": "environment", "held_out": 3, "limit": 8},
    "sampling": {"max_new_tokens": 4},
    "ppo": {"batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1, "precision": "fp32"},
    "steps": 3,
    "checkpoints": {"every": 1, "best": None},
    "quiet": True,
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Pictures take seconds, and have tests of their own."""
    monkeypatch.setattr(run, "write_report", lambda runs, out: out / "report.html")


def written(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "game.py").write_text(GAME)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SMALL | {"out": str(folder / "run")} | changes))
    return recipe


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    slow = ("time/", "tokens_per_second", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(slow)} for row in rows]


def test_a_recipe_names_an_environment(tmp_path, capsys):
    recipe = written(tmp_path / "whole")
    assert cli.main(["train", str(recipe)]) == 0
    assert "game.py" in capsys.readouterr().err  # no recipe is so quiet that its code is not told
    whole = rows_of(tmp_path / "whole" / "run")
    last = whole[-1]
    assert (last["episode/turns"], last["stop/done"]) == (2, 1)
    assert 0 <= last["reward/environment"] <= 2
    lines = (tmp_path / "whole" / "run" / "samples.jsonl").read_text().splitlines()
    sample = json.loads(lines[0])
    assert sample["prompt"].startswith("The film number")
    assert [m["role"] for m in sample["episode"]["messages"]] == ["assistant", "user"] * 2


def test_a_checkpoint_of_episodes_is_gone_on_with_exactly(tmp_path):
    whole = written(tmp_path / "whole")
    assert cli.main(["train", str(whole)]) == 0
    part = written(tmp_path / "part")
    assert cli.main(["train", str(part)]) == 0
    folder = tmp_path / "part" / "run"
    steps = sorted((folder / "checkpoints").iterdir())
    assert len(steps) == 2  # of steps 2 and 3
    assert cli.main(["train", str(part), "--resume", str(steps[0])]) == 0
    assert rows_of(folder)[-1] == rows_of(tmp_path / "whole" / "run")[-1]


def test_another_environment_is_named_when_a_run_goes_on(tmp_path, capsys):
    recipe = written(tmp_path / "a", steps=1)
    assert cli.main(["train", str(recipe)]) == 0
    (tmp_path / "a" / "game.py").write_text(GAME.replace('"e" in', '"o" in'))
    capsys.readouterr()
    assert cli.main(["train", str(recipe), "--resume", "auto", "--steps", "2"]) != 0
    assert "environment" in capsys.readouterr().err


def test_code_elsewhere_is_refused_until_it_is_trusted(tmp_path, capsys):
    recipe = written(tmp_path / "a")
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "game.py").write_text(GAME)
    named = {"class": f"{other}/game.py:Game"}
    recipe = written(tmp_path / "a", environment=named)
    assert cli.main(["train", str(recipe)]) != 0
    err = capsys.readouterr().err
    assert "environment.name" in err
    assert "--trust" in err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"environment": {"max_turns": 3}}, "environment.name"),
        ({"environment": {"class": "game.py"}}, "file.py:name"),
        ({"environment": None}, "data.prompts"),
        ({"environment": {"class": "game.py:Gam"}}, "Game"),
        ({"environment": {"tools": ["game.py:look_up"]}}, "call_format"),
    ],
)
def test_what_cannot_be_is_told(changes, told, tmp_path, capsys):
    recipe = written(tmp_path / "a", **changes)
    assert cli.main(["train", str(recipe)]) != 0
    assert told in capsys.readouterr().err


def sampled(out, *arguments):
    assert cli.main(["sample", *arguments, "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_model_is_sampled_with_the_environment_of_a_recipe_or_its_run(tmp_path, capsys):
    """And what was sampled can be scored: functions see the whole conversation."""
    reward = {"kind": "function", "name": "game.py:turns"}
    recipe, out = written(tmp_path / "a", reward=[reward]), tmp_path / "s.jsonl"
    rows = sampled(out, "starter", "--recipe", str(recipe), "--n", "2")
    assert len(rows) == 2 * SMALL["data"]["held_out"]
    for row in rows:
        messages = row["episode"]["messages"]
        assert [m["role"] for m in messages] == ["assistant", "user"] * 2
        assert row["prompt"].startswith("The film number")
        assert row["reward"] == sum(m.get("reward", 0) for m in messages)
        assert row["tokens"] <= 8  # those of the recipe in each turn
        assert row["response"].split() == " ".join(m["content"] for m in messages[::2]).split()
    assert rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]  # a group has one task
    assert "game.py" in capsys.readouterr().err

    assert cli.main(["score", str(out), "--recipe", str(recipe), "--out", "-"]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["score"] for row in scored] == [4] * len(rows)

    (tmp_path / "a" / "policy").symlink_to(starter.LANGUAGE_MODEL)
    assert sampled(tmp_path / "t.jsonl", str(tmp_path / "a"), "--n", "2") == rows
    alone = ["--no-environment", "--prompt", "This"]
    assert "episode" not in sampled(out, str(tmp_path / "a"), *alone)[0]
    capsys.readouterr()
    given = ["--prompt", "This", "--max-new-tokens", "2"]
    assert cli.main(["sample", str(tmp_path / "a"), *given]) == 0
    assert "[user] and" in capsys.readouterr().out  # people see who said what


def test_a_person_talks_with_a_model_that_has_tools(tmp_path, capsys, monkeypatch):
    form = {"call_format": r"(?P<name>the) (?P<word>\w+)", "max_turns": 2}
    recipe = written(tmp_path / "a", environment={"tools": ["game.py:the"]} | form)
    monkeypatch.setattr("sys.stdin", io.StringIO("I liked the film since\n"))
    how = ["--max-new-tokens", "30", "--out", "-"]
    assert cli.main(["chat", "starter", "--recipe", str(recipe), *how]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    said, told, _ = row["answer"].partition("\n[the]  <")
    assert "the " in said
    assert told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["chat", "starter", "--recipe", "RECIPE"], "between it and the model"),
        (["chat", "starter", "--recipe", "toy-token"], "name a recipe with an environment"),
        (["sample", "starter", "--recipe", "RECIPE", "--no-environment"], "--no-environment"),
        (["sample", "FOLDER"], "there is no"),
    ],
)
def test_what_cannot_be_talked_with_is_told(arguments, told, tmp_path, capsys):
    recipe = written(tmp_path / "a")
    if "FOLDER" in arguments:
        (tmp_path / "a" / "game.py").unlink()
        (tmp_path / "a" / "policy").symlink_to(starter.LANGUAGE_MODEL)
    names = {"RECIPE": str(recipe), "FOLDER": str(tmp_path / "a")}
    assert cli.main([names.get(each, each) for each in arguments]) == 2
    assert told in capsys.readouterr().err
