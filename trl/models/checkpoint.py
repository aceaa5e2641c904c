"""The value head beside a saved model, in today's folders and in those of older releases.

value_head.safetensors      ours: `summary.weight` [1, d], `summary.bias` [1]; its metadata say with
                            which weights of the language model it was saved
v_head.summary.*            among the model's own weights: the 2020 trl, and releases 0.2 to
                            0.11, where a LoRA folder keeps them in pytorch_model.bin
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from trl.models.fingerprint import fingerprint

VALUE_HEAD_FILE = "value_head.safetensors"
PREFIX = "v_head."
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MODEL_FILE = "model.safetensors"

_PICKLED = "pytorch_model.bin"
_SAVED_WITH = "language_model"  # the name of the fingerprint in the metadata
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)


def hub_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of `from_pretrained` that say where a file is."""
    return {name: settings[name] for name in _HUB_ARGUMENTS if settings.get(name) is not None}


def checked_name(name: str | os.PathLike[str]) -> str:
    """Return a hub name, or the path of a folder with `~` written out.

    Raises:
        FileNotFoundError: if it can only be a folder, and there is none.
    """
    name = os.path.expanduser(os.fspath(name))
    path = Path(name)
    if path.is_dir():
        return name
    local = path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1
    if local or path.is_file():
        what = "is a file" if path.is_file() else "does not exist"
        raise FileNotFoundError(
            f"the model folder `{name}` {what}: pass a folder with config.json and "
            f"{MODEL_FILE}, or the name of a model on the Hugging Face Hub."
        )
    return name


def find_file(name: str, file: str, **where: Any) -> Path | None:
    """Return the path of a file in a folder or a repository of the hub, None if it has none."""
    if Path(name).is_dir():
        path = Path(name) / where.get("subfolder", "") / file
        return path if path.is_file() else None
    found = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **where,
    )
    return None if found is None else Path(found)


def check_folder(name: str, *, allow_pickle: bool, **where: Any) -> None:
    """Raise if `name` is a folder that holds no model that may be loaded.

    Raises:
        FileNotFoundError: if the weights are missing.
        ValueError: if the weights are pickles and `allow_pickle` is False.
    """
    if not Path(name).is_dir():
        return
    folder = Path(name) / where.get("subfolder", "")
    weights = [path for path in folder.glob("*.safetensors") if path.name != VALUE_HEAD_FILE]
    if weights:
        return
    if not any(folder.glob("pytorch_model*.bin")):
        found = sorted(entry.name for entry in folder.glob("*"))
        raise FileNotFoundError(
            f"the model folder `{folder}` must hold weights (model.safetensors), found "
            f"{found or 'nothing'}: save the model there with save_pretrained."
        )
    if not allow_pickle:
        raise ValueError(f"`{folder}` holds its weights as {_PICKLED}, a pickle. {PICKLE_ADVICE}")


PICKLE_ADVICE = (
    "Pickles can run code when they are loaded: if you trust where this one comes from, pass "
    "allow_pickle=True, then save_pretrained once to have safetensors."
)


class SavedHead(NamedTuple):
    """A value head that was saved with a model."""

    weights: dict[str, Tensor]
    source: str
    """The file, or the model among whose weights it stands."""


def load_value_head(
    name: str,
    *,
    among_weights: bool,
    allow_pickle: bool,
    saved_with: str | None = None,
    **where: Any,
) -> SavedHead | None:
    """Return the value head saved with a model, None if it has none.

    A head that was saved with other weights of the language model than those that now stand
    beside it is left out, with a warning.

    Args:
        name: Folder or hub name.
        among_weights: Look for `v_head.*` among the model's own weights too.
        allow_pickle: Also in pickles.
        saved_with: The file of weights that it belongs to, `MODEL_FILE` or `ADAPTER_FILE`; None:
            do not compare.
        **where: See `hub_arguments`.

    Raises:
        ValueError: if the file cannot be read.
    """
    own = find_file(name, VALUE_HEAD_FILE, **where)
    if own is not None:
        weights, expected = _read_value_head(own)
        if saved_with and expected and expected != _fingerprint(name, saved_with, **where):
            warnings.warn(
                f"`{own}` is left out, since it was saved with other weights of the language "
                "model than those beside it: the value head starts anew. Save a policy with its "
                "own save_pretrained, or delete that file.",
                stacklevel=4,
            )
            return None
        return SavedHead(weights, str(own))
    if not among_weights:
        return None
    head: dict[str, Tensor] = {}
    for path in _weight_files(name, MODEL_FILE, PREFIX, **where):
        with safe_open(path, framework="pt") as file:
            keys = [key for key in list(file.keys()) if key.startswith(PREFIX)]
            head |= {key: file.get_tensor(key) for key in keys}
    if not head and allow_pickle:
        for path in _weight_files(name, _PICKLED, PREFIX, **where):
            weights = torch.load(path, map_location="cpu", weights_only=True)
            head |= {key: value for key, value in weights.items() if key.startswith(PREFIX)}
    head = {key.removeprefix(PREFIX): value for key, value in head.items()}
    return SavedHead(head, name) if head else None


def _read_value_head(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the weights of a value-head file, and the fingerprint of those beside it if known."""
    try:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in list(file.keys())}
            return weights, (file.metadata() or {}).get(_SAVED_WITH)
    except SafetensorError as error:
        raise ValueError(
            f"`{path}` must be a safetensors file with a value head, but cannot be read ({error}): "
            "save the policy again, or delete the file to start with a new value head."
        ) from error


def fill_value_head(head: nn.Module, saved: SavedHead) -> None:
    """Copy the saved weights into a value head.

    Raises:
        ValueError: if they are those of another one.
    """
    expected = {key: tuple(weight.shape) for key, weight in head.state_dict().items()}
    found = {key: tuple(weight.shape) for key, weight in saved.weights.items()}
    if found != expected:
        raise ValueError(
            f"the value head in `{saved.source}` must hold {expected}, got {found or 'nothing'}: "
            f"save the policy again, or delete {VALUE_HEAD_FILE} to start with a new value head."
        )
    head.load_state_dict(saved.weights)


def _weight_files(name: str, file: str, prefix: str = "", **where: Any) -> list[Path]:
    """Return the files of a checkpoint with weights of that prefix: one, or some of its shards."""
    single = find_file(name, file, **where)
    if single is not None:
        return [single]
    index = find_file(name, f"{file}.index.json", **where)
    if index is None:
        return []
    places = json.loads(index.read_text())["weight_map"]
    shards = {shard for key, shard in places.items() if key.startswith(prefix)}
    found = (find_file(name, shard, **where) for shard in sorted(shards))
    return [path for path in found if path is not None]


def _fingerprint(name: str, file: str, **where: Any) -> str | None:
    return fingerprint(_weight_files(name, file, **where))


def save_value_head(
    head: nn.Module | dict[str, Tensor],
    folder: str | os.PathLike[str],
    saved_with: str | None = MODEL_FILE,
) -> None:
    """Write the value head, or its state dict, beside a saved model.

    Args:
        head: The value head.
        folder: Where the model has just been saved.
        saved_with: The file of its weights, which are then known by their fingerprint; None: no.
    """
    weights = head.state_dict() if isinstance(head, nn.Module) else head
    weights = {key: weight.detach().contiguous().cpu() for key, weight in weights.items()}
    metadata = {"format": "pt"}
    known = _fingerprint(os.fspath(folder), saved_with) if saved_with else None
    if known:
        metadata[_SAVED_WITH] = known
    save_file(weights, Path(folder) / VALUE_HEAD_FILE, metadata=metadata)


def checked_save_directory(save_directory: str | os.PathLike[str]) -> str:
    """Return the path of a folder to save to, with `~` written out.

    Raises:
        FileExistsError: if it is a file.
    """
    folder = os.path.expanduser(os.fspath(save_directory))
    if Path(folder).is_file():
        raise FileExistsError(
            f"`save_directory` must be a folder, got the file `{folder}`: pass another path."
        )
    return folder


def refuse_adapter_folder(folder: str) -> None:
    """Raise if a whole model is to be saved where an adapter is: the adapter would be loaded."""
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"`save_directory` must not hold an adapter beside a whole model, but `{folder}` "
            f"has {ADAPTER_CONFIG}, and loading it would load the adapter: save to another folder, "
            "or delete the adapter_* files first."
        )


@contextmanager
def one_layout(folder: str) -> Iterator[None]:
    """Delete what a save inside replaces: one file of weights, or the index of several.

    transformers would load the one file, however old. A save that fails deletes nothing.
    """
    single, index = Path(folder) / MODEL_FILE, Path(folder) / f"{MODEL_FILE}.index.json"
    before = [_written(path) for path in (single, index)]
    yield
    new = [_written(path) != old for path, old in zip((single, index), before, strict=True)]
    if new == [False, True]:
        single.unlink(missing_ok=True)
    elif new == [True, False]:
        index.unlink(missing_ok=True)


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def split_value_head(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into the model's weights and the head's, the latter without prefix."""
    head = {
        key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)
    }
    return {key: value for key, value in weights.items() if not key.startswith(PREFIX)}, head
