import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from tests.conftest import VOCABULARY, ragged
from trl.gpt2 import GPT2HeadWithValueModel, ValueHead, respond_to_batch


@pytest.fixture
def log(caplog):
    """What transformers says, which it does through a logger of its own."""
    transformers_logging.enable_propagation()
    caplog.set_level(logging.INFO)
    yield caplog
    transformers_logging.disable_propagation()


def test_output_is_a_tuple_with_names(make_model):
    model = make_model()
    input_ids = torch.stack(ragged([5, 5, 5]))
    logits, past, value = model(input_ids)
    output = model(input_ids)
    assert logits.shape == (3, 5, VOCABULARY)
    assert value.shape == (3, 5)
    assert past.get_seq_length() == 5
    assert torch.equal(output.logits, logits)
    assert torch.equal(output.value, value)
    assert torch.equal(output[0], logits)
    assert torch.equal(output[-1], value)
    assert len(model(input_ids, use_cache=False)) == 2
    assert len(model(input_ids, output_hidden_states=True)) == 4


def test_logits_are_those_of_plain_gpt2(make_model):
    model = make_model()
    plain = GPT2LMHeadModel(model.config).eval()
    plain.load_state_dict(
        {key: value for key, value in model.state_dict().items() if not key.startswith("v_head")}
    )
    input_ids = torch.stack(ragged([6, 6]))
    assert torch.equal(model(input_ids).logits, plain(input_ids).logits)


def test_value_is_the_head_of_the_last_hidden_state(make_model):
    model = make_model()
    input_ids = torch.stack(ragged([4]))
    hidden = model.transformer(input_ids).last_hidden_state
    head = model.v_head.summary
    expected = (hidden * head.weight[0]).sum(-1) + head.bias
    torch.testing.assert_close(model(input_ids).value, expected)


def test_a_new_value_head_gives_zero():
    from transformers import GPT2Config

    model = GPT2HeadWithValueModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)).eval()
    assert model(torch.tensor([[1, 2]])).value.abs().max() == 0


def test_value_head_follows_the_config(make_model):
    config = make_model().config
    config.summary_activation = "tanh"
    config.summary_first_dropout = 0.3
    config.summary_last_dropout = 0.4
    head = ValueHead(config)
    torch.nn.init.constant_(head.summary.weight, 100.0)
    head.eval()
    assert head(torch.ones(2, 3, 32)).tolist() == [[1.0] * 3] * 2
    assert (head.first_dropout.p, head.last_dropout.p) == (0.3, 0.4)
    assert sorted(head.state_dict()) == ["summary.bias", "summary.weight"]
    config.summary_activation = "relu"
    with pytest.raises(ValueError, match="`config.summary_activation`"):
        ValueHead(config)
    config.summary_activation, config.summary_use_proj = None, False
    with pytest.raises(ValueError, match="`config.summary_use_proj`"):
        ValueHead(config)


def test_a_detached_head_sends_no_gradient_to_the_transformer(make_model):
    model = make_model()
    model.detach_value_head()
    model(torch.tensor([[1, 2, 3]])).value.sum().backward()
    assert model.v_head.summary.weight.grad is not None
    assert model.transformer.wte.weight.grad is None


def test_generate_works(make_model):
    model = make_model()
    input_ids = torch.stack(ragged([4, 4]))
    mask = torch.ones_like(input_ids)
    generated = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert generated.shape == (2, 9)
    greedy = model(generated).logits[:, 3:-1].argmax(-1)
    ended = (generated[:, 4:] == 0).cumsum(1) > 0
    assert (ended | (greedy == generated[:, 4:])).all()


def test_saving_and_loading_restores_everything_bit_for_bit(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    again = GPT2HeadWithValueModel.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not again.training


def test_plain_transformers_loads_the_policy_without_a_word(make_model, tmp_path, log, capfd):
    model = make_model()
    model.save_pretrained(tmp_path)
    transformers_logging.disable_progress_bar()
    log.clear()
    capfd.readouterr()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    transformers_logging.enable_progress_bar()
    assert type(plain) is GPT2LMHeadModel
    assert not [record for record in log.records if record.levelno >= logging.WARNING]
    assert "v_head" not in "".join(capfd.readouterr())
    input_ids = torch.stack(ragged([4]))
    assert torch.equal(plain(input_ids).logits, model(input_ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "GPT2LMHeadModel"
    ]


def test_a_plain_checkpoint_loads_with_a_zero_head_and_without_a_word(make_model, tmp_path, log):
    plain = GPT2LMHeadModel(make_model().config)
    plain.save_pretrained(tmp_path)
    log.clear()
    model = GPT2HeadWithValueModel.from_pretrained(tmp_path)
    assert not [record for record in log.records if record.levelno >= logging.WARNING]
    assert model.v_head.summary.weight.abs().max() == 0
    assert model.v_head.summary.bias.abs().max() == 0
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_half_precision_files_load_as_float32(make_model, tmp_path):
    make_model().half().save_pretrained(tmp_path)
    model = GPT2HeadWithValueModel.from_pretrained(tmp_path)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_loading_info_passes_through(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    model, info = GPT2HeadWithValueModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, GPT2HeadWithValueModel)
    assert not info["missing_keys"]


def test_saving_leaves_the_callers_state_dict_alone(make_model, tmp_path):
    model = make_model()
    state = model.state_dict()
    names = set(state)
    model.save_pretrained(tmp_path / "a", state_dict=state)
    assert set(state) == names
    without_head = {key: value for key, value in state.items() if not key.startswith("v_head")}
    model.save_pretrained(tmp_path / "b", state_dict=without_head)
    loaded = GPT2HeadWithValueModel.from_pretrained(tmp_path / "b")
    assert torch.equal(loaded.v_head.summary.weight, model.v_head.summary.weight)
    with pytest.raises(ValueError, match="save first, then call model.push_to_hub"):
        model.save_pretrained(tmp_path / "c", push_to_hub=True)


def test_arguments_of_transformers_pass_through(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "inner")
    loaded = GPT2HeadWithValueModel.from_pretrained(tmp_path, subfolder="inner")
    assert torch.equal(loaded.v_head.summary.weight, model.v_head.summary.weight)
    half = GPT2HeadWithValueModel.from_pretrained(tmp_path / "inner", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    made = GPT2HeadWithValueModel.from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    assert torch.equal(made.lm_head.weight, model.lm_head.weight)


def test_a_model_of_another_kind_is_refused():
    from trl import starter

    with pytest.raises(ValueError, match="must hold the weights of a GPT2HeadWithV.*, but lacks"):
        GPT2HeadWithValueModel.from_pretrained(starter.CLASSIFIER)


def test_labels_give_the_loss_of_plain_gpt2(make_model):
    model = make_model()
    plain = GPT2LMHeadModel(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    input_ids = torch.stack(ragged([6, 6]))
    output = model(input_ids, labels=input_ids)
    assert output.loss == plain(input_ids, labels=input_ids).loss
    assert output[0] is output.loss
    assert type(model(input_ids, return_dict=False)) is tuple


def test_a_folder_without_weights_says_so(make_model, tmp_path):
    make_model().config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold weights.*found \['config.json'\]"):
        GPT2HeadWithValueModel.from_pretrained(tmp_path)


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GPT2HeadWithValueModel.from_pretrained(tmp_path / "nowhere")


def test_a_hub_name_without_network_says_how_to_use_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="or pass the path of a local folder"):
        GPT2HeadWithValueModel.from_pretrained("gpt2")


def test_respond_to_batch(make_model):
    model = make_model()
    queries = torch.stack(ragged([5, 5, 5]))
    responses = respond_to_batch(model, queries, txt_len=7)
    assert responses.shape == (3, 7)
    assert responses.dtype == torch.long
    assert not responses.requires_grad
    assert responses.min() >= 0
    assert responses.max() < VOCABULARY
    torch.manual_seed(3)
    first = respond_to_batch(model, queries)
    torch.manual_seed(3)
    assert torch.equal(first, respond_to_batch(model, queries))
    assert first.shape == (3, 20)


def test_respond_to_batch_takes_any_causal_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    responses = respond_to_batch(LlamaForCausalLM(config), torch.tensor([[1, 2]]), txt_len=3)
    assert responses.shape == (1, 3)
