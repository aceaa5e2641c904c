"""Load and run models with a classification head, each with its own tokenizer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl.anatomy import accepts, without_dropout
from trl.batch import Rollout, check_unicode, pad_rows
from trl.config import check_values
from trl.config.errors import refuse
from trl.config.types import Count
from trl.evaluation.scores import failures_named
from trl.gguf import as_plain, classifier_head, gguf_apart, unpacking
from trl.saved import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_there,
    check_weights,
    damage,
    damage_told,
)
from trl.scored import Scored

__all__ = [
    "SequenceModel",
    "character_ends",
    "load_classifier",
    "loaded",
    "pad_token_id",
    "token_limit",
    "tokenize",
]

Source = str | os.PathLike[str]

# Tokenizers that know no limit say 10^30, more than they themselves take for a length.
NO_LIMIT = 10**9


class SequenceModel:
    """A model with a classification head, its own tokenizer, and how texts go through both.

    Args:
        model: A folder, a hub name or a GGUF file, loaded in float32, or a loaded model.
        tokenizer: None: the one beside the model, or in its GGUF file.
        batch_size: Texts per forward pass.
        max_length: Cut texts to this many tokens; None: to as many as it was trained with, where
            config.json has `text_cut` (see `train_classifier`), or to what the model can take.
        device: None: a loaded model stays where it is; another goes to the GPU if there is one.
        gguf_file: Read the model from this file of the folder or repository.
        allow_pickle: Also load weights from pickles (pytorch_model.bin).

    Raises:
        ValueError: if a size is none, or the two cannot make batches.
        OSError: if one of them cannot be loaded.
    """

    def __init__(
        self,
        model: Source | PreTrainedModel,
        tokenizer: Source | PreTrainedTokenizerBase | None,
        batch_size: int,
        max_length: int | None,
        device: str | torch.device | None,
        gguf_file: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        sizes = {"batch_size": (Count, batch_size), "max_length": (Count | None, max_length)}
        check_values(type(self).__name__, sizes)
        by_name = isinstance(model, (str, os.PathLike))
        if tokenizer is None and not by_name:
            fix = "pass the tokenizer that the model was trained with, or its folder"
            refuse("tokenizer", "be given with a loaded model", fix=fix)
        if gguf_file is not None and not by_name:
            refuse("gguf_file", "be None with a loaded model", repr(gguf_file), "leave it out")
        model = _of_run(model) if by_name else model
        where = {"gguf_file": gguf_file} if tokenizer is None else {}
        tokenizer = model if tokenizer is None else tokenizer
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = loaded(AutoTokenizer, tokenizer, TOKENIZER, TOKENIZER_CONFIG, **where)
        if by_name:
            model = self._load(model, gguf_file, allow_pickle)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device or model.device)
        if tokenizer.pad_token_id is None or pad_token_id(model) is None:
            raise ValueError(
                "The model must have a padding token to score texts of different lengths, but "
                f"`tokenizer.pad_token_id` is {tokenizer.pad_token_id} and "
                f"`model.config.pad_token_id` is {pad_token_id(model)}. Set both (often to the "
                "EOS token) and pass the two objects."
            )
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = batch_size
        cut = getattr(model.config, "text_cut", {})
        self.max_length = token_limit(model, tokenizer, max_length or cut.get("max_length"))
        self._head_share = cut.get("head_share")
        self._unpadded = self._padding_changes()

    add_special_tokens = True
    """False: texts have them already."""

    def _load(self, source: Source, gguf_file: str | None, allow_pickle: bool) -> PreTrainedModel:
        """Return the model of a folder or name."""
        return load_classifier(source, gguf_file, allow_pickle)

    def _scores(self, logits: Tensor) -> Tensor:
        """Return the scores [B] that logits [B, number of labels] give."""
        raise NotImplementedError

    def _scored(self, rollout: Rollout, texts_of: Callable[[Rollout], list[str]]) -> Scored:
        """Score the texts of a rollout."""
        with failures_named(type(self).__name__, rollout):
            return Scored.of(self._scores(self._logits(texts_of(rollout))), rollout)

    def _logits(self, texts: list[str], *, keep_end: bool = True) -> Tensor:
        """Return [B, number of labels] of B texts, of which too long ones lose their beginning.

        Args:
            texts: Any number.
            keep_end: False: they lose what they lost in training, or what the tokenizer's own side
                says.
        """
        token_ids = tokenize(
            self.tokenizer,
            texts,
            max_length=self.max_length,
            add_special_tokens=self.add_special_tokens,
            head_share=0.0 if keep_end else self._head_share,
        )
        return self._logits_of(token_ids, self.batch_size, unpadded=self._unpadded)

    def _logits_of(self, token_ids: list[list[int]], size: int, *, unpadded: bool) -> Tensor:
        """Run the model, without dropout, on texts of like length together.

        Args:
            token_ids: Of B texts.
            size: Texts per forward pass.
            unpadded: Only texts of one length share a pass.
        Returns:
            [B, number of labels] float32, on the CPU; in the order of the texts.
        """
        # Made outside inference mode: the caller may use it in a graph.
        shape = len(token_ids), self.model.config.num_labels
        logits = torch.empty(shape, dtype=torch.float32, device="cpu")
        for rows, found in self._run(token_ids, size, unpadded=unpadded):
            logits[rows] = found
        return logits

    def _token_logits(self, token_ids: list[list[int]], size: int, *, unpadded: bool) -> list[Any]:
        """Return the logits [t, number of labels] at each of its t tokens, of each text.

        Args:
            token_ids: See `_logits_of`.
            size: Likewise.
            unpadded: Likewise.
        """
        at_tokens = list[Tensor]()
        # The head of a sequence classifier that is causal reads all tokens; it gives one of them.
        head = getattr(self.model, "score", None) or torch.nn.Identity()
        hook = head.register_forward_hook(lambda *found: at_tokens.append(found[-1]))
        logits: list[Any] = [None] * len(token_ids)
        try:
            for rows, found in self._run(token_ids, size, unpadded=unpadded):
                wide = found if found.ndim == 3 else at_tokens[-1] if at_tokens else found
                at_tokens.clear()
                if wide.ndim != 3:
                    rule = "read each token: a token classifier, or a causal sequence classifier"
                    refuse("model", rule, type(self.model).__name__)
                for row, own in zip(rows, wide.float().cpu(), strict=True):
                    logits[row] = own[: len(token_ids[row])].clone()
        finally:
            hook.remove()
        return logits

    def _run(
        self, token_ids: list[list[int]], size: int, *, unpadded: bool
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the rows of each pass, and the logits that the model gives of them."""
        for rows in _passes([len(ids) for ids in token_ids], size, unpadded):
            tokens = [torch.tensor(token_ids[row], device="cpu") for row in rows]
            # On the right, where padding moves no position; and with the token of the model, not
            # with that of the tokenizer: causal models read the score at the last that is another.
            padded, mask = pad_rows(tokens, left=False)
            inputs = {"input_ids": padded.masked_fill(~mask, pad_token_id(self.model))}
            if accepts(self.model, "attention_mask"):
                inputs["attention_mask"] = mask.long()
            inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            with torch.inference_mode(), without_dropout(self.model):
                found = self.model(**inputs).logits.float().cpu()
            yield rows, found

    def _padding_changes(self) -> bool:
        """Return whether a text beside a longer one gets other logits than alone.

        Some families take no mask (FNet), or have layers that do not look at it.
        """
        pair = tokenize(self.tokenizer, ["a b", "a b c d e f g h i j"], max_length=self.max_length)
        try:
            alone, beside = (self._logits_of(pair, size, unpadded=False)[0] for size in (1, 2))
        except Exception:  # it may not like these texts; what is to be scored will tell
            return True
        exact = self.model.dtype == torch.float32
        tolerance = 1e-3 if exact else 5e-2  # rounding, in relation to the largest logit
        return not bool((alone - beside).abs().max() <= tolerance * alone.abs().max().clamp(min=1))


def token_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> int | None:
    """Return `max_length`, or by default what model and tokenizer can take; None: no limit."""
    limit = tokenizer.model_max_length
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        limit = min(limit, positions - _first_position(model, positions))
    if max_length is not None and max_length > limit:
        refuse("max_length", f"be at most {limit}, what the model can take", str(max_length))
    limit = limit if max_length is None else max_length
    return limit if limit < NO_LIMIT else None


def _first_position(model: PreTrainedModel, positions: int) -> int:
    """Return the position of a text's first token: in RoBERTa's kind the one after the padding's.

    Their table of positions has a row for the padding, `padding_idx`; those before it are not used.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and "position" in name.split(".")[-1]:
            padding = module.padding_idx
            return padding + 1 if padding is not None and len(module.weight) == positions else 0
    return 0


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    max_length: int | None,
    add_special_tokens: bool = True,
    head_share: float | None = None,
) -> list[list[int]]:
    """Return the token ids of each text, cut to `max_length`; special tokens stay where they are.

    A text that begins with the BOS token already, as chat templates write it, gets no second one.

    Args:
        tokenizer: It keeps its own `truncation_side`.
        texts: Any number.
        max_length: Tokens of a text at most, special ones among them; None: any number.
        add_special_tokens: False: the texts have them already.
        head_share: Share of `max_length` that is kept from the start of a longer text; the rest is
            kept from its end. None: the tokenizer's side says whether all is kept from the one or
            from the other.
    """
    if not texts:
        return []
    check_unicode(texts, "texts")
    if head_share is None:
        head_share = float(tokenizer.truncation_side == "right")

    def kept(side: str) -> list[list[int]]:
        tokenizer.truncation_side = side
        cut = {"truncation": max_length is not None, "max_length": max_length}
        return tokenizer(texts, add_special_tokens=add_special_tokens, **cut)["input_ids"]

    with _unchanged_truncation(tokenizer):
        token_ids = kept("right" if head_share else "left")
        if max_length is not None and 0 < head_share < 1:
            # Both have all special tokens; of a text that is not cut both are the same.
            head = round(head_share * max_length)
            pairs = zip(token_ids, kept("left"), strict=True)
            token_ids = [start[:head] + end[head:] for start, end in pairs]
    bos = tokenizer.bos_token_id
    if add_special_tokens and bos is not None:
        token_ids = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in token_ids]
    for row, ids in enumerate(token_ids):
        if not ids:
            refuse(f"texts[{row}]", "have at least one token", repr(texts[row]))
    return token_ids


def character_ends(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    max_length: int | None,
    add_special_tokens: bool,
) -> list[list[float]]:
    """Return where in its text each token ends, of texts that lose their beginning, in characters.

    Those that stand for none: −1 before the first one that does, infinity after it.
    """
    with _unchanged_truncation(tokenizer):
        tokenizer.truncation_side = "left"
        how = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": True}
        how |= {"truncation": max_length is not None, "max_length": max_length}
        spans = tokenizer(texts, **how)["offset_mapping"]
    rows = list[list[float]]()
    for row in spans:
        ends, none = list[float](), -1.0
        for start, end in row:
            none = math.inf if end > start else none
            ends.append(end if end > start else none)
        rows.append(ends)
    return rows


@contextmanager
def _unchanged_truncation(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Leave a tokenizer as it was; its backend keeps the last cut, and would be saved with it."""
    backend, side = getattr(tokenizer, "backend_tokenizer", None), tokenizer.truncation_side
    cut = backend and backend.truncation
    try:
        yield
    finally:
        tokenizer.truncation_side = side
        if cut:
            backend.enable_truncation(**cut)
        elif backend:
            backend.no_truncation()


def _passes(lengths: list[int], batch_size: int, unpadded: bool) -> Iterator[list[int]]:
    """Yield the rows of each pass, the longest first: if memory is short it shows at once."""
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for _, group in groupby(longest_first, key=lambda row: lengths[row] if unpadded else None):
        rows = list(group)
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def pad_token_id(model: PreTrainedModel) -> int | None:
    """Return the token that the model takes for padding."""
    return model.config.get_text_config().pad_token_id


def _of_run(source: Any) -> Any:
    """Return the folder of the model in that of a run of `trl reward` or `trl classifier`."""
    folder = Path(source)
    inside = [folder / name for name in ("reward_model", "classifier")]
    found = [each for each in inside if (each / CONFIG).is_file()]
    return found[0] if found and not (folder / CONFIG).exists() else source


def load_classifier(source: Source, gguf_file: str | None, allow_pickle: bool) -> PreTrainedModel:
    """Return the sequence classifier of a folder or name.

    Raises:
        OSError, ValueError: if it is none, or cannot be loaded.
    """
    options = {"dtype": torch.float32, "output_loading_info": True}
    name, where = gguf_apart(source, {"gguf_file": gguf_file})
    head, labels = classifier_head(name, where) if where else ({}, [])
    if head:
        options |= {"num_labels": len(head["weight"])}
    if len(labels) == len(head.get("weight", ())) > 0:
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    options |= where | (unpacking() if where else {})
    if not where:
        if os.path.isdir(name):
            check_weights(Path(name), allow_pickle=allow_pickle)
        options["use_safetensors"] = None if allow_pickle else True
    model, info = loaded(AutoModelForSequenceClassification, name, CONFIG, **options)
    if where:
        as_plain(model, name, where["gguf_file"])
        _fill(model, head, info["missing_keys"])
    if info["missing_keys"]:
        raise ValueError(
            f"{os.fspath(source)!r} is not a sequence classifier: it has no weights for "
            f"{', '.join(sorted(info['missing_keys']))}, so its scores would be random. Pass a "
            "model that was trained and saved as AutoModelForSequenceClassification."
        )
    return model


def _fill(model: PreTrainedModel, head: dict[str, Tensor], missing: set[str]) -> None:
    """Put the head of a GGUF file where the model lacks one, and take it from what is missing."""
    for place in sorted(missing):
        owner, _, kind = place.rpartition(".")
        weight = getattr(model.get_submodule(owner), kind)
        if kind in head and head[kind].shape == weight.shape:
            weight.data.copy_(head[kind])
            missing.remove(place)


def loaded(kind: Any, source: Source, *needed: str, **options: Any) -> Any:
    """Return what a class of transformers loads from a folder, or by its name on the hub.

    Args:
        kind: Has `from_pretrained`.
        source: Folder or name.
        *needed: Files that a folder must hold, the last one in any case.
        options: For `from_pretrained`.
    """
    name, options = gguf_apart(source, options)
    check_there(name)
    folder = Path(name) if Path(name).is_dir() else None
    if "gguf_file" in options:
        needed = (options["gguf_file"],)
    with damage_told(folder, *needed):
        if folder is not None and not (folder / needed[-1]).is_file():
            raise FileNotFoundError(damage(folder, OSError(), needed[-1]))
        try:
            return kind.from_pretrained(name, trust_remote_code=False, **options)
        except (OSError, ValueError) as error:
            if folder is not None:
                raise
            raise OSError(
                f"the {kind.__name__} of {name!r} could not be loaded: it is neither a local "
                "folder nor could it be fetched from the hub. Without network, pass the path of a "
                "folder that holds config.json, model.safetensors and the tokenizer's files."
            ) from error
