"""Tiny policies, all made on the CPU with the same weights, and what they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import ragged, tiny_gpt2
from tests.families import VOCABULARY, tiny_model
from tests.models.policies import lora_config, with_values
from trl.batch import Rollout
from trl.models.with_value_head import CausalLMWithValueHead, load_policy
from trl.ppo import PPOTrainer

SETTINGS = {
    "precision": "fp32",
    "batch_size": 8,
    "minibatch_size": 4,
    "forward_batch_size": 2,
    "ppo_epochs": 2,
}
SCORES = [-1.0, 2.0, 0.5, 0.0, 1.0, -2.0, 0.3, 1.1]


def llama(**options: Any) -> nn.Module:
    return with_values(CausalLMWithValueHead.from_pretrained(tiny_model("llama"), **options))


def made(family: str) -> nn.Module:
    if family == "gpt2":
        return tiny_gpt2(0)
    return with_values(load_policy(tiny_model(family)))


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module] | None, str]] = {
    "gpt2 and a copy": (lambda: made("gpt2"), None, "copy"),
    "gpt2 and another": (lambda: made("gpt2"), lambda: tiny_gpt2(1), "model"),
    "llama and a copy": (llama, None, "copy"),
    "lora, switched off": (lambda: llama(peft_config=lora_config()), None, "adapters-off"),
    "a shared trunk": (lambda: llama(unfrozen_layers=1), None, "shared-trunk"),
    "t5 and a copy": (lambda: made("t5"), None, "copy"),
}
"""Name -> the policy, the reference that is passed, and its kind."""


def batch(rows: int = 8) -> Rollout:
    """Rows of many lengths, four for each query."""
    queries = [q for q in ragged([3, 6, 1, 4][: rows // 4], 0, VOCABULARY) for _ in range(4)]
    lengths = [2, 7, 1, 8, 2, 8, 5, 8, 3, 4, 6, 1, 7, 2, 5, 8][:rows]
    rollout = Rollout.from_lists(
        queries,
        ragged(lengths, 1, VOCABULARY),
        group_ids=[row // 4 for row in range(rows)],
    )
    return replace(rollout, ended=torch.arange(rows) % 3 > 0)


def trainer_by_sgd(policy: nn.Module, reference: Any = None, **settings: Any) -> PPOTrainer:
    """A trainer whose updates are as large as the gradients; Adam makes noise of theirs large."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    return PPOTrainer(policy, reference, optimizer=optimizer, **SETTINGS | settings)


def weights_of(policy: nn.Module) -> Tensor:
    """The trained weights as one vector, on the CPU; sharded ones whole, on every process."""
    trained = [weight.detach() for weight in policy.parameters() if weight.requires_grad]
    whole = [getattr(weight, "full_tensor", lambda weight=weight: weight)() for weight in trained]
    return torch.cat([weight.flatten().cpu() for weight in whole])


def bytes_held(trainer: PPOTrainer) -> int:
    """Bytes of weights and of what the optimiser keeps of them; of sharded ones, its own part."""
    kept = [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors = [x for x in (*trainer.model.parameters(), *kept) if isinstance(x, Tensor)]
    return sum(getattr(x, "to_local", lambda x=x: x)().nbytes for x in tensors)
