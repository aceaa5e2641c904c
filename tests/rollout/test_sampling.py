import pytest
import torch

from tests.conftest import VOCABULARY, ragged
from trl.batch import pad_rows
from trl.rollout.draw import draw_at, draw_from_logits, uniform
from trl.rollout.sampling import sample


def test_tokens_come_from_the_models_distribution(make_model):
    """Chi-square of 20,000 first tokens against the exact probabilities."""
    model = make_model()
    query = ragged([4])[0]
    with torch.no_grad():
        exact = model(query[None]).logits[0, -1].softmax(-1)
    draws = 20_000
    rollout = sample(model, query.expand(draws, -1), max_new_tokens=1)
    counts = torch.bincount(rollout.responses[:, 0], minlength=VOCABULARY)
    common = exact * draws >= 5
    expected = torch.cat((exact[common], exact[~common].sum()[None])) * draws
    seen = torch.cat((counts[common], counts[~common].sum()[None])).float()
    chi_square = ((seen - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum().item()
    freedom = int((expected > 0).sum()) - 1
    # Mean `freedom`, standard deviation sqrt(2·freedom): five of them is beyond chance.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_the_second_token_follows_the_first_through_the_cache(make_model):
    """With greedy sampling (top_k=1) the cached tokens equal those of full forward passes."""
    model = make_model()
    queries, mask = pad_rows(ragged([2, 6, 4]), left=True)
    rollout = sample(model, queries, mask, max_new_tokens=8, top_k=1)
    for row, query in enumerate(ragged([2, 6, 4])):
        tokens = query
        for _ in range(8):
            token = model(tokens[None]).logits[0, -1].argmax()
            tokens = torch.cat((tokens, token[None]))
        assert rollout.responses[row].tolist() == tokens[len(query) :].tolist()


def test_temperature_divides_the_logits(make_model):
    model = make_model()
    query = ragged([4])[0]
    with torch.no_grad():
        exact = (model(query[None]).logits[0, -1] / 0.5).softmax(-1)
    rollout = sample(model, query.expand(20_000, -1), max_new_tokens=1, temperature=0.5)
    share = (rollout.responses[:, 0] == exact.argmax()).float().mean()
    assert abs(share - exact.max()) < 0.02


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.3}])
def test_top_k_and_top_p_cut_the_distribution(make_model, settings):
    model = make_model()
    query = ragged([4])[0]
    with torch.no_grad():
        order = model(query[None]).logits[0, -1].softmax(-1).sort(descending=True)
    if "top_k" in settings:
        allowed = order.indices[:3]
    else:
        allowed = order.indices[: int((order.values.cumsum(0) < 0.3).sum()) + 1]
    rollout = sample(model, query.expand(2_000, -1), max_new_tokens=1, **settings)
    assert set(rollout.responses[:, 0].tolist()) <= set(allowed.tolist())


def test_a_response_ends_with_its_first_eos(make_model):
    model = make_model()
    torch.nn.init.zeros_(model.transformer.wte.weight)  # uniform logits: the EOS comes often
    queries = torch.stack(ragged([3] * 64))
    rollout = sample(model, queries, max_new_tokens=40, eos_token_id=5)
    lengths = rollout.response_mask.sum(1)
    assert lengths.min() < lengths.max()
    for tokens, mask in zip(rollout.responses, rollout.response_mask, strict=True):
        counted = tokens[mask].tolist()
        assert 5 not in counted[:-1]
        assert counted[-1] == 5 or len(counted) == 40
        assert (tokens[~mask] == 0).all()


def test_it_stops_when_every_row_has_ended(make_model):
    model = make_model()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    queries = torch.stack(ragged([3, 3]))
    first = sample(model, queries, max_new_tokens=1, top_k=1).responses[0, 0].item()
    calls.clear()
    rollout = sample(model, queries[:1], max_new_tokens=30, top_k=1, eos_token_id=first)
    assert rollout.responses.tolist() == [[first]]
    assert len(calls) == 1


def test_padding_does_not_change_the_tokens(make_model):
    model = make_model()
    alone = sample(model, ragged([3])[0][None], max_new_tokens=10, top_k=1).responses[0]
    queries, mask = pad_rows([ragged([3])[0], ragged([12], seed=1)[0]], left=True)
    together = sample(model, queries, mask, max_new_tokens=10, top_k=1).responses[0]
    assert torch.equal(alone, together)


def test_same_generator_same_tokens(make_model):
    model = make_model()
    queries = torch.stack(ragged([3, 3]))
    draws = [
        sample(
            model, queries, max_new_tokens=10, generator=torch.Generator().manual_seed(7)
        ).responses
        for _ in range(2)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer > 0, got 0"),
        ({"temperature": 0.0}, "`temperature` must be a finite number > 0"),
        ({"top_k": -1}, "`top_k` must be an integer >= 0"),
        ({"top_p": 1.5}, "`top_p` must be a finite number > 0 and <= 1, got 1.5"),
        ({"max_new_tokens": 62}, r"the model's 64 positions, got 3 \+ 62 tokens"),
        ({"queries": torch.tensor([1, 2])}, r"`queries` must be a tensor \[batch, length\]"),
        ({"queries": torch.tensor([[1, 97]])}, "ids from 0 to 96, got 1 to 97"),
    ],
)
def test_bad_arguments(make_model, arguments, message):
    arguments = {"queries": torch.tensor([[1, 2, 3]]), "max_new_tokens": 4} | arguments
    with pytest.raises(ValueError, match=message):
        sample(make_model(), **arguments)


def test_a_model_with_nan_weights_is_found(make_model):
    model = make_model()
    model.transformer.ln_f.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="`model` must give finite logits"):
        sample(model, torch.tensor([[1, 2]]), max_new_tokens=3)


def test_masks_of_a_tokenizer_are_taken_and_checked(make_model):
    queries, mask = pad_rows(ragged([2, 4]), left=True)
    model = make_model()
    one = sample(model, queries, mask.long(), max_new_tokens=5, top_k=1)
    assert torch.equal(
        one.responses, sample(model, queries, mask, max_new_tokens=5, top_k=1).responses
    )
    with pytest.raises(ValueError, match="padding on the left.*tokenizer.padding_side"):
        sample(model, queries.flip(1), mask.flip(1), max_new_tokens=5)
    with pytest.raises(ValueError, match="must count a token in every row, got none in row 0"):
        sample(model, queries, torch.zeros_like(mask), max_new_tokens=5)


def test_draw_never_gives_a_token_of_probability_zero():
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0, 0.0]]).expand(5_000, -1)
    tokens = draw_at(probabilities, uniform(len(probabilities), torch.device("cpu"), None))
    assert set(tokens.flatten().tolist()) == {1, 3}
    assert abs((tokens == 3).float().mean() - 0.7) < 0.03


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.299, 1), (0.3, 3), (0.999, 3), (1.0, 3)]
)
def test_draw_inverts_the_cumulative_distribution(number, token):
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).double()
    assert draw_at(probabilities, torch.tensor([[number]]).double()).item() == token


@pytest.mark.parametrize("size", [3, 256, 257, 1000])
@pytest.mark.parametrize("rows_at_once", [1, 2**20])
def test_draws_are_those_of_the_plain_cumulative_sum(monkeypatch, size, rows_at_once):
    """Also of a vocabulary of several chunks, some of them without any probability."""
    monkeypatch.setattr("trl.rollout.draw._CPU_BLOCK_NUMBERS", rows_at_once)
    logits = torch.randn(200, size, dtype=torch.float64) * 3
    logits[:, : size // 2] = -torch.inf
    logits[::2, -1] = -torch.inf
    numbers = torch.rand(200, 1, dtype=torch.float64)
    logprobs = (logits / 0.7).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    expected = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)
    assert torch.equal(draw_at(logprobs.exp(), numbers), expected)
    tokens, found = draw_from_logits(logits, numbers, 0.7)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(found, logprobs.gather(-1, expected))


@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-53, 1.0])
def test_the_ends_of_the_unit_interval_give_tokens_with_probability(number):
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [300, 301, 650]] = torch.tensor([1.0, 2.0, -80.0])
    tokens, logprobs = draw_from_logits(logits, torch.tensor([[number]], dtype=torch.float64))
    assert tokens.item() in (300, 301, 650)
    assert logprobs.isfinite().all()


def test_rounding_at_the_border_of_two_chunks_gives_no_token_without_probability():
    """(a + b) − b may be more than a; the number drawn then lies below the second chunk."""
    first, second = torch.rand(2, 5_000, dtype=torch.float64)
    probabilities = torch.zeros(5_000, 600, dtype=torch.float64)
    probabilities[:, 0], probabilities[:, 300] = first, second
    border = (first / (first + second))[:, None]
    tokens = draw_at(probabilities, border)
    assert set(tokens.flatten().tolist()) <= {0, 300}


@pytest.mark.filterwarnings("ignore")  # of torch, on sparse tensors
@pytest.mark.parametrize("kind", ["to_sparse", "tolist"])
def test_a_mask_whose_numbers_are_not_there_is_refused(make_model, kind):
    queries, mask = pad_rows(ragged([3, 5]), left=True)
    with pytest.raises(TypeError, match="`query_mask` must be a tensor"):
        sample(make_model(), queries, getattr(mask, kind)(), max_new_tokens=1)
