"""Record what the original trl computes, for tests/test_original_numbers.py.

The trainer of the 2020 wheel `trl==0.0.3` is run as published on a tiny GPT-2. What it was given
and every number it returned go to `tests/data/original/`: `policy.safetensors` and
`reference.safetensors` (the two models), `cases.json` (settings, tokens, scores, the 30 stats of
each step, the size of every parameter's update) and `after.safetensors` (some weights after the
last step of each case, named `<case>/<parameter>`).

The recording needs an environment of its own, because the wheel asks for a transformers of its
time:

    python3.11 -m venv original
    original/bin/pip install torch==2.13.0 "numpy<2" transformers==4.30.2 safetensors
    original/bin/pip install --no-deps trl==0.0.3
    original/bin/python benchmarks/original_goldens.py tests/data/original

The wheel is not edited. Two things are put right from here, and neither touches a number: the
name `collections.Mapping`, which Python dropped in 3.10, and the class-level default settings,
which one trainer of that time left changed for the next one.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import GPT2Config

collections.Mapping = collections.abc.Mapping  # the wheel looks it up when flatten_dict is called

from trl.gpt2 import GPT2HeadWithValueModel, respond_to_batch  # noqa: E402
from trl.ppo import PPOTrainer  # noqa: E402

VOCAB = 97
DEFAULTS = copy.deepcopy(PPOTrainer.default_params)
BASE = {"batch_size": 1, "forward_batch_size": 1, "ppo_epochs": 1}
FAST = {"lr": 3e-4}  # far above the default: ratios and values leave their clip ranges
EVERYTHING = {
    "lr": 2e-4,
    "init_kl_coef": 0.5,
    "target": 3.0,
    "horizon": 50,
    "gamma": 0.9,
    "lam": 0.8,
    "cliprange": 0.1,
    "cliprange_value": 0.05,
    "vf_coef": 0.3,
    "ppo_epochs": 3,
}
# name -> (settings, [(query length, response length, score) of each step])
CASES: dict[str, tuple[dict[str, Any], list[tuple[int, int, float]]]] = {
    "query4_response7": (BASE, [(4, 7, 1.0)]),
    "query1_response3": (BASE, [(1, 3, -0.5)]),
    "query9_response12": (BASE, [(9, 12, 0.25)]),
    "large_score": (BASE, [(4, 7, 1000.0)]),
    "three_steps": (BASE, [(4, 7, 1.0), (6, 5, -2.0), (2, 9, 0.5)]),
    "four_epochs": ({**BASE, "ppo_epochs": 4}, [(5, 8, 1.5)]),
    "four_epochs_fast": ({**BASE, **FAST, "ppo_epochs": 4}, [(5, 8, 1.5)]),
    "three_steps_fast": ({**BASE, **FAST}, [(4, 7, 1.0), (6, 5, -2.0), (2, 9, 0.5)]),
    "every_setting": ({**BASE, **EVERYTHING}, [(3, 10, 2.0), (7, 6, -1.0)]),
}
# Not among them: attn.c_attn.bias. A bias on the keys cannot change the attention, so its gradient
# is rounding noise, which Adam turns into steps of full size.
WATCHED = (
    "transformer.h.0.attn.c_proj.bias",
    "transformer.h.0.ln_1.weight",
    "transformer.h.1.mlp.c_proj.bias",
    "transformer.ln_f.weight",
    "transformer.ln_f.bias",
    "v_head.summary.weight",
    "v_head.summary.bias",
)


def build_config() -> GPT2Config:
    """The tiny GPT-2: two layers, no dropout anywhere."""
    return GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
    )


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter once: `lm_head.weight` is tied to `transformer.wte.weight`."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def build_models() -> tuple[GPT2HeadWithValueModel, GPT2HeadWithValueModel]:
    """A policy with clearly uneven next-token probabilities and values, and a reference near it."""
    generator = torch.Generator().manual_seed(2020)
    policy = GPT2HeadWithValueModel(build_config())
    assert policy.lm_head.weight is policy.transformer.wte.weight
    with torch.no_grad():
        for name, value in policy.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "ln_" in name:
                value.add_(0.1 * noise)
            elif "wte" in name or "v_head" in name:
                value.copy_(0.4 * noise)
            else:
                value.copy_(0.15 * noise)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for value in reference.parameters():
            value.add_(0.03 * torch.randn(value.shape, generator=generator))
    return policy, reference


def as_json(value: Any) -> Any:
    """Arrays become nested lists, numpy numbers plain floats."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def record(
    settings: dict[str, Any],
    plan: list[tuple[int, int, float]],
    policy: GPT2HeadWithValueModel,
    reference: GPT2HeadWithValueModel,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run the 2020 trainer through `plan`; return the JSON record and the watched weights."""
    PPOTrainer.default_params = copy.deepcopy(DEFAULTS)
    model, ref_model = copy.deepcopy(policy), copy.deepcopy(reference)
    trainer = PPOTrainer(model, ref_model, **settings)
    steps = []
    for number, (query_length, response_length, score) in enumerate(plan):
        torch.manual_seed(1000 * query_length + 10 * response_length + number)
        random.seed(number)
        query = torch.randint(VOCAB, (1, query_length))
        with torch.no_grad():
            response = respond_to_batch(model, query, txt_len=response_length)
        before = parameters_of(model)
        stats = trainer.step(query, response, torch.tensor([score]))
        moved = {name: after - before[name] for name, after in parameters_of(model).items()}
        steps.append(
            {
                "query": query.tolist(),
                "response": response.tolist(),
                "scores": [score],
                "stats": {key: as_json(value) for key, value in stats.items()},
                "kl_coef_after": float(trainer.kl_ctl.value),
                "update_norms": {name: delta.norm().item() for name, delta in moved.items()},
            }
        )
    after = parameters_of(model)
    return {"settings": settings, "steps": steps}, {name: after[name] for name in WATCHED}


def main() -> None:
    """Write the four files into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the recorded numbers go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    policy, reference = build_models()
    cases, weights = {}, {}
    for name, (settings, plan) in CASES.items():
        cases[name], watched = record(settings, plan, policy, reference)
        weights |= {f"{name}/{parameter}": value for parameter, value in watched.items()}
    config = policy.config
    shape = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    dropout = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
    made_with = {
        "trl": "0.0.3",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    content = {
        "made_with": made_with,
        "config": {name: getattr(config, name) for name in shape + dropout},
        "cases": cases,
    }
    save_file(parameters_of(policy), folder / "policy.safetensors")
    save_file(parameters_of(reference), folder / "reference.safetensors")
    save_file(weights, folder / "after.safetensors")
    (folder / "cases.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
