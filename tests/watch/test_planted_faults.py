"""Runs with a planted fault, each of which a diagnosis names."""

import itertools
import re
import warnings

import pytest
import torch
from transformers import GenerationConfig

import trl
from tests.families import tiny_model
from tests.training.test_loop import tokenizer
from trl.environments import Turn

PROMPTS = ["w3 w4", "w5 w6", "w7 w8", "w9 w10", "w11 w12", "w13", "w14 w15", "w16"]
SLOW = pytest.mark.slow
STILL = {"learning_rate": 1e-5, "init_kl_coef": 0.05, "adaptive_kl": False}
FREE = {"learning_rate": 1e-2, "init_kl_coef": 0.0, "adaptive_kl": False}


def named(model, reward, *, steps, prompts=PROMPTS, words=None, **settings):
    """The names of what was found in a run."""
    torch.manual_seed(0)
    fixed = {"batch_size": 16, "minibatch_size": 8, "ppo_epochs": 2, "precision": "fp32"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {"tokenizer": words, "max_new_tokens": 8} | fixed | settings
        trl.train(model, prompts, reward, steps=steps, **given)
    told = [re.match(r"trl\.train, step \d+: ", str(warning.message)) for warning in caught]
    return [str(w.message)[t.end() :] for w, t in zip(caught, told, strict=True) if t]


def same(texts):
    return [1.0] * len(texts)


def never(texts):
    return [0.0] * len(texts)


def lookup(word: str) -> str:
    """Look a word up.

    Args:
        word: Any.
    """
    return word


class Endless:
    """A game without an end."""

    def reset(self) -> None:
        """Begin."""

    def step(self, text: str) -> Turn:
        """Go on, whatever is said."""
        return Turn("w3", float(len(text)))


def count(*words):
    return lambda texts: [float(sum(text.split().count(w) for w in words)) for text in texts]


def chance():
    draw = torch.Generator().manual_seed(5)
    return lambda texts: torch.randn(len(texts), generator=draw).tolist()


def by_step(of_step, noise=0.1):
    """A reward that depends on how often it was asked, and hardly on the text."""
    calls, draw = itertools.count(), torch.Generator().manual_seed(5)
    return lambda texts: (
        of_step(next(calls)) + noise * torch.randn(len(texts), generator=draw)
    ).tolist()


def eos_by(shift):
    """A model that writes its EOS more or less often than it would."""
    model = tiny_model("phi")  # which has a bias there
    model.lm_head.bias.data[1] += shift
    return model


def noisy(size):
    def shaken(module, given, logits):
        return logits + size * torch.randn_like(logits)

    model = tiny_model("llama")
    model.lm_head.register_forward_hook(shaken)
    return model


def with_generation_config(**settings):
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(do_sample=True, **settings)
    return model


def with_chat_template():
    words = tokenizer()
    words.chat_template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2 "
    return words


CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]

# What is planted: the words that name it, the steps, and how the run differs from others.
PLANTED = {
    "constant_score": ("All responses of a batch get the same score", 4, {"reward": same} | STILL),
    "updates_without_signal": ("All responses of the batch got the same", 1, {"reward": same}),
    "no_group_signal": (
        "The responses to each prompt all get the same score",
        4,
        {
            "reward": lambda texts: [float("w3" in text.split()[:1]) for text in texts],
            "algorithm": "rloo",
            "sampler_kwargs": {"group_size": 2},
        }
        | STILL,
    ),
    "update_too_large": ("One step changed the policy beyond", 1, FREE | {"learning_rate": 1.0}),
    "updates_skipped": ("No update was applied", 3, STILL | {"max_approxkl": 1e-30}),
    "clip_fraction": ("The clip cuts off", 4, FREE | {"cliprange": 1e-4, "learning_rate": 1e-3}),
    "gradient_clipped": ("The gradient's norm has been", 10, STILL | {"max_grad_norm": 1e-4}),
    "answers_cut": (
        "Of the answers to chats",
        5,
        STILL | {"prompts": CHATS, "model": lambda: eos_by(-20.0), "words": with_chat_template},
    ),
    "never_ends": (
        "Hardly a response ends by itself",
        5,
        STILL | {"model": lambda: eos_by(-20.0), "missing_eos_penalty": 1.0},
    ),
    "rate_at_bound": (
        "The rate that sets itself",
        6,
        {"learning_rate": "auto", "auto_rate_bounds": (1e-9, 1e-8)},
    ),
    "reward_falling": (
        "The mean reward has fallen",
        12,
        STILL | {"reward": by_step(lambda step: -0.3 * step)},
    ),
    "ratio_not_one": (
        "Before the first update of a step",
        5,
        STILL | {"model": lambda: noisy(4e-4)},
    ),
    "negative_kl": (  # the policy is surer of the end than its reference, and may not write it
        "The KL to the reference is negative",
        10,
        STILL
        | {
            "model": lambda: eos_by(20.0),
            "ref_model": lambda: tiny_model("phi"),
            "sampler_kwargs": {"min_new_tokens": 8},
        },
    ),
    "sampler_cuts": ("The sampler draws from a cut", 1, STILL | {"sampler_kwargs": {"top_k": 5}}),
    "generation_config_cuts": (
        "The policy's generation_config has",
        1,
        STILL | {"model": lambda: with_generation_config(top_k=20)},
    ),
    "no_end": (
        "Responses are to end by themselves",
        1,
        STILL | {"missing_eos_penalty": 1.0, "sampler_kwargs": {"eos_token_id": None}},
    ),
    "kl_coef_stays_0": ("`adaptive_kl` is on", 1, FREE | {"adaptive_kl": True}),
    "part_never_varies": (
        "`never` has given 0 to every response of 10 steps",
        10,
        STILL | {"reward": [count("w7", "w8", "w9"), never]},
    ),
    "no_tool_called": (
        "No tool was called in the 32 conversations of 2 steps",
        2,
        STILL | {"prompts": CHATS, "words": with_chat_template, "tools": [lookup]},
    ),
    "conversations_cut": (
        "100% were cut at a limit (turns 100%)",
        2,
        STILL | {"environment": Endless, "environment_kwargs": {"max_turns": 2}},
    ),
}
LONGER = {
    "entropy_collapsed": (
        "The entropy of the policy has fallen",
        25,
        FREE | {"reward": count("w7")},
    ),
    "repeated_text": ("The responses repeat themselves", 25, FREE | {"reward": count("w7")}),
    "kl_runaway": (
        "The KL to the reference has gone",
        30,
        FREE | {"reward": count("w7"), "max_new_tokens": 24},
    ),
    "kl_above_target": (
        "times `kl_target`",
        12,
        FREE | {"adaptive_kl": True, "init_kl_coef": 1e-4, "kl_target": 0.1, "reward": count("w7")},
    ),
    "penalty_outweighs_reward": (
        "The KL penalty,",
        12,
        FREE | {"init_kl_coef": 20.0, "reward": chance()},
    ),
    "coefficient_cannot_act": (
        "its coefficient has hardly moved",
        22,
        STILL
        | {"adaptive_kl": True, "kl_target": 50.0, "kl_horizon": 10**7, "learning_rate": 1e-3},
    ),
    "texts_break": (
        "The reward has risen",
        30,
        FREE | {"reward": count(*(f"w{n}" for n in range(10, 18))), "learning_rate": 5e-3},
    ),
    "nothing_learned": (
        "Nothing was learnt in",
        45,
        STILL | {"reward": chance()} | {"learning_rate": 1e-3},
    ),
    "length_exploited": (
        "Responses have become longer",
        40,
        FREE
        | {
            "model": lambda: eos_by(3.0),
            "reward": lambda texts: [len(text.split()) / 4 for text in texts],
            "max_new_tokens": 24,
            "learning_rate": 3e-3,
        },
    ),
    "value_not_learning": (
        "the values explain nothing",
        31,
        STILL | {"reward": chance(), "vf_coef": 1e-9},
    ),
    "learning_rate_too_small": (
        "Updates hardly change the policy",
        21,
        STILL | {"reward": chance(), "learning_rate": 1e-9},
    ),
}
EVERY = [*PLANTED, *(pytest.param(name, marks=SLOW) for name in LONGER)]


def test_a_fault_is_planted_for_every_symptom():
    from trl.watch.symptoms import SYMPTOMS

    # A figure that is no number stops the trainer: it is told of made rows alone.
    assert {*PLANTED, *LONGER, "not_a_number"} == {each.name for each in SYMPTOMS}


@pytest.mark.parametrize("name", EVERY)
def test_a_planted_fault_is_named(name):
    words, steps, settings = (PLANTED | LONGER)[name]
    makers = {"model": lambda: tiny_model("llama"), "words": tokenizer}
    given = makers | {"reward": count("w7")} | settings
    made = {name: given[name]() for name in ("model", "words", "ref_model") if name in given}
    found = named(**given | made, steps=steps)
    assert any(words in told for told in found), found
