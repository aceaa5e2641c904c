"""The value head beside a saved model, in today's folders and in those of older releases.

value_head.safetensors      ours: `summary.weight` [1, d], `summary.bias` [1]
v_head.summary.*            among the model's own weights: the 2020 trl, and releases 0.2 to
                            0.11, where a LoRA folder keeps them in pytorch_model.bin
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

VALUE_HEAD_FILE = "value_head.safetensors"
PREFIX = "v_head."

_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
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
    """Raise if `name` looks like a folder and holds no model that may be loaded.

    Raises:
        FileNotFoundError: if the folder, or the weights in it, are missing.
        ValueError: if the weights are pickles and `allow_pickle` is False.
    """
    if not Path(name).is_dir():
        if Path(name).is_absolute() or name.startswith(("./", "../", "~")):
            raise FileNotFoundError(
                f"the model folder `{name}` does not exist: pass a folder with config.json and "
                "model.safetensors, or the name of a model on the Hugging Face Hub."
            )
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


def load_value_head(
    name: str, *, among_weights: bool, allow_pickle: bool, **where: Any
) -> dict[str, Tensor] | None:
    """Return the state dict of the value head saved with a model, None if it has none.

    Args:
        name: Folder or hub name.
        among_weights: Look for `v_head.*` among the model's own weights too.
        allow_pickle: Also in pickles.
        **where: See `hub_arguments`.
    """
    own = find_file(name, VALUE_HEAD_FILE, **where)
    if own is not None:
        return load_file(own)
    if not among_weights:
        return None
    head: dict[str, Tensor] = {}
    for path in _weight_files(name, _SAFE, **where):
        with safe_open(path, framework="pt") as file:
            keys = [key for key in list(file.keys()) if key.startswith(PREFIX)]
            head |= {key: file.get_tensor(key) for key in keys}
    if not head and allow_pickle:
        for path in _weight_files(name, _PICKLED, **where):
            weights = torch.load(path, map_location="cpu", weights_only=True)
            head |= {key: value for key, value in weights.items() if key.startswith(PREFIX)}
    return {key.removeprefix(PREFIX): value for key, value in head.items()} or None


def _weight_files(name: str, file: str, **where: Any) -> list[Path]:
    """Return the files of a checkpoint that may hold the head: one, or some of several shards."""
    single = find_file(name, file, **where)
    if single is not None:
        return [single]
    index = find_file(name, f"{file}.index.json", **where)
    if index is None:
        return []
    places = json.loads(index.read_text())["weight_map"]
    shards = {shard for key, shard in places.items() if key.startswith(PREFIX)}
    found = (find_file(name, shard, **where) for shard in sorted(shards))
    return [path for path in found if path is not None]


def save_value_head(head: nn.Module | dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write the value head, or its state dict, beside a saved model."""
    weights = head.state_dict() if isinstance(head, nn.Module) else head
    weights = {key: weight.detach().contiguous().cpu() for key, weight in weights.items()}
    save_file(weights, Path(folder) / VALUE_HEAD_FILE, metadata={"format": "pt"})


def split_value_head(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into the model's weights and the head's, the latter without prefix."""
    head = {
        key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)
    }
    return {key: value for key, value in weights.items() if not key.startswith(PREFIX)}, head
