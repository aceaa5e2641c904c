"""What older releases called things: each says what it is here, at once."""

import importlib
import re
from pathlib import Path

import pytest

import trl
from tests.conftest import tiny_gpt2
from trl import CausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.config import moved
from trl.config.ppo import PPOConfig as Fields

GUIDE = (Path(__file__).parents[1] / "docs" / "moving.md").read_text()
IMPORTS = [f"from trl import {name}" for name in moved.NAMES]
IMPORTS += [f"from {module} import anything" for module in moved.MODULES]
IMPORTS += [f"import {module}.inner" for module in moved.MODULES]
IMPORTS += ["from trl.core import set_seed, LengthSampler", "from trl.core import respond_to_batch"]


@pytest.mark.parametrize("line", IMPORTS)
def test_an_old_import_says_what_it_is(line):
    with pytest.raises(ImportError, match="of TRL (is|belongs|goes)"):
        exec(line)


def test_other_names_are_the_errors_that_they_were():
    assert not hasattr(trl, "no_such_name")
    with pytest.raises(ImportError, match="cannot import name 'no_such_name'"):
        from trl import no_such_name  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="No module named 'trl.no_such_module'"):
        importlib.import_module("trl.no_such_module")


@pytest.mark.parametrize("name", moved.ARGUMENTS)
def test_an_old_argument_says_what_it_is(name):
    for config in (None, PPOConfig()):
        with pytest.raises(TypeError, match=f"`{name}` of TRL"):
            PPOTrainer(config=config, model=tiny_gpt2(0), **{name: object()})


def test_the_old_order_is_named():
    config, model = PPOConfig(), tiny_gpt2(0)
    for arguments in ((config, model), (config, model, None, "tokenizer")):
        with pytest.raises(TypeError, match="`model` must stand first.*order of older releases"):
            PPOTrainer(*arguments)


def test_an_old_method_says_what_it_is():
    trainer = PPOTrainer(tiny_gpt2(0), batch_size=4)
    for name in moved.METHODS:
        with pytest.raises(AttributeError, match=f"`PPOTrainer.{name}` of TRL"):
            getattr(trainer, name)
    assert not hasattr(trainer, "no_such_name")


@pytest.mark.parametrize("name", moved.LOADING)
def test_an_old_argument_of_loading_says_what_it_is(name):
    with pytest.raises(TypeError, match=f"`{name}` of TRL"):
        CausalLMWithValueHead.from_pretrained(trl.starter.LANGUAGE_MODEL, **{name: 1})


@pytest.mark.parametrize("name", moved.FIELDS)
def test_an_old_field_says_what_it_is(name):
    assert name not in Fields.known_names()
    with pytest.raises(TypeError, match=f"no field `{name}`. That of TRL"):
        PPOConfig(**{name: 1})


def test_what_is_named_as_new_is_there():
    told = " ".join([*moved.NAMES.values(), *moved.ARGUMENTS.values(), *moved.METHODS.values()])
    for name in re.findall(r"\b(?:CausalLM|Seq2SeqLM|PPO|RewardModel)\w+", told):
        assert hasattr(trl, name), name
    for place in re.findall(r"\btrl\.[\w.]+\w", told):
        owner, _, name = place.rpartition(".")
        assert hasattr(importlib.import_module(owner), name), place


def test_the_guide_knows_of_all_that_was_asked_for():
    for name in (
        *("TextEnvironment", "BestOfNSampler", "reward_adapter", "RewardTrainer", "set_seed"),
        *("is_trainable", "256 unless said, there 128"),
    ):
        assert name in GUIDE, name
    assert PPOConfig().batch_size == 256
