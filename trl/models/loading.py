"""Loading a language model by name: whole or an adapter on its base model, with its value head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models import auto
from transformers.utils import logging as transformers_logging

from trl.anatomy import text_config
from trl.config import moved
from trl.gguf import as_plain, gguf_apart, unpacking
from trl.kernels.stored import bring_in, left_in_files
from trl.models import checkpoint as saved
from trl.models.adapters import base_of, load_adapter
from trl.models.checkpoint import SavedHead, Source
from trl.saved import CONFIG, PICKLE_ADVICE, check_weights, damage_told, refuse_pickle

OF_ONE_MODEL = ("revision", "subfolder", "gguf_file", "config", "variant", "code_revision")
"""Arguments of `from_pretrained` that are not those of a second model."""


def load_model(
    name: str, *, is_trainable: bool, allow_pickle: bool, as_critic: bool = False, **kwargs: Any
) -> tuple[nn.Module, SavedHead | None]:
    """Return a language model, its adapter on it if it has one, and its value head.

    Args:
        name: Hub name or folder.
        is_trainable: Whether an adapter goes on being trained.
        allow_pickle: Also load weights from pickles.
        as_critic: It may be a reward model: the language head may be missing.
        **kwargs: `shard`, which leaves float32 weights in their files for a trainer to shard; what
            transformers' `from_pretrained` takes.
    """
    if older := [moved.told(k, moved.LOADING[k]) for k in kwargs if k in moved.LOADING]:
        raise TypeError(" ".join(older))
    name, kwargs = gguf_apart(name, kwargs)
    source = Source.of(name, kwargs)
    if source.find(saved.ADAPTER_CONFIG) is None:
        how: Any = {"allow_pickle": allow_pickle, "as_critic": as_critic}
        return load_whole(None, source, **how, **kwargs)[:2]
    with damage_told(source.folder, saved.ADAPTER_CONFIG, saved.ADAPTER_FILE):
        return _load_adapted(source, kwargs, is_trainable=is_trainable, allow_pickle=allow_pickle)


def _load_adapted(
    source: Source, kwargs: dict[str, Any], *, is_trainable: bool, allow_pickle: bool
) -> tuple[nn.Module, SavedHead | None]:
    """Return the base model with the adapter on it, and the value head of either."""
    elsewhere = {key: kwargs[key] for key in kwargs if key not in ("revision", "subfolder")}
    of_base, elsewhere = base_of(source, elsewhere)
    base, base_head, _ = load_whole(
        None, of_base, allow_pickle=allow_pickle, **elsewhere | of_base.hub
    )
    model = load_adapter(base, source, is_trainable=is_trainable, allow_pickle=allow_pickle)
    head = saved.load_value_head(
        source, saved.ADAPTER_FILE, among_weights=True, allow_pickle=allow_pickle
    )
    if head is None and not allow_pickle and source.find(saved.PICKLE_FILE):
        refuse_pickle(source.name, "value head", saved.PICKLE_FILE)
    return model, head or base_head


def load_whole(
    load: Callable[..., Any] | None,
    source: Source,
    *args: Any,
    allow_pickle: bool,
    as_critic: bool = False,
    shard: bool = False,
    **kwargs: Any,
) -> tuple[Any, SavedHead | None, dict[str, Any]]:
    """Return a language model, its value head, and what transformers says of the loading.

    Args:
        load: `from_pretrained` of a class of transformers; None: of the one for its kind.
        source: Where the model is.
        *args: What `load` takes after the name.
        allow_pickle: Also load weights from pickles.
        as_critic: See `load_model`.
        shard: Likewise.
        **kwargs: What `load` takes.
    """
    with damage_told(source.folder, kwargs.get("gguf_file") or CONFIG):
        how = {"allow_pickle": allow_pickle, "as_critic": as_critic, "shard": shard}
        return _load_whole(load, source, *args, **how, **kwargs)


def _load_whole(
    load: Callable[..., Any] | None,
    source: Source,
    *args: Any,
    allow_pickle: bool,
    as_critic: bool,
    shard: bool,
    **kwargs: Any,
) -> tuple[Any, SavedHead | None, dict[str, Any]]:
    in_gguf = kwargs.get("gguf_file")
    if in_gguf is None and source.folder is not None:
        check_weights(source.folder, allow_pickle=allow_pickle)
    quantized = "quantization_config" in kwargs
    if not quantized and "torch_dtype" not in kwargs:
        kwargs.setdefault("dtype", torch.float32)
    if in_gguf is not None and not quantized:
        kwargs |= unpacking()
    if not allow_pickle:
        kwargs["use_safetensors"] = True
    in_files = shard and in_gguf is None and not quantized
    try:
        # Not quiet, it would warn of the value head in old folders.
        with quiet_transformers(bars=True), left_in_files(in_files):
            if load is None:
                kwargs.setdefault("trust_remote_code", False)  # None: transformers asks, and waits
                config = _config(source, kwargs)
                load = _auto_class(config).from_pretrained
                if in_gguf is not None:  # to read the file's vocabulary again takes seconds
                    kwargs["config"] = config
            model, info = load(source.name, *args, output_loading_info=True, **kwargs)
            bring_in(model.buffers())
    except OSError as error:
        if source.folder is not None:
            raise
        there = "safetensors" in f"{error}"  # else nothing is, not even a pickle
        raise OSError(
            f"could not load `{source.name}` from the Hugging Face Hub ({error}): check the name "
            "and the network, or pass the path of a local folder with config.json and "
            f"{saved.MODEL_FILE}. {f'If it has {saved.PICKLE_FILE} only: {PICKLE_ADVICE}' * there}"
        ) from error
    _check_whole(model, source, info["missing_keys"], as_critic=as_critic)
    _check_layers(model, source, info["unexpected_keys"])
    if in_gguf is not None:
        if not quantized:
            as_plain(model, source.name, in_gguf)
        return model, None, info
    head = saved.load_value_head(
        source,
        None if kwargs.get("variant") else saved.MODEL_FILE,
        among_weights=any(key.startswith(saved.PREFIX) for key in info["unexpected_keys"]),
        allow_pickle=allow_pickle,
    )
    if head is None and as_critic:
        head = saved.load_score_head(source, model.config)
    return model, head, info


def _check_whole(model: Any, source: Source, lacking: Iterable[str], *, as_critic: bool) -> None:
    """Raise if weights are missing; a critic may lack the language head."""
    missing = set(lacking)
    if as_critic:
        head = model.get_output_embeddings()
        missing -= {key for key in missing if model.get_submodule(key.rpartition(".")[0]) is head}
    if missing:
        raise ValueError(
            f"`{source.name}` must hold the weights of a {type(model).__name__}, but lacks "
            f"{sorted(missing)[:3]} and so on: it is a model of another kind, or its "
            "config.json is that of another one."
        )


def _check_layers(model: Any, source: Source, unused: Iterable[str]) -> None:
    """Raise if the weights are of more layers than config.json says.

    transformers loads the first ones: another model, without a word.
    """
    numbers = re.compile(r"\.\d+\.")
    kinds = {numbers.sub(".N.", name) for name in model.state_dict()}
    left = sorted(name for name in unused if numbers.sub(".N.", name) in kinds)
    layers = getattr(text_config(model), "num_hidden_layers", 1)
    if left or layers < 1:
        raise ValueError(
            f"the model folder `{source.name}` has a config.json of {layers} layers, but weights "
            f"of more ({(left or ['all'])[0]} is left over): copy both from the same model."
        )


def _config(source: Source, kwargs: dict[str, Any]) -> PretrainedConfig:
    """Return the configuration that a model is loaded with."""
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        return config
    names = ("trust_remote_code", "code_revision", "gguf_file")
    code = {key: kwargs[key] for key in names if key in kwargs}
    return AutoConfig.from_pretrained(config or source.name, **code, **source.hub)


def _auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads models of the kind."""
    seq2seq, images = auto.AutoModelForSeq2SeqLM, auto.AutoModelForImageTextToText
    kind = seq2seq if config.is_encoder_decoder else auto.AutoModelForCausalLM
    # Some that read images too (Qwen2.5-VL, Llava) are no causal models to transformers.
    of_images = type(config) in images._model_mapping and type(config) not in kind._model_mapping
    return images if of_images else kind


@contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Keep the advice of transformers off the screen, and its bars unless they are wanted."""
    was_on = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if was_on and not bars:
            transformers_logging.enable_progress_bar()
