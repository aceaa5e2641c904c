"""Where the parts of a language model are, whatever its family calls them.

What sampling and training both have to know of a model of transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trl.config.errors import refuse

_FIXED_SCALINGS = ("linear", "yarn", "llama3")
"""Those of rotary positions that do not depend on the length of a text, as "dynamic" does."""


def language_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a value-head or PEFT wrapper; a plain one is itself.

    The layers of an adapter (LoRA and its like) stand in this model, so it answers as adapted.
    """
    model = getattr(model, "language_model", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(plain: PreTrainedModel) -> nn.Module:
    """Return the part that turns tokens into the hidden states which the language head reads.

    Raises:
        TypeError: if it cannot be told.
    """
    # Some families answer with the whole model (Llama 4), some with a layer of their head.
    for part in (plain.get_decoder(), plain.base_model, getattr(plain, "model", None)):
        if _runs_on_tokens(part, plain):
            return part
    got = f"{type(plain).__name__}, whose get_decoder() does not return one"
    rule, fix = "have a decoder apart from its language head", "use a model of another family"
    refuse("model", rule, got, fix, error=TypeError)


def _runs_on_tokens(part: Any, plain: PreTrainedModel) -> bool:
    """Return whether it is a model inside the model, rather than a single layer, say."""
    if not isinstance(part, nn.Module) or part is plain or not hasattr(part, "config"):
        return False
    return not plain.config.is_encoder_decoder or accepts(part, "encoder_hidden_states")


def text_config(model: nn.Module) -> PretrainedConfig:
    """Return the configuration of the part that reads and writes text, of several or the only."""
    config = language_model(model).config
    if is_encoder_decoder(model) or not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config()


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of tokens that the model has an embedding for."""
    embedding = language_model(model).get_input_embeddings()
    # An adapter's layer around the embedding has no `num_embeddings`. What wraps single trained
    # tokens makes its weight anew at every look: the weight inside has the same rows.
    embedding = getattr(embedding, "original_module", embedding)
    return embedding.weight.shape[0]


def position_limits(model: nn.Module) -> tuple[int | None, int | None]:
    """Return how many positions a text may have, and beyond how many all of them change; or None.

    Rotary positions that are scaled by a fixed factor reach that much further. LongRoPE (Phi-3)
    takes other frequencies for all positions of a pass in which one text is longer than those that
    the model was first trained on.
    """
    config = text_config(model)
    most, border = getattr(config, "max_position_embeddings", None), None
    rotary = getattr(config, "rope_parameters", None) or {}
    each = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]  # kind of layer
    for scaling in each:
        original = scaling.get("original_max_position_embeddings", most)
        if scaling.get("rope_type") == "longrope":
            border = original
        elif scaling.get("rope_type") in _FIXED_SCALINGS and most is not None:
            most = max(most, int(scaling.get("factor", 1) * original))
    return most, border


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the queries go through an encoder of their own."""
    return bool(getattr(language_model(model).config, "is_encoder_decoder", False))


def response_start(plain: PreTrainedModel) -> list[int]:
    """Return the tokens that the decoder of an encoder-decoder reads before a response.

    As `generate` does: the generation config goes over the model's own, and a token that is forced
    to be the first (mBART's and NLLB's target language, BART's BOS) is not the policy's to choose.

    Raises:
        ValueError: if the model does not say how its responses start.
    """
    configs = (getattr(plain, "generation_config", None), plain.config)
    start, forced = (
        [token for config in configs if (token := getattr(config, name, None)) is not None]
        for name in ("decoder_start_token_id", "forced_bos_token_id")
    )
    if not start:
        fix = "an encoder-decoder starts every response with it"
        refuse("model.config.decoder_start_token_id", "be set", None, fix)
    tokens, head = start[:1] + forced[:1], plain.get_output_embeddings()
    if any(not isinstance(token, int) or not 0 <= token < len(head.weight) for token in tokens):
        fix = "a start for each row, as a list, is no part of a policy"
        names = "decoder_start_token_id` and `forced_bos_token_id"
        refuse(names, f"be token ids from 0 to {len(head.weight) - 1}", tokens, fix)
    return tokens


def accepts(module: nn.Module, argument: str) -> bool:
    """Return whether the forward pass has an argument of this name, or hands it on as **kwargs."""
    return any(
        argument in inspect.signature(vars(base)["forward"]).parameters
        for base in type(module).__mro__
        if "forward" in vars(base)
    )


def last_hidden_state(output: Any) -> Tensor:
    """Return the hidden states [B, T, d] of a decoder's output."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


class Kept:
    """What a hook has seen."""

    hidden: Tensor
    """[B, T, d] the decoder's last hidden states."""


@contextmanager
def keep_hidden_states(plain: PreTrainedModel) -> Iterator[Kept]:
    """Keep the last hidden states of the forward passes made inside."""
    kept = Kept()

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.hidden = last_hidden_state(output)

    with decoder(plain).register_forward_hook(keep):
        yield kept


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` answer for the module; its attributes, which models look at, stay."""
    before = vars(module).get("forward")  # accelerate puts one there for models on many devices
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def without_dropout(*models: nn.Module) -> Iterator[None]:
    """Run in evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def seen_while(
    plain: PreTrainedModel, run: nn.Module, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Return the last hidden states [B, T, d] while `run`, the model or a wrapper, computes, and
    what it returns.
    """
    with without_dropout(plain), keep_hidden_states(plain) as kept, low_precision_of(plain):
        output = run(*args, **kwargs)
    return kept.hidden, output


def try_out(plain: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return logits [2, 4, V] and last hidden states [2, 4, d] of a few tokens, for comparison."""
    vocabulary = vocabulary_size(plain)
    tokens = torch.arange(8, device=plain.device).view(2, 4) * 7 % vocabulary
    inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    if plain.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(0)
    hidden, output = seen_while(plain, plain, **inputs)
    return output.logits, hidden


def called_modules(plain: PreTrainedModel) -> list[nn.Module]:
    """Return the parts of a model in the order in which a pass over a text calls them."""
    called: list[nn.Module] = []
    with ExitStack() as stack:
        for module in plain.modules():
            see = module.register_forward_pre_hook(lambda module, _: called.append(module))
            stack.enter_context(see)
        try_out(plain)
    return called


def agree(found: Tensor, expected: Tensor, *, low: bool = False, exact: float = 1e-5) -> bool:
    """Return whether two tensors are the same up to rounding.

    Args:
        found: In the units of `expected`.
        expected: Its largest number is what gaps are compared with.
        low: They were computed in low precision, whatever they are in now.
        exact: The gap allowed in float32.
    """
    rounding = 2e-2 if low or expected.dtype != torch.float32 else exact
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())


def uses_flash_attention(plain: PreTrainedModel) -> bool:
    """Return whether attention is FlashAttention's: it takes no float32, and no mask of pairs."""
    return "flash" in (decoder(plain).config._attn_implementation or "")


def low_precision_of(plain: PreTrainedModel) -> torch.autocast:
    """Return a context for a pass by itself: bfloat16 where the attention takes no float32."""
    needed = plain.dtype == torch.float32 and uses_flash_attention(plain)
    return torch.autocast(plain.device.type, torch.bfloat16, enabled=needed)
