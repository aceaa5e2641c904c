"""A prompt that several responses share is computed once, in training too.

The responses of a group stand behind their prompt in one row, each blind to the others:

    p p p | a a | b b | c c          a sees p and a, b sees p and b, …; positions go on from p

so that G responses of S tokens to a prompt of Q take Q + G·S columns rather than G·(Q + S).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trl.anatomy import accepts, decoder, text_config, uses_flash_attention
from trl.batch import Rollout

# The columns of responses for each column of the prompt, at most. More would save little of the
# prompt's work, and the attention of responses that do not see each other is computed in vain.
_RESPONSES_PER_PROMPT = 4

_WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_chunk_size")
"""What configurations call the distance that a layer can see; it is counted in columns."""


class Packed(NamedTuple):
    """Lines of several texts each, and where to find the response tokens in them."""

    inputs: dict[str, Tensor | bool]
    """The arguments of the decoder's forward pass."""
    rows: Tensor
    """[B, 1] the line of each response."""
    columns: Tensor
    """[B, R] the column whose hidden state predicts each of its tokens."""

    def predicting(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden states [N, d] that predict the counted tokens."""
        return hidden[self.rows.expand_as(mask)[mask], self.columns[mask]]


def can_pack(plain: PreTrainedModel, rollout: Rollout) -> bool:
    """Return whether the model may be given these rows packed, as far as its configuration says.

    That it then gives the same hidden states has to be tried out.
    """
    if rollout.group_ids is None:
        return False
    columns = _columns(rollout)
    return columns is not None and takes_lines(plain, columns)


def takes_lines(plain: PreTrainedModel, columns: int) -> bool:
    """Return whether several texts may stand in a line of so many columns, as far as is known."""
    config = text_config(plain)
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return (
        not plain.config.is_encoder_decoder
        and accepts(decoder(plain), "position_ids")
        and not uses_flash_attention(plain)
        and not any(window is not None and window < columns for window in windows)
    )


def pack(plain: PreTrainedModel, rollout: Rollout) -> Packed:
    """Pack the responses of each group behind their prompt.

    Args:
        plain: Its kind of attention decides what a mask looks like.
        rollout: With `group_ids`, the rows of a group side by side.
    """
    prompt_of_row, first_rows, place = _groups(rollout)
    queries, query_mask = rollout.queries[first_rows], rollout.query_mask[first_rows]  # [P, Q]
    width, steps = queries.shape[1], rollout.responses.shape[1] - 1
    most = int(place.max()) + 1
    prompts, size = len(first_rows), width + most * steps
    device = queries.device

    def behind(prompt_part: Tensor, response_part: Tensor) -> Tensor:
        """Lay [P, Q] and, for each response, [B, S] side by side: [P, Q + G·S]."""
        slots = response_part.new_zeros(prompts, most, steps)
        slots[prompt_of_row, place] = response_part
        return torch.cat((prompt_part, slots.flatten(1)), dim=1)

    seen = rollout.attention_mask[:, width:-1]
    lengths = query_mask.sum(1, keepdim=True)
    prompt_positions = (query_mask.cumsum(1) - 1).clamp(min=0)
    response_positions = lengths[prompt_of_row] + torch.arange(steps, device=device)
    # Padding must not run beyond the longest row: there may be no such position, and some
    # rotary embeddings change for all rows with the largest.
    response_positions = response_positions.masked_fill(~seen, 0)
    real = behind(query_mask, seen)  # [P, L]
    column = torch.arange(size, device=device)
    slot = torch.where(column < width, -1, (column - width) // max(1, steps))  # −1: the prompt
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    related = (slot[:, None] == slot) | (slot == -1)
    # A padded column sees itself: a softmax over nothing is NaN.
    mask = (causal & related & real[:, None]) | torch.eye(size, dtype=torch.bool, device=device)
    start = rollout.responses[:, :-1]
    columns = width + place[:, None] * steps + torch.arange(-1, steps, device=device)
    columns[:, 0] = width - 1
    return Packed(
        {
            "input_ids": behind(queries, start),
            "attention_mask": attention_mask_for(plain, mask[:, None]),
            "position_ids": behind(prompt_positions, response_positions),
            "use_cache": False,
        },
        prompt_of_row[:, None],
        columns,
    )


def trial_of_groups(vocabulary: int, device: torch.device) -> Rollout:
    """Return a few tokens to try out whether a model can be given packed rows."""
    tokens = torch.arange(7, 64, 3, device=device) % vocabulary
    first, second = tokens[:2], tokens[3:7]
    responses = [tokens[8:9], tokens[4:7], tokens[9:11], tokens[1:4]]
    rollout = Rollout.from_lists([first, first, second, second], responses)
    return replace(rollout, group_ids=torch.tensor([0, 0, 1, 1], device=device))


def _groups(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row the number of its prompt, of each prompt its first row [P], and for each
    row its place among the responses to the prompt.

    A large group is cut into several, see `_RESPONSES_PER_PROMPT`.
    """
    rows = torch.arange(len(rollout), device=rollout.queries.device)
    _, group, counts = torch.unique_consecutive(
        rollout.group_ids, return_inverse=True, return_counts=True
    )
    place = rows - (counts.cumsum(0) - counts)[group]
    steps = max(1, rollout.responses.shape[1] - 1)
    most = max(1, _RESPONSES_PER_PROMPT * rollout.queries.shape[1] // steps)
    starts = place % most == 0
    prompt_of_row = starts.cumsum(0) - 1
    return prompt_of_row, rows[starts], place % most


def _columns(rollout: Rollout) -> int | None:
    """Return the columns of the packed rows; None if packing saves nothing or would be wrong."""
    prompt_of_row, first_rows, place = _groups(rollout)
    if len(first_rows) == len(rollout):
        return None
    chosen = first_rows[prompt_of_row]
    alike = torch.equal(rollout.queries[chosen], rollout.queries)
    if not alike or not torch.equal(rollout.query_mask[chosen], rollout.query_mask):
        return None
    return rollout.queries.shape[1] + (int(place.max()) + 1) * (rollout.responses.shape[1] - 1)


def attention_mask_for(plain: PreTrainedModel, mask: Tensor) -> Tensor:
    """Return a mask [P, 1, L, L] of what is seen as the kind of attention takes it."""
    if decoder(plain).config._attn_implementation != "eager":
        return mask
    unseen = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, unseen)
