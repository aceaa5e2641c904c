"""Attention over short texts, and of a single token, by plain products.

The fused kernel works in tiles that are larger than what there is to do, above all going backward.
On a CPU plain products are up to ten times faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_GRAIN = 32
"""Columns by which a KV cache grows, and of which attention over it takes in whole ones."""

# Measured forward and backward, 2 cores: in bfloat16 plain products take 0.4 of the time of the
# fused kernel at 128 columns and 0.7 at 256 to 512, with the more memory the more columns; in
# float32 as long at 128 and 1.5 times as long at 512. For a single token they take a quarter of it
# in bfloat16, at any length of the cache.
_MOST_COLUMNS = {torch.bfloat16: 384, torch.float32: 64}


def suits(query: Tensor) -> bool:
    """Return whether `attention` is quick for such queries [B, H, Q, d]."""
    columns = query.shape[2]
    # A single token in float32 is the fused kernel's.
    single_in_float32 = columns == 1 and query.dtype != torch.bfloat16
    return columns <= _MOST_COLUMNS.get(query.dtype, 0) and not single_in_float32


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    is_causal: bool,
) -> Tensor:
    """Return softmax(q·kᵀ·scaling + mask)·v [B, Q, H, d], the softmax in float32.

    Args:
        query: [B, H, Q, d].
        key: [B, H or fewer, K, d]; each of fewer serves a group of heads.
        value: The same.
        mask: [B, 1 or H, Q, K], True where a token is seen, or added to the products; None: what
            comes later is not seen.
        scaling: None: d^−½.
        is_causal: Whether what comes later is not seen, without a mask.
    """
    shape, columns = query.shape, query.shape[2]
    groups = shape[1] // key.shape[1]
    one_mask = mask is None or mask.shape[1] == 1
    if groups > 1 and columns == 1 and one_mask:  # the heads of a group as rows of one product
        query = query.reshape(shape[0], key.shape[1], groups, shape[3])
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if columns == 1:
        key, value, mask = _in_grains(key, value, mask)
    products = query @ key.transpose(-1, -2)
    products = products * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        if is_causal and columns > 1:
            seen = torch.ones(columns, key.shape[2], dtype=torch.bool, device=query.device).tril()
            products = products.masked_fill(~seen, torch.finfo(products.dtype).min)
    elif mask.dtype == torch.bool:
        products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    else:
        products = products + mask
    # The kernel computes in float32 and rounds once: what a softmax in float32 gives, rounded, with
    # a third of the memory for going backward.
    weights = products.softmax(-1).to(value.dtype)
    output = (weights @ value).reshape(*shape[:3], value.shape[-1])
    return output.transpose(1, 2).contiguous()


def _in_grains(
    key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in columns behind the cache, unseen: its length becomes one of whole grains.

    oneDNN prepares and keeps a product for each shape, which at every length would take longer
    than the product. Memory is behind a cache that has room, see `trl.rollout.room`.
    """
    length = key.shape[2]
    more = -length % ATTENTION_GRAIN
    if not more:
        return key, value, mask
    for states in (key, value):
        _, head, column, number = states.stride()
        width = states.shape[3]
        roomy = head >= (length + more) * width and (column, number) == (width, 1)
        if not roomy or states.storage_offset() % head:
            return key, value, mask
    longer = (
        states.as_strided(
            (*states.shape[:2], length + more, states.shape[3]),
            states.stride(),
            states.storage_offset(),
        )
        for states in (key, value)
    )
    if mask is None:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=key.device)
    unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return *longer, F.pad(mask, (0, more), value=unseen)
