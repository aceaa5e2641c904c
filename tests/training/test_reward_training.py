"""Training a reward model on made-up preferences for texts whose words give their worth away."""

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from tests.evaluation.test_reward_model import make_model, make_tokenizer
from tests.training.runs import stop_after
from tests.training.test_classifier_training import tiny_bert
from tests.training.test_classifier_training import write as write_lines
from trl import cli
from trl import config as settings
from trl.config import SettingsError
from trl.config.recipe import LoRAConfig, RewardRecipe
from trl.data.preferences import Preference
from trl.evaluation import RewardModelScorer
from trl.training import reward
from trl.training.reward import train_reward

WORTH = {"yes": 1.0, "five": 0.5, "no": -1.0, "maybe": -0.5, "and": 0.0, "two": 0.0, "is": 0.0}


def worth(text):
    return sum(WORTH[word] for word in text.split())


def preferences(count, seed):
    """Rows of a prompt, two responses, and the better of them, whatever its length."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        pair = [" ".join(rng.choices(list(WORTH), k=rng.randint(3, 8))) for _ in range(2)]
        worse, better = sorted(pair, key=worth)
        if worth(worse) < worth(better):
            rows.append({"prompt": f"what {seed}{len(rows)} ? ", "chosen": better})
            rows[-1]["rejected"] = worse
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two tiny models, and preferences."""
    folder = tmp_path_factory.mktemp("files")
    tiny_bert(folder / "bert")
    causal = LlamaForCausalLM(make_model(pad_token_id=None).config)
    causal.save_pretrained(folder / "causal")
    make_tokenizer(pad_token=None).save_pretrained(folder / "causal")
    write_lines(folder / "train.jsonl", preferences(200, 0))
    write_lines(folder / "test.jsonl", preferences(60, 1))
    return folder


def recipe_of(files, out, **more):
    """A reward model that is trained in about a second."""
    given = {
        "model": str(files / "bert"),
        "train": str(files / "train.jsonl"),
        "test": str(files / "test.jsonl"),
        "epochs": 3,
        "batch_size": 20,
        "learning_rate": 1e-2,
        "log_every": 10,
        "precision": "fp32",
        "out": str(out),
        "quiet": True,
    }
    return RewardRecipe(**given | more)


@pytest.fixture(scope="module")
def trained(files):
    recipe = recipe_of(files, files / "run")
    return recipe, train_reward(recipe)


def responses(rows):
    return [(row["prompt"], row[name]) for row in rows for name in ("chosen", "rejected")]


def test_it_learns_what_is_better_and_not_what_is_longer(trained):
    recipe, summary = trained
    assert summary["accuracy"] > 0.85
    low, high = summary["interval"]
    assert 0.7 < low < summary["accuracy"] < high
    assert 0.3 < summary["length_rule"] < 0.7
    assert (summary["decided"], summary["tied"], summary["nu"]) == (60, 0, 0)
    rows = [json.loads(line) for line in Path(recipe.out, "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 30
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["accuracy"] > 0.8
    text = Path(recipe.out, "report.md").read_text()
    for heading in ("Accuracy", "Calibration", "Length", "By how far apart"):
        assert f"## {heading}" in text
    assert Path(recipe.out, "report", "calibration.png").stat().st_size > 5000


def test_rewards_have_mean_0_and_deviation_1_wherever_the_model_is_loaded(trained):
    recipe, _ = trained
    folder = Path(recipe.out, "reward_model")
    rewards = RewardModelScorer(folder)(responses(preferences(200, 0)))
    assert rewards.mean().item() == pytest.approx(0, abs=1e-4)
    assert rewards.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.score_offset == 0  # the head has a bias
    texts = AutoTokenizer.from_pretrained(folder)("what 00 ? yes yes", return_tensors="pt")
    with torch.no_grad():
        plain = model(**texts).logits[0, 0]
    torch.testing.assert_close(RewardModelScorer(folder)([("what 00 ? ", "yes yes")])[0], plain)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)])
def test_a_causal_model_without_padding_reads_its_chat_template(files, tmp_path, lora):
    if lora:
        pytest.importorskip("peft")
    recipe = recipe_of(files, tmp_path / "run", model=str(files / "causal"), lora=lora, epochs=6)
    summary = train_reward(recipe)
    assert summary["accuracy"] > 0.6
    folder = Path(recipe.out, "reward_model")
    assert not list(folder.glob("adapter*"))
    scorer = RewardModelScorer(folder)
    assert scorer.chat_template
    # It does not know the numbers of the prompts, so that some texts are the same: they count once.
    different = set(map(tuple, scorer.token_ids(responses(preferences(200, 0)))))
    rewards = scorer.scores_of(list(map(list, different)))
    assert rewards.mean().item() == pytest.approx(0, abs=1e-4)
    assert rewards.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    # The head has no bias: config.json has by how much plain transformers is beside it.
    assert scorer.model.config.score_offset == -summary["mean"] / summary["std"] != 0
    # What a fit reads is what the scorer reads.
    said = ("what ?", " yes no"), Preference("what ?", (" yes no",), (1.0, 0.0))
    (example,) = reward._examples([said[1]], scorer)
    assert example["input_ids"] == scorer.token_ids([said[0]])[0]
    assert "<user> what ? <end>" in scorer.tokenizer.decode(example["input_ids"])


@pytest.mark.usefixtures("no_pictures")
def test_a_reference_sets_the_scale(files, tmp_path):
    file = write_lines(
        tmp_path / "samples.jsonl",
        [{"prompt": p, "response": r} for p, r in responses(preferences(50, 5))],
    )
    recipe = recipe_of(files, tmp_path / "run", reference=file, epochs=0.5)
    train_reward(recipe)
    rewards = RewardModelScorer(Path(recipe.out, "reward_model"))(responses(preferences(50, 5)))
    assert rewards.mean().item() == pytest.approx(0, abs=1e-4)
    assert rewards.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    one = write_lines(tmp_path / "one.jsonl", [{"text": "yes"}])
    with pytest.raises(ArithmeticError, match="name other texts in `reference`"):
        train_reward(replace(recipe, reference=one, out=str(tmp_path / "one")))
    none = write_lines(tmp_path / "none.jsonl", [{"words": "yes"}])
    with pytest.raises(ValueError, match="`reference` must have columns prompt and response"):
        train_reward(replace(recipe, reference=none, out=str(tmp_path / "none")))


@pytest.mark.usefixtures("no_pictures")
def test_votes_for_three_responses_and_for_none_are_learnt_from(files, tmp_path):
    rng = random.Random(3)
    rows = []
    for number in range(120):
        texts = [" ".join(rng.choices(list(WORTH), k=4)) for _ in range(rng.randint(2, 3))]
        best = max(range(len(texts)), key=lambda index: worth(texts[index]))
        votes = [{"answer": "tie" if number % 4 == 0 else best}, {"answer": best}]
        rows.append({"prompt": f"what {number} ? ", "responses": texts, "votes": votes})
    file = write_lines(tmp_path / "votes.jsonl", [*rows, {"prompt": 3}])
    found = {}
    for ties in ("davidson", "half", "ignore"):
        recipe = recipe_of(files, tmp_path / ties, train=file, test=None, held_out=0.25, ties=ties)
        found[ties] = summary = train_reward(recipe)
        assert summary["accuracy"] > 0.6
        assert (summary["train_preferences"], summary["test_preferences"]) == (90, 30)
        (problem,) = summary["problems"]
        assert f"line 121 of {file}" in problem
        assert problem in Path(recipe.out, "report.md").read_text()
        assert "By the share of people who agree" in Path(recipe.out, "report.md").read_text()
    assert found["half"]["nu"] == found["ignore"]["nu"] == 0
    # About 1 of 8 votes is for none, of 2 or 3 responses: 2.5 times 1/7.
    assert 0.25 < found["davidson"]["nu"] < 0.5
    assert len({summary["std"] for summary in found.values()}) == 3


@pytest.mark.usefixtures("no_pictures")
def test_margins_and_the_centre_count(files, tmp_path):
    rows = [row | {"margin": 5.0, "weight": 3} for row in preferences(80, 0)]
    file = write_lines(tmp_path / "train.jsonl", rows)
    found = {}
    for name, more in {
        "plain": {"margin_scale": 0.0},
        "margin": {},
        "centre": {"margin_scale": 0.0, "centring_coef": 1.0},
    }.items():
        recipe = recipe_of(files, tmp_path / name, train=file, epochs=10, **more)
        found[name] = train_reward(recipe)
    assert found["margin"]["std"] > 1.2 * found["plain"]["std"]
    assert found["centre"]["std"] < found["plain"]["std"]
    assert abs(found["centre"]["mean"]) < 0.2


@pytest.mark.usefixtures("no_pictures")
def test_a_prompt_is_learnt_from_or_measured_on(files, tmp_path):
    rows = [row | {"prompt": f"what {n % 20} ?"} for n, row in enumerate(preferences(100, 0))]
    recipe = RewardRecipe(train=write_lines(tmp_path / "a.jsonl", rows), held_out=0.3)
    train, test, problems = reward._train_and_test(recipe)
    assert (len(train), len(test), problems) == (70, 30, [])
    assert not {each.prompt for each in train} & {each.prompt for each in test}
    assert reward._train_and_test(replace(recipe, limit=10))[0] == train[:10]
    # With few prompts it is rows; and none of those that are measured on.
    rows = [row | {"prompt": ""} for row in rows]
    recipe = replace(recipe, train=write_lines(tmp_path / "b.jsonl", rows), held_out=0.3)
    train, test, _ = reward._train_and_test(recipe)
    assert (len(train), len(test)) == (70, 30)
    turned = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:40]]
    recipe = replace(recipe, test=write_lines(tmp_path / "c.jsonl", turned))
    train, test, _ = reward._train_and_test(recipe)
    assert (len(train), len(test)) == (60, 40)
    recipe = replace(recipe, test=recipe.train)
    message = "`train` must have preferences .*some to train and others to measure on, got none to "
    with pytest.raises(ValueError, match=f"{message}train on in '.*b.jsonl': add more"):
        reward._train_and_test(recipe)
    tied = [
        {"responses": ["a", "b"], "votes": [{"annotator": "ann", "answer": answer}]}
        for answer in ("tie", 0)
    ]
    file = write_lines(tmp_path / "d.jsonl", tied[:1])
    with pytest.raises(ValueError, match="`test` must have preferences.*measure on in '.*d.jsonl'"):
        reward._train_and_test(replace(recipe, test=file))
    file = write_lines(tmp_path / "e.jsonl", tied)
    for seed in range(4):  # which of the two is held out
        with pytest.raises(ValueError, match=f"{message}(measure|train) on in '.*e.jsonl': add"):
            reward._train_and_test(replace(recipe, train=file, test=None, seed=seed, ties="ignore"))


@pytest.mark.usefixtures("no_pictures")
def test_a_text_of_many_pairs_is_read_once_in_an_update(files, tmp_path):
    examples = [
        {"input_ids": [1, 2, 3], "sizes": [2, 1]},
        {"input_ids": [3, 1, 2], "sizes": [1, 2]},
    ]
    texts, places = reward._once(examples)
    assert (texts, places.tolist()) == ([[1, 2], [3]], [0, 1, 1, 0])
    said = ["no no no", "maybe is two", "five and", "yes five yes yes"]
    rows = [{"chosen": b, "rejected": a} for i, a in enumerate(said) for b in said[i + 1 :]]
    file = write_lines(tmp_path / "pairs.jsonl", rows)
    recipe = recipe_of(files, tmp_path / "run", train=file, batch_size=6, epochs=5, log_every=5)
    summary = train_reward(recipe)
    scorer = RewardModelScorer(Path(recipe.out, "reward_model"))
    once = sum(map(len, scorer.token_ids([("", text) for text in said])))
    assert summary["tokens"] <= 5 * once  # each is in three pairs
    rewards = scorer([("", text) for text in said]).tolist()
    assert rewards == sorted(rewards)


@pytest.mark.usefixtures("no_pictures")
def test_attention_has_no_dropout_which_costs_a_cpu_half_of_its_time(files, tmp_path):
    config = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    shutil.copytree(files / "bert", tmp_path / "bert")
    file = tmp_path / "bert" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    recipe = recipe_of(files, tmp_path / "run", model=str(tmp_path / "bert"), epochs=0.1)
    train_reward(recipe)
    told = json.loads(Path(recipe.out, "reward_model", "config.json").read_text())
    assert (told["hidden_dropout_prob"], told["attention_probs_dropout_prob"]) == (0.1, 0.0)


def test_a_curve_over_the_number_of_preferences(files, tmp_path):
    recipe = recipe_of(files, tmp_path / "run", curve=(100, 20))
    summary = train_reward(recipe)
    assert [point["preferences"] for point in summary["curve"]] == [20, 100]
    assert summary["curve"][0]["accuracy"] < summary["accuracy"]
    assert "| 20 | " in Path(recipe.out, "report.md").read_text()
    assert Path(recipe.out, "report", "curve.png").stat().st_size > 5000
    assert not Path(recipe.out, "curve-20", "reward_model").exists()
    with pytest.raises(ValueError, match=r"`curve` must .* to train on \(200\), got 201"):
        train_reward(replace(recipe, curve=(201,), out=str(tmp_path / "more")))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)])
def test_after_a_stop_it_goes_on_to_the_same_weights(files, tmp_path, monkeypatch, capsys, lora):
    if lora:
        pytest.importorskip("peft")
    recipe = recipe_of(files, tmp_path / "run", lora=lora, dropout=0.1, curve=(40,), quiet=False)
    whole = train_reward(replace(recipe, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:  # in the curve, which has 6 steps
        stop_after(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT), reward.RewardFit)
        with pytest.raises(KeyboardInterrupt):
            train_reward(recipe)
    assert f"trl train {recipe.out} --resume" in " ".join(capsys.readouterr().err.split())

    def die():
        raise MemoryError

    with monkeypatch.context() as patch:
        stop_after(patch, 2 + 17, die, reward.RewardFit)
        with pytest.raises(MemoryError):
            train_reward(recipe, resume=True)
    assert cli.main(["train", recipe.out, "--resume"]) == 0
    summary = json.loads(Path(recipe.out, "summary.json").read_text())
    first, second = (
        load_file(tmp_path / name / "reward_model" / "model.safetensors")
        for name in ("whole", "run")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("accuracy", "ece", "mean", "std", "curve", "tokens"):
        assert summary[name] == whole[name]
    assert cli.main(["train", recipe.out, "--resume"]) == 2  # it is complete


def test_the_command(files, tmp_path, capsys, monkeypatch):
    file = str(files / "train.jsonl")
    assert cli.main(["reward", file, "--model", str(files / "bert"), "--print-config"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "a.yaml").write_text(shown)
    recipe = settings.build(RewardRecipe, settings.read_yaml(tmp_path / "a.yaml"))
    assert recipe == RewardRecipe(train=file, model=str(files / "bert"))
    seen = []
    monkeypatch.setattr(
        reward, "train_reward", lambda recipe, resume: seen.append((recipe, resume))
    )
    assert cli.main(["reward", file, "--lora", "{rank: 8}", "--curve", "[100]", "--resume"]) == 0
    assert cli.main(["train", str(tmp_path / "a.yaml")]) == 0
    lora = RewardRecipe(train=file, lora=LoRAConfig(rank=8), curve=(100,))
    assert seen == [(lora, True), (recipe, False)]
    assert cli.main(["reward", file, "--resume", "step-1"]) == 2
    assert "--resume must stand alone for a reward" in capsys.readouterr().err
    assert cli.main(["reward", file, "--model", "./nothing"]) == 2
    assert "`model` must be the folder of a model" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["reward", "nothing.jsonl", "--out", str(tmp_path / "run")]) == 2
    assert "`train` must be a file that is there, got 'nothing.jsonl'" in capsys.readouterr().err


def test_settings_that_cannot_be_are_all_named():
    with pytest.raises(SettingsError) as told:
        RewardRecipe(ties="coin", held_out=1.0, curve=(0,), task="classifier")
    for name in ("ties", "held_out", "curve", "task"):
        assert f"`{name}` must be" in str(told.value)
