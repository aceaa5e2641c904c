import torch

from tests.conftest import ragged
from trl.batch import Rollout
from trl.models.response import ResponseModel


def naive(model, query, response, temperature=1.0):
    """Log-probs, values and entropies of one response, token by token."""
    tokens = torch.cat((query, response))
    logits, _, values = model(tokens[None])
    logits = logits[0].double() / temperature
    rows = []
    for t in range(len(response)):
        column = len(query) - 1 + t
        log_softmax = logits[column].log_softmax(-1)
        entropy = -(log_softmax.exp() * log_softmax).sum()
        rows.append((log_softmax[response[t]], values[0, column], entropy))
    return [torch.stack([row[i] for row in rows]).float() for i in range(3)]


def test_ragged_rows_equal_a_token_by_token_loop(make_model):
    model = make_model()
    queries, responses = ragged([1, 5, 3, 9]), ragged([4, 1, 7, 2], seed=1)
    for temperature in (1.0, 0.7):
        output = ResponseModel(model, temperature)(Rollout.from_lists(queries, responses))
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            expected = naive(model, query, response, temperature)
            for column, exact in zip(output[:3], expected, strict=True):
                torch.testing.assert_close(
                    column[row, : len(response)], exact, rtol=1e-5, atol=1e-5
                )
                assert (column[row, len(response) :] == 0).all()


def test_a_hole_is_seen_but_not_scored(make_model):
    model = make_model()
    query, response = ragged([3, 5])
    whole = Rollout.from_lists([query], [response])
    mask = torch.tensor([[True, True, False, False, True]])
    holed = Rollout(whole.queries, whole.query_mask, whole.responses, mask)
    full, part = ResponseModel(model)(whole), ResponseModel(model)(holed)
    torch.testing.assert_close(part.logprobs, full.logprobs * mask)
    torch.testing.assert_close(part.values, full.values * mask)


def test_a_reference_without_value_head_has_zero_values(make_model):
    from transformers import GPT2LMHeadModel

    model = make_model()
    plain = GPT2LMHeadModel(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    rollout = Rollout.from_lists(ragged([2, 3]), ragged([3, 2]))
    output = ResponseModel(plain)(rollout)
    torch.testing.assert_close(output.logprobs, ResponseModel(model)(rollout).logprobs)
    assert (output.values == 0).all()
