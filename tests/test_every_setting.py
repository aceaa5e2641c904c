"""Every setting acts: to change one changes what comes out.

`CASES` has an entry for each setting of a recipe, those of PPO included: the settings that it acts
beside, another value, and what to look at. Those of speed and memory are looked at by what they are
for; all others by numbers or texts of the result.
"""

import io
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import ragged, tiny_gpt2
from tests.families import tiny_model
from tests.rollout.tokenizers_for_tests import CHAT_TEMPLATE
from tests.training.runs import lines, make_parts, without_time
from tests.training.test_loop import tokenizer
from trl import starter
from trl.batch import Rollout
from trl.compute import updater
from trl.compute.precision import make_accelerator
from trl.config import PPOConfig, build, paths
from trl.config.recipe import Recipe
from trl.data.pretraining import PretrainingText
from trl.ppo import PPOTrainer
from trl.training import run as running
from trl.training.named import load_scorer
from trl.training.parts import Parts, seeded

# -- what a setting may act on: each takes settings by their paths, and returns what to compare ----

GROUPS = [0, 0, 1, 1, 2, 2]


def trainer_of(settings: dict[str, Any], **more: Any) -> tuple[PPOTrainer, Rollout]:
    """A trainer by hand, and ragged rows in groups, of which some ended by themselves."""
    defaults = {"precision": "fp32", "batch_size": 6, "minibatch_size": 3, "ppo_epochs": 1}
    given = {name.removeprefix("ppo."): value for name, value in settings.items()}
    if "pretraining_coef" in given:
        more["pretraining"] = lambda rows: ragged([4, 2, 6, 3, 5][:rows])
    config = PPOConfig(**defaults | {"learning_rate": 0.02} | given)
    three, responses = ragged([3, 5, 2]), ragged([4, 1, 7, 2, 6, 3], seed=5)
    rollout = Rollout.from_lists([three[g] for g in GROUPS], responses, group_ids=GROUPS)
    trainer = PPOTrainer(tiny_gpt2(1), tiny_gpt2(0), config, **more)
    return trainer, replace(rollout, ended=torch.arange(6) % 2 == 0)


def step(settings: dict[str, Any], folder: Path, number: int = 1) -> Any:
    """Figures and weights of a step by hand."""
    trainer, rollout = trainer_of(settings)
    scores = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, 3.0])
    found = []
    for n in range(number):
        if "ppo.reuse_recorded" in settings:  # a little off, as those of a sampler are
            output = trainer.forward_pass(trainer.policy, rollout)
            recorded = {"behaviour_logprobs": output.logprobs - 1e-4, "values": output.values}
            rollout = replace(rollout, **recorded)
        found.append(untimed(trainer.step(rollout, scores * (1 + n))))
    return found, [float(weight.double().sum()) for weight in trainer.model.parameters()]


def two_steps(settings: dict[str, Any], folder: Path) -> Any:
    """The same of two steps, for what one hands on to the next."""
    return step(settings, folder, 2)


def warned(settings: dict[str, Any], folder: Path) -> Any:
    """What a step says, or why it is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            step(settings, folder)
        except RuntimeError as error:
            return str(error)
    return [str(warning.message) for warning in caught]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    (row,) = without_time([row])
    return {name: value for name, value in row.items() if isinstance(value, float)}


def passes(settings: dict[str, Any], folder: Path) -> Any:
    """How many passes of the policy a step takes."""
    trainer, rollout = trainer_of(settings)
    seen: list[int] = []
    trainer.model.transformer.register_forward_hook(lambda *_: seen.append(1))
    trainer.step(rollout, torch.arange(6.0))
    return len(seen)


def kept_memory(settings: dict[str, Any], folder: Path) -> Any:
    """How often the process is asked to keep what it frees; not really, which lasts."""
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(updater, "keep_freed_memory", lambda: asked.append(1))
        trainer_of(settings)
    return len(asked)


def patience(settings: dict[str, Any], folder: Path) -> Any:
    """For how many seconds processes are to wait for each other."""
    asked: list[float] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(updater, "watch_peers", lambda accelerator, timeout: asked.append(timeout))
        trainer_of(settings)
    return asked


def recipe_of(settings: dict[str, Any], folder: Path) -> Recipe:
    """A recipe of the parts in the folder, {folder} standing for its path in every text."""
    own = {
        "model.name": "{folder}/model",
        "data.prompts": "{folder}/prompts.txt",
        "data.chat": False,
        "data.held_out": 4,
        "sampling.max_new_tokens": 6,
        "reward": [{"kind": "function", "name": "{folder}/reward.py:count_w7"}],
        "ppo.batch_size": 4,
        "ppo.minibatch_size": 2,
        "ppo.ppo_epochs": 1,
        "ppo.learning_rate": 0.02,
        "ppo.precision": "fp32",
        "steps": 2,
        "eval_every": 1,
        "out": "{folder}/run",
    }
    nested: dict[str, Any] = {}
    for path, value in (own | settings).items():
        *sections, name = path.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    text = json.dumps({k: v for k, v in nested.items() if v != "unset"})
    return build(Recipe, json.loads(text.replace("{folder}", str(folder))))


def prompts(settings: dict[str, Any], folder: Path) -> Any:
    """The prompts to train on, and those to measure on."""
    split = parts_of(settings, folder).prompts
    return split.train, split.held_out


def parts_of(settings: dict[str, Any], folder: Path) -> Parts:
    recipe = recipe_of(settings, folder)
    return Parts.of_recipe(recipe, make_accelerator(recipe.ppo.precision))


def first_step(settings: dict[str, Any], folder: Path) -> Any:
    """What the first step of a run writes, and its figures."""
    parts = parts_of(settings, folder)
    row = untimed(parts.loop.step())
    return row, parts.loop.rollout.query_lists(), parts.loop.rollout.response_lists()


def two_steps_of_a_run(settings: dict[str, Any], folder: Path) -> Any:
    """The figures of two steps, for what only the second one shows."""
    parts = parts_of(settings, folder)
    return [untimed(parts.loop.step()) for _ in range(2)]


def rows_written(settings: dict[str, Any], folder: Path) -> Any:
    """How many rows each pass of the sampler has."""
    parts, seen = parts_of(settings, folder), []
    model = parts.model.language_model
    model.register_forward_hook(lambda *found: seen.append(len(found[2].logits)))
    parts.loop.sampler(parts.model, parts.prompts.train[:4])
    return max(seen)


def scored(settings: dict[str, Any], folder: Path) -> Any:
    """What the scorers of training and evaluation make of some texts."""
    texts = ("w1 a fine film", "w2 the worst w7", "w1 w7 w7", "w2 dull")
    rollout = Rollout.from_lists(*[torch.ones(4, 1, dtype=torch.long)] * 2)
    rollout = replace(rollout, query_texts=tuple(t[:3] for t in texts))
    rollout = replace(rollout, response_texts=tuple(t[3:] for t in texts))
    found = []
    for scorer in load_scorer(recipe_of(settings, folder).reward):
        result = scorer(rollout)
        found.append((result.scores.tolist(), {k: v.tolist() for k, v in result.parts.items()}))
    return found


def text_rows(settings: dict[str, Any], folder: Path) -> Any:
    """The rows of text for the pretraining loss."""
    recipe = recipe_of({"ppo.pretraining_coef": 1.0} | settings, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    source = PretrainingText(recipe.pretraining, tokenizer, seed=0)
    return [row.tolist() for row in source(3)]


def loaded(settings: dict[str, Any], folder: Path) -> Any:
    """The weights of the policy, or why there is none."""
    with pytest.MonkeyPatch.context() as patched, seeded(0):
        patched.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        patched.setattr(sys, "stdin", io.StringIO())  # nobody to ask whether code is trusted
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        patched.setattr("trl.training.parts.find_tokenizer", lambda *_, **__: tokenizer)
        try:
            model = parts_of(settings, folder).model
        except ValueError as error:
            return type(error).__name__
    return [float(weight.sum()) for weight in model.parameters()]


def adapter(settings: dict[str, Any], folder: Path) -> Any:
    """What is saved of an adapter; its dropout acts where others train it further."""
    model = parts_of(settings, folder).model
    return {
        key: str(value)
        for key, value in model.language_model.peft_config["default"].to_dict().items()
    }


def sharding(settings: dict[str, Any], folder: Path) -> Any:
    """What the trainer is told of the weights' place; one process alone holds them all."""
    with mock.patch("trl.ppo.make_updater", wraps=updater.make_updater) as made:
        parts_of(settings, folder)
    return made.call_args.kwargs


def rollouts(settings: dict[str, Any], folder: Path) -> Any:
    """How many responses of each step a run has kept."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        result = running.run_recipe(recipe_of(settings, folder))
    return len(lines(result.folder / "rollouts.jsonl"))


def run(settings: dict[str, Any], folder: Path) -> Any:
    """A run: its figures, files and checkpoints, why it ended, and what it shows."""
    recipe = recipe_of(settings, folder)
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        result = running.run_recipe(recipe)
    rows = without_time(lines(result.folder / "metrics.jsonl"))
    files = {
        (str(path.relative_to(folder)), path.name == "state.pt" and path.stat().st_size)
        for path in folder.rglob("*")
        if not path.name.startswith("events")
    }
    best = [float(t.double().sum()) for t in result.model.parameters()]
    kept = result.summary | {"seconds": 0}
    return json.dumps(rows), files, best, str(kept.get("best")), shown.getvalue() != ""


def tracked(settings: dict[str, Any], folder: Path) -> Any:
    """What a tracker is told of a run when it starts."""
    told: list[Any] = []

    class Recorder:
        name = "wandb"

        def __init__(self, project, **how):
            told.append((project, how["name"]))

        def start(self):
            pass

        log = log_table = lambda self, *_, **__: None
        finish = start

    pytest.importorskip("wandb")
    from trl.watch import tracking

    recipe = recipe_of({"tracking.to": ["wandb"], "steps": 1, "quiet": True} | settings, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tracking, "tracking", SimpleNamespace(WandBTracker=Recorder))
        running.run_recipe(recipe)
    return told


# -- the table -------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Another value of a setting, what it acts on, and the settings beside it."""

    value: Any
    """In place of the default, or of what is in `beside`. A mapping with dots in its keys: of
    several settings, where one cannot be without another."""
    result: Callable[[dict[str, Any], Path], Any] = step
    beside: dict[str, Any] = {}  # noqa: RUF012


GRPO = {"ppo.algorithm": "grpo"}
TEXT = {"ppo.pretraining_coef": 1.0}
AUTO = {"ppo.learning_rate": "auto"}
STALE = {"ppo.reuse_recorded": False}
FAST = {
    "ppo.learning_rate": 0.2,
    "ppo.max_grad_norm": None,
    "ppo.ppo_epochs": 3,
}  # far from the first weights
TABLE = {"data.prompts": "{folder}/table.jsonl"}
LORA = {"model.lora": {"rank": 2}}
CONTROL = {
    "reward": [{"kind": "control", "targets": {"w1 ": [0.9, 1.0], "w2 ": [0.0, 0.2]}}],
    "data.prefixes": ["w1 ", "w2 "],
}
CLASSIFIER = {"reward": [{"kind": "classifier"}]}
REPETITION = {"reward": [{"kind": "repetition"}]}
FUNCTION = {"kind": "function", "name": "{folder}/reward.py:count_w7"}
GAME = {"environment": {"name": "{folder}/game.py:Game"}}
TOOLS = {
    "environment": {"tools": ["{folder}/game.py:w3"], "call_format": r"(?P<name>w[3-6])"},
}
PRETRAINING = {"pretraining.text": "{folder}/table.jsonl", "pretraining.tokens": 4}
WRITTEN = {"data.prompts": "model", "data.model_prompts": 12, "data.min_tokens": 1}
NO_GAIN = {
    "stop.patience": 1,
    "stop.min_gain": 100.0,
    "checkpoints.best": "held_out/kl",
    "steps": 3,
}

CASES = {
    "model.name": Case("{folder}/other", first_step),
    "model.revision": Case("other", loaded, {"model.name": "tiny/hub"}),
    "model.gguf_file": Case("tiny.gguf", loaded, {"model.name": "{folder}/gguf"}),
    "model.dtype": Case("bfloat16", loaded, LORA),
    "model.tokenizer": Case("{folder}/other", first_step),
    "model.trust_remote_code": Case(True, loaded, {"model.name": "{folder}/code"}),
    "model.unfrozen_layers": Case(1, first_step),
    "model.lora": Case({"rank": 2}, first_step),
    "model.lora.rank": Case(4, first_step, LORA),
    "model.lora.alpha": Case(4.0, first_step, LORA),
    "model.lora.dropout": Case(0.5, adapter, LORA),
    "model.lora.target_modules": Case("q_proj", first_step, LORA),
    "model.reference": Case("none", first_step, {"ppo.init_kl_coef": 0.0}),
    "model.critic": Case("copy", two_steps_of_a_run),
    "model.value_head": Case("bins", two_steps_of_a_run),
    "model.value_range": Case([-1.0, 1.0], two_steps_of_a_run, {"model.value_head": "bins"}),
    "model.shard": Case(True, sharding),
    "model.offload": Case(True, sharding, {"model.shard": True}),
    "data.prompts": Case("{folder}/table.jsonl", prompts),
    "data.shuffle_buffer": Case(8, first_step),
    "data.subset": Case("b", prompts, {"data.prompts": "{folder}/set", "data.subset": "a"}),
    "data.split": Case("test", prompts, {"data.prompts": "{folder}/splits"}),
    "data.column": Case("other", prompts, TABLE),
    "data.template": Case("w3 {text}", prompts),
    "data.chat": Case(True, prompts),
    "data.system": Case("w5 w5", prompts, {"data.chat": True}),
    "data.chat_template_kwargs": Case({"extra": True}, first_step, {"data.chat": True}),
    "data.prefixes": Case(["w1 ", "w2 "], prompts),
    "data.cut_tokens": Case([1, 2], prompts),
    "data.min_tokens": Case(3, prompts),
    "data.max_tokens": Case(3, prompts),
    "data.limit": Case(10, prompts),
    "data.held_out": Case(2, prompts),
    "data.held_out_prompts": Case("{folder}/table.jsonl", prompts),
    "data.deduplicate": Case(False, prompts),
    "data.shuffle": Case(False, prompts),
    "data.model_prompts": Case(16, prompts, WRITTEN),
    "data.model_prompt_tokens": Case([5, 6], prompts, WRITTEN),
    "sampling.max_new_tokens": Case(3, first_step),
    "sampling.shortest_limit": Case(1, first_step),
    "sampling.group_size": Case(2, first_step),
    "sampling.eos": Case(False, first_step, {"sampling.max_new_tokens": 24}),
    "sampling.stop_strings": Case([" w"], first_step),
    "sampling.add_bos": Case(False, first_step),
    "sampling.max_rows": Case(1, rows_written),
    "sampling.parts": Case(
        2, first_step, {"reward": [FUNCTION | {"name": "{folder}/reward.py:counting"}]}
    ),
    "environment": Case(GAME["environment"], first_step),
    "environment.name": Case("{folder}/game.py:Longer", first_step, GAME),
    "environment.tools": Case(["{folder}/game.py:w4"], first_step, TOOLS),
    "environment.max_turns": Case(1, first_step, GAME),
    "environment.max_tokens": Case(8, first_step, GAME),
    "environment.max_tool_calls": Case(1, first_step, TOOLS),
    "environment.call_format": Case(r"(?P<name>w3)", first_step, TOOLS),
    "environment.seconds": Case(0.001, first_step, TOOLS),
    "reward": Case([FUNCTION, FUNCTION | {"title": "again"}], scored),
    "reward.N.kind": Case(CONTROL, scored, CLASSIFIER),
    "reward.N.name": Case("{folder}/reward.py:counting", scored),
    "reward.N.label": Case("NEGATIVE", scored, CLASSIFIER),
    "reward.N.output": Case("probability", scored, CLASSIFIER),
    "reward.N.weight": Case(2.0, scored),
    "reward.N.title": Case("w7s", scored),
    "reward.N.targets": Case({"w1 ": [0.2, 0.8], "w2 ": [0.0, 0.2]}, scored, CONTROL),
    "reward.N.target_weights": Case({"w1 ": 3.0}, scored, CONTROL),
    "reward.N.arguments": Case({"ngram": 1}, scored, REPETITION),
    "ppo.algorithm": Case("rloo"),
    "ppo.policy_loss": Case("cispo"),
    "ppo.aggregate": Case("sequence"),
    "ppo.aggregate_length": Case(
        20, step, {"ppo.aggregate": "constant", "ppo.aggregate_length": 10}
    ),
    "ppo.dual_clip": Case(1.01, step, FAST | {"ppo.ratio_threshold": 1e9}),
    "ppo.learning_rate": Case(0.01),
    "ppo.auto_approxkl": Case(0.001, two_steps, AUTO),
    "ppo.auto_initial_rate": Case(1e-3, step, AUTO),
    "ppo.auto_rate_bounds": Case([1e-3, 1e-2], step, AUTO),
    "ppo.value_learning_rate": Case(0.5),
    "ppo.adam_eps": Case(1e-3),
    "ppo.tf_adam": Case(True, step, {"ppo.adam_eps": 1e-3}),
    "ppo.adaptive_kl": Case(False, two_steps),
    "ppo.init_kl_coef": Case(0.1),
    "ppo.kl_target": Case(0.1, two_steps),
    "ppo.kl_horizon": Case(100.0, two_steps),
    "ppo.kl_in": Case("loss"),
    "ppo.kl_estimator": Case("k3"),
    "ppo.gamma": Case(0.9),
    "ppo.gae_lambda": Case(0.5),
    "ppo.gae_lambda_value": Case(0.5),
    "ppo.length_adaptive": Case(0.3),
    "ppo.cliprange": Case(0.01),
    "ppo.cliprange_high": Case(0.01),
    "ppo.cliprange_value": Case(0.01),
    "ppo.vf_coef": Case(1.0),
    "ppo.entropy_coef": Case(0.1),
    "ppo.value_warmup_steps": Case(1),
    "ppo.value_pretraining": Case(1),
    "ppo.positive_coef": Case(1.0),
    "ppo.positive_above": Case(1.5, step, {"ppo.positive_coef": 1.0}),
    "ppo.pretraining_coef": Case(1.0),
    "ppo.pretraining_rows": Case(2, step, TEXT),
    "ppo.batch_size": Case(24, step, {"ppo.minibatch_size": None}),
    "ppo.forward_batch_size": Case(1, passes),
    "ppo.token_budget": Case(1, passes),
    "ppo.minibatch_size": Case(2),
    "ppo.ppo_epochs": Case(2),
    "ppo.reuse_recorded": Case(False, step, {"ppo.reuse_recorded": True}),
    "ppo.correction": Case("tis", step, STALE),
    "ppo.correction_bounds": Case([0.0, 1.0], step, STALE | {"ppo.correction": "tis"}),
    "ppo.prob_error_warn": Case(1.00001, warned, STALE),
    "ppo.prob_error_stop": Case(1.00001, warned, STALE),
    "ppo.temperature": Case(0.7),
    "ppo.missing_eos_penalty": Case(1.0),
    "ppo.missing_eos_replaces": Case(True, step, {"ppo.missing_eos_penalty": 1.0}),
    "ppo.whiten_rewards": Case(True),
    "ppo.score_range": Case([0.0, 2.0]),
    "ppo.center_scores": Case(True),
    "ppo.scale_scores": Case(True),
    "ppo.clip_scores": Case(0.5),
    "ppo.max_grad_norm": Case(0.01),
    "ppo.ratio_threshold": Case(1.01, step, FAST),
    "ppo.max_approxkl": Case(1e-6),
    "ppo.precision": Case("bf16"),
    "ppo.keep_freed_memory": Case(False, kept_memory),
    "ppo.collective_timeout": Case(30.0, patience),
    "ppo.seed": Case(1),
    "steps": Case(1, run),
    "episodes": Case(4, run, {"steps": None, "episodes": 8}),
    "schedule.kind": Case("constant", run),
    "schedule.warmup_steps": Case(1, run),
    "schedule.final": Case(0.5, run),
    "eval_every": Case(2, run),
    "keep_rollouts": Case(1, rollouts),
    "checkpoints.every": Case(1, run),
    "checkpoints.keep": Case(1, run, {"checkpoints.every": 1, "steps": 3}),
    "checkpoints.keep_optimizer": Case(False, run),
    "checkpoints.best": Case(None, run),
    "checkpoints.mode": Case("min", run, {"checkpoints.best": "held_out/kl"}),
    "stop.kl": Case(1e-9, run),
    "stop.patience": Case(None, run, NO_GAIN),
    "stop.min_gain": Case(0.0, run, NO_GAIN),
    "pretraining.text": Case({"pretraining.text": "{folder}/prompts.txt"}, text_rows, PRETRAINING),
    "pretraining.subset": Case(
        "b",
        text_rows,
        PRETRAINING | {"pretraining.text": "{folder}/set", "pretraining.subset": "a"},
    ),
    "pretraining.split": Case(
        "test", text_rows, PRETRAINING | {"pretraining.text": "{folder}/splits"}
    ),
    "pretraining.column": Case("other", text_rows, PRETRAINING),
    "pretraining.tokens": Case(3, text_rows, PRETRAINING),
    "tracking.to": Case(["tensorboard"], run),
    "tracking.project": Case("mine", tracked),
    "tracking.name": Case("first", tracked),
    "seed": Case(1, first_step),
    "out": Case("{folder}/another", run),
    "profile": Case("{folder}/profile", run),
    "quiet": Case(True, run),
}


def write_gguf(folder: Path) -> None:
    """A model as an ordinary folder, and another one in a file of it."""
    from tests import test_gguf as others

    folder.mkdir()
    others.folder_of(folder / "made", others.byte_tokenizer())
    others.exporter.to_gguf(folder / "made", folder / "tiny.gguf")
    tiny_model("llama").save_pretrained(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Models, tokenizers, prompts and datasets on the disk."""
    import datasets

    folder = tmp_path_factory.mktemp("sources")
    make_parts(folder)
    ours, other = tokenizer(), tokenizer()
    ours.chat_template = CHAT_TEMPLATE + "{% if extra %} w9{% endif %}"
    ours.save_pretrained(folder / "model")
    tiny_model("llama", seed=1).save_pretrained(folder / "other")
    other.add_tokens(["w1w"])
    other.bos_token = "w57"
    other.save_pretrained(folder / "other")
    write_gguf(folder / "gguf")
    rows = [" ".join(f"w{n + m}" for m in range(1 + n % 5)) for n in range(1, 21)]
    (folder / "prompts.txt").write_text("\n".join([*rows, *rows[:3]]) + "\n")
    table = [{"text": row, "other": f"w50 {row}"} for row in rows[::-1]]
    written = {
        name: "\n".join(map(json.dumps, part))
        for name, part in zip("ab", (table, table[::2]), strict=True)
    }
    (folder / "table.jsonl").write_text(written["a"])
    (folder / "set").mkdir()
    configs = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab"]
    (folder / "game.py").write_text(
        "import time\n"
        "from trl.environments import Turn\n"
        "class Game:\n"
        "    last = 2\n"
        "    def reset(self):\n        self.turn = 0\n"
        "    def step(self, text) -> Turn:\n"
        "        self.turn += 1\n"
        "        return Turn(' w5', reward=1.0, done=self.turn == self.last)\n"
        "class Longer(Game):\n    last = 3\n"
        "def w3() -> str:\n    'Say w3.'\n    time.sleep(0.05)\n    return ' w3'\n"
        "def w4() -> str:\n    'Say w4.'\n    return ' w4'\n"
    )
    (folder / "set" / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    for name in "ab":
        (folder / "set" / f"{name}.jsonl").write_text(written[name])
    halves = {"train": table[:10], "test": table[10:]}
    splits = {name: datasets.Dataset.from_list(half) for name, half in halves.items()}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "splits"))
    hub = folder / "hub" / "models--tiny--hub"
    for seed, name in enumerate(("main", "other")):
        (hub / "refs").mkdir(parents=True, exist_ok=True)
        (hub / "refs" / name).write_text(f"{seed}" * 40)
        tiny_model("llama", seed).save_pretrained(hub / "snapshots" / (f"{seed}" * 40))
    tiny_model("llama").save_pretrained(folder / "code")
    config = json.loads((folder / "code" / "config.json").read_text())
    mine = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "code" / "config.json").write_text(
        json.dumps(config | {"model_type": "mine", "auto_map": mine})
    )
    (folder / "code" / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Pictures take seconds, and have tests of their own."""
    monkeypatch.setattr(running, "write_report", lambda runs, out: out / "report.html")


def test_every_setting_has_an_entry():
    assert list(CASES) == [setting.path for setting in paths(Recipe)]
    assert starter.CLASSIFIER.is_dir()


FOUND: dict[str, Any] = {}


def what_comes_out(result, settings, sources, tmp_path) -> Any:
    """The result, kept for the next setting that is looked at beside the same ones."""
    key = f"{result.__name__} {json.dumps(settings)}"
    if key not in FOUND:
        folder = tmp_path / f"{len(FOUND)}"
        folder.mkdir()
        for part in sources.iterdir():
            (folder / part.name).symlink_to(part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = result(settings, folder)
        FOUND[key] = json.dumps(found, default=str).replace(str(folder), "")
    return FOUND[key]


def with_value(settings: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and any("." in key or key == "reward" for key in value):
        return settings | value
    if name.startswith("model.lora."):
        return settings | {"model.lora": settings["model.lora"] | {name.split(".")[-1]: value}}
    if name.startswith("environment."):
        of_section = settings["environment"] | {name.split(".")[-1]: value}
        return settings | {"environment": of_section}
    if name.startswith("reward.N."):
        (scorer,) = settings.get("reward", [FUNCTION])
        return settings | {"reward": [scorer | {name.split(".")[-1]: value}]}
    return settings | {name: value}


@pytest.mark.parametrize("name", CASES)
def test_a_setting_acts(name, sources, tmp_path):
    case = CASES[name]
    before = what_comes_out(case.result, case.beside, sources, tmp_path)
    changed = with_value(case.beside, name, case.value)
    assert changed != case.beside
    assert what_comes_out(case.result, changed, sources, tmp_path) != before


@pytest.mark.parametrize(
    "result", [step, prompts, first_step, run, scored], ids=lambda f: f.__name__
)
def test_what_comes_out_follows_from_the_settings_alone(result, sources, tmp_path):
    first = what_comes_out(result, {}, sources, tmp_path)
    FOUND.clear()
    assert what_comes_out(result, {}, sources, tmp_path) == first
