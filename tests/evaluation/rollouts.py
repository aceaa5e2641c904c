"""Rollouts made by hand, for tests of scorers."""

from dataclasses import replace

import torch

from trl.batch import Rollout


def make_rollout(*pairs, lengths=None, holes=()):
    """A rollout of the given (query, response) texts; the tokens are 10, 11, 12 …

    Args:
        pairs: (query, response) of each row.
        lengths: tokens of each response; by default 1, 2, 3 …
        holes: (row, column) of response tokens that do not count.
    """
    lengths = lengths or range(1, len(pairs) + 1)
    responses = [torch.arange(10, 10 + length) for length in lengths]
    rollout = Rollout.from_lists([torch.tensor([1])] * len(pairs), responses)
    for row, column in holes:
        rollout.response_mask[row, column] = False
    queries, texts = zip(*pairs, strict=True)
    return replace(rollout, query_texts=queries, response_texts=texts)


def without_texts(rollout):
    return replace(rollout, query_texts=None, response_texts=None)
