"""`Decoder`: a language model that continues a batch of queries, one token a step, with its cache.

It hides what differs between the families of transformers: the names of their arguments, left
padding and positions, recurrent states, an encoder in front.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from trl.anatomy import accepts, is_encoder_decoder, language_model, response_start, text_config
from trl.batch import pad_rows
from trl.core import position_ids_from_mask
from trl.rollout.past import Past, State, keeps_all
from trl.rollout.room import make_room

CACHES = ("past_key_values", "cache_params")
"""What the cache is called, in the arguments and in the output of a model."""


class Decoder:
    """The queries are computed when it is made; `advance` then takes a token for each row.

    Args:
        model: A model of transformers with a language head, or a wrapper around one (see
            `language_model`) that takes the same arguments. If its output has a `value` [B, T],
            that is recorded too.
        queries: [B, Q] token ids, left-padded.
        query_mask: [B, Q] bool, True on real tokens.
        room: Most tokens that will be written.
        past: What the model has read of each row before its query; see `states`. None: nothing.
        last: The last position that any row is to have; a row that goes on beyond it, as its
            response is over, stays there.

    Attributes:
        logits: [B, V] of the next token.
        values: [B] float32, the value before the next token; None without a value head.
        can_select: Whether rows can be chosen and repeated.

    Raises:
        TypeError: if the model has no cache.
        ValueError: if an encoder-decoder does not say how its responses start.
    """

    def __init__(
        self,
        model: nn.Module,
        queries: Tensor,
        query_mask: Tensor,
        room: int,
        past: Past | None = None,
        last: int = sys.maxsize,
    ) -> None:
        plain = language_model(model)
        self._model, self._last = model, last
        self._cache_name = next((name for name in CACHES if accepts(plain, name)), None)
        if self._cache_name is None:
            raise _no_cache(plain, f"forward takes none of {', '.join(CACHES)}")
        self._takes_positions = accepts(plain, "position_ids")
        self._takes_logits_to_keep = accepts(plain, "logits_to_keep")
        # The balance of experts is a matter of training; with a cache, transformers cannot tell it.
        self._routes = bool(getattr(text_config(model), "output_router_logits", False))
        self._cache: Any = None
        self._has_room = False
        self._encoded: Any = None  # the encoder's output, its last_hidden_state [B, Q, d]
        if is_encoder_decoder(model):
            tokens = self._encode(plain, queries, query_mask)
        else:
            seen = query_mask if past is None else torch.cat((past.mask, query_mask), dim=1)
            written = torch.ones(len(queries), room, dtype=torch.long, device=queries.device)
            self._mask = torch.cat((seen.long(), written), dim=1)  # room: never copied again
            columns = queries.shape[1]
            self._positions = position_ids_from_mask(seen)[:, -columns:]  # [B, Q], then [B, 1]
            tokens = queries.masked_fill(~query_mask, 0)
        self._length = 0
        if past is not None:
            self._cache, self._length = past.cache, past.mask.shape[1]
        self._run(tokens)
        self._asked = self._length

    def _encode(self, plain: nn.Module, queries: Tensor, query_mask: Tensor) -> Tensor:
        """Run the encoder; return the tokens [B, S] that start the responses."""
        start = response_start(plain)
        # Padding on the right: BART has learned positions that count columns, padding included.
        rows = [row[mask] for row, mask in zip(queries, query_mask, strict=True)]
        tokens, mask = pad_rows(rows, left=False)
        self._mask = mask.long()
        encoder = plain.get_encoder()
        # Its own kind of output: the decoder may ask for more of it than the hidden states.
        self._encoded = encoder(input_ids=tokens, attention_mask=self._mask)
        return tokens.new_tensor(start).repeat(len(tokens), 1)

    @property
    def can_select(self) -> bool:
        """Whether rows can be chosen and repeated."""
        return _can_reorder(self._cache)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows [b] only, each as often as it is named."""
        self._cache.reorder_cache(rows)  # of every layer, index_select along the batch
        self._mask = self._mask[rows]
        self.logits = self.logits[rows]
        if self.values is not None:
            self.values = self.values[rows]
        if self._encoded is not None:
            self._encoded = copy.copy(self._encoded)
            self._encoded.last_hidden_state = self._encoded.last_hidden_state[rows]
        else:
            self._positions = self._positions[rows]

    @property
    def can_go_on(self) -> bool:
        """Whether `states` keep all that the model knows of a row."""
        return keeps_all(self._cache)

    def states(self, rows: Sequence[int], written: Sequence[int]) -> list[State]:
        """Return what the model has read of some rows: the query, and so many tokens of each.

        They are views of the cache: copy those that are to outlive it.
        """
        asked = self._mask[:, : self._asked].sum(1).tolist()  # the last ones: padding is left
        columns = [
            slice(self._asked - asked[row], self._asked + n)
            for row, n in zip(rows, written, strict=True)
        ]
        layers = self._cache.layers
        return [
            [(each.keys[row][:, own], each.values[row][:, own]) for each in layers]
            for row, own in zip(rows, columns, strict=True)
        ]

    def advance(self, tokens: Tensor) -> None:
        """Read the token [B] that each row has written."""
        if not self._has_room:  # now that the rows are as many as will be
            make_room(getattr(self._cache, "self_attention_cache", self._cache))
            self._has_room = True
        self._run(tokens[:, None])

    def _run(self, tokens: Tensor) -> None:
        inputs: dict[str, Any] = {"use_cache": True, self._cache_name: self._cache}
        if self._encoded is not None:
            inputs["decoder_input_ids"] = tokens
            inputs["encoder_outputs"] = self._encoded
            inputs["attention_mask"] = self._mask
        else:
            self._length += tokens.shape[1]
            inputs["input_ids"] = tokens
            # A recurrent state has already seen the padding; it takes the mask of new tokens.
            if self._cache is None or self._cache_name == "past_key_values":
                inputs["attention_mask"] = self._mask[:, : self._length]
            if self._takes_positions:
                inputs["position_ids"] = self._positions
            self._positions = (self._positions[:, -1:] + 1).clamp(max=self._last)
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        if self._routes:
            inputs["output_router_logits"] = False
        output = self._model(**inputs)
        self._cache = getattr(output, self._cache_name, None)
        if self._cache is None:
            raise _no_cache(language_model(self._model), f"output has no {self._cache_name}")
        self.logits = output.logits[:, -1]
        value = getattr(output, "value", None)
        self.values = None if value is None else value[:, -1].float()


def _no_cache(plain: nn.Module, why: str) -> TypeError:
    return TypeError(
        f"`model` must keep a cache while it writes, got {type(plain).__name__}, whose {why}: "
        "sample with another engine and make the Rollout with Rollout.from_lists."
    )


def _can_reorder(kept: Any) -> bool:
    """Return whether the cache, and what it consists of, can choose and repeat its rows.

    A family's own cache may inherit the method from a class that knows nothing of its state
    (MiniMax): then the rows would be right in some layers only.
    """
    if isinstance(kept, EncoderDecoderCache):
        inner = [kept.self_attention_cache, kept.cross_attention_cache]
    else:
        inner = getattr(kept, "layers", None) or []
    return _knows_its_rows(type(kept)) and all(map(_can_reorder, inner))


@cache
def _knows_its_rows(kind: type) -> bool:
    """Return whether `reorder_cache` is of the class itself, or of transformers' general caches."""
    for base in kind.__mro__:
        if callable(vars(base).get("reorder_cache")):
            return True
        if base.__module__ != Cache.__module__:
            return False
    return False
