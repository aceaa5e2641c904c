"""Train transformer language models with reinforcement learning (PPO).

The names below load their module on first use (PEP 562), so that `import trl` alone imports neither
torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "CausalLMWithValueHead",
    "ClassifierScorer",
    "ControlScorer",
    "EndpointScorer",
    "FixedKLController",
    "FunctionScorer",
    "GPT2HeadWithValueModel",
    "Loop",
    "PPOConfig",
    "PPOTrainer",
    "Recipe",
    "RewardModelScorer",
    "Rollout",
    "Sampler",
    "Scored",
    "ScoringError",
    "Seq2SeqLMWithValueHead",
    "WeightedSum",
    "__version__",
    "as_scorer",
    "respond_to_batch",
    "run_recipe",
    "starter",
    "train",
]

_HOME = {
    "AdaptiveKLController": "trl.ppo",
    "CausalLMWithValueHead": "trl.models.with_value_head",
    "ClassifierScorer": "trl.evaluation",
    "ControlScorer": "trl.evaluation",
    "EndpointScorer": "trl.evaluation",
    "FixedKLController": "trl.ppo",
    "FunctionScorer": "trl.evaluation",
    "GPT2HeadWithValueModel": "trl.gpt2",
    "Loop": "trl.training.loop",
    "PPOConfig": "trl.config",
    "PPOTrainer": "trl.ppo",
    "Recipe": "trl.config.recipe",
    "RewardModelScorer": "trl.evaluation",
    "Rollout": "trl.batch",
    "Sampler": "trl.rollout",
    "Scored": "trl.scored",
    "ScoringError": "trl.evaluation",
    "Seq2SeqLMWithValueHead": "trl.models.with_value_head",
    "WeightedSum": "trl.evaluation",
    "as_scorer": "trl.evaluation",
    "respond_to_batch": "trl.gpt2",
    "run_recipe": "trl.training.run",
    "starter": "trl",
    "train": "trl.training.one_call",
}

if TYPE_CHECKING:  # what the lazy names are, for type checkers and editors
    from trl import starter
    from trl.batch import Rollout
    from trl.config import PPOConfig
    from trl.config.recipe import Recipe
    from trl.evaluation import (
        ClassifierScorer,
        ControlScorer,
        EndpointScorer,
        FunctionScorer,
        RewardModelScorer,
        ScoringError,
        WeightedSum,
        as_scorer,
    )
    from trl.gpt2 import GPT2HeadWithValueModel, respond_to_batch
    from trl.models.with_value_head import CausalLMWithValueHead, Seq2SeqLMWithValueHead
    from trl.ppo import AdaptiveKLController, FixedKLController, PPOTrainer
    from trl.rollout import Sampler
    from trl.scored import Scored
    from trl.training.loop import Loop
    from trl.training.one_call import train
    from trl.training.run import run_recipe


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trl' has no attribute {name!r}")
    home = _HOME[name]
    if home == __name__:
        value: Any = import_module(f"{home}.{name}")
    else:
        value = getattr(import_module(home), name)
    globals()[name] = value  # the next look-up finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
