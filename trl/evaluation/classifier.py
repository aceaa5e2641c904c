"""Score texts with a sequence classifier that brings its own tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl.batch import Rollout
from trl.config import check_values, closest
from trl.config.errors import refuse, shown
from trl.evaluation.scores import texts_of
from trl.evaluation.sequence_model import SequenceModel
from trl.scored import Scored

__all__ = ["ClassifierScorer"]

Output = Literal["logit", "probability", "log_odds"]


class ClassifierScorer(SequenceModel):
    """One number per text, from any `AutoModelForSequenceClassification`.

    The classifier sees plain text and cuts it into tokens with its own tokenizer, so it need not
    share a vocabulary with the language model.

        scorer = ClassifierScorer("path/to/classifier", label="POSITIVE")
        scores = scorer(["A wonderful film.", "A waste of time."])  # a tensor [2]
        scored = scorer(rollout)  # a Scored, of each query and its response as one text

    With logits z and label c the score is

        "logit"        z_c
        "probability"  p_c = softmax(z)_c
        "log_odds"     log p_c / (1 − p_c) = z_c − logsumexp_{j≠c} z_j

    A multi-label head (`problem_type="multi_label_classification"`) and a head with one output
    have independent logits: there p_c = sigmoid(z_c), and the log-odds are z_c. A head with one
    output needs no label. One with `problem_type="regression"` has no probability.

    Args:
        model: A folder or a hub name, loaded in float32, or a loaded model.
        tokenizer: A folder, a hub name, or a loaded tokenizer. Default: the one that lies beside
            the model; a loaded model needs it.
        label: The class whose score counts, by name (case does not matter) or by index.
        output: What to return: "logit", "probability" or "log_odds".
        batch_size: Texts per forward pass; texts of similar length share one.
        max_length: Cut texts to this many tokens, on the side that `tokenizer.truncation_side`
            says (mostly the right: the beginning stays). What is cut of a rollout's text is always
            the beginning: the response is at the end. Default: what the model can take. A
            classifier of `trl train` cuts texts as in training, by default to as many tokens.
        device: Where to compute. Default: a loaded model stays where it is; another goes to the
            GPU if there is one.
        gguf_file: Read the model from this file of the folder or repository; `model` may also be
            the path of the file.
        allow_pickle: Also load weights from pickles (pytorch_model.bin), which can run code.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        *,
        label: str | int = "POSITIVE",
        output: Output = "logit",
        batch_size: int = 256,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        gguf_file: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, batch_size, max_length, device, gguf_file, allow_pickle)
        self.label = label_index(self.model, label)
        self.set_output(output)

    def set_output(self, output: Output) -> None:
        """Return another number of the label from now on: "logit", "probability" or "log_odds"."""
        check_values("ClassifierScorer", {"output": (Output, output)})
        if self.model.config.problem_type == "regression" and output != "logit":
            rule = 'be "logit" for a regression head, which has no probability'
            refuse("output", rule, repr(output))
        self.output = output

    def __call__(self, texts: Sequence[str] | Rollout) -> Tensor | Scored:
        """Score texts, or the responses of a rollout that has its texts.

        Args:
            texts: Any number of texts (B); the order and the batch size do not change the scores.

        Returns:
            [B] scores, float32, on the CPU; of a rollout as a `Scored`.
        """
        if isinstance(texts, Rollout):
            return self._scored(texts, texts_of)
        return self._scores(self._logits(_checked(texts), keep_end=False))

    def _scores(self, logits: Tensor) -> Tensor:
        """Return the scores [B] that logits [B, number of labels] give."""
        return label_scores(logits, self.label, self.output, self.model.config)


def label_scores(logits: Tensor, label: int, output: Output, config: PreTrainedConfig) -> Tensor:
    """Return the scores [N] of a label, see `ClassifierScorer`.

    Args:
        logits: [N, number of labels].
        label: Index.
        output: What to return.
        config: Of the model, which says whether labels exclude each other.
    """
    log_odds = logits[:, label]
    if output == "logit":
        return log_odds
    if logits.shape[1] > 1 and config.problem_type != "multi_label_classification":
        others = torch.arange(logits.shape[1], device=logits.device) != label
        log_odds = log_odds - logits[:, others].logsumexp(dim=1)
    return log_odds if output == "log_odds" else log_odds.sigmoid()


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str | Tensor) or not all(isinstance(text, str) for text in texts):
        fix = "pass [text], join each pair to one text, and decode token ids with batch_decode"
        refuse("texts", "be a list of strings", shown(texts), fix, error=TypeError)
    return list(texts)


def label_index(model: PreTrainedModel, label: str | int) -> int:
    """Return the index of a label of a model, given its name or that."""
    if isinstance(label, bool) or not isinstance(label, str | Integral):
        refuse("label", "be the name of a label or its index", repr(label), error=TypeError)
    names = [str(model.config.id2label.get(i, i)) for i in range(model.config.num_labels)]
    if isinstance(label, Integral):
        if 0 <= label < len(names):
            return int(label)
    else:
        lowered = [name.lower() for name in names]
        if label.lower() in lowered:
            return lowered.index(label.lower())
        if len(names) == 1 and label == "POSITIVE":  # the default: one output needs no label
            return 0
    known = ", ".join(f"{index} = {name!r}" for index, name in enumerate(names))
    hint = closest(str(label).upper(), names)
    raise ValueError(f"`label` must be a label of the classifier ({known}), got {label!r}.{hint}")
