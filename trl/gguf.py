"""Models in a GGUF file, the format of llama.cpp, read as plain numbers.

A model is named by its folder (or repository of the hub) and `gguf_file`, or by the path of the
file alone. What is read is an ordinary model: it may be trained, and saved as a folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import cached_file

from trl.config.errors import needed, refuse

_HEADS = "cls.output", "score", "classifier"
"""What the head of a classifier is called in a file."""


def gguf_apart(
    name: str | os.PathLike[str], settings: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the folder or repository of a model, and the settings to load it with.

    Args:
        name: Of a folder, of a repository, or of a GGUF file in one.
        settings: Of `from_pretrained`; without `gguf_file`, or with None for it, those that come
            back name the file if `name` does. In a folder they name it by its whole path, since
            transformers would take another one of its name that lies where the program runs.

    Raises:
        ImportError: for a GGUF file without the package gguf.
        FileNotFoundError: if the folder does not hold it.
    """
    name, settings = os.path.expanduser(os.fspath(name)), dict(settings)
    file = settings.pop("gguf_file", None)
    if file is None and name.endswith(".gguf"):
        name, file = os.path.split(name)
        name = name or "."
    if file is None:
        return name, settings
    needed("gguf", "a GGUF file")
    folder = Path(name) / (settings.get("subfolder") or "")
    if not folder.is_dir() or (folder / "adapter_config.json").is_file():  # or that of its base
        return name, settings | {"gguf_file": os.fspath(file)}
    path = (folder / os.path.expanduser(file)).resolve()
    if not path.is_file():
        others = ", ".join(sorted(other.name for other in folder.glob("*.gguf")))
        got = f"{os.fspath(file)!r} where there is {others or 'no GGUF file'}"
        refuse("gguf_file", f"be a file in {name}", got, error=FileNotFoundError)
    return name, settings | {"gguf_file": str(path)}


def unpacking() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that make it unpack a file to plain numbers.

    Without them transformers keeps the blocks of a file where it has kernels for them.
    """
    config = getattr(transformers, "GgufConfig", None)  # before it, all files were unpacked
    return {"quantization_config": config(dequantize=True)} if config else {}


def as_plain(model: PreTrainedModel, name: str, file: str) -> None:
    """Let a model that was read and unpacked be an ordinary one, which may be trained and saved.

    Args:
        model: Its weights are plain numbers already.
        name: Its folder or repository.
        file: The GGUF file in it: what is made of the model later finds it by both.
    """
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)
    model.is_quantized = False
    model.name_or_path = model.config.name_or_path = os.path.join(name, file)


def classifier_head(name: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return weight (and bias) of the head of a classifier in a file, and the names of its labels.

    transformers knows no name for them.

    Returns:
        {"weight": [labels, d], "bias": [labels]}, without those that are missing; the names, as
        many or none.
    """
    gguf = needed("gguf", "a GGUF file")
    where = {key: settings[key] for key in ("revision", "subfolder", "token") if key in settings}
    reader = gguf.GGUFReader(cached_file(name, settings["gguf_file"], **where))
    found = {}
    for tensor in reader.tensors:
        owner, _, kind = tensor.name.rpartition(".")
        if owner in _HEADS:
            numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
            found[kind] = torch.tensor(numbers, dtype=torch.float32)
    architecture = reader.get_field("general.architecture").contents()
    labels = reader.get_field(f"{architecture}.classifier.output_labels")
    return found, list(labels.contents()) if labels is not None else []
