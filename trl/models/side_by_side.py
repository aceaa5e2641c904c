"""Rows of different lengths stand in one line, one behind the other, where that saves padding.

    padded rows          lines
    · · a a a a ·        c c c c c c c
    · b b · · · ·        a a a a b b ·
    c c c c c c c   →    d d d
    · · d d d · ·

Each row is blind to the others, and its positions begin at 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from trl.anatomy import text_config
from trl.batch import Rollout
from trl.models.shared_prompts import Packed, lay_out, takes_lines

_WORTH = 0.9
"""Lines are used if they take at most this share of the work of padded rows."""

_WIDTHS = 16
"""So many widths of lines are tried, from the longest row to twice as much."""


class Places(NamedTuple):
    """Where the rows stand."""

    lines: list[int]
    """B numbers of lines."""
    starts: list[int]
    """B columns at which rows begin."""
    shape: tuple[int, int]
    """Lines, and columns of each."""


def places(plain: PreTrainedModel, rollout: Rollout) -> Places | None:
    """Return where the rows shall stand; None if that saves little, or the model takes no lines.

    That the model then gives the same hidden states has to be tried out.
    """
    lengths = (rollout.lengths - 1).tolist()  # the last token predicts nothing
    longest = max(lengths)
    if not takes_lines(plain, longest):
        return None
    config = text_config(plain)
    # A line wider than a model has positions may not fit a buffer of its attention (GPT-Neo).
    positions = getattr(config, "max_position_embeddings", None) or 0
    most = max(longest, min(2 * longest, positions))
    widths = range(longest, most + 1, -(-longest // _WIDTHS))
    ways = [fill_lines(lengths, width) for width in widths if takes_lines(plain, width)]
    best = min(ways, key=lambda way: _work(*way.shape, config.hidden_size))
    columns = rollout.queries.shape[1] + rollout.responses.shape[1] - 1
    padded = _work(len(rollout), columns, config.hidden_size)
    return best if _work(*best.shape, config.hidden_size) <= _WORTH * padded else None


def _work(lines: int, columns: int, size: int) -> float:
    """Return the work of lines, in that of the products by weights for one token.

    For each token a layer multiplies by 12·d² weights, and for attention by 2·columns·d numbers.
    Measured, one of these takes 2.5 times as long as one of those.
    """
    return lines * columns * (1 + 2.5 * 2 * columns / (12 * size))


def fill_lines(lengths: list[int], columns: int) -> Places:
    """Place rows, the longest first, each in the first line with room for it.

    At most 11/9 of the lines of the best way are used, and 6/9 of one (Dósa, "The tight bound of
    first fit decreasing bin-packing algorithm", 2007).

    Args:
        lengths: B numbers of tokens.
        columns: Of a line, at least the longest row.
    """
    used: list[int] = []  # columns of each line
    lines, starts = [0] * len(lengths), [0] * len(lengths)
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fitting = (n for n, taken in enumerate(used) if taken + lengths[row] <= columns)
        line = next(fitting, len(used))
        if line == len(used):
            used.append(0)
        lines[row], starts[row] = line, used[line]
        used[line] += lengths[row]
    return Places(lines, starts, (len(used), columns))


def line_up(plain: PreTrainedModel, rollout: Rollout, where: Places) -> Packed:
    """Put the rows in their places.

    Args:
        plain: Its kind of attention decides what a mask looks like.
        rollout: B rows.
        where: They stand there.
    """
    device = rollout.queries.device
    lines, starts = (torch.tensor(part, device=device)[:, None] for part in where[:2])
    rows = torch.arange(len(rollout), device=device)[:, None]
    return lay_out(plain, rollout, lines, starts + rollout.position_ids, rows, where.shape)


def trial_of_rows(vocabulary: int, device: torch.device) -> Rollout:
    """Return a few tokens, of several lengths, to try out whether a model takes lines."""
    tokens = torch.arange(5, 98, 3, device=device) % vocabulary
    queries = [tokens[:5], tokens[5:7], tokens[7:8], tokens[8:11]]
    responses = [tokens[11:14], tokens[14:16], tokens[16:19], tokens[19:20]]
    return Rollout.from_lists(queries, responses)
