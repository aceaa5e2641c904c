"""A fingerprint of saved weights, to tell whether a value head was trained with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

SAMPLED = 16
"""Numbers that are looked at of each tensor, in the middle of it."""


def fingerprint(files: Iterable[Path]) -> str | None:
    """Return a hash of a few numbers of every tensor in some safetensors files.

    It does not depend on how the tensors are spread over files. Training moves all numbers of a
    tensor, so a few show it; all of them would take as long to read as the model.

    Returns:
        32 hexadecimal digits; None without files.
    """
    samples: dict[str, bytes] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            samples |= {key: _sample(file, key) for key in list(file.keys())}
    if not samples:
        return None
    digest = hashlib.sha256()
    for key in sorted(samples):
        digest.update(key.encode() + samples[key])
    return digest.hexdigest()[:32]


def _sample(file: Any, key: str) -> bytes:
    """Return shape, dtype and some numbers of a tensor, reading no more than those."""
    whole = file.get_slice(key)
    shape = whole.get_shape()
    if shape:
        rows = tuple(slice(size // 2, size // 2 + 1) for size in shape[:-1])
        part = whole[(*rows, slice(0, SAMPLED))]
    else:
        part = file.get_tensor(key)
    numbers = part.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{shape}{part.dtype}".encode() + numbers
