"""Loading a language model by name: whole or an adapter on its base model, with its value head."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from trl.models.adapters import base_of, load_adapter
from trl.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    MODEL_FILE,
    PICKLE_ADVICE,
    SavedHead,
    check_folder,
    checked_name,
    find_file,
    hub_arguments,
    load_value_head,
)

_OURS = ("peft_config", "is_trainable", "unfrozen_layers", "allow_pickle")


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Raise if a keyword is one of ours misspelt, which transformers would hand to the model."""
    for name in kwargs:
        match = difflib.get_close_matches(name, _OURS, 1, 0.85)
        if match:
            raise TypeError(f"from_pretrained has no argument `{name}`: did you mean `{match[0]}`?")
    if "output_loading_info" in kwargs:
        raise TypeError("`output_loading_info` must be left out: a policy loads whole or not.")


def is_encoder_decoder_name(name: str, kwargs: dict[str, Any]) -> bool:
    """Return whether the model of a hub name or folder, or the base of its adapter, is one.

    Args:
        name: Hub name or folder.
        kwargs: What it is to be loaded with.
    """
    name, where = checked_name(name), hub_arguments(kwargs)
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        return bool(config.is_encoder_decoder)
    if find_file(name, ADAPTER_CONFIG, **where) is not None:
        name, where = base_of(name, where)
    else:
        check_folder(name, allow_pickle=True, **where)
    code = {key: kwargs[key] for key in ("trust_remote_code", "code_revision") if key in kwargs}
    try:
        return bool(AutoConfig.from_pretrained(config or name, **code, **where).is_encoder_decoder)
    except OSError as error:
        raise no_such_model(name, error) from error


def load_model(
    auto: Any, name: str, *, is_trainable: bool, allow_pickle: bool, **kwargs: Any
) -> tuple[nn.Module, SavedHead | None]:
    """Return a language model, its adapter on it if it has one, and its value head.

    Args:
        auto: The class of transformers that loads models of the kind.
        name: Hub name or folder.
        is_trainable: Whether an adapter goes on being trained.
        allow_pickle: Also load weights from pickles.
        **kwargs: What transformers' `from_pretrained` takes.
    """
    name, where = checked_name(name), hub_arguments(kwargs)
    if find_file(name, ADAPTER_CONFIG, **where) is None:
        return _load_whole(auto, name, allow_pickle, where, kwargs)
    base_name, base_where = base_of(name, where)
    elsewhere = {k: v for k, v in kwargs.items() if k not in ("revision", "subfolder")}
    base, base_head = _load_whole(auto, base_name, allow_pickle, base_where, elsewhere | base_where)
    model = load_adapter(
        base, name, is_trainable=is_trainable, allow_pickle=allow_pickle, where=where
    )
    head = load_value_head(
        name, among_weights=True, allow_pickle=allow_pickle, saved_with=ADAPTER_FILE, **where
    )
    if head is None and not allow_pickle and find_file(name, "pytorch_model.bin", **where):
        raise ValueError(
            f"`{name}` holds its value head in pytorch_model.bin, a pickle. {PICKLE_ADVICE}"
        )
    return model, head or base_head


def _load_whole(
    auto: Any, name: str, allow_pickle: bool, where: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[nn.Module, SavedHead | None]:
    """Load a language model and its value head."""
    check_folder(name, allow_pickle=allow_pickle, **where)
    if "quantization_config" not in kwargs and "torch_dtype" not in kwargs:
        kwargs.setdefault("dtype", torch.float32)
    if not allow_pickle:
        kwargs["use_safetensors"] = True
    try:
        with _quiet_transformers():  # or it would warn of the value head in old folders
            model, info = auto.from_pretrained(name, output_loading_info=True, **kwargs)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise no_such_model(name, error) from error
    missing = sorted(set(info["missing_keys"]))
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("v_head.")]
    if missing:
        raise ValueError(
            f"`{name}` must hold the weights of a {type(model).__name__}, but lacks {missing[:3]}"
            f"{' and so on' if missing[3:] else ''}: it is a model of another kind."
        )
    head = load_value_head(
        name,
        among_weights=len(unexpected) < len(info["unexpected_keys"]),
        allow_pickle=allow_pickle,
        saved_with=None if kwargs.get("variant") else MODEL_FILE,
        **where,
    )
    return model, head


def no_such_model(name: str, error: OSError) -> OSError:
    """Return the error for a hub name that cannot be loaded."""
    return OSError(
        f"could not load `{name}` from the Hugging Face Hub ({error}): check the name and the "
        "network, or pass the path of a local folder with config.json and model.safetensors, "
        f"e.g. from_pretrained('./{Path(name).name}'). If it has pytorch_model.bin only: "
        f"{PICKLE_ADVICE}"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the warnings of transformers away."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
