"""Train transformer language models with reinforcement learning (PPO).

The names below load their module on first use (PEP 562), so that `import trl` alone imports neither
torch nor transformers.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AdaptiveKLController": "trl.ppo",
    "CausalLMWithValueHead": "trl.models.with_value_head",
    "ClassifierScorer": "trl.evaluation",
    "ControlScorer": "trl.evaluation",
    "EndpointScorer": "trl.evaluation",
    "FixedKLController": "trl.ppo",
    "FunctionScorer": "trl.evaluation",
    "GPT2HeadWithValueModel": "trl.gpt2",
    "HumanScorer": "trl.evaluation",
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
    "StepScorer": "trl.evaluation",
    "WeightedSum": "trl.evaluation",
    "as_scorer": "trl.evaluation",
    "respond_to_batch": "trl.gpt2",
    "run_recipe": "trl.training.run",
    "starter": "trl",
    "train": "trl.training.one_call",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:  # what the lazy names are, for type checkers and editors
    from trl import starter as starter
    from trl.batch import Rollout as Rollout
    from trl.config import PPOConfig as PPOConfig
    from trl.config.recipe import Recipe as Recipe
    from trl.evaluation import ClassifierScorer as ClassifierScorer
    from trl.evaluation import ControlScorer as ControlScorer
    from trl.evaluation import EndpointScorer as EndpointScorer
    from trl.evaluation import FunctionScorer as FunctionScorer
    from trl.evaluation import HumanScorer as HumanScorer
    from trl.evaluation import RewardModelScorer as RewardModelScorer
    from trl.evaluation import ScoringError as ScoringError
    from trl.evaluation import StepScorer as StepScorer
    from trl.evaluation import WeightedSum as WeightedSum
    from trl.evaluation import as_scorer as as_scorer
    from trl.gpt2 import GPT2HeadWithValueModel as GPT2HeadWithValueModel
    from trl.gpt2 import respond_to_batch as respond_to_batch
    from trl.models.with_value_head import CausalLMWithValueHead as CausalLMWithValueHead
    from trl.models.with_value_head import Seq2SeqLMWithValueHead as Seq2SeqLMWithValueHead
    from trl.ppo import AdaptiveKLController as AdaptiveKLController
    from trl.ppo import FixedKLController as FixedKLController
    from trl.ppo import PPOTrainer as PPOTrainer
    from trl.rollout import Sampler as Sampler
    from trl.scored import Scored as Scored
    from trl.training.loop import Loop as Loop
    from trl.training.one_call import train as train
    from trl.training.run import run_recipe as run_recipe


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from trl.config.moved import NAMES, told

        if name in NAMES:  # `from trl import` shows no sentence of an AttributeError
            raise ImportError(told(name, NAMES[name]), name="trl")
        raise AttributeError(f"module 'trl' has no attribute {name!r}")
    home = _HOME[name]
    if home == __name__:
        value: Any = import_module(f"{home}.{name}")
    else:
        value = getattr(import_module(home), name)
    globals()[name] = value  # the next look-up finds it without this function
    return value


class _Moved:
    """Is asked for modules that no other finder has, and knows those that there were."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        """Raise an ImportError for a module of older releases."""
        if name.startswith("trl."):
            from trl.config.moved import MODULES, told

            if name in MODULES:
                raise ModuleNotFoundError(told(name, f"is gone: {MODULES[name]}"), name=name)


sys.meta_path.append(_Moved)  # type: ignore[arg-type]


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
