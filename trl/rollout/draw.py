"""Drawing a token from a distribution by inverting its cumulative sum.

One random number for each row, where `torch.multinomial` takes one for each token of the
vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.core import at_least_fp32

# A vocabulary is summed up in chunks of so many tokens; only one of them is then looked into.
_CHUNK = 256
# Rows are worked on together as long as they fit the cache of a core; on a GPU all are.
_CPU_BLOCK_NUMBERS = 2**18


def draw_at(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token of each row at which the cumulative sum exceeds u times its total.

    Args:
        probabilities: [B, V]; the rows need not sum to exactly 1.
        uniforms: [B, 1] numbers u in [0, 1).

    Returns:
        [B, 1] token ids, never one of probability 0.
    """
    size = probabilities.shape[-1]
    chunks = F.pad(probabilities, (0, -size % _CHUNK)).unflatten(-1, (-1, _CHUNK))
    token, _ = _draw_from_chunks(chunks, uniforms)
    return token.clamp(max=size - 1)  # NaN, which is reported at the end, is beyond every token


def draw_from_logits(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw a token from softmax(logits / temperature), and return its log-prob too.

    Args:
        logits: [B, V].
        uniforms: [B, 1] in [0, 1).
        temperature: > 0.

    Returns:
        token ids [B, 1], never one that is forbidden (−inf), and log-probs [B, 1].
    """
    size = logits.shape[-1]
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, _CPU_BLOCK_NUMBERS * torch.get_num_threads() // size)
    blocks = [
        _draw_softmax(some, some_uniforms, temperature)
        for some, some_uniforms in zip(logits.split(rows), uniforms.split(rows), strict=True)
    ]
    tokens, logprobs = map(torch.cat, zip(*blocks, strict=True))
    return tokens, logprobs


def _draw_softmax(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    size = logits.shape[-1]
    z = at_least_fp32(logits)
    if temperature != 1:
        z = z / temperature
    peak = z.amax(-1, keepdim=True)
    padded = z.new_zeros(len(z), size + -size % _CHUNK)
    torch.sub(z, peak, out=padded[:, :size])
    padded[:, :size].exp_()
    token, total = _draw_from_chunks(padded.unflatten(-1, (-1, _CHUNK)), uniforms)
    token = token.clamp(max=size - 1)
    return token, z.gather(-1, token) - peak - total.log().to(z.dtype)


def _draw_from_chunks(chunks: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens [B, 1] and the totals [B, 1] of probabilities [B, chunks, tokens]."""
    # float32 sums over a large vocabulary would lose tokens of small probability.
    precise = random_dtype(chunks.device)
    sums = chunks.sum(-1).to(precise)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    target = uniforms * total
    chunk = _first_above(cumulative, target)
    # Below 0 by rounding it would point at a first token of probability 0.
    target = (target - (cumulative.gather(-1, chunk) - sums.gather(-1, chunk))).clamp(min=0)
    inside = chunks.gather(1, chunk[..., None].expand(-1, -1, chunks.shape[-1]))[:, 0]
    place = _first_above(inside.cumsum(-1, dtype=precise), target)
    return chunk * chunks.shape[-1] + place, total


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first column [B, 1] above the target, or the last that adds to the sum."""
    found = torch.searchsorted(cumulative, target, right=True)
    # Rounding may carry the target up to the sum itself.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(found, last).clamp(max=cumulative.shape[-1] - 1)


def random_dtype(device: torch.device) -> torch.dtype:
    """Return the precision of random numbers and cumulative sums: float64 where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniform(size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Return random numbers [size, 1] in [0, 1)."""
    return torch.rand(size, 1, dtype=random_dtype(device), device=device, generator=generator)
