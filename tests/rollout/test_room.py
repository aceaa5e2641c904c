"""The memory of the KV cache."""

import pytest
import torch

from tests.families import tiny_model
from trl.rollout import decoder as decoder_module
from trl.rollout.decoder import Decoder


def decoded(dtype):
    """The logits after three tokens, and the keys and values of the first layer."""
    model = tiny_model("llama").eval()
    queries = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        decoder = Decoder(model, queries, queries > 0, room=3)
        for token in (8, 9, 10):
            decoder.advance(torch.full((2,), token))
    layer = decoder._cache.layers[0]
    return decoder.logits, layer.keys, layer.values


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_keys_are_as_low_as_autocast_would_make_them_for_every_token(dtype, monkeypatch):
    torch.manual_seed(0)
    found, keys, values = decoded(dtype)
    torch.manual_seed(0)
    monkeypatch.setattr(decoder_module, "make_room", lambda _cache: None)
    expected, own_keys, _ = decoded(dtype)
    assert own_keys.dtype == torch.float32  # rotary positions are
    assert keys.dtype == values.dtype == (dtype or torch.float32)
    assert torch.equal(keys, own_keys.to(keys.dtype))
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if dtype else 1e-6)
