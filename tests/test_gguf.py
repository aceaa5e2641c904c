"""A Llama written as GGUF is the same model to transformers, and its tokenizer reads the same; all
that loads a model here takes the file, and what it makes of it is an ordinary model.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import trl
from trl import CausalLMWithValueHead, PPOTrainer, starter
from trl.anatomy import language_model
from trl.evaluation import ClassifierScorer, RewardModelScorer
from trl.models.with_value_head import load_policy
from trl.training.parts import find_tokenizer

gguf = pytest.importorskip("gguf")
peft = pytest.importorskip("peft")
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
def test_the_file_is_the_model(tmp_path, small, tied):
    made = folder_of(tmp_path / "made", small, tie_word_embeddings=tied)
    exporter.to_gguf(tmp_path / "made", tmp_path / "made.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="made.gguf", dtype=torch.float32
    )
    tokens = torch.randint(0, len(small), (2, 24))
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


# -- through every loader --------------------------------------------------------------------------


def byte_tokenizer():
    """A tokenizer that is read fast: of bytes, and a few merges."""
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    made.train_from_iterator(["This film was a joy to see, and the other was dull."] * 9, trainer)
    end = {"bos_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **end)


@pytest.fixture(scope="module")
def small():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory, small):
    """Folders with a file each, of tied embeddings and not, and nothing else."""
    made = {}
    for tied in True, False:
        folder = tmp_path_factory.mktemp("files")
        folder_of(folder / "made", small, tie_word_embeddings=tied)
        made[tied] = tmp_path_factory.mktemp("gguf")
        exporter.to_gguf(folder / "made", made[tied] / "tiny.gguf")
    return made


def logits_of(model):
    with torch.no_grad():
        return language_model(model)(torch.arange(1, 25).view(2, 12)).logits


@pytest.mark.parametrize(("tied", "by_path"), [(True, True), (False, False)])
def test_a_policy_is_trained_and_saved_as_an_ordinary_folder(files, tmp_path, tied, by_path):
    where = {} if by_path else {"gguf_file": "tiny.gguf"}
    policy = load_policy(files[tied] / "tiny.gguf" if by_path else files[tied], **where)
    plain = policy.language_model
    expected = AutoModelForCausalLM.from_pretrained(
        files[tied], gguf_file="tiny.gguf", dtype=torch.float32
    )
    assert torch.equal(logits_of(policy), logits_of(expected))
    assert not plain.is_quantized
    assert not any(hasattr(plain, name) for name in ("hf_quantizer", "quantization_method"))
    assert not hasattr(plain.config, "quantization_config")
    trainer = PPOTrainer(policy, batch_size=2, minibatch_size=2, learning_rate=1e-3)
    queries, responses = [torch.arange(1, 5)] * 2, [torch.arange(4, 0, -1)] * 2
    trainer.step(queries, responses, torch.tensor([1.0, -1.0]))
    assert not torch.equal(logits_of(policy), logits_of(expected))
    policy.save_pretrained(tmp_path)
    again = CausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(policy))
    assert "gguf" not in (tmp_path / "config.json").read_text()
    for each in plain, again.language_model:
        assert (each.lm_head.weight is each.model.embed_tokens.weight) is tied


@pytest.mark.usefixtures("no_pictures")
def test_one_call_finds_the_tokenizer_in_the_file(files, tmp_path, small):
    model, _ = trl.train(
        files[True],
        ["This film was", "I saw"],
        lambda texts: [float(len(text)) for text in texts],
        steps=1,
        batch_size=2,
        max_new_tokens=3,
        model_kwargs={"gguf_file": "tiny.gguf"},
        ref_model=load_policy(files[True] / "tiny.gguf"),
        out=tmp_path / "run",
    )
    assert model.tokenizer("a joy").input_ids == small("a joy").input_ids
    assert "gguf_file: tiny.gguf" in (tmp_path / "run" / "recipe.yaml").read_text()
    again = AutoTokenizer.from_pretrained(tmp_path / "run" / "policy")
    assert again("a joy").input_ids == small("a joy").input_ids


def test_an_adapter_finds_its_base_in_the_file(files, tmp_path):
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    policy = load_policy(files[False], gguf_file="tiny.gguf", peft_config=config)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy.save_pretrained(tmp_path)
    expected = logits_of(policy)
    assert torch.equal(logits_of(load_policy(tmp_path)), expected)
    assert find_tokenizer(None, tmp_path, policy, {}) is not None


def test_a_file_of_that_name_where_the_program_runs_is_another(files, tmp_path, monkeypatch):
    shutil.copy(files[False] / "tiny.gguf", tmp_path)
    monkeypatch.chdir(tmp_path)
    here = load_policy("tiny.gguf")
    there = load_policy(files[True], gguf_file="tiny.gguf")
    assert not torch.equal(logits_of(here), logits_of(there))
    assert torch.equal(logits_of(there), logits_of(load_policy(files[True] / "tiny.gguf")))


def test_a_missing_file_or_package_is_named(files, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"`gguf_file` must be a file in .*tiny.gguf"):
        load_policy(files[True], gguf_file="tinny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (load_policy, RewardModelScorer):
        with pytest.raises(ImportError, match="needs the package gguf: pip install gguf"):
            load(files[True], gguf_file="tiny.gguf")


def classifier_file(folder, tokenizer, labels):
    """Write a sequence classifier with its head, as llama.cpp's own converter does."""
    torch.manual_seed(1)
    folder_of(folder / "made", tokenizer, pad_token_id=0)
    made = LlamaForSequenceClassification.from_pretrained(
        folder / "made", num_labels=max(1, len(labels)), dtype=torch.float32
    )
    for weight in made.parameters():
        weight.data = weight.data.half().float()
    backbone = LlamaForCausalLM.from_pretrained(folder / "made")
    writer = gguf.GGUFWriter(folder / "scorer.gguf", "llama")
    exporter.add_settings(writer, backbone)
    exporter.add_tokenizer(writer, tokenizer, backbone.config.vocab_size)
    if labels:
        writer.add_classifier_output_labels(labels)
    for name, weight in made.model.state_dict().items():
        name = f"model.{name}"
        stored = exporter.stored(name, weight, made.config).float()
        writer.add_tensor(exporter.place_of(name), stored.numpy())
    writer.add_tensor("cls.output.weight", made.score.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made.eval()


@pytest.mark.parametrize("labels", [[], ["BAD", "GOOD", "SO-SO"]])
def test_scorers_read_a_file_with_a_head(tmp_path, small, labels):
    made = classifier_file(tmp_path, small, labels)
    if labels:
        scorer = ClassifierScorer(tmp_path / "scorer.gguf", label="GOOD")
        scores = scorer(["A joy to see.", "Dull"])
        expected = ClassifierScorer(made, small, label=1)(["A joy to see.", "Dull"])
    else:
        pairs = [("How was it?", " Dull"), ("And now?", " A joy")]
        scores = RewardModelScorer(tmp_path, gguf_file="scorer.gguf")(pairs)
        expected = RewardModelScorer(made, small)(pairs)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_file_without_a_head_is_no_scorer(files):
    with pytest.raises(ValueError, match=r"no weights for score.weight"):
        RewardModelScorer(files[True], gguf_file="tiny.gguf")
