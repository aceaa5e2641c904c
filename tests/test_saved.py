"""Damage to the folder of a saved model: each kind is one sentence with folder, file and fix."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from trl import CausalLMWithValueHead, ClassifierScorer, starter
from trl.config.places import not_a_model
from trl.training.parts import find_tokenizer

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a policy, of an adapter on it, and of a classifier."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("saved")
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    config = GPT2Config(vocab_size=len(tokenizer), pad_token_id=0, **SIZES)
    policy = CausalLMWithValueHead(GPT2LMHeadModel(config))
    policy.tokenizer = tokenizer
    policy.save_pretrained(root / "policy")
    base = GPT2LMHeadModel.from_pretrained(root / "policy")
    lora = peft.LoraConfig(r=2, fan_in_fan_out=True)
    CausalLMWithValueHead(peft.get_peft_model(base, lora)).save_pretrained(root / "adapter")
    GPT2ForSequenceClassification(config).save_pretrained(root / "classifier")
    tokenizer.save_pretrained(root / "classifier")
    for kind in ("policy", "adapter", "classifier"):
        load(root / kind)
    return root


def load(folder):
    """Load all that is in a folder, as a run does."""
    if "classifier" in str(folder):
        return ClassifierScorer(folder, label=1)
    policy = CausalLMWithValueHead.from_pretrained(folder)
    return find_tokenizer(None, folder, policy, {})


def missing(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def torn(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def noise(file):
    file.write_bytes(bytes(range(255, 100, -1)))


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_list(file):
    file.write_text("[1]")


def null(file):
    file.write_text("null")


def lfs(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def setting(**values):
    """Return what writes other settings into a file; None: without them."""

    def damage(file):
        known = json.loads(file.read_text()) | values
        file.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))

    return damage


def without_a_weight(file):
    weights = load_file(file)
    weights.pop(sorted(weights)[-1])
    save_file(weights, file, metadata={"format": "pt"})


def without_a_shard(file):
    file.rename(file.with_name("model-00001-of-00002.safetensors"))
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = file.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


KINDS = {
    "policy": {
        "config.json": [missing, empty, torn, noise, a_folder, a_list, null],
        "model.safetensors": [missing, empty, torn, noise, a_folder, lfs],
        "tokenizer.json": [
            missing,
            empty,
            torn,
            noise,
            a_folder,
            a_list,
            null,
            setting(model=None),
        ],
        "tokenizer_config.json": [empty, torn, noise, a_list, null],
        "generation_config.json": [empty, torn, noise, a_list, null],
        "value_head/head.safetensors": [empty, torn, noise, lfs, without_a_weight],
    },
    "adapter": {
        "adapter_config.json": [missing, empty, torn, noise, a_folder, a_list, null],
        "adapter_model.safetensors": [missing, empty, torn, noise, a_folder, lfs],
    },
    "classifier": {
        "config.json": [missing, empty, torn, noise, a_folder, a_list, null],
        "model.safetensors": [missing, empty, torn, noise, a_folder, lfs],
        "tokenizer.json": [missing, empty, torn, noise, a_folder, a_list, null],
        "tokenizer_config.json": [missing, empty, torn, noise, a_folder, a_list, null],
    },
}
SETTINGS = [
    ("policy", "config.json", setting(model_type="no_such"), "model type `no_such`"),
    ("policy", "config.json", setting(model_type=None), "Unrecognized model"),
    ("policy", "config.json", setting(n_embd="x"), "expected int"),
    ("policy", "config.json", setting(n_embd=16), "other sizes than the weights have"),
    ("policy", "config.json", setting(n_layer=3), "lacks ['transformer.h.2"),
    ("policy", "config.json", setting(n_layer=1), "config.json of 1 layers, but weights of more"),
    ("policy", "config.json", setting(n_layer=-1), "config.json of -1 layers"),
    ("policy", "config.json", setting(activation_function="no_such"), "no_such"),
    ("policy", "config.json", setting(vocab_size=10), "other sizes"),
    ("policy", "model.safetensors", without_a_weight, "lacks ["),
    ("policy", "model.safetensors", without_a_shard, "model-00002-of-00002.safetensors"),
    ("adapter", "adapter_config.json", setting(peft_type="NO_SUCH"), "NO_SUCH"),
    ("adapter", "adapter_config.json", setting(r=4), "other sizes"),
    ("adapter", "adapter_config.json", setting(target_modules=["no_such"]), "no_such"),
    ("adapter", "adapter_config.json", setting(base_model_name_or_path=None), "its base model"),
    ("adapter", "adapter_config.json", setting(base_model_name_or_path="/no/x"), "`/no/x` does"),
    ("adapter", "adapter_model.safetensors", without_a_weight, "missing adapter keys"),
    ("classifier", "config.json", setting(id2label={"0": "A"}), "other sizes"),
    ("classifier", "model.safetensors", without_a_weight, "has no weights for"),
    ("classifier", "model.safetensors", without_a_shard, "model-00002-of-00002.safetensors"),
]


def told_of(kind, folders, tmp_path, file, damage):
    """Return the sentence on a copy of a folder after some damage."""
    folder = tmp_path / kind
    shutil.copytree(folders / kind, folder)
    damage(folder / file)
    with pytest.raises((OSError, ValueError)) as caught:
        load(folder)
    assert type(caught.value) in (OSError, FileNotFoundError, ValueError)
    place = caught.traceback[-1].path
    assert "trl" in Path(place).parts[-3:], place
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence, folder


@pytest.mark.parametrize(
    ("kind", "file", "damage"),
    [
        pytest.param(kind, file, damage, id=f"{kind}-{file}-{damage.__name__}")
        for kind, files in KINDS.items()
        for file, damages in files.items()
        for damage in damages
    ],
)
def test_a_damaged_file_is_one_sentence_with_folder_file_and_fix(
    kind, file, damage, folders, tmp_path
):
    sentence, folder = told_of(kind, folders, tmp_path, file, damage)
    assert str(folder) in sentence
    assert file in sentence
    fixes = ("copy it anew", "save the policy again", "save_pretrained", "git lfs pull")
    assert any(fix in sentence for fix in fixes)


@pytest.mark.parametrize(("kind", "file", "damage", "words"), SETTINGS)
def test_settings_that_are_not_those_of_the_weights(kind, file, damage, words, folders, tmp_path):
    sentence, _ = told_of(kind, folders, tmp_path, file, damage)
    assert words in sentence


def test_code_of_a_model_is_not_asked_for_but_refused(folders, tmp_path):
    damage = setting(model_type="mine", auto_map={"AutoConfig": "x.C"})
    sentence, _ = told_of("policy", folders, tmp_path, "config.json", damage)
    assert "runs code of its own" in sentence
    assert "--model.trust-remote-code" in sentence


def test_pickles_of_scorers_are_loaded_only_if_asked_for(folders, tmp_path):
    import torch

    shutil.copytree(folders / "classifier", tmp_path / "pickled")
    file = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pickled" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"weights in pytorch_model\.bin, a pickle.*allow_pickle"):
        ClassifierScorer(tmp_path / "pickled", label=1)
    scorer = ClassifierScorer(tmp_path / "pickled", label=1, allow_pickle=True)
    whole = ClassifierScorer(folders / "classifier", label=1)
    assert scorer(["A film."]).equal(whole(["A film."]))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/not/there", "does not exist"),
        ("./not", "does not exist"),
        ("~/not", "does not exist"),
        ("a/b/c", "does not exist"),
        ("a/b/c/d.gguf", "does not exist"),
        (r"C:\models\gpt2", "is a path of Windows, where this is none"),
        ("C:/models/gpt2", "is a path of Windows, where this is none"),
        (r"models\gpt2", "is a path of Windows, where this is none"),
        ("a b", "is no folder, and no name that the hub can have"),
        ("gpt2/", "is no folder, and no name that the hub can have"),
        ("https://huggingface.co", "does not exist"),
        (__file__, "is a file"),
        ("gpt2", None),
        ("Qwen/Qwen3-0.6B", None),
        ("a/b/c.gguf", None),
        (str(Path(__file__).parent), None),
    ],
)
def test_names_that_are_no_models(name, problem):
    assert not_a_model(name) == problem
    if problem:
        for kind in (CausalLMWithValueHead.from_pretrained, ClassifierScorer):
            with pytest.raises(FileNotFoundError, match=problem):
                kind(name)


def test_the_folder_beside_a_name_that_is_not_there_is_named(tmp_path):
    (tmp_path / "smollm2").mkdir()
    told = not_a_model(str(tmp_path / "smolm2"))
    assert told == f"does not exist (is it {tmp_path / 'smollm2'}?)"
