"""A Llama written as GGUF is the same model to transformers, and its tokenizer reads the same."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl import starter

pytest.importorskip("gguf")
PLACE = Path(__file__).parents[1] / "examples/real_models/to_gguf.py"
SPEC = importlib.util.spec_from_file_location("to_gguf", PLACE)
exporter = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(exporter)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)


def folder_of(path, tokenizer, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # else they are all 1, and no mix-up shows
            torch.nn.init.normal_(weight, 1.0, 0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_is_the_model(tmp_path, tokenizer, tied):
    made = folder_of(tmp_path / "made", tokenizer, tie_word_embeddings=tied)
    exporter.to_gguf(tmp_path / "made", tmp_path / "made.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="made.gguf", dtype=torch.float32
    )
    tokens = torch.randint(0, len(tokenizer), (2, 24))
    expected = {n: w.half().float() if w.dim() > 1 else w for n, w in made.state_dict().items()}
    for name, weight in read.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, made(tokens).logits, rtol=0, atol=0.02)


def test_its_tokenizer_reads_the_same(tmp_path, tokenizer):
    folder_of(tmp_path / "made", tokenizer)
    exporter.to_gguf(tmp_path / "made", tmp_path / "made.gguf")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="made.gguf")
    for text in ("This film was a joy, 1999!", "naïve — \n\ttabs", " leading"):
        assert read(text).input_ids == tokenizer(text).input_ids
        assert read.decode(read(text).input_ids) == text
    assert read.eos_token == tokenizer.eos_token


def test_rows_that_rotate_together_meet():
    rows = torch.arange(8.0)[:, None]  # two heads of four rows
    assert exporter.interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"attention_bias": True}, "without biases"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
            "without RoPE scaling",
        ),
    ],
)
def test_what_the_file_cannot_hold_is_refused(tmp_path, tokenizer, changes, rule):
    model = folder_of(tmp_path / "made", tokenizer)
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=rule):
        exporter.check(model, tokenizer)
    assert not list(tmp_path.glob("*.gguf"))
