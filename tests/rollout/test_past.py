"""What a model has read is not read again: the same tokens and numbers as from the beginning."""

import pytest
import torch

from tests.families import CAUSAL, tiny_model
from trl.batch import pad_rows
from trl.rollout.sampling import Distribution, Writing
from trl.rollout.stop import StopRule

# Windows and recurrent states cannot be taken apart.
READ_AGAIN = {"mistral", "gemma2", "gemma3_text", "mamba"}


def written(model, rows, limits, numbers, **of_states):
    """Return a `Writing` whose rows end with token 3, or at their limits."""
    padded, mask = pad_rows([torch.tensor(row) for row in rows], left=True)
    uniforms = numbers.unbind(1).__getitem__
    writing = Writing(padded, mask, limits, uniforms, Distribution(), StopRule([3]), **of_states)
    writing.write(model, writing.query_of_row)
    return writing


@pytest.mark.parametrize("family", CAUSAL)
def test_a_second_turn_is_as_if_all_were_read_anew(family):
    model = tiny_model(family).eval()
    queries = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15]]
    limits = [9, 2, 6, 1]  # rows leave the batch at different steps
    numbers = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)).double()
    first = written(model, queries, limits, numbers, keeps=True)
    if family in READ_AGAIN:
        assert first.states == [None] * 4
        return
    turn = first.rollout()
    heard = [[20, 21, 22], [23], [24, 25], [26, 27, 28, 29]]
    wrote = turn.response_lists()
    whole = [q + w + h for q, w, h in zip(queries, wrote, heard, strict=True)]
    more = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)).double()
    going_on = written(model, whole, limits, more, before=first.states, keeps=True)
    anew = written(model, whole, limits, more, keeps=True)
    found, expected = going_on.rollout(), anew.rollout()
    assert found.response_lists() == expected.response_lists()
    torch.testing.assert_close(
        found.behaviour_logprobs, expected.behaviour_logprobs, atol=2e-5, rtol=0
    )
    for one, other in zip(going_on.states, anew.states, strict=True):  # for the turn after it
        for layer, same in zip(one, other, strict=True):
            torch.testing.assert_close(layer, same, atol=1e-4, rtol=1e-4)
