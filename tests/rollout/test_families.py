"""Every family: padding, positions, caches, groups and dropped rows leave the numbers right."""

import re
import textwrap

import pytest
import torch
import transformers
from torch import nn

import trl.rollout
from tests.conftest import ragged
from tests.families import tiny_model
from tests.rollout.families import (
    FAMILIES,
    LLAMA,
    MOE,
    SEQ2SEQ,
    SIZES,
    VOCAB,
    WithValue,
    make,
)
from trl.anatomy import language_model
from trl.batch import Rollout, pad_rows
from trl.kernels.attention import ATTENTION_GRAIN
from trl.models.response import ResponseModel
from trl.rollout import Sampler, sampling
from trl.rollout.decoder import Decoder

QUERIES = ragged([3, 9, 5], vocabulary=VOCAB)
TEMPERATURE = 0.7


def fresh(model, query, response):
    """Log-probs and values of one response in one pass without cache or padding."""
    query, response = torch.tensor([query]), torch.tensor([response])
    if language_model(model).config.is_encoder_decoder:
        start = torch.tensor([[language_model(model).config.decoder_start_token_id]])
        shifted = torch.cat((start, response[:, :-1]), 1)
        output = model(input_ids=query, decoder_input_ids=shifted)
        logits, values = output.logits[0], output.value[0]
    else:
        output = model(input_ids=torch.cat((query, response), 1))
        predicts = slice(query.shape[1] - 1, -1)
        logits, values = output.logits[0, predicts], output.value[0, predicts]
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(-1, response.T)[:, 0], values


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_is_right_in_every_family(family):
    model = make(family)
    batch_sizes = []
    name = "decoder_input_ids" if family in SEQ2SEQ else "input_ids"
    model.register_forward_pre_hook(
        lambda _, __, inputs: batch_sizes.append(len(inputs[name])), with_kwargs=True
    )
    settings = {"max_new_tokens": (1, 9), "temperature": TEMPERATURE}
    together = Sampler(**settings, group_size=2)
    rollout = together(model, QUERIES, seeds=range(6))
    rollout.check()
    assert rollout.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    # Each query was computed once; finished rows left the batch.
    assert batch_sizes[:2] == [3, 6]
    assert batch_sizes[-1] < 6
    assert batch_sizes == sorted(batch_sizes[:1]) + sorted(batch_sizes[1:], reverse=True)

    columns = rollout.behaviour_logprobs, rollout.values, rollout.response_mask
    rows = zip(rollout.query_lists(), rollout.response_lists(), *columns, strict=True)
    for query, response, logprobs, values, mask in rows:
        with torch.no_grad():
            expected_logprobs, expected_values = fresh(model, query, response)
        torch.testing.assert_close(logprobs[mask], expected_logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(values[mask], expected_values, atol=1e-4, rtol=0)
    assert (rollout.behaviour_logprobs[~rollout.response_mask] == 0).all()
    assert (rollout.values[~rollout.response_mask] == 0).all()
    # Neither flat (log 60 = 4.1) nor certain, which would hide errors.
    assert 0.5 < -rollout.behaviour_logprobs[rollout.response_mask].mean() < 3.7
    assert rollout.behaviour_logprobs[rollout.response_mask].std() > 0.3

    alone = Sampler(**settings)
    for row, response in enumerate(rollout.response_lists()):
        one = alone(model, [QUERIES[row // 2]], seeds=[row])
        assert one.response_lists() == [response]


def test_a_cache_that_cannot_select_rows_is_worked_around(monkeypatch):
    model = make("llama")
    settings = {"max_new_tokens": (1, 9), "group_size": 2}
    expected = Sampler(**settings)(model, QUERIES)
    monkeypatch.setattr(Decoder, "can_select", False)
    monkeypatch.delattr(Decoder, "select")
    rollout = Sampler(**settings)(model, QUERIES)
    assert torch.equal(rollout.responses, expected.responses)
    torch.testing.assert_close(
        rollout.behaviour_logprobs, expected.behaviour_logprobs, atol=1e-5, rtol=0
    )


def test_adapters_do_not_hide_what_the_model_takes():
    """The forward of a PeftModel names neither position_ids nor logits_to_keep."""

    class Adapted(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model
            self.config = model.config

        def get_base_model(self):
            return self.inner

        def forward(self, input_ids=None, attention_mask=None, **inputs):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    model = make("gpt2").language_model
    expected = Sampler(max_new_tokens=6)(model, QUERIES)
    assert expected.values is None
    assert torch.equal(
        Sampler(max_new_tokens=6)(Adapted(model), QUERIES).responses, expected.responses
    )


def test_a_model_without_a_cache_is_refused():
    class Cacheless(nn.Module):
        config = make("gpt2").language_model.config

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids):
            raise AssertionError

    with pytest.raises(TypeError, match=r"`model` must keep a cache .* got Cacheless"):
        Sampler()(Cacheless(), QUERIES)


def test_an_encoder_decoder_needs_a_start_token():
    model = make("t5")
    plain = model.language_model
    plain.config.decoder_start_token_id = plain.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="`model.config.decoder_start_token_id` must be set"):
        Sampler()(model, QUERIES)


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
BART |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")} | {"forced_eos_token_id": None}
LED = BART | {f"max_{side}_position_embeddings": 64 for side in ("encoder", "decoder")}
KIN = dict.fromkeys(("mt5", "umt5", "longt5"), T5)
KIN |= dict.fromkeys(("mbart", "m2m_100", "pegasus", "plbart", "blenderbot"), BART)
KIN |= {"marian": BART | {"decoder_vocab_size": VOCAB}, "led": LED | {"attention_window": 8}}


@pytest.mark.parametrize("family", KIN)
def test_encoder_decoders_that_are_named_are_scored_as_sampled(family):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.AutoConfig.for_model(family, vocab_size=VOCAB, **KIN[family], **ids)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    rollout = Sampler(max_new_tokens=(3, 9), eos_token_id=[2])(model, QUERIES)
    # M2M100 gives a token of padding no position, wherever it stands.
    assert not any(0 in response for response in rollout.response_lists())
    with torch.no_grad():
        again = ResponseModel(model)(rollout)
    assert -rollout.behaviour_logprobs[rollout.response_mask].mean() > 0.3
    torch.testing.assert_close(again.logprobs, rollout.behaviour_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_generate_of_an_encoder_decoder_fills_a_rollout(family):
    """The second snippet of `trl.rollout`, as it stands there."""
    model = language_model(make(family))
    model.generation_config.forced_bos_token_id = 7
    eos = model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = 2
    (snippet,) = re.findall(r"\n    start = .*check\(\)\n", trl.rollout.__doc__, re.DOTALL)
    queries, query_mask = pad_rows(QUERIES, left=False)
    names = {"trl": trl, "Rollout": Rollout, "model": model, "eos": eos}
    names |= {"queries": queries, "query_mask": query_mask}
    exec(textwrap.dedent(snippet), names)
    rollout, output = names["rollout"], names["output"]
    assert output[:, :2].tolist() == [[2, 7]] * 3
    assert rollout.query_lists() == [query.tolist() for query in QUERIES]
    for response, row in zip(rollout.response_lists(), output[:, 2:].tolist(), strict=True):
        assert response == row[: row.index(eos) + 1 if eos in row else None]
    assert max(map(len, rollout.response_lists())) > 2


@pytest.mark.parametrize("start", [[2, 5, 7], VOCAB + 900, -1])
def test_a_start_that_is_no_token_is_refused(start):
    """`generate` takes a list as the starts of the rows; all of it stood before each response."""
    model = make("bart")
    language_model(model).generation_config.decoder_start_token_id = start
    with pytest.raises(ValueError, match="`decoder_start_token_id` .* must be token ids from 0 to"):
        Sampler()(model, ragged([4, 4], vocabulary=VOCAB))


@pytest.mark.parametrize("forced", [None, 7])
def test_an_encoder_decoder_starts_its_responses_as_generate_does(forced):
    """The generation config goes over the model's own; mBART is told the language to write so."""
    model = make("bart")
    plain = language_model(model)
    plain.config.decoder_start_token_id = 5
    plain.generation_config.decoder_start_token_id = 2
    plain.generation_config.forced_bos_token_id = forced
    queries = ragged([4, 4], vocabulary=VOCAB)
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    with torch.no_grad():
        written = plain.generate(
            torch.stack(queries), do_sample=False, max_length=8, min_length=8, num_beams=1
        )
    start = [2] if forced is None else [2, forced]
    assert written[:, : len(start)].tolist() == [start] * 2
    expected = written[:, len(start) :]
    with pytest.warns(UserWarning, match="top_k"):
        rollout = Sampler(**settings, top_k=1)(model, queries)
    width = min(6, expected.shape[1])
    assert torch.equal(rollout.responses[:, :width], expected[:, :width])
    # What is trained is what was written.
    rollout = Sampler(**settings)(model, queries)
    with torch.no_grad():
        again = ResponseModel(model)(rollout)
    torch.testing.assert_close(again.logprobs, rollout.behaviour_logprobs, atol=1e-5, rtol=0)


def test_positions_of_each_side_of_an_encoder_decoder():
    model = make("bart")
    Sampler(max_new_tokens=2, max_rows=1)(model, ragged([64], vocabulary=VOCAB))
    with pytest.raises(
        ValueError, match=r"each fit the model's 64 positions, got 65 and 2 .*row 1"
    ):
        Sampler(max_new_tokens=2)(model, ragged([3, 65], vocabulary=VOCAB))


def test_finished_rows_leave_in_quarters(monkeypatch):
    """A row costs nothing after it has left; a batch is not copied for each row that ends."""
    model = make("gpt2")
    sizes = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    limits = iter([1, 1, 2, 3, 4, 5, 5, 6])
    Sampler(max_new_tokens=lambda: next(limits))(model, ragged([4] * 8, vocabulary=VOCAB))
    # After the steps 2, 1, 1, 1, 2 rows have ended: 6 of 8 run, 5 of 6, 4 of 6, 3 of 4, 1 of 3.
    assert sizes == [8, 6, 6, 4, 3, 1]
    assert sampling._FINISHED_SHARE == 0.25


def odd(family):
    """Models whose caches or encoders differ from those of the other families."""
    torch.manual_seed(0)
    if family == "minimax":
        config = transformers.MiniMaxConfig(
            **LLAMA | MOE | {"sliding_window": None, "head_dim": 8, "block_size": 4},
            layer_types=["linear_attention", "full_attention"],
        )
        model = transformers.MiniMaxForCausalLM(config)
    elif family == "recurrent_gemma":
        config = transformers.RecurrentGemmaConfig(
            **SIZES | {"intermediate_size": 48, "lru_width": 32, "num_hidden_layers": 3}
        )
        model = transformers.RecurrentGemmaForCausalLM(config)
    else:
        config = transformers.SwitchTransformersConfig(
            **SIZES | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=2,
            decoder_start_token_id=0,
        )
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return WithValue(model).eval()


@pytest.mark.parametrize(("family", "selects"), [("minimax", False), ("switch", True)])
def test_caches_and_encoders_of_their_own_kind(family, selects):
    model = odd(family)
    queries = ragged([9, 9], vocabulary=VOCAB)
    mask = torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        assert Decoder(model, torch.stack(queries), mask, 4).can_select == selects
    sampler = Sampler(max_new_tokens=(1, 9), temperature=TEMPERATURE, group_size=3)
    rollout = sampler(model, queries)
    rows = zip(
        *(rollout.query_lists(), rollout.response_lists()), rollout.behaviour_logprobs, strict=True
    )
    for query, response, logprobs in rows:
        with torch.no_grad():
            expected, _ = fresh(model, query, response)
        torch.testing.assert_close(logprobs[: len(response)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_sampling_does_not_ask_for_router_logits(family):
    model = tiny_model(family)
    expected = Sampler(max_new_tokens=5)(model, ragged([3, 5], vocabulary=VOCAB))
    model.config.output_router_logits = True
    rollout = Sampler(max_new_tokens=5)(model, ragged([3, 5], vocabulary=VOCAB))
    assert torch.equal(rollout.responses, expected.responses)
    assert model.config.output_router_logits


def test_an_output_without_its_cache_is_refused():
    with pytest.raises(TypeError, match=r"must keep a cache .* output has no past_key_values"):
        Sampler()(odd("recurrent_gemma"), QUERIES)


def test_the_cache_has_room_for_the_next_tokens():
    """No step moves what is there already, also after rows have been chosen and repeated."""
    model = make("llama")
    queries = torch.randint(3, VOCAB, (2, 4))
    decoder = Decoder(model, queries, torch.ones_like(queries, dtype=torch.bool), 3)
    decoder.select(torch.tensor([0, 0, 1]))
    places = set()
    for _ in range(3):
        decoder.advance(torch.tensor([3, 4, 5]))
        places |= {layer.keys.data_ptr() for layer in decoder._cache.layers}
    assert len(places) == len(decoder._cache.layers)
    assert decoder._cache.get_seq_length() == 7
    decoder.select(torch.tensor([2]))
    fresh = language_model(model)(torch.cat((queries[1], torch.tensor([5, 5, 5])))[None])
    torch.testing.assert_close(decoder.logits, fresh.logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [ATTENTION_GRAIN - 2, ATTENTION_GRAIN, 2 * ATTENTION_GRAIN + 1])
def test_the_cache_grows_by_whole_grains_and_stays_in_one_piece(columns):
    model = make("llama")
    queries = torch.randint(3, VOCAB, (2, columns))
    tokens = torch.randint(3, VOCAB, (2, ATTENTION_GRAIN + 4))
    decoder = Decoder(model, queries, torch.ones_like(queries, dtype=torch.bool), tokens.shape[1])
    places = []
    for step, column in enumerate(tokens.T):
        if step == ATTENTION_GRAIN:  # a row is left out on the way
            decoder.select(torch.tensor([1]))
        decoder.advance(column[-len(decoder.logits) :])
        (layer, *_) = decoder._cache.layers
        length = columns + step + 1
        assert layer.keys.shape[2] == length
        assert layer._all_keys.shape[2] == length + -length % ATTENTION_GRAIN
        assert layer._all_keys.is_contiguous()
        places.append(layer._all_keys.shape[2])
    assert len(set(places)) in (2, 3)
    fresh = language_model(model)(torch.cat((queries[1], tokens[1]))[None]).logits[:, -1]
    torch.testing.assert_close(decoder.logits, fresh, rtol=1e-4, atol=1e-4)
