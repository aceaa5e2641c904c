"""Score texts with a sequence classifier that brings its own tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl.config import closest

__all__ = ["ClassifierScorer"]

Output = Literal["logit", "probability", "log_odds"]


class ClassifierScorer:
    """One number per text, from any `AutoModelForSequenceClassification`.

    The classifier sees plain text and cuts it into tokens with its own tokenizer, so it need not
    share a vocabulary with the language model.

        scorer = ClassifierScorer("path/to/classifier", label="POSITIVE")
        scores = scorer(["A wonderful film.", "A waste of time."])  # [2]

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
        max_length: Cut texts to this many tokens. Default: what the model can take.
        device: Where to compute. Default: a loaded model stays where it is; another goes to the
            GPU if there is one.
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
    ) -> None:
        if output not in get_args(Output):
            raise ValueError(f"`output` must be one of {get_args(Output)}, got {output!r}.")
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if isinstance(model, (str, os.PathLike)):
            source = tokenizer if tokenizer is not None else model
            self.tokenizer = _load_tokenizer(source)
            self.model = _load_model(model)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        elif tokenizer is None:
            raise ValueError(
                "`tokenizer` must be given with a loaded model: pass the tokenizer that the "
                "classifier was trained with, or its folder."
            )
        else:
            self.tokenizer = _load_tokenizer(tokenizer)
            self.model = model
        self.model.to(device or self.model.device)
        self.output = output
        self.batch_size = batch_size
        self.label = _label_index(self.model, label)
        self.max_length = _token_limit(self.model, self.tokenizer, max_length)
        self._independent = (
            self.model.config.num_labels == 1
            or self.model.config.problem_type == "multi_label_classification"
        )
        if self.model.config.problem_type == "regression" and output != "logit":
            raise ValueError(
                f'`output` must be "logit" for a regression head, which has no probability, got '
                f"{output!r}."
            )
        if self.tokenizer.pad_token_id is None or self.model.config.pad_token_id is None:
            raise ValueError(
                "The classifier must have a padding token to score texts of different lengths, but "
                f"`tokenizer.pad_token_id` is {self.tokenizer.pad_token_id} and "
                f"`model.config.pad_token_id` is {self.model.config.pad_token_id}. Set both (often "
                "to the EOS token) and pass the two objects."
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Score texts.

        Args:
            texts: Any number of texts (B); the order and the batch size do not change the scores.

        Returns:
            [B] scores, float32, on the CPU.
        """
        token_ids = self._tokenize(_checked(texts))
        scores = torch.empty(len(token_ids))
        longest_first = sorted(range(len(token_ids)), key=lambda row: -len(token_ids[row]))
        self.model.eval()
        for start in range(0, len(token_ids), self.batch_size):
            rows = longest_first[start : start + self.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [token_ids[row] for row in rows]}, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(
                    input_ids=batch["input_ids"].to(self.model.device),
                    attention_mask=batch["attention_mask"].to(self.model.device),
                ).logits
                # `scores` was made outside inference mode: the caller may use it in a graph
                scores[rows] = self._score(logits.float()).cpu()
        return scores

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        token_ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        for row, ids in enumerate(token_ids):
            if not ids:
                raise ValueError(
                    "`texts` must have at least one token each, but "
                    f"texts[{row}] is {texts[row]!r}."
                )
        return token_ids

    def _score(self, logits: Tensor) -> Tensor:  # [B, number of labels] -> [B]
        logit = logits[:, self.label]
        if self.output == "logit":
            return logit
        if self._independent:
            log_odds = logit
        else:
            others = torch.arange(logits.shape[1], device=logits.device) != self.label
            log_odds = logit - logits[:, others].logsumexp(dim=1)
        return log_odds if self.output == "log_odds" else log_odds.sigmoid()


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("`texts` must be a list of strings, got one string: pass [text].")
    if isinstance(texts, Tensor):
        raise TypeError(
            "`texts` must be a list of strings, got a tensor: decode token ids first, with "
            "tokenizer.batch_decode(ids, skip_special_tokens=True)."
        )
    texts = list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"`texts` must be a list of strings, but texts[{row}] is a "
                f"{type(text).__name__}: decode token ids first, with tokenizer.batch_decode(ids)."
            )
    return texts


def _label_index(model: PreTrainedModel, label: str | int) -> int:
    names = [str(model.config.id2label.get(i, i)) for i in range(model.config.num_labels)]
    if isinstance(label, int):
        if 0 <= label < len(names):
            return label
    else:
        lowered = [name.lower() for name in names]
        if label.lower() in lowered:
            return lowered.index(label.lower())
        if len(names) == 1 and label == "POSITIVE":  # the default: one output needs no label
            return 0
    known = ", ".join(f"{index} = {name!r}" for index, name in enumerate(names))
    raise ValueError(
        f"`label` must be a label of the classifier ({known}), got {label!r}."
        + closest(str(label).upper(), names)
    )


def _token_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    limit = min(positions, tokenizer.model_max_length)
    if max_length is None:
        return limit
    if max_length > limit:
        raise ValueError(
            f"`max_length` must be at most {limit}, what the classifier can take, got {max_length}."
        )
    return max_length


def _load_model(source: str | os.PathLike[str]) -> PreTrainedModel:
    _check_folder(source, "config.json")
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            os.fspath(source), dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _unloadable("classifier", source) from error
    if info["missing_keys"]:
        raise ValueError(
            f"{os.fspath(source)!r} is not a sequence classifier: it has no weights for "
            f"{', '.join(sorted(info['missing_keys']))}, so its scores would be random. Pass a "
            "model that was trained and saved as AutoModelForSequenceClassification."
        )
    return model


def _load_tokenizer(
    source: str | os.PathLike[str] | PreTrainedTokenizerBase,
) -> PreTrainedTokenizerBase:
    if not isinstance(source, (str, os.PathLike)):
        return source
    _check_folder(source, "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(os.fspath(source))
    except (OSError, ValueError) as error:
        raise _unloadable("tokenizer of the classifier", source) from error


def _check_folder(source: str | os.PathLike[str], needed: str) -> None:
    folder = Path(source)
    if not folder.exists() and (folder.is_absolute() or os.fspath(source).startswith((".", "~"))):
        raise FileNotFoundError(
            f"The classifier's folder {os.fspath(source)!r} does not exist: pass a folder with "
            "config.json, model.safetensors and the tokenizer's files, or a name of the hub."
        )
    if folder.is_dir() and not (folder / needed).is_file():
        raise FileNotFoundError(
            f"The folder {os.fspath(source)!r} holds no {needed}. Save a classifier there with "
            "model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
        )


def _unloadable(what: str, source: str | os.PathLike[str]) -> OSError:
    if Path(source).is_dir():
        return OSError(f"The {what} in the folder {os.fspath(source)!r} could not be loaded.")
    return OSError(
        f"The {what} {os.fspath(source)!r} is neither a local folder nor could it be fetched from "
        "the hub. Without network, pass the path of a folder that holds config.json, "
        "model.safetensors and the tokenizer's files."
    )
