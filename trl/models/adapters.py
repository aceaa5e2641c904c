"""Adapters of the package peft (LoRA and its like): which weights are theirs, and their files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from trl.anatomy import language_model, text_config, vocabulary_size
from trl.config.errors import needed, refuse
from trl.gguf import gguf_apart
from trl.models.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, Source
from trl.saved import refuse_pickle

_PICKLED = "adapter_model.bin"


import_peft = partial(needed, "peft", by="an adapter")
"""Returns the package peft, or says how to get it."""


# -- in a model ------------------------------------------------------------------------------------


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """Return the model with a new adapter.

    Raises:
        TypeError: if `peft_config` is none of peft's.
        ValueError: if the model has an adapter already.
    """
    peft = import_peft()
    if not isinstance(peft_config, peft.PeftConfig):
        got, fix = type(peft_config).__name__, "pass peft.LoraConfig(r=8) or another of its kind"
        refuse("peft_config", "be a configuration of peft", got, fix, error=TypeError)
    if hasattr(model, "get_base_model"):
        fix = "merge it first with merge_and_unload(), or go on training it"
        refuse("peft_config", "be None for a model that already has an adapter", fix=fix)
    with _old_names():
        return peft.get_peft_model(model, peft_config)


@contextmanager
def _old_names() -> Iterator[None]:
    """Be silent on what peft calls by its old name, which is no matter of the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def with_adapter_like(model: nn.Module, other: nn.Module) -> nn.Module:
    """Return the model with a new adapter of the settings of another model's, if that has one and
    this one does not.
    """
    if not hasattr(other, "get_base_model") or hasattr(model, "get_base_model"):
        return model
    settings = copy.deepcopy(other.peft_config[other.active_adapter])
    settings.inference_mode, settings.base_model_name_or_path = False, None
    return add_adapter(model, settings)


def base_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and weight of all that is in force while the adapter is switched off.

    An adapter's layer holds the layer of the base model that it changes (`base_layer`), or that it
    replaces (`original_module`).
    """
    for name in ("original_module", "base_layer"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            yield from base_weights(inner, f"{prefix}{name}.")
            return
    for name, weight in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", weight
    for name, child in module.named_children():
        yield from base_weights(child, f"{prefix}{name}.")


def check_enabled(policy: nn.Module) -> None:
    """Raise if the adapter of a policy has been switched off, or merged into the base."""
    for name, module in policy.named_modules():
        merged = hasattr(module, "base_layer") and getattr(module, "merged", False) is True
        if merged or getattr(module, "disable_adapters", None) is True:
            rule = "have its adapter switched on and apart from its base"
            back = "unmerge_adapter()" if merged else "base_model.enable_adapter_layers()"
            got = f"that of `{name}` {'merged' if merged else 'off'}"
            refuse("model", rule, got, f"call model.pretrained_model.{back}")


# -- in a folder -----------------------------------------------------------------------------------


def save_adapter(
    model: Any, folder: str, selected_adapters: list[str] | None = None, **kwargs: Any
) -> None:
    """Save the adapter of a `PeftModel` where `load_adapter` looks for it: at the folder's root.

    Raises:
        ValueError: if there are several, or the folder is that of the base model, or the adapter
            changes one of two embeddings of a model with added tokens.
    """
    names = selected_adapters or list(model.peft_config)
    if len(names) != 1:
        fix = "name one with save_pretrained(folder, selected_adapters=[...])"
        refuse("selected_adapters", "name one adapter", names, fix)
    (name,) = names
    base = model.peft_config[name].base_model_name_or_path or language_model(model).name_or_path
    if base and Path(base).resolve() == Path(folder).resolve():
        rule, fix = "be another folder than that of the base model", "pass a folder of its own"
        refuse("save_directory", rule, f"`{folder}`", fix)
    if base:
        _check_added_tokens(language_model(model), base)
    if base and base.endswith(".gguf"):  # which peft does not look into
        added = _tokens_of(base) != vocabulary_size(model)
        kwargs.setdefault("save_embedding_layers", added or "auto")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Could not find a config file in .*\.gguf")
        model.save_pretrained(folder, selected_adapters=names, **kwargs)
    if name != "default":  # peft puts it into a folder of its name
        for file in (ADAPTER_CONFIG, ADAPTER_FILE, _PICKLED):
            with suppress(FileNotFoundError):
                (Path(folder) / name / file).replace(Path(folder) / file)
        with suppress(OSError):  # not empty
            (Path(folder) / name).rmdir()


def _check_added_tokens(plain: PreTrainedModel, base: str) -> None:
    """Raise if tokens were added whose embeddings peft would not save beside the adapter.

    It saves those of both ends, unless the adapter changes some: then it saves these only.
    """
    both = (plain.get_input_embeddings(), plain.get_output_embeddings())
    changed = {hasattr(embedding, "base_layer") for embedding in both}
    if len(changed) == 1 or text_config(plain).tie_word_embeddings:
        return
    try:
        tokens = _tokens_of(base)
    except (OSError, ValueError):  # unknown: out of reach, or with code of its own
        return
    if tokens != vocabulary_size(plain):
        raise ValueError(
            f"an adapter on one of two embeddings cannot be saved when the model has "
            f"{vocabulary_size(plain)} tokens and its base `{base}` {tokens}: save the base model "
            "with its added tokens and load that, or put the adapter on both embeddings."
        )


def _tokens_of(base: str) -> int:
    """Return the size of the vocabulary of a model by its name."""
    name, where = gguf_apart(base, {})
    return AutoConfig.from_pretrained(name, **where).get_text_config().vocab_size


def base_of(adapter: Source, settings: dict[str, Any]) -> tuple[Source, dict[str, Any]]:
    """Return where the base model of a saved adapter is, and the settings to load it with.

    Args:
        adapter: Where it is.
        settings: Of `from_pretrained`; the base model may be in a GGUF file.

    Raises:
        FileNotFoundError: if the base model is a folder that is missing.
        ValueError: if the adapter names none, or one that is an adapter itself.
    """
    config = import_peft().PeftConfig.from_pretrained(adapter.name, **adapter.hub)
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(
            f"`{adapter.name}` must name its base model in {ADAPTER_CONFIG}, got {name!r}: load "
            "the base model, put the adapter on it with PeftModel.from_pretrained, and pass that."
        )
    revision = getattr(config, "revision", None)
    name, settings = gguf_apart(name, settings)
    base = Source.of(name, adapter.hub | {"revision": revision, "subfolder": None})
    if base.find(ADAPTER_CONFIG) is not None:
        raise ValueError(
            f"the base model of the adapter `{adapter.name}` must be a whole model, got `{name}`, "
            f"which has an {ADAPTER_CONFIG}: move the adapter_* files of one of them to another "
            f"folder, and set base_model_name_or_path in {ADAPTER_CONFIG}."
        )
    return base, settings


def load_adapter(
    base: PreTrainedModel, adapter: Source, *, is_trainable: bool, allow_pickle: bool
) -> nn.Module:
    """Put a saved adapter on its base model.

    Raises:
        ValueError: if the adapter is a pickle and `allow_pickle` is False.
    """
    file = adapter.find(ADAPTER_FILE)
    if file is not None:
        _resize_like(base, file)
    elif not allow_pickle and adapter.find(_PICKLED) is not None:
        refuse_pickle(adapter.name, "adapter", _PICKLED)
    load = import_peft().PeftModel.from_pretrained
    with _old_names():  # or the weights that are not there would be new ones
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return load(base, adapter.name, is_trainable=is_trainable, **adapter.hub)


def _resize_like(base: PreTrainedModel, file: Path) -> None:
    """Give the base model as many tokens as it had when the adapter was saved.

    peft saves embeddings beside an adapter if tokens had been added to the base model.
    """
    embedding = base.get_input_embeddings()
    (place,) = (name for name, module in base.named_modules() if module is embedding)
    names = (f"{place}.{part}weight" for part in ("", "base_layer.", "modules_to_save."))
    with safe_open(file, framework="pt") as weights:
        saved = {f"base_model.model.{name}" for name in names}.intersection(weights.keys())
        rows = {weights.get_slice(key).get_shape()[0] for key in saved}
    for tokens in rows - {vocabulary_size(base)}:
        base.resize_token_embeddings(tokens, mean_resizing=False)
