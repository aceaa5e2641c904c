"""A reward in whatever form it is written, and rows on which it has no say, in whole runs."""

import itertools
import json
from collections import defaultdict

import pytest
import torch
from transformers import AutoTokenizer

import trl
from tests.training.runs import lines, make_parts, tiny_recipe
from trl.compute.precision import make_accelerator
from trl.config import PPOConfig
from trl.config.recipe import DataConfig, RewardConfig, ScheduleConfig
from trl.evaluation import as_scorer, score
from trl.models.with_value_head import load_policy
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.training.named import load_function
from trl.training.parts import Parts

FORMS = """
from trl.batch import Rollout


def counts(wholes, answers):
    return [float(whole.split().count(a)) for whole, a in zip(wholes, answers, strict=True)]


def of_texts(texts, answer):
    return counts(texts, answer)


def of_another_name(whatever, answer):
    return counts(whatever, answer)


def of_pairs(queries, responses, answer):
    return counts([q + r for q, r in zip(queries, responses, strict=True)], answer)


def of_rollout(rollout):
    return counts(rollout.texts, rollout.columns["answer"])


def of_typed_rollout(batch: Rollout, answer):
    return counts(batch.texts, answer)


def of_trl(prompts, completions, **columns):
    return of_pairs(prompts, completions, columns["answer"])


async def awaited(texts, answer):
    return counts(texts, answer)
"""
NAMES = [
    line[4:].partition("(")[0].removeprefix("c def ")
    for line in FORMS.replace("async def", "def").splitlines()
    if line.startswith("def ") and not line.startswith("def counts")
]
CONFIG = PPOConfig(
    batch_size=8, minibatch_size=4, learning_rate=1e-2, ppo_epochs=2, precision="fp32"
)
ROWS = [
    {"prompt": f"w{a} w{b}", "answer": f"w{7 + a % 2}"} for a in range(1, 5) for b in range(9, 13)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    (folder / "forms.py").write_text(FORMS)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


def in_one_call(folder, name):
    reward = load_function(f"{folder}/forms.py:{name}", "reward")
    settings = {"config": CONFIG, "max_new_tokens": 5, "decay_learning_rate": False}
    return trl.train(str(folder / "model"), ROWS, reward, steps=2, **settings).history


def in_a_recipe(folder, name):
    recipe = tiny_recipe(
        folder,
        folder / "out",
        data=DataConfig(prompts=f"{folder}/rows.jsonl", held_out=0, shuffle=False),
        reward=(RewardConfig(kind="function", name=f"{folder}/forms.py:{name}"),),
        schedule=ScheduleConfig(kind="constant"),
        ppo={"ppo_epochs": 2},
    )
    loop = Parts.of_recipe(recipe, make_accelerator("fp32")).loop
    return [loop.step() for _ in range(2)]


def in_a_loop(folder, name):
    torch.manual_seed(0)
    policy = load_policy(folder / "model")
    trainer = PPOTrainer(policy, config=CONFIG)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    sampler = Sampler(tokenizer, max_new_tokens=5, add_bos=True)
    scorer = as_scorer(load_function(f"{folder}/forms.py:{name}", "reward"))
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for batch in order[:8], order[8:]:
        with trainer.sampling():
            rollout = sampler(policy, [ROWS[row] for row in batch])
        scored = score(scorer, rollout)
        stats = trainer.step(rollout, scored)
        found.append(stats | {"reward/mean": scored.scores.mean().item()})
    return found


WAYS = [in_one_call, in_a_recipe, in_a_loop]


def figures(rows):
    return [
        {
            name: value
            for name, value in row.items()
            if name.startswith(("ppo/", "objective/", "reward/mean")) and isinstance(value, float)
        }
        for row in rows
    ]


ALL = [(name, way) for name in NAMES for way in WAYS]
SOME = list(zip(NAMES, itertools.cycle(WAYS[::-1])))  # they share what tells the forms apart


@pytest.mark.parametrize("runs", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=len)
def test_every_form_gives_the_same_run_as_every_way(runs, folder):
    assert len(NAMES) == 7
    expected = figures(in_one_call(folder, NAMES[0]))
    assert expected[0]["reward/mean"] > 0
    assert len(expected[0]) > 20
    for name, way in runs:
        assert figures(way(folder, name)) == expected, (way.__name__, name)


# -- a column that is not there --------------------------------------------------------------------


def right(completions, solution):
    return [0.0] * len(completions)


GONE = r"^right asks for `solution`.*the columns answer: give rows such as {'prompt'"


@pytest.mark.parametrize("reward", [right, [(right, 0.5), len], {right: 1.0}])
def test_one_call_looks_for_columns_before_it_loads_anything(reward):
    with pytest.raises(ValueError, match=GONE):
        trl.train("no/such-model", ROWS, reward)
    with pytest.raises(ValueError, match=GONE):
        trl.train("no/such-model", lambda: iter(ROWS), reward)
    with pytest.raises(ValueError, match=r"asks for `solution`.*no columns:"):
        trl.train("no/such-model", ["w1 w2"], reward)
    rows = [row | {"solution": 1} for row in ROWS]
    with pytest.raises(ValueError, match=GONE):  # only what is held out lacks it
        trl.train("no/such-model", rows, reward, held_out=ROWS)


@pytest.mark.parametrize(
    ("data", "there"),
    [
        ({}, "the columns answer"),
        ({"shuffle_buffer": 4}, "the columns answer"),
        (
            {"column": "answer"},
            "no columns",
        ),  # the prompts' column; `prompt` would be its other name
        ({"template": "{prompt} {answer}"}, "the columns answer"),
        ({"held_out": 2, "held_out_prompts": "others.jsonl"}, "the columns answer"),
        ({"prompts": "starter"}, "no columns"),
    ],
)
def test_a_recipe_looks_for_columns_before_it_loads_a_model(data, there, folder, tmp_path):
    pytest.importorskip("datasets" if "shuffle_buffer" in data else "json")
    (tmp_path / "mine.py").write_text(
        "def right(completions, solution):\n    return [0.0] * len(completions)\n"
    )
    rows = [row | {"solution": 1} for row in ROWS] if "held_out_prompts" in data else ROWS
    for name, written in (("rows", rows), ("others", ROWS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
    data = {"prompts": "rows.jsonl", "held_out": 0} | data
    data |= {k: str(tmp_path / x) for k, x in data.items() if str(x).endswith(".jsonl")}
    classifier = RewardConfig(name="no/such-classifier")
    function = RewardConfig(kind="function", name=f"{tmp_path}/mine.py:right")
    recipe = tiny_recipe(folder, tmp_path, data=DataConfig(**data), reward=(classifier, function))
    with pytest.raises(ValueError, match=f"^right asks for .*with {there}:"):
        Parts.of_recipe(recipe, make_accelerator("fp32"))


# -- None ------------------------------------------------------------------------------------------


def of_some(texts, log_extra):
    """A reward with a say on texts that begin with an odd word."""
    log_extra("seen", texts)
    return [len(text) / 8 if int(text[1]) % 2 else None for text in texts]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_with_rows_on_which_nothing_has_a_say(folder, tmp_path):
    out = tmp_path / "run"
    settings = {"config": CONFIG, "max_new_tokens": 5, "steps": 2, "parts": 2, "held_out": 6}
    rows = [{"prompt": f"w{a} w9"} for a in (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 3, 5, 7, 9)]
    _, history = trl.train(str(folder / "model"), rows, [of_some], **settings, out=out)
    for line, row in zip(lines(out / "scores.jsonl"), history[1:], strict=True):
        told = [score for score in line["scores"] if score is not None]
        assert 0 < row["response/counted"] == len(told) / 8 < 1
        assert row["reward/mean"] == pytest.approx(sum(told) / len(told), abs=1e-4)
        assert row["reward/of_some"] == pytest.approx(row["reward/mean"])
        assert row["objective/scores"] == pytest.approx(row["reward/mean"])
    samples = defaultdict(list)
    for sample in lines(out / "samples.jsonl"):
        assert (
            (sample["reward"] is not None) == int(sample["prompt"][1]) % 2 == len(sample["parts"])
        )
        assert sample["notes"] == {"seen": sample["prompt"] + sample["response"]}
        samples[sample["step"]].append(sample["reward"])
    for row in history[::2]:
        told = [reward for reward in samples[row["step"]] if reward is not None]
        assert row["held_out/reward/mean"] == pytest.approx(sum(told) / len(told))
    assert (out / "report.html").exists()


@pytest.mark.filterwarnings("ignore:`scores` must be numbers for some")
@pytest.mark.usefixtures("no_pictures")
def test_a_run_in_which_nothing_has_a_say_at_first(folder, tmp_path):
    def late(texts):
        late.calls += 1
        return [1.0 if late.calls > 2 and row else None for row, _ in enumerate(texts)]

    late.calls = 0
    settings = {"config": CONFIG, "max_new_tokens": 5, "steps": 3, "held_out": 3, "eval_every": 9}
    _, history = trl.train(str(folder / "model"), ROWS, late, **settings, out=tmp_path / "run")
    start, none, *others = history
    assert not any(name.startswith(("held_out/reward", "reward/")) for name in {**start, **none})
    assert none["ppo/updates"] == none["response/counted"] == 0
    assert all(row["ppo/updates"] > 0 and row["reward/mean"] == 1 for row in others)
    assert history[-1]["held_out/reward/mean"] == 1
