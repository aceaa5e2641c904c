import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from tests.conftest import VOCABULARY, ragged
from tests.families import tiny_model
from trl.batch import Rollout, pad_rows
from trl.core import LengthSampler
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.rollout.sampling import sample

QUERIES = ragged([3, 12, 6, 3])


@pytest.fixture
def uniform_model(make_model):
    """Every token is as likely as any other: the EOS comes often."""
    model = make_model()
    torch.nn.init.zeros_(model.transformer.wte.weight)
    return model


# --- the distribution ----------------------------------------------------------------------------


def chi_square(counts, exact):
    """(statistic − mean) in standard deviations, for counts against probabilities."""
    expected = exact * counts.sum()
    assert expected.min() >= 5
    freedom = len(exact) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / (2 * freedom) ** 0.5


def test_pairs_of_tokens_come_with_their_exact_probabilities():
    """Chi-square of 10,000 two-token responses of one group against p(a)·p(b | a)."""
    torch.manual_seed(0)
    size = 7
    config = GPT2Config(
        vocab_size=size,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    query = torch.tensor([3, 5, 1])
    with torch.no_grad():
        inputs = torch.stack([torch.cat((query, torch.tensor([a]))) for a in range(size)])
        p = (model(inputs).logits[:, -2:] / 0.8).softmax(-1)
    exact = (p[0, 0][:, None] * p[:, 1]).flatten()
    assert exact.max() > 5 * exact.min()
    sampler = Sampler(max_new_tokens=2, temperature=0.8, group_size=10_000, seed=3)
    first, second = sampler(model, [query]).responses.T
    counts = torch.bincount(first * size + second, minlength=size**2)
    assert chi_square(counts, exact) < 4


def test_recorded_logprobs_are_those_of_the_whole_distribution(make_model):
    model = make_model()
    with pytest.warns(UserWarning, match=r"top_k=5, top_p=0.9, min_new_tokens=3: .* KL"):
        sampler = Sampler(top_k=5, top_p=0.9, min_new_tokens=3, eos_token_id=[7], max_new_tokens=6)
    assert sampler.cuts == ("top_k=5", "top_p=0.9", "min_new_tokens=3")
    assert Sampler(temperature=0.5).cuts == ()
    rollout = sampler(model, QUERIES)
    with torch.no_grad():
        logits = model(
            rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
        ).logits
    logprobs = logits[:, rollout.queries.shape[1] - 1 : -1].log_softmax(-1)
    mask = rollout.response_mask
    chosen = logprobs.gather(-1, rollout.responses[..., None])[..., 0]
    torch.testing.assert_close(rollout.behaviour_logprobs[mask], chosen[mask], atol=1e-4, rtol=0)
    # Each token is among the 5 likeliest, but for those that came in for a forbidden EOS.
    assert ((logprobs > chosen[..., None]).sum(-1)[mask] <= 5).all()


# --- ends ----------------------------------------------------------------------------------------


def test_responses_end_with_any_stop_token_or_at_the_limit(uniform_model):
    sampler = Sampler(max_new_tokens=30, eos_token_id=[5, 9], group_size=100)
    rollout = sampler(uniform_model, QUERIES[:1])
    assert 0.1 < rollout.ended.float().mean() < 0.9
    for tokens, ended in zip(rollout.response_lists(), rollout.ended.tolist(), strict=True):
        assert not {5, 9} & set(tokens[:-1])
        assert ended == (tokens[-1] in (5, 9))
        assert ended or len(tokens) == 30
    assert {tokens[-1] for tokens in rollout.response_lists()} >= {5, 9}


def test_no_stop_token_comes_too_early(uniform_model):
    with pytest.warns(UserWarning, match="min_new_tokens=4"):
        sampler = Sampler(
            max_new_tokens=30, min_new_tokens=4, eos_token_id=list(range(40)), group_size=100
        )
    lengths = sampler(uniform_model, QUERIES[:1]).response_mask.sum(1)
    assert lengths.min() == 5


def test_random_limits(make_model):
    def lengths(limits, **settings):
        sampler = Sampler(max_new_tokens=limits, group_size=50, **settings)
        rollout = sampler(make_model(), QUERIES[:1])
        assert not rollout.ended.any()
        return rollout.response_mask.sum(1).tolist()

    assert set(lengths((2, 5))) == {2, 3, 4, 5}
    assert lengths((2, 5)) == lengths(LengthSampler(2, 6)) != lengths((2, 5), seed=1)
    numbers = [1, 4] * 25
    assert lengths(iter(numbers).__next__) == numbers


def test_rows_that_have_stopped_are_not_computed_any_more():
    sizes = {"vocab_size": 500, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    queries = torch.ones(128, 1, dtype=torch.long)
    computed = []
    model.transformer.h[0].register_forward_hook(
        lambda _module, inputs, _output: computed.append(inputs[0].shape[:2].numel())
    )

    def tokens(limits):
        computed.clear()
        Sampler(max_new_tokens=iter(limits).__next__)(model, queries)
        return sum(computed)

    everything = tokens([16] * 128)
    assert everything == 128 * 16  # one pass over the queries, 15 single tokens
    assert tokens([2, 16] * 64) <= 0.6 * everything  # 0.56 of them, and what rows wait for


# --- reproducible --------------------------------------------------------------------------------


def test_calls_differ_and_can_be_repeated(make_model):
    model = make_model()
    first, second = Sampler(seed=4), Sampler(seed=4)
    runs = [first(model, QUERIES).responses for _ in range(3)]
    assert not torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], Sampler(seed=5)(model, QUERIES).responses)
    group = Sampler(group_size=2)(model, QUERIES[:1]).responses
    assert not torch.equal(group[0], group[1])
    second.calls = 2
    torch.manual_seed(99)  # of no concern
    assert torch.equal(second(model, QUERIES).responses, runs[2])
    second(model, QUERIES, seeds=range(4))  # an evaluation in between does not move the run
    assert (first.calls, second.calls) == (3, 3)


@pytest.mark.parametrize("max_rows", [1, 4, 5])
def test_rows_do_not_depend_on_their_neighbours(uniform_model, make_model, max_rows):
    # A product of one row rounds unlike that of many: here logits differ by up to 1e-6, cumulative
    # probabilities by up to 1e-7. With these seeds no number that is drawn comes nearer than 2e-4
    # to where one token ends and the next begins (with range(12) one comes as near as 7.5e-8).
    seeds = range(72, 84)
    for model in (uniform_model, make_model()):
        settings = {"max_new_tokens": (3, 15), "eos_token_id": range(9), "group_size": 3}
        expected = Sampler(**settings)(model, QUERIES, seeds=seeds)
        assert 0 < expected.ended.sum() < 12
        sizes = []
        hook = model.register_forward_hook(
            lambda _, __, output, sizes=sizes: sizes.append(len(output.logits))
        )
        cut = Sampler(**settings, max_rows=max_rows)(model, QUERIES, seeds=seeds)
        hook.remove()
        assert max(sizes) == max_rows
        for name in ("queries", "responses", "response_mask", "ended", "group_ids"):
            assert torch.equal(getattr(cut, name), getattr(expected, name))
        torch.testing.assert_close(
            cut.behaviour_logprobs, expected.behaviour_logprobs, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(cut.values, expected.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_parts_are_the_rows_of_a_call(uniform_model, parts):
    settings = {"max_new_tokens": (3, 15), "eos_token_id": range(9), "group_size": 3, "seed": 5}
    whole, split = Sampler(**settings), Sampler(**settings)
    for _ in range(2):  # the second call goes on where the first one ended
        expected = whole(uniform_model, QUERIES)
        found = list(split.in_parts(uniform_model, QUERIES, parts))
        assert len(found) == min(parts, 4)
        joined = Rollout.concat(found)
        for name in ("queries", "responses", "response_mask", "ended", "group_ids"):
            assert torch.equal(getattr(joined, name), getattr(expected, name)), name
        torch.testing.assert_close(
            joined.behaviour_logprobs, expected.behaviour_logprobs, atol=1e-5, rtol=0
        )
    assert whole.calls == split.calls == 2


def test_a_higher_limit_only_continues_the_responses(make_model):
    short = Sampler(max_new_tokens=5)(make_model(), QUERIES).responses
    assert torch.equal(short, Sampler(max_new_tokens=9)(make_model(), QUERIES).responses[:, :5])


def test_an_early_end_does_not_change_the_other_rows_of_sample(uniform_model):
    def run(eos):
        generator = torch.Generator().manual_seed(2)
        return sample(
            uniform_model,
            torch.ones(40, 3, dtype=torch.long),
            max_new_tokens=30,
            eos_token_id=eos,
            generator=generator,
        )

    full, ended = run(None), run(5)
    assert ended.ended.any()
    mask = ended.response_mask
    assert torch.equal(ended.responses[mask], full.responses[:, : mask.shape[1]][mask])


# --- the rest ------------------------------------------------------------------------------------


def test_progress_counts_every_token_once(uniform_model):
    seen = []
    sampler = Sampler(max_new_tokens=(2, 9), eos_token_id=5, group_size=4, max_rows=6)
    limits = Sampler(max_new_tokens=(2, 9), group_size=4)(uniform_model, QUERIES)
    sampler(uniform_model, QUERIES, progress=lambda *numbers: seen.append(numbers))
    done = [number for number, _ in seen]
    assert {total for _, total in seen} == {int(limits.response_mask.sum())}
    assert done == sorted(done)
    assert done[0] == 6
    assert done[-1] == seen[0][1]


def test_each_module_gets_its_mode_back(make_model):
    model = make_model(dropout=0.5).train()
    model.transformer.h[0].eval()
    runs = [Sampler()(model, QUERIES) for _ in range(2)]
    assert torch.equal(runs[0].responses, runs[1].responses)  # no dropout
    assert model.training
    assert model.transformer.h[1].mlp.dropout.training
    assert not model.transformer.h[0].mlp.dropout.training


def test_nan_is_found(make_model):
    model = make_model()
    model.transformer.ln_f.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="`model` must give finite logits"):
        Sampler()(model, QUERIES)


def test_no_graph_is_kept(make_model):
    rollout = Sampler()(make_model(), QUERIES)
    assert not rollout.behaviour_logprobs.requires_grad
    assert not rollout.values.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer > 0, got 0"),
        ({"max_new_tokens": (5, 2)}, r"`max_new_tokens` .* got \(5, 2\)"),
        ({"max_new_tokens": LengthSampler(0, 4)}, r"`max_new_tokens` .* got \(0, 3\)"),
        (
            {"min_new_tokens": 9, "max_new_tokens": (8, 12)},
            "`min_new_tokens` must be <= .* 8, got 9",
        ),
        ({"temperature": 0.0}, "`temperature` must be a finite number > 0"),
        ({"top_k": -1}, "`top_k` must be an integer >= 0"),
        ({"top_p": 0.0}, "`top_p` must be a finite number > 0 and <= 1"),
        ({"min_new_tokens": -1}, "`min_new_tokens` must be an integer >= 0"),
        ({"group_size": 0}, "`group_size` must be an integer > 0, got 0"),
        ({"max_rows": 0}, "`max_rows` must be an integer > 0 or None, got 0"),
        ({"seed": -1}, "`seed` must be an integer >= 0"),
        ({"eos_token_id": -1}, "`eos_token_id` must hold token ids >= 0, got -1"),
        ({"eos_token_id": "</s>"}, "`eos_token_id` .* got '</s>': give texts as stop_strings"),
        ({"stop_strings": ["."]}, "`stop_strings` must come with a tokenizer"),
        ({"stop_strings": "."}, "`stop_strings` must be a list"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


def test_settings_of_another_kind(make_model):
    with pytest.raises(TypeError, match="`max_tokens`. Did you mean `max_new_tokens`"):
        Sampler(max_tokens=3)
    with pytest.raises(TypeError, match="`tokenizer` must be .*, got GPT2HeadWithValueModel: load"):
        Sampler(make_model())
    with pytest.raises(TypeError, match="`tokenizer` must be .*, got 'gpt2': load"):
        Sampler("gpt2")


def test_the_warning_of_a_cut_distribution_points_to_the_caller():
    with pytest.warns(UserWarning, match="drawn from a cut distribution") as caught:
        Sampler(top_k=3)
    assert caught[0].filename == __file__


def test_a_tokenizer_that_knows_no_tokens_is_refused():
    empty = GPT2Tokenizer()  # what transformers finds in a folder without a tokenizer
    for add_bos in (False, True):
        with pytest.raises(
            ValueError, match="`tokenizer` must give tokens for 'This film', got none"
        ):
            Sampler(empty, add_bos=add_bos)(tiny_model("gpt2"), ["This film"])


def test_bad_calls(make_model):
    model = make_model()
    sampler = Sampler(max_new_tokens=4, group_size=2)
    with pytest.raises(
        ValueError, match=r"`seeds` must be one number >= 0 for each of the 8 rows .*, got 4 of"
    ):
        sampler(model, QUERIES, seeds=range(4))
    with pytest.raises(ValueError, match="`seeds` must be one number >= 0 for each .*, got -2"):
        sampler(model, QUERIES, seeds=range(-2, 6))
    with pytest.raises(ValueError, match=r"the model's 64 positions, got 61 \+ 4 tokens in row 1"):
        sampler(model, ragged([3, 61]))
    with pytest.raises(ValueError, match=r"got 61 \+ 4 tokens"):  # whatever limit comes up
        Sampler(max_new_tokens=(1, 4))(model, ragged([61]), seeds=[0])
    with pytest.raises(ValueError, match=f"ids from 0 to {VOCABULARY - 1}, got 1 to 97"):
        sampler(model, [torch.tensor([1, 97])])
    with pytest.raises(ValueError, match=r"`max_new_tokens\(\)` must give lengths > 0 .* got 0"):
        Sampler(max_new_tokens=lambda: 0)(model, QUERIES)
    assert sampler.calls == 0


def test_a_row_near_the_last_position_is_written_beside_longer_responses(make_model):
    """Each row fits by itself; one that is over stays where it is while the others go on."""
    model, queries, limits = make_model(), ragged([61, 3, 4, 5, 6]), [3, 20, 20, 20, 20]
    rollout = Sampler(max_new_tokens=iter(limits).__next__)(model, queries, seeds=range(5))
    assert rollout.response_mask.sum(1).tolist() == limits
    for row in (0, 4):
        limit = limits[row]
        sampler = Sampler(max_new_tokens=lambda limit=limit: limit)
        alone = sampler(model, queries[row : row + 1], seeds=[row])
        assert torch.equal(rollout.responses[row, :limit], alone.responses[0])
    with pytest.raises(ValueError, match=r"got 61 \+ 4 tokens in row 1"):
        Sampler(max_new_tokens=iter([20, 4, 4]).__next__)(model, ragged([3, 61, 6]))


# --- training on it ------------------------------------------------------------------------------


def test_the_trainer_takes_a_rollout(make_model):
    rollout = Sampler(max_new_tokens=6, eos_token_id=0)(make_model(), QUERIES)
    stats = PPOTrainer(make_model(), batch_size=4, precision="fp32").step(
        rollout, torch.arange(4.0)
    )
    # Scored again by the trainer: the entropy estimate is minus the summed log-probs.
    entropy = -rollout.behaviour_logprobs.sum(1).mean().item()
    assert stats["objective/entropy"] == pytest.approx(entropy, abs=1e-4)


def test_another_engine_fills_a_rollout(make_model):
    """The protocol in the docstring of `trl.rollout`, with transformers' own generate."""
    model = make_model()
    queries, query_mask = pad_rows(QUERIES, left=True)
    output = model.generate(
        queries,
        attention_mask=query_mask,
        max_new_tokens=24,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        eos_token_id=7,
    )
    rollout = Rollout.from_lists(
        [row[mask] for row, mask in zip(queries, query_mask, strict=True)],
        output[:, queries.shape[1] :],
        eos_token_id=7,
    )
    rollout.check()
    assert rollout.query_lists() == [query.tolist() for query in QUERIES]
    stats = PPOTrainer(model, batch_size=4).step(rollout, torch.arange(4.0))
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-4)
