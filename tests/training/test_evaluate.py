"""`trl eval`: several samples of each held-out prompt, and the figures made of them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.runs import lines, make_parts, tiny_recipe
from trl import cli
from trl.config import SettingsError
from trl.config.recipe import DataConfig, RewardConfig, SamplingConfig
from trl.training.evaluate import evaluate, figures_of
from trl.training.parts import Parts

QUESTIONS = [{"prompt": f"w{a} w{b}", "answer": f"{a + b}"} for a in (1, 2, 7) for b in (9, 10, 11)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    make_parts(folder)
    text = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (folder / "questions.jsonl").write_text(text)
    # The answer of a text is how many different words it has.
    (folder / "reward.py").write_text(
        (folder / "reward.py").read_text()
        + "\ndef few(texts, log_extra):\n"
        + "    found = [len(set(text.split()[2:])) for text in texts]\n"
        + "    log_extra('answer', [f'{n} words' for n in found])\n"
        + "    return [float(n < 5) for n in found]\n"
    )
    return folder


def recipe_of(folder, name="few", **changes):
    reward = (RewardConfig(kind="function", name=f"{folder / 'reward.py'}:{name}"),)
    return tiny_recipe(folder, folder / "run", reward=reward, **changes)


def test_the_figures_of_samples_by_hand():
    def sample(reward, right, answer, **more):
        more = {"length": 3, "ended": True, "parts": {"math": reward}} | more
        return {"reward": reward, "right": right, "notes": {"answer": answer}} | more

    groups = [
        [sample(1.0, True, "5"), sample(1.0, True, "5", length=5), sample(0.0, False, "4")],
        [sample(0.0, False, "1"), sample(0.0, False, "2"), sample(math.nan, None, "")],
    ]
    found = figures_of(groups, [1, 2, 3])
    assert list(found)[-2:] == ["length", "ended"]
    value = {name: each["value"] for name, each in found.items()}
    assert value["reward/mean"] == pytest.approx((2 / 3 + 0) / 2)  # of what has a score
    assert value["accuracy"] == value["pass@1"] == pytest.approx(1 / 3)
    assert value["pass@2"] == 0.5  # (1 + 0) / 2
    # Of the second prompt two samples count: what needs three is that of the first alone.
    assert value["pass@3"] == pytest.approx(1)
    assert value["majority@3"] == pytest.approx(1)
    assert value["majority@2"] == pytest.approx((2 / 3 + 0) / 2)
    assert value["length"] == pytest.approx((11 / 3 + 3) / 2)
    assert "reward/math" not in value  # it is the reward itself
    assert found["pass@2"] == {"value": 0.5, "low": 0, "high": 1}
    assert math.isnan(found["pass@3"]["low"])  # of one prompt


def test_the_figures_of_episodes():
    def sample(stop, turns, calls, errors):
        episode = {"turns": turns, "tool_calls": calls, "tool_errors": errors, "stop": stop}
        return {"reward": 0.0, "parts": {}, "length": 1, "ended": True, "episode": episode}

    groups = [
        [sample("done", 2, 1, 0), sample("turns", 4, 3, 2)],
        [sample("done", 1, 0, 0), sample("done", 1, 0, 0)],
    ]
    value = {name: each["value"] for name, each in figures_of(groups).items()}
    assert value["episode/turns"] == 2
    assert value["episode/tool_calls"] == 1
    assert value["episode/tool_errors"] == 0.5
    assert (value["stop/done"], value["stop/turns"]) == (0.75, 0.25)
    assert "accuracy" not in value


def test_an_evaluation_of_a_policy(folder, tmp_path):
    recipe = recipe_of(folder)
    found = evaluate(folder / "model", recipe, samples=4, greedy=True, out=tmp_path / "a")
    groups = found.samples
    assert [len(group) for group in groups] == [5] * 6
    assert all(len({sample["prompt"] for sample in group}) == 1 for group in groups)
    assert len({group[0]["prompt"] for group in groups}) == 6
    drawn = [sample["response"] for group in groups for sample in group[:4]]
    assert len(set(drawn)) > 20  # no two of them with the same random numbers
    for group in groups:
        for sample in group:
            words = len(set(sample["response"].split()))
            assert sample["notes"]["answer"] == f"{words} words"
            assert sample["right"] == (sample["reward"] == 1.0) == (words < 5)
    assert list(found.sampled)[:3] == ["reward/mean", "accuracy", "pass@1"]
    assert {"pass@4", "majority@1", "majority@4"} <= set(found.sampled)
    assert "pass@1" not in found.greedy

    # The likeliest response is that of transformers.
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for group in groups:
        ids = tokenizer(group[4]["prompt"], add_special_tokens=False, return_tensors="pt").input_ids
        if tokenizer.bos_token_id is not None:
            ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
        best = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(best, skip_special_tokens=True)
        assert group[4]["response"].split() == text.split()

    written = lines(tmp_path / "a" / "eval_samples.jsonl")
    assert [(line["row"], line.get("greedy")) for line in written[:6]] == [
        *[(0, None)] * 4, (0, True), (1, None),
    ]  # fmt: skip
    figures = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert figures["sampled"] == found.sampled
    assert (figures["prompts"], figures["samples"]) == (6, 4)

    few = replace(recipe, sampling=SamplingConfig(max_new_tokens=5, max_rows=4))
    again = evaluate(folder / "model", few, samples=4)
    assert [sample["response"] for group in again.samples for sample in group] == drawn


def test_one_sample_of_each_is_what_a_run_measures(folder):
    recipe = recipe_of(folder)
    measured, figures = Parts.of_recipe(recipe, Accelerator()).held_out.measure()
    found = evaluate(folder / "model", recipe, samples=1)
    for (sample,), other in zip(found.samples, measured, strict=True):
        assert sample["response"] == other["response"]
        assert sample["reward"] == other["reward"]
    mean = found.sampled["reward/mean"]["value"]
    assert mean == pytest.approx(figures["held_out/reward/mean"])


def test_right_is_what_the_checks_say_or_a_threshold(folder):
    data = DataConfig(prompts=str(folder / "questions.jsonl"), held_out=3)
    reward = (
        RewardConfig(kind="regex", arguments={"pattern": "w[0-9]"}),
        RewardConfig(kind="function", name=f"{folder / 'reward.py'}:count_w7", weight=2),
    )
    recipe = replace(recipe_of(folder), data=data, reward=reward)
    found = evaluate(folder / "model", recipe, samples=2)
    for sample in (sample for group in found.samples for sample in group):
        assert sample["right"] == (sample["parts"]["regex"] == 1)
    assert found.sampled["accuracy"]["value"] > 0
    assert not any(name.startswith("majority") for name in found.sampled)  # nothing was read off

    found = evaluate(folder / "model", recipe, samples=2, right_from=2.5)
    for sample in (sample for group in found.samples for sample in group):
        assert sample["right"] == (sample["reward"] >= 2.5)

    alone = replace(recipe, reward=reward[1:])
    found = evaluate(folder / "model", alone, samples=2, prompts=str(folder / "questions.jsonl"))
    assert "accuracy" not in found.sampled  # 2, 4 … is neither right nor wrong
    assert "pass@1" not in found.sampled
    assert "--right-from" in found.table().caption
    prompts = [group[0]["prompt"] for group in found.samples]
    assert prompts == [row["prompt"] for row in QUESTIONS]  # all of them, in their order


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"k": [1, 3]}, ValueError, "`k` must be from 1 to `samples`, 2, got 3: raise `samples`"),
        ({"samples": 0}, SettingsError, "samples"),
        ({"out": "."}, ValueError, "`out` must be a folder without an evaluation, got .*eval.json"),
        ({"prompts": "nowhere.jsonl"}, FileNotFoundError, "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_sampled(given, error, told, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "eval.json").write_text("{}")
    with pytest.raises(error, match=told):
        evaluate(folder / "model", recipe_of(folder), **{"samples": 2} | given)
    (folder / "eval.json").unlink()


def test_without_held_out_prompts_there_is_nothing_to_measure(folder):
    data = DataConfig(prompts=str(folder / "prompts.txt"), held_out=0)
    with pytest.raises(ValueError, match=r"`data.held_out` must be above 0, got 0"):
        evaluate(folder / "model", recipe_of(folder, data=data))


def test_the_command(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {folder / 'model'}}}\n"
        f"data: {{prompts: {folder / 'prompts.txt'}, held_out: 3}}\n"
        f"reward: [{{kind: function, name: '{folder / 'reward.py'}:few'}}]\n"
    )
    command = ["eval", str(folder / "model"), str(recipe), "--sampling.max-new-tokens", "4"]
    given = ["--samples", "3", "--k", "1,3", "--out", str(tmp_path / "out"), "--trust",
             str(folder / "reward.py")]  # fmt: skip
    assert cli.main([*command, *given]) == 0
    table = capsys.readouterr().out
    assert "3 prompts, 3 samples of each" in table
    assert [name in table for name in ("pass@3", "majority@3", "pass@2")] == [True, True, False]
    rows = lines(tmp_path / "out" / "eval_samples.jsonl")
    assert {row["length"] for row in rows} <= {1, 2, 3, 4}
    assert cli.main([*command, *given]) == 2
    assert "`out` must be a folder without an evaluation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--k", "1,x"])
    assert "argument --k" in capsys.readouterr().err
    recipe.write_text("task: reward\ntrain: x.jsonl\n")
    assert cli.main(command[:3]) == 2
    assert "`RECIPE` must be one that trains a policy" in capsys.readouterr().err
