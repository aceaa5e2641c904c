"""The value head beside a saved model, in today's folders and in those of older releases.

value_head/head.safetensors   ours: `summary.weight` [1, d], `summary.bias` [1]; its metadata say
                              with which weights of the language model it was saved. In a folder of
                              its own: vLLM and SGLang load every *.safetensors beside the model
value_head.safetensors        ours until 1.0, the same
v_head.summary.*              among the model's own weights: the 2020 trl, and releases 0.2 to
                              0.11, where a LoRA folder keeps them in pytorch_model.bin
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import cached_file

from trl.config.errors import refuse
from trl.saved import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    MODEL_FILE,
    OLDER_HEAD_FILE,
    PICKLE_FILE,
    SCORE_OFFSET,
    check_there,
)

VALUE_HEAD_FILE = "value_head/head.safetensors"
PREFIX = "v_head."
CRITIC = "critic"
"""Folder of a critic of its own beside a saved model, and its attribute."""
SCORE = "score."
"""Prefix of the head of a reward model."""

_SAVED_WITH = "language_model"  # the name of the fingerprint in the metadata
_HUB_ARGUMENTS = "cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"
_NO_EXCEPTIONS = [
    f"_raise_exceptions_for_{what}"
    for what in ("missing_entries", "connection_errors", "gated_repo")
]

_SAMPLED = 16
"""Numbers that are looked at of each tensor, in the middle of it."""


def hub_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of `from_pretrained` that say where a file is."""
    return {name: settings[name] for name in _HUB_ARGUMENTS if settings.get(name) is not None}


class Source(NamedTuple):
    """A folder, or a repository of the hub, that a model is loaded from."""

    name: str
    hub: dict[str, Any]
    """See `hub_arguments`."""

    @classmethod
    def of(cls, name: str | os.PathLike[str], settings: dict[str, Any]) -> Source:
        """Return where the model of that name is, given the arguments of `from_pretrained`.

        Raises:
            FileNotFoundError: if it can only be a folder, and there is none.
        """
        name = os.path.expanduser(os.fspath(name))
        check_there(name)
        return cls(name, hub_arguments(settings))

    @property
    def folder(self) -> Path | None:
        """Where the files are, None on the hub."""
        path = Path(self.name)
        return path / self.hub.get("subfolder", "") if path.is_dir() else None

    def find(self, file: str) -> Path | None:
        """Return the path of a file, None if there is none."""
        if self.folder is not None:
            return self.folder / file if (self.folder / file).is_file() else None
        path = cached_file(self.name, file, **dict.fromkeys(_NO_EXCEPTIONS, False), **self.hub)
        return None if path is None else Path(path)

    def weight_files(self, file: str, prefix: str = "") -> list[Path]:
        """Return the files with weights of that prefix: `file`, or some of its shards."""
        single = self.find(file)
        if single is not None:
            return [single]
        index = self.find(f"{file}.index.json")
        places = json.loads(index.read_text())["weight_map"] if index is not None else {}
        shards = {shard for key, shard in places.items() if key.startswith(prefix)}
        return [path for path in map(self.find, sorted(shards)) if path is not None]


# -- the value head --------------------------------------------------------------------------------


class SavedHead(NamedTuple):
    """A value head that was saved with a model."""

    weights: dict[str, Tensor]
    source: str
    """The file, or the model among whose weights it stands."""


def load_value_head(
    source: Source, file: str | None, *, among_weights: bool, allow_pickle: bool
) -> SavedHead | None:
    """Return the value head saved with a model, None if it has none.

    A head that was saved with other weights of the language model than those that now stand
    beside it is left out, with a warning.

    Args:
        source: Where the model is.
        file: Its weights, `MODEL_FILE` or `ADAPTER_FILE`; None: do not compare.
        among_weights: Look for `v_head.*` among the model's own weights too.
        allow_pickle: Also in pickles.

    Raises:
        ValueError: if the file cannot be read.
    """
    path = source.find(VALUE_HEAD_FILE) or source.find(OLDER_HEAD_FILE)
    if path is not None:
        try:
            weights, metadata = _read(path)
        except SafetensorError as error:
            raise ValueError(
                f"`{path}` must be a safetensors file with a value head, but cannot be read "
                f"({error}): save the policy again, or delete the file to start with a new head."
            ) from error
        expected = metadata.get(_SAVED_WITH)
        if not file or not expected or expected == _fingerprint(source.weight_files(file)):
            return SavedHead(weights, str(path))
        warnings.warn(
            f"`{path}` is left out, since it was saved with other weights of the language "
            "model than those beside it: the value head starts anew. Save a policy with its "
            "own save_pretrained, or delete that file.",
            stacklevel=4,
        )
    elif among_weights:
        weights = {}
        for path in source.weight_files(MODEL_FILE, PREFIX):
            weights |= _read(path, PREFIX)[0]
        if not weights and allow_pickle:
            for path in source.weight_files(PICKLE_FILE, PREFIX):
                weights |= torch.load(path, map_location="cpu", weights_only=True)
        if head := _of_value_head(weights):
            return SavedHead(head, source.name)
    return None


def load_score_head(source: Source, config: PretrainedConfig) -> SavedHead | None:
    """Return the head of a reward model as that of values, None if it is none.

    Raises:
        ValueError: if it is a classifier of several classes.
    """
    weights: dict[str, Tensor] = {}
    for path in source.weight_files(MODEL_FILE, SCORE):
        weights |= _read(path, SCORE)[0]
    if (weight := weights.get(f"{SCORE}weight")) is None:
        return None
    if len(weight) != 1:
        refuse("critic", "have one output if it is a classifier", f"{len(weight)} of {source.name}")
    offset = torch.full((1,), getattr(config, SCORE_OFFSET, 0.0))
    return SavedHead(
        {"summary.weight": weight, "summary.bias": weights.get(f"{SCORE}bias", offset)}, source.name
    )


def _of_value_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a state dict that are the value head's, by their names in it."""
    return {key.removeprefix(PREFIX): w for key, w in weights.items() if key.startswith(PREFIX)}


def _read(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights of a file whose names begin so, and its metadata."""
    with safe_open(path, framework="pt") as file:
        keys = [key for key in list(file.keys()) if key.startswith(prefix)]
        return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}


def fill_value_head(head: nn.Module, saved: SavedHead | None) -> None:
    """Copy the saved weights, if there are any, into a value head.

    Raises:
        ValueError: if they are those of another one.
    """
    if saved is None:
        return
    try:
        head.load_state_dict(saved.weights)
    except RuntimeError as error:
        got = " ".join(str(error).split())
        raise ValueError(
            f"the value head in `{saved.source}` must fit the model, but does not ({got}): save "
            "the policy again, or delete that file to start with a new value head."
        ) from error


# -- save ------------------------------------------------------------------------------------------


def save_policy(
    policy: Any,
    save: Callable[..., Any],
    save_directory: str | os.PathLike[str],
    file: str,
    kwargs: dict[str, Any],
) -> None:
    """Save a language model by its own method, with value head and tokenizer beside it.

    Args:
        policy: Has `v_head` and `tokenizer`.
        save: `save_pretrained` of the model without the head, or of its adapter.
        save_directory: Where to; `~` is the home folder.
        file: What the weights are called: `MODEL_FILE` or `ADAPTER_FILE`.
        kwargs: What `save` takes.

    Raises:
        FileExistsError: if `save_directory` is a file.
        ValueError: if it holds an adapter and a whole model is to be saved, which nobody could
            then load, or if the folder is to be uploaded before the head is in it.
    """
    folder = Path(save_directory).expanduser()
    if kwargs.pop("push_to_hub", False):
        refuse("push_to_hub", "be False here", "", "save first, then call model.push_to_hub(...)")
    if folder.is_file():
        got = f"the file `{folder}`"
        refuse("save_directory", "be a folder", got, "pass another path", error=FileExistsError)
    if file == MODEL_FILE and (folder / ADAPTER_CONFIG).is_file():
        got = f"`{folder}` with {ADAPTER_CONFIG}, and loading it would load the adapter"
        fix = "save to another folder, or delete the adapter_* files first"
        refuse("save_directory", "not hold an adapter beside a whole model", got, fix)
    critic = getattr(policy, CRITIC, None)
    head = {} if critic is not None else policy.v_head.state_dict()
    weights = kwargs.get("state_dict")
    if weights is not None:
        head = _of_value_head(weights) or head
        kwargs["state_dict"] = {
            key.removeprefix("pretrained_model."): weight
            for key, weight in weights.items()
            if not key.startswith((PREFIX, f"{CRITIC}."))
        }
    save(str(folder), **kwargs)
    if kwargs.get("is_main_process", True):
        _delete_older_layout(folder)
        _save_value_head(head, folder, None if kwargs.get("variant") else file)
        if critic is not None:
            theirs = f"{CRITIC}."
            own = {
                k.removeprefix(theirs): w
                for k, w in (weights or {}).items()
                if k.startswith(theirs)
            }
            critic.save_pretrained(folder / CRITIC, **({"state_dict": own} if own else {}))
        if policy.tokenizer is not None:
            policy.tokenizer.save_pretrained(folder)
        config = ADAPTER_CONFIG if file == ADAPTER_FILE else "config.json"
        for path in folder.rglob("*.safetensors"):  # which come with the mode of temporary files
            shutil.copymode(folder / config, path)


def _delete_older_layout(folder: Path) -> None:
    """Delete what a save has replaced: one file of weights, or the index of several.

    transformers deletes older shards itself, but would then load the one file, however old.
    """
    single, index = folder / MODEL_FILE, folder / f"{MODEL_FILE}.index.json"
    if single.exists() and index.exists():
        shards = json.loads(index.read_text())["weight_map"].values()
        newer = all((folder / shard).exists() for shard in shards)
        (single if newer else index).unlink()


def _save_value_head(head: dict[str, Tensor], folder: Path, file: str | None) -> None:
    """Write the value head, with the fingerprint of `file` saved beside it if it is given.

    Without any weights, since a critic of its own has them, none stays there.
    """
    path = folder / VALUE_HEAD_FILE
    if not head:
        path.unlink(missing_ok=True)
        return
    weights = {key: weight.detach().contiguous().cpu() for key, weight in head.items()}
    saved_with = _fingerprint(Source(str(folder), {}).weight_files(file)) if file else None
    # One entry at most: safetensors writes several in any order, and equal heads are equal bytes.
    metadata = {_SAVED_WITH: saved_with} if saved_with else None
    path.parent.mkdir(exist_ok=True)
    save_file(weights, path, metadata=metadata)
    (folder / OLDER_HEAD_FILE).unlink(missing_ok=True)


def _fingerprint(files: Iterable[Path]) -> str | None:
    """Return a hash of a few numbers of every tensor in some files, to know the weights again.

    It does not depend on how the tensors are spread over files. Training moves all numbers of a
    tensor, so a few show it; all of them would take as long to read as the model.

    Returns:
        32 hexadecimal digits; None without files.
    """
    samples: dict[str, bytes] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            samples |= {key: _sample(file, key) for key in list(file.keys())}
    text = b"".join(key.encode() + samples[key] for key in sorted(samples))
    return hashlib.sha256(text).hexdigest()[:32] if samples else None


def _sample(file: Any, key: str) -> bytes:
    """Return shape, dtype and some numbers of a tensor, reading no more than those."""
    whole = file.get_slice(key)
    shape = whole.get_shape()
    middle = tuple(slice(size // 2, size // 2 + 1) for size in shape[:-1])
    part = whole[(*middle, slice(0, _SAMPLED))] if shape else file.get_tensor(key)
    numbers = part.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{shape}{part.dtype}".encode() + numbers
