"""Whether tokens fit a model: it must know each of them, and have a position for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trl.anatomy import is_encoder_decoder, text_config, vocabulary_size
from trl.config.errors import refuse


def check_ids(model: nn.Module, rows: Tensor | Sequence[Tensor], name: str) -> None:
    """Raise unless the model has an embedding for every token of the rows [B, L], or [L_i] each."""
    vocabulary = vocabulary_size(model)
    # One look at all of them.
    tokens = rows if isinstance(rows, Tensor) else torch.cat([row.cpu() for row in rows])
    if int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary:
        return
    for index, row in enumerate(rows):
        if int(row.min()) < 0 or int(row.max()) >= vocabulary:
            rule = f"hold token ids from 0 to {vocabulary - 1}"
            got = f"{int(row.min())} to {int(row.max())}"
            refuse(f"{name}[{index}]", rule, got, "encode with the model's own tokenizer")


def check_positions(
    model: nn.Module,
    queries: Tensor | Sequence[int],
    responses: Tensor | int,
    name: str = "queries",
) -> None:
    """Raise unless queries of these lengths [B], and responses to them, fit the model.

    Args:
        model: A model without a known number of positions takes any.
        queries: [B] tokens of each.
        responses: [B], or the most that any may have.
        name: What errors call the queries.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is None:
        return
    queries = queries if isinstance(queries, Tensor) else torch.tensor(queries, device="cpu")
    responses = torch.as_tensor(responses, device=queries.device).expand_as(queries)
    apart = is_encoder_decoder(model)  # each side has its own positions
    needed = torch.maximum(queries, responses) if apart else queries + responses
    if int(needed.max()) > limit:
        row = int(needed.argmax())
        rule, sign = ("each fit", "and") if apart else ("fit", "+")
        raise ValueError(
            f"query {sign} response must {rule} the model's {limit} positions, got "
            f"{int(queries[row])} {sign} {int(responses[row])} tokens in row {row} of `{name}`: "
            "shorten the query or the response."
        )
