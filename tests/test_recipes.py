"""The recipes that ship: all of them load, and those that need no network run, shortened."""

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.llama2c import load_model, load_tokenizer
from tests.training.runs import lines
from trl import config as settings
from trl.config.folder import recipe_folder
from trl.config.recipe import STARTER, TASKS, Recipe
from trl.training.run import run_recipe

FILES = sorted(recipe_folder().glob("*.yaml"))
NAMES = [file.stem for file in FILES]


def load(name):
    values = settings.read_yaml(recipe_folder() / f"{name}.yaml")
    return settings.build(TASKS.get(values.get("task"), Recipe), values)


def shortened(recipe, out):
    """The same recipe with fewer and smaller steps."""
    group = recipe.sampling.group_size
    written = {"model_prompts": 16} if recipe.data.prompts == "model" else {}
    return replace(
        recipe,
        data=replace(recipe.data, held_out=4, **written),
        sampling=replace(recipe.sampling, max_new_tokens=4),
        ppo=replace(
            recipe.ppo,
            batch_size=4 * group,
            minibatch_size=2 * group,
            precision="fp32",
            forward_batch_size=8,
        ),
        steps=2,
        eval_every=1,
        out=str(out),
        quiet=True,
    )


def test_there_are_those_that_the_documentation_names():
    assert set(NAMES) >= {
        "chat-reward",
        "gsm8k",
        "guess-number",
        "json-object",
        "reviews-real",
        "reward-chat",
        "imdb-classifier",
        "imdb-classifier-starter",
        "sentiment",
        "sentiment-control",
        "sentiment-control-gpt2",
        "sentiment-gpt2",
        "sentiment-grpo",
        "sentiment-lora",
        "sentiment-rloo",
        "stories",
        "toy-token",
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_its_header_says_what_to_expect(name):
    recipe = load(name)
    assert recipe.out == f"runs/{name}"
    text = (recipe_folder() / f"{name}.yaml").read_text()
    header = text[: re.search(r"^[a-z]", text, re.MULTILINE).start()]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"trl train {name}" in header
    for part in ("hardware", "time", "result"):
        (told,) = re.findall(rf"^# {part} +(\S.*)$", header, re.MULTILINE)
        assert len(told) > 5
    # What it says is what is meant: nothing that is the default anyway by another name.
    assert yaml.safe_load(text).keys() <= set(settings.as_mapping(recipe)), name


def offline():
    for name in NAMES:
        recipe = load(name)
        if type(recipe) is Recipe and recipe.model.name == STARTER:
            yield name


SLOW = ("sentiment-rloo", "sentiment-lora", "sentiment-control")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in offline()],
)
@pytest.mark.usefixtures("no_pictures")
def test_it_runs_without_a_network(name, tmp_path):
    if "lora" in name:
        pytest.importorskip("peft")
    result = run_recipe(shortened(load(name), tmp_path / "run"))
    assert result.steps == 2
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.usefixtures("no_pictures")
def test_a_recipe_of_the_hub_runs_on_a_model_of_this_machine(shared, tmp_path):
    folder = shared / "data" / "stories260K"
    load_model(folder / "stories260K.bin").save_pretrained(tmp_path / "model")
    load_tokenizer(folder / "tok512.bin", 512).save_pretrained(tmp_path / "model")
    recipe = load("stories")
    recipe = replace(recipe, model=replace(recipe.model, name=str(tmp_path / "model")))
    result = run_recipe(shortened(recipe, tmp_path / "run"))
    assert result.steps == 2
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert len({sample["prompt"] for sample in samples}) == 4


@pytest.mark.parametrize("name", ["json-object", "chat-reward"])
@pytest.mark.usefixtures("no_pictures")
def test_the_recipes_of_chat_models_run_on_one(name, tmp_path, chat_model):
    recipe = load(name)
    prompts = recipe_folder() / recipe.data.prompts
    assert len(prompts.read_text().splitlines()) > 300
    recipe = replace(
        recipe,
        model=replace(recipe.model, name=str(chat_model)),
        data=replace(recipe.data, prompts=str(prompts), limit=20),
    )
    result = run_recipe(shortened(recipe, tmp_path / "run"))
    assert result.steps == 2
    (row, *_) = lines(tmp_path / "run" / "samples.jsonl")
    assert "reward" in row
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["ppo/auto_rate/target"] > 0


def test_the_game_of_recipes_runs_on_a_chat_model(tmp_path, chat_model):
    recipe = load("guess-number")
    recipe = replace(recipe, model=replace(recipe.model, name=str(chat_model)))
    recipe = replace(recipe, data=replace(recipe.data, limit=16))
    assert run_recipe(shortened(recipe, tmp_path / "run")).steps == 2
    figures = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert figures["stop/done"] + figures["stop/turns"] == 1
    assert 1 <= figures["episode/turns"] <= 4


def test_word_problems_are_made_for_a_recipe_that_runs_on_them(tmp_path, chat_model):
    pytest.importorskip("math_verify")
    made = runpy.run_path(str(recipe_folder() / "word_problems.py"))
    made["main"](tmp_path, 20, 8)
    train, test = (lines(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert (len(train), len(test)) == (20, 8)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    calculator = runpy.run_path(str(recipe_folder() / "gsm8k.py"))["Solver"]().calculator
    for row in train + test:
        steps = re.findall(r"= <<(.+?)=(\d+)>>(\d+)", row["answer"])
        assert len(steps) == 2
        assert all(calculator(term) == told == number for term, told, number in steps)
        assert row["answer"].endswith(f"\n#### {steps[-1][1]}")

    recipe = load("gsm8k")
    files = {"prompts": tmp_path / "train.jsonl", "held_out_prompts": tmp_path / "test.jsonl"}
    data = replace(recipe.data, **{key: str(path) for key, path in files.items()})
    recipe = replace(recipe, data=data, model=replace(recipe.model, name=str(chat_model)))
    recipe = replace(recipe, sampling=replace(recipe.sampling, group_size=2))
    assert run_recipe(shortened(recipe, tmp_path / "run")).steps == 2
    with (tmp_path / "run" / "samples.jsonl").open(encoding="utf-8") as samples:
        row = json.loads(next(samples))
    first, *_, last = (each["content"] for each in row["messages"])
    assert last == f"Write a call of the calculator for: {first}"
    assert "math" in row["parts"]


def test_the_game_of_recipes_is_won_in_four_guesses_and_says_what_is_possible():
    kind = runpy.run_path(str(recipe_folder() / "guess.py"))["Guess"]
    for number in range(1, 16):
        game = kind()
        first = game.reset(seed=0)
        assert [each["role"] for each in first] == ["user", "assistant"] * 3 + ["user"]
        game.number = number
        for _ in range(4):
            turn = game.step(str((game.low + game.high) // 2))
            if turn.done:
                break
            assert (turn.reward, f"from {game.low} to {game.high}." in turn.observation) == (
                0,
                True,
            )
        assert (turn.done, turn.reward) == (True, 1.0), number
    game.reset(seed=0)
    game.number = 9
    assert game.step("8").reward == 0
    for text in ("8", "no idea", "7 or 12", "16"):  # ruled out, none, two, beyond
        assert game.step(text).reward == -0.2
    assert (game.low, game.high) == (9, 15)
    numbers = set()
    for seed in range(20):
        game.reset(seed=seed)
        numbers.add(game.number)
    assert len(numbers) > 5


def test_the_calculator_of_word_problems_works_out_numbers_alone():
    calculator = runpy.run_path(str(recipe_folder() / "gsm8k.py"))["Solver"]().calculator
    told = {"3 * 25 - 8": "67", "7/2": "3.5", "(1 + 2) * 0.1": "0.3", "-4": "-4"}
    assert {term: calculator(term) for term in told} == told
    for term in ("2**9", "abs(-1)", "True", "'a' * 9", "1e99 + 1"):
        with pytest.raises(ValueError, match="only numbers"):
            calculator(term)


@pytest.fixture
def chat_model(tmp_path):
    """The tiny Llama with the starter's tokenizer and a chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.families import tiny_config
    from trl import starter

    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = tiny_config("llama")
    config.update({"vocab_size": len(tokenizer), "max_position_embeddings": 512})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_the_reward_functions_of_recipes():
    from trl.training.named import load_function

    the = load_function("rewards.py:word_the", "reward[0].name")
    assert the(["The cat and the dog", "Other"]) == [2.0, 0.0]
    asked = ['Give me "name" and "age".', 'user: "name" and "age", please']
    answers = ['{"name": 1, "age": 2}', '{"name": "age"']
    function = load_function("rewards.py:json_object", "reward[0].name")
    assert function(asked, answers) == [1.0, 0.4]
    assert function(asked, ["{}", "a list"]) == [0.5, 0.0]
    polite = load_function("rewards.py:polite_and_short", "reward[0].name")
    fifteen = "Thank you for asking and welcome " + "word " * 9
    assert polite([fifteen, "word " * 30]) == [2.0, -1.0]
    happy = load_function("rewards.py:happy_words", "reward[0].name")
    assert happy(["sad", "a happy, HAPPY friend", "happy fun friend"]) == [0.0, 1.5, 1.75]
    with pytest.raises(ValueError, match=r"`reward\[0\].name` .* no function 'word_teh'.*word_the"):
        load_function("rewards.py:word_teh", "reward[0].name")
    with pytest.raises(ValueError, match=r"`reward\[1\].name` must name a file that is there"):
        load_function(str(Path("none") / "mine.py:f"), "reward[1].name")
    with pytest.raises(
        ValueError, match=r"`reward\[1\].name` must name a module .* 'no_such_module'"
    ):
        load_function("no_such_module:f", "reward[1].name", trust=["no_such_module"])
