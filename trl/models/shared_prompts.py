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

_UNSEEN = torch.finfo(torch.float32).min

_SEEN_BY_ALL, _PADDING = -1, -2
"""Numbers of texts: the prompt of a line, and what is none."""


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
    prompt_of_row, first_rows, place = _groups(rollout)
    chosen, steps = first_rows[prompt_of_row], rollout.responses.shape[1] - 1
    return (
        len(first_rows) < len(rollout)
        and torch.equal(rollout.queries[chosen], rollout.queries)
        and torch.equal(rollout.query_mask[chosen], rollout.query_mask)
        and takes_lines(plain, rollout.queries.shape[1] + (int(place.max()) + 1) * steps)
    )


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
    width, length = rollout.queries.shape[1], rollout.input_ids.shape[1]
    steps = length - width - 1
    place = place[:, None]
    column = torch.arange(length, device=place.device)
    in_prompt = column < width
    return lay_out(
        plain,
        rollout,
        prompt_of_row[:, None],
        torch.where(in_prompt, column, column + place * steps),
        torch.where(in_prompt, _SEEN_BY_ALL, place),
        (len(first_rows), width + (int(place.max()) + 1) * steps),
    )


def lay_out(
    plain: PreTrainedModel,
    rollout: Rollout,
    lines: Tensor,
    columns: Tensor,
    texts: Tensor,
    shape: tuple[int, int],
) -> Packed:
    """Bring the tokens of a rollout, all but the last of each row, to lines that several share.

    A token sees those before it in its line that are of the same text or `_SEEN_BY_ALL`.

    Args:
        plain: Its kind of attention decides what a mask looks like.
        rollout: B rows.
        lines: [B, 1] the line of each row.
        columns: [B, T] where in it a token stands.
        texts: [B, T] the number of the text that it is of.
        shape: Lines, and columns of each.
    """
    positions = rollout.position_ids
    shown = rollout.attention_mask & (positions < rollout.lengths[:, None] - 1)
    row, step = shown.nonzero(as_tuple=True)
    place = lines[row, 0], columns[row, step]

    def laid(values: Tensor, padding: int = 0) -> Tensor:
        """Bring [B, T] to where the tokens stand."""
        there = torch.full(shape, padding, device=values.device)
        there[place] = values[row, step]
        return there

    # Padding is a text of its own, so that it sees itself: a softmax over nothing is NaN. It takes
    # position 0: beyond the longest row there may be none, and some rotary embeddings change for
    # all rows with the largest.
    text = laid(texts.expand_as(positions), _PADDING)
    related = (text[:, :, None] == text[:, None]) | (text[:, None] == _SEEN_BY_ALL)
    mask = related & torch.ones(shape[1:] * 2, dtype=torch.bool, device=text.device).tril()
    if decoder(plain).config._attn_implementation == "eager":  # which adds the mask
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, _UNSEEN)
    width = rollout.queries.shape[1]
    return Packed(
        {
            "input_ids": laid(rollout.input_ids),
            "attention_mask": mask[:, None],
            "position_ids": laid(positions),
            "use_cache": False,
        },
        lines,
        columns[:, width - 1 : -1],
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
