"""Evaluation: what turns a query and its response into scores.

scores.py          the contract of a scorer, and what happens when one breaks it
function.py        a Python function as a scorer
sequence_model.py  loading and running what has a classification head
classifier.py      the score of one label
control.py         the sentiment that a prefix of the query asks for
reward_model.py    the one number of a reward model, with its chat template
steps.py           where the steps of a response end, and on which tokens their scores land
step_model.py      a process reward model: a score for each step
endpoint.py        a server that answers over HTTP
weighted_sum.py    several scorers as one
final_answer.py    a final answer against the right one: numbers, fractions, LaTeX, units
checks.py          JSON, patterns and parts of a response
code_tests.py      code by its tests
penalties.py       for length and repetition
metrics.py         pass@k, majority@k, intervals
row_by_row.py      what scores each response with the value of a column
cells.py           where what cannot be trusted runs: `warden.py` starts and ends it, in
programs.py        is what can run there
people/            people who judge, on a page

A scorer takes a rollout, or, to try it by hand, texts: JsonScorer(schema)(["{}"]).scores

The names below load their module on first use: people can judge without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.evaluation.checks import FormatScorer, JsonScorer, RegexScorer
    from trl.evaluation.classifier import ClassifierScorer
    from trl.evaluation.code_tests import CodeScorer
    from trl.evaluation.control import ControlScorer
    from trl.evaluation.endpoint import EndpointScorer
    from trl.evaluation.final_answer import MathScorer
    from trl.evaluation.function import FunctionScorer, as_scorer
    from trl.evaluation.penalties import LengthPenalty, RepetitionPenalty
    from trl.evaluation.people.scorer import HumanScorer
    from trl.evaluation.reward_model import RewardModelScorer
    from trl.evaluation.scores import Scorer, ScoringError, score
    from trl.evaluation.step_model import StepScorer
    from trl.evaluation.weighted_sum import WeightedSum

__all__ = [
    "CHECKS",
    "ClassifierScorer",
    "CodeScorer",
    "ControlScorer",
    "EndpointScorer",
    "FormatScorer",
    "FunctionScorer",
    "HumanScorer",
    "JsonScorer",
    "LengthPenalty",
    "MathScorer",
    "RegexScorer",
    "RepetitionPenalty",
    "RewardModelScorer",
    "Scorer",
    "ScoringError",
    "StepScorer",
    "WeightedSum",
    "as_scorer",
    "score",
]

CHECKS = {
    "math": "MathScorer",
    "code": "CodeScorer",
    "json": "JsonScorer",
    "regex": "RegexScorer",
    "format": "FormatScorer",
    "repetition": "RepetitionPenalty",
    "length": "LengthPenalty",
}
"""The scorers that check a response by rules, by what a recipe calls them."""

_HOME = {
    "ClassifierScorer": "classifier",
    "CodeScorer": "code_tests",
    "ControlScorer": "control",
    "EndpointScorer": "endpoint",
    "FormatScorer": "checks",
    "FunctionScorer": "function",
    "HumanScorer": "people.scorer",
    "JsonScorer": "checks",
    "LengthPenalty": "penalties",
    "MathScorer": "final_answer",
    "RegexScorer": "checks",
    "RepetitionPenalty": "penalties",
    "RewardModelScorer": "reward_model",
    "Scorer": "scores",
    "ScoringError": "scores",
    "StepScorer": "step_model",
    "WeightedSum": "weighted_sum",
    "as_scorer": "function",
    "score": "scores",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
