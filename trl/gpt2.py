"""GPT-2 with a value head, and sampling from it: the first of the seed's two doors.

model = GPT2HeadWithValueModel.from_pretrained("gpt2")
logits, past, values = model(input_ids)
response = respond_to_batch(model, input_ids, txt_len=20)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from trl.anatomy import keep_hidden_states
from trl.config.errors import refuse
from trl.gguf import gguf_apart
from trl.models.checkpoint import ADAPTER_CONFIG, MODEL_FILE, Source, fill_value_head, save_policy
from trl.models.head import constant_weights, precise_head
from trl.models.loading import load_whole
from trl.models.value_head import ValueHead
from trl.models.whole import add_whole_weights
from trl.models.with_value_head import OutputWithValue
from trl.rollout.sampling import sample

__all__ = ["GPT2HeadWithValueModel", "ValueHead", "respond_to_batch"]


class GPT2HeadWithValueModel(GPT2LMHeadModel):
    """GPT-2 with its language head and a scalar value for each token.

    It is a `GPT2LMHeadModel`: `.generate` and everything else works. The value head `v_head`
    starts with zero output. Under autocast the logits are centred for each token (their softmax
    is the same; see `trl.models.head`).
    """

    # Plain GPT-2 checkpoints have no head; ours keep it in a file of its own, so that plain
    # transformers loads the policy without a word about it.
    _keys_to_ignore_on_load_missing: ClassVar = [r"v_head\."]

    tokenizer: Any = None
    """Saved beside the model, if there is one; `trl.train` puts it here."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.v_head = ValueHead(config)

    def _init_weights(self, module: torch.nn.Module) -> None:
        head = getattr(self, "v_head", None)
        if head is not None and module is head.summary:
            head.reset_parameters()
        else:
            super()._init_weights(module)

    def detach_value_head(self) -> None:
        """Stop the value loss from reaching the transformer."""
        self.v_head.detach_head = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> OutputWithValue | tuple[Any, ...]:
        """Return logits [B, T, V], the KV cache and values [B, T].

        Args:
            input_ids: [B, T].
            past_key_values: KV cache of earlier tokens.
            attention_mask: [B, T] (earlier tokens included), True or 1 on real tokens.
            logits_to_keep: Compute the logits of the last n tokens only; 0: of all.
            return_dict: False: a plain tuple.
            **kwargs: Whatever else `GPT2LMHeadModel.forward` takes: labels, ….
        """
        with keep_hidden_states(self) as kept, precise_head(self):
            kwargs |= {"logits_to_keep": logits_to_keep, "return_dict": True}
            output = super().forward(input_ids, past_key_values, attention_mask, **kwargs)
        result = OutputWithValue.of(output, self.v_head(kept.hidden))
        return result.to_tuple() if return_dict is False else result

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> GPT2HeadWithValueModel:
        """Load a GPT-2 by hub name or from a folder, with its value head if there is one.

        The weights are float32 unless `dtype` says otherwise: training needs float32 weights.
        Takes whatever transformers' `from_pretrained` takes; weights from pickles
        (pytorch_model.bin, as the 2020 trl saved them) only with `allow_pickle`.

        Raises:
            FileNotFoundError: if the folder, or the weights in it, are missing.
            OSError: if it is a hub name and the hub cannot be reached.
            ValueError: if it is a model of another kind, an adapter, or a pickle.
        """
        if pretrained_model_name_or_path is None:  # from a config and a state_dict
            return super().from_pretrained(None, *args, **kwargs)
        name, kwargs = gguf_apart(pretrained_model_name_or_path, kwargs)
        source = Source.of(name, kwargs)
        if source.find(ADAPTER_CONFIG) is not None:
            fix = "load it with trl.CausalLMWithValueHead.from_pretrained"
            refuse(source.name, "be a whole model", f"an adapter ({ADAPTER_CONFIG})", fix)
        wants_info = kwargs.pop("output_loading_info", False)
        model, head, info = load_whole(
            super().from_pretrained, source, *args, allow_pickle=allow_pickle, **kwargs
        )
        fill_value_head(model.v_head, head)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save a folder that plain transformers loads as GPT-2, with the value head beside it.

        Takes whatever transformers' `save_pretrained` takes, but for `push_to_hub`, which would
        upload the folder before it is complete: call `push_to_hub` afterwards. Older weights of
        the model in the folder are replaced; a folder that holds an adapter is refused.
        """
        if not add_whole_weights(self, kwargs):
            return
        kwargs["state_dict"] = kwargs.get("state_dict") or self.state_dict()
        save_policy(self, super().save_pretrained, save_directory, MODEL_FILE, kwargs)
        if kwargs.get("is_main_process", True):
            self.config.architectures = ["GPT2LMHeadModel"]
            self.config.save_pretrained(Path(save_directory).expanduser())


def respond_to_batch(
    model: torch.nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Sample `txt_len` tokens after each query.

    Uses a KV cache, keeps no autograd graph, and samples without dropout. Does not stop at EOS.

    Args:
        model: GPT-2, or any causal language model of transformers.
        queries: [B, Q] token ids, all of the same length.
        txt_len: R, tokens of each response.
        top_k: Sample among the k likeliest tokens; 0: all.
        top_p: Sample among the likeliest tokens that together have this probability; 1: all.

    Returns:
        [B, R] token ids of the responses, queries not included.
    """
    queries = queries.to(next(model.parameters()).device)
    with constant_weights():
        rollout = sample(model, queries, max_new_tokens=txt_len, top_k=top_k, top_p=top_p)
    return rollout.responses
