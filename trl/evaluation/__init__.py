"""Evaluation: what turns a query and its response into one number."""

from trl.evaluation.classifier import ClassifierScorer

__all__ = ["ClassifierScorer"]
