"""Adapters of the package peft (LoRA and its like): which weights are theirs, and their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from trl.anatomy import language_model, text_config, vocabulary_size
from trl.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PICKLE_ADVICE,
    checked_name,
    find_file,
)

_PICKLED = "adapter_model.bin"


def import_peft() -> Any:
    """Return the package peft, or say how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("an adapter needs the package peft: pip install peft.") from error
    return peft


# -- in a model ------------------------------------------------------------------------------------


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """Return the model with a new adapter.

    Raises:
        TypeError: if `peft_config` is none of peft's.
        ValueError: if the model has an adapter already.
    """
    peft = import_peft()
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            f"`peft_config` must be a configuration of peft, got {type(peft_config).__name__}: "
            "pass peft.LoraConfig(r=8) or another of its kind."
        )
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "`peft_config` must be None for a model that already has an adapter: merge "
            "it first with merge_and_unload(), or go on training it."
        )
    return peft.get_peft_model(model, peft_config)


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
        if hasattr(module, "base_layer") and getattr(module, "merged", False) is True:
            raise ValueError(
                f"the adapter of `model` must be apart from its base, but that of `{name}` is "
                "merged: call model.pretrained_model.unmerge_adapter(), or merge_and_unload()."
            )
        if getattr(module, "disable_adapters", None) is True:
            raise ValueError(
                f"the adapter of `model` must be switched on, but that of `{name}` is off: nothing "
                "would be trained. Call model.pretrained_model.base_model.enable_adapter_layers()."
            )


# -- in a folder -----------------------------------------------------------------------------------


def save_adapter(model: Any, folder: str, **kwargs: Any) -> None:
    """Save the adapter of a `PeftModel` where `load_adapter` looks for it: at the folder's root.

    Raises:
        ValueError: if there are several, or the folder is that of the base model, or the adapter
            changes one of two embeddings of a model with added tokens.
    """
    names = kwargs.pop("selected_adapters", None) or list(model.peft_config)
    if len(names) != 1:
        raise ValueError(
            f"a policy is saved with one adapter, got {names}: name one with "
            "save_pretrained(folder, selected_adapters=[...]), or remove the others with "
            "model.pretrained_model.delete_adapter(...)."
        )
    (name,) = names
    base = model.peft_config[name].base_model_name_or_path or language_model(model).name_or_path
    if base and Path(base).is_dir() and Path(base).resolve() == Path(folder).resolve():
        raise ValueError(
            f"`save_directory` must be another folder than that of the base model, got `{folder}`: "
            "the adapter would stand for its own base. Pass a folder of its own."
        )
    if base:
        _check_added_tokens(language_model(model), base)
    model.save_pretrained(folder, selected_adapters=names, **kwargs)
    if name != "default":  # peft puts it into a folder of its name
        _move_up(Path(folder) / name)


def _check_added_tokens(plain: PreTrainedModel, base: str) -> None:
    """Raise if tokens were added whose embeddings peft would not save beside the adapter.

    It saves those of both ends, unless the adapter changes some: then it saves these only.
    """
    ends = (plain.get_input_embeddings(), plain.get_output_embeddings())
    changed = {hasattr(end, "base_layer") for end in ends}
    if len(changed) == 1 or text_config(plain).tie_word_embeddings:
        return
    try:
        tokens = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    except (OSError, ValueError):  # unknown: out of reach, or with code of its own
        return
    if tokens != vocabulary_size(plain):
        raise ValueError(
            f"an adapter on one of two embeddings cannot be saved when the model has "
            f"{vocabulary_size(plain)} tokens and its base `{base}` {tokens}: save the base model "
            "with its added tokens and load that, or put the adapter on both embeddings."
        )


def _move_up(inner: Path) -> None:
    """Move the files of an adapter to the folder above."""
    for file in (ADAPTER_CONFIG, ADAPTER_FILE, _PICKLED):
        if (inner / file).is_file():
            (inner / file).replace(inner.parent / file)
    if inner.is_dir() and not any(inner.iterdir()):
        inner.rmdir()


def base_of(name: str, where: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of the base model of a saved adapter, and where its files are.

    Args:
        name: Folder or hub name of the adapter.
        where: See `trl.models.checkpoint.hub_arguments`; subfolder and revision are the adapter's.

    Raises:
        FileNotFoundError: if the base model is a folder that is missing.
        ValueError: if the adapter names none, or one that is an adapter itself.
    """
    config = import_peft().PeftConfig.from_pretrained(name, **where)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"`{name}` must name its base model in {ADAPTER_CONFIG}, got {base!r}: load the "
            "base model, put the adapter on it with PeftModel.from_pretrained, and pass that."
        )
    base = checked_name(base)
    there = {key: value for key, value in where.items() if key not in ("revision", "subfolder")}
    if getattr(config, "revision", None):
        there["revision"] = config.revision
    if find_file(base, ADAPTER_CONFIG, **there) is not None:
        raise ValueError(
            f"the base model of the adapter `{name}` must be a whole model, got `{base}`, which "
            f"has an {ADAPTER_CONFIG}: move the adapter_* files of one of them to another folder, "
            f"and set base_model_name_or_path in {ADAPTER_CONFIG}."
        )
    return base, there


def load_adapter(
    base: PreTrainedModel,
    name: str,
    *,
    is_trainable: bool,
    allow_pickle: bool,
    where: dict[str, Any],
) -> nn.Module:
    """Put a saved adapter on its base model.

    Raises:
        ValueError: if the adapter is a pickle and `allow_pickle` is False.
    """
    file = find_file(name, ADAPTER_FILE, **where)
    if file is not None:
        _resize_like(base, file)
    elif not allow_pickle and find_file(name, _PICKLED, **where) is not None:
        raise ValueError(f"`{name}` holds its adapter as {_PICKLED}, a pickle. {PICKLE_ADVICE}")
    peft = import_peft()
    return peft.PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **where)


def _resize_like(base: PreTrainedModel, file: Path) -> None:
    """Give the base model as many tokens as it had when the adapter was saved.

    peft saves embeddings beside an adapter if tokens had been added to the base model.
    """
    embedding = base.get_input_embeddings()
    (place,) = (name for name, module in base.named_modules() if module is embedding)
    saved = {
        f"base_model.model.{place}.{part}weight" for part in ("", "base_layer.", "modules_to_save.")
    }
    with safe_open(file, framework="pt") as weights:
        rows = {weights.get_slice(key).get_shape()[0] for key in saved.intersection(weights.keys())}
    for tokens in rows - {vocabulary_size(base)}:
        base.resize_token_embeddings(tokens, mean_resizing=False)
