"""Train transformer language models with reinforcement learning (PPO).

The names below load their module on first use (PEP 562), so that `import trl` alone imports neither
torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "ClassifierScorer",
    "FixedKLController",
    "GPT2HeadWithValueModel",
    "PPOConfig",
    "PPOTrainer",
    "Rollout",
    "__version__",
    "respond_to_batch",
]

_HOME = {
    "AdaptiveKLController": "trl.ppo",
    "ClassifierScorer": "trl.evaluation",
    "FixedKLController": "trl.ppo",
    "GPT2HeadWithValueModel": "trl.gpt2",
    "PPOConfig": "trl.config",
    "PPOTrainer": "trl.ppo",
    "Rollout": "trl.batch",
    "respond_to_batch": "trl.gpt2",
}

if TYPE_CHECKING:  # what the lazy names are, for type checkers and editors
    from trl.batch import Rollout
    from trl.config import PPOConfig
    from trl.evaluation import ClassifierScorer
    from trl.gpt2 import GPT2HeadWithValueModel, respond_to_batch
    from trl.ppo import AdaptiveKLController, FixedKLController, PPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trl' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
