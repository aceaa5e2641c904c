import json
import math
import os
import re

import pytest

from tests.training.run_folders import KL_NEGATIVE, make_run, write_lines
from trl.config.recipe import LoRAConfig, ModelConfig, Recipe, RewardConfig
from trl.config.writing import as_mapping, flatten
from trl.report.figures import rewards_differ, settings_that_differ
from trl.report.run import WITHOUT, Run, read_runs


def only(folder):
    (run,) = read_runs([folder])
    return run


def test_a_whole_run(tmp_path):
    run = only(make_run(tmp_path / "one", steps=20, eval_every=5, warnings=KL_NEGATIVE))
    assert (run.name, run.recipe["ppo.algorithm"], run.recipe["model.name"]) == (
        "one",
        "ppo",
        "gpt2",
    )
    assert run.finished
    assert run.last_step == 20
    assert run.state == "20 steps"
    assert run.seconds == 72
    assert [step for step, _ in run.evaluations] == [0, 5, 10, 15, 20]
    assert run.before["kl"] == 0
    assert run.after["kl"] == run.evaluations[-1][1]["kl"]
    assert len(run.pairs) == 24
    assert all(before.prompt == after.prompt for before, after in run.pairs)
    assert [(w["name"], w["step"]) for w in run.warnings] == [("kl_negative", 12)]
    assert run.notes == []


def test_any_file_may_be_missing(tmp_path):
    names = ["recipe.yaml", "metrics.jsonl", "scores.jsonl", "samples.jsonl", "summary.json"]
    for name in names:
        run_folder = make_run(tmp_path / name, steps=4)
        (run_folder / name).unlink()
        assert [note for note in only(run_folder).notes if note.startswith(f"{name} is missing")]


def test_a_cut_last_line_is_left_out_and_told(tmp_path):
    folder = make_run(tmp_path / "run", steps=6, finished=False)
    for name in ("metrics.jsonl", "scores.jsonl", "samples.jsonl"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-9])
    run = only(folder)
    assert run.last_step == 5
    assert list(run.scores) == [1, 2, 3, 4, 5]
    assert [len(rows) for rows in run.samples.values()] == [24, 23]
    for name in ("metrics.jsonl", "scores.jsonl", "samples.jsonl"):
        assert any(note.startswith(f"{name}: its last line is cut") for note in run.notes)
    assert "samples.jsonl: 23 of 24 held-out prompts have a response at step 6" in str(run.notes)


def test_lines_of_another_kind_are_left_out_and_counted(tmp_path):
    good = json.dumps({"step": 1, "reward/mean": 1, "word": "x", "flag": True})
    bad = [
        "[]",
        "not json",
        '{"reward/mean": 2}',
        '{"step": "2"}',
        '{"step": -1}',
        '{"step": true}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*bad, good]))
    run = only(tmp_path)
    assert run.metrics == [{"step": 1, "reward/mean": 1}]
    assert "metrics.jsonl: 6 of 7 lines were left out, since they are not JSON with a step." in (
        run.notes
    )


def test_what_is_not_a_number_is_nan(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": 1, "b": null}\n{"step": 2, "a": NaN, "b": Infinity, "c": "text"}\n'
    )
    first, second = only(tmp_path).metrics
    assert first["a"] == 1
    assert all(map(math.isnan, (first["b"], second["a"], second["b"])))
    assert "c" not in second


def test_a_resumed_run_counts_what_was_done_again(tmp_path):
    steps = [1, 2, 3, 4, 3]
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": step, "reward/mean": 10 * n} for n, step in enumerate(steps)],
    )
    write_lines(
        tmp_path / "samples.jsonl",
        [{"step": s, "prompt": "p", "response": str(n)} for n, s in enumerate([0, 3, 3, 0, 3])],
    )
    run = only(tmp_path)
    assert [(row["step"], row["reward/mean"]) for row in run.metrics] == [(1, 0), (2, 10), (3, 40)]
    assert {s: [x.response for x in rows] for s, rows in run.samples.items()} == {
        0: ["3"],
        3: ["4"],
    }


def test_training_and_evaluation_of_a_step_may_be_two_rows(tmp_path):
    rows = [
        {"step": 0, "held_out/kl": 0},
        {"step": 1, "objective/kl": 2},
        {"step": 1, "held_out/kl": 3},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert only(tmp_path).metrics[1] == {"step": 1, "objective/kl": 2, "held_out/kl": 3}


def test_a_prompt_that_comes_twice_keeps_its_responses_apart(tmp_path):
    write_lines(
        tmp_path / "samples.jsonl",
        [
            {"step": step, "prompt": "same", "response": f"{step}{letter}"}
            for step in (0, 5)
            for letter in "ab"
        ],
    )
    pairs = [(before.response, after.response) for before, after in only(tmp_path).pairs]
    assert pairs == [("0a", "5a"), ("0b", "5b")]


def test_broken_recipe_and_summary(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: [1")
    (tmp_path / "summary.json").write_text('{"before": {')
    run = only(tmp_path)
    assert not run.finished
    assert run.algorithm is None
    assert any(note.startswith("recipe.yaml could not be read") for note in run.notes)
    assert any(note.startswith("summary.json could not be read") for note in run.notes)


NESTED = "[" * 100_000


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "deep"])
def test_what_is_no_file_or_too_deep_is_left_out_and_told(name, kind, tmp_path):
    folder = make_run(tmp_path / "run", steps=4, warnings=KL_NEGATIVE)
    (folder / name).unlink()
    if kind == "deep":
        (folder / name).write_text(NESTED + "\n{}\n")
    else:
        (os.mkfifo if kind == "a pipe" else os.mkdir)(folder / name)
    said = "is no file" if kind != "deep" else "left out|cannot be read|could not be read"
    assert re.search(said, " ".join(note for note in only(folder).notes if name in note))


def test_settings_get_dotted_names():
    nested = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, {"e": 3}], "f": [1, 2], "g": None}
    assert flatten(nested) == {
        "a.b": 1,
        "a.c": {},
        "d.0.e": 2,
        "d.1.e": 3,
        "f": [1, 2],
        "g": None,
    }


def test_runs_of_one_name_are_told_apart_and_named_once(tmp_path):
    folders = [make_run(tmp_path / side / "run", steps=1) for side in ("a", "b")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run"]


def test_a_folder_that_is_not_one_of_a_run(tmp_path):
    make_run(tmp_path / "runs" / "first", steps=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    folders = [tmp_path / name for name in ("runs", "empty", "file", "nowhere")]
    with pytest.raises(FileNotFoundError) as caught:
        read_runs(folders)
    message = str(caught.value)
    assert all(str(folder) in message for folder in folders)
    assert f"Runs are inside it: give {tmp_path / 'runs' / 'first'}." in message
    assert "it holds none of recipe.yaml, metrics.jsonl" in message
    assert "file is not the folder of a run: it is no folder. Give the folder that a" in message


def test_runs_must_be_a_list_with_something_in_it(tmp_path):
    with pytest.raises(ValueError, match="at least one folder"):
        read_runs([])
    with pytest.raises(TypeError, match="`runs` must be a list of folders"):
        read_runs(str(tmp_path))


def test_of_a_scorer_that_others_lack_only_what_it_sets_is_told(tmp_path):
    """And of a section that others lack its settings, not that it is there."""
    one = Run(tmp_path, "one", 0)
    one.recipe = flatten(as_mapping(Recipe())) | {"steps": 3}
    two = Run(tmp_path, "two", 1)
    rewards = (RewardConfig(), RewardConfig(kind="length", weight=-0.5, title="short"))
    model = ModelConfig(lora=LoRAConfig(rank=4))
    two.recipe = flatten(as_mapping(Recipe(reward=rewards, model=model))) | {"steps": 4}
    found = dict(settings_that_differ([one, two]))
    assert found["steps"] == ["3", "4"]
    assert found["reward.1.kind"] == ["–", "length"]
    assert found["reward.1.weight"] == ["–", "-0.5"]
    assert found["model.lora.rank"] == ["–", "4"]
    assert not {"model.lora", "reward.1.label", "reward.1.targets"} & found.keys()
    assert rewards_differ([one, two])
