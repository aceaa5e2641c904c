"""`trl.train` and the loop under it."""

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import trl
from tests.families import tiny_model
from tests.llama2c import load_model, load_tokenizer
from trl.config import PPOConfig
from trl.evaluation import ScoringError
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.training.loop import Loop

SMALL = {"batch_size": 8, "minibatch_size": 8, "precision": "fp32", "ppo_epochs": 1}


def tokenizer():
    words = ["<s>", "</s>", "<pad>"] + [f"w{n}" for n in range(58)]
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def count_w7(texts):
    return [float(text.split().count("w7")) for text in texts]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_one_call_tunes_a_loaded_model_to_please_a_function(family):
    plain = tiny_model(family)
    model, history = trl.train(
        plain,
        ["w3 w4", "w5", "w6 w9 w10"],
        count_w7,
        steps=25,
        tokenizer=tokenizer(),
        max_new_tokens=6,
        batch_size=32,
        minibatch_size=32,
        learning_rate=1e-2,
        init_kl_coef=0.02,
        adaptive_kl=False,
        precision="fp32",
    )
    assert model.language_model is plain
    assert [row["step"] for row in history] == list(range(1, 26))
    first = sum(row["reward/mean"] for row in history[:3]) / 3
    last = sum(row["reward/mean"] for row in history[-3:]) / 3
    assert last > first + 1.0
    assert all(isinstance(value, float) for row in history for value in row.values())


def test_a_folder_an_adapter_and_a_group(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    rows = []
    model, history = trl.train(
        tmp_path,
        ["w3 w4", "w5"],
        count_w7,
        steps=5,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        sampler_kwargs={"group_size": 4},
        on_step=lambda step, row: rows.append(row) or step == 2,
        **SMALL,
    )
    assert rows == history
    assert len(history) == 2  # on_step stopped it
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert all("lora" in name or name.startswith("v_head") for name in trained)


def test_every_prompt_comes_up_once_before_any_comes_again():
    trainer = PPOTrainer(trl.CausalLMWithValueHead(tiny_model("llama")), config=PPOConfig(**SMALL))
    loop = Loop(trainer, Sampler(), lambda rollout: None, [torch.tensor([n]) for n in range(12)])
    seen = [int(p) for _ in range(3) for p in loop._next_prompts()]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


def test_a_failing_reward_names_the_texts_and_changes_nothing():
    plain = tiny_model("llama")
    before = {name: weight.clone() for name, weight in plain.named_parameters()}

    def broken(texts):
        return [float("nan")] + [0.0] * (len(texts) - 1)

    with pytest.raises(ScoringError, match=r"broken must give finite numbers, got nan .*'w5"):
        trl.train(plain, ["w5"], broken, steps=1, tokenizer=tokenizer(), **SMALL)
    assert all(torch.equal(before[name], weight) for name, weight in plain.named_parameters())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "`steps` must be a whole number > 0, got 0"),
        ({"prompts": []}, ValueError, "`prompts` must have at least one entry"),
        ({"reward": "distilbert"}, TypeError, "`reward` must be a scorer or a function"),
        ({"tokenizer": None}, ValueError, "`tokenizer` must be given"),
        ({"config": PPOConfig()}, TypeError, "in `config` or as keyword arguments, not both"),
        ({"lerning_rate": 1.0}, TypeError, "Did you mean `learning_rate`"),
        ({"sampler_kwargs": {"group_size": 3}}, ValueError, "`batch_size` must be a multiple"),
        ({"sampler_kwargs": {"temperature": 0.5}}, ValueError, "the same for sampler and trainer"),
    ],
)
def test_bad_settings_are_named_before_anything_is_trained(changes, error, message):
    settings = {"prompts": ["w5"], "reward": count_w7, "tokenizer": tokenizer(), "steps": 1}
    with pytest.raises(error, match=message):
        trl.train(tiny_model("llama"), **SMALL | settings | changes)


def test_a_pretrained_llama_learns_a_reward(shared):
    """A 260K-parameter model of children's stories writes more of the letter "s"."""
    folder = shared / "data" / "stories260K"
    plain = load_model(folder / "stories260K.bin")
    words = load_tokenizer(folder / "tok512.bin", plain.config.vocab_size)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside"
    tokens = torch.tensor([[1, *words.encode(story)]])
    with torch.no_grad():  # what was converted is a model of stories, not noise
        assert plain(tokens, labels=tokens).loss < 1.5
    assert words.decode(words.encode(story)) == story

    def letters(texts):
        return [text.count("s") / 5 for text in texts]

    prompts = ["Once upon a time", "There was a", "One day, a boy", "The little dog", "She saw a"]
    _, history = trl.train(
        plain,
        prompts,
        letters,
        steps=30,
        tokenizer=words,
        max_new_tokens=16,
        sampler_kwargs={"add_bos": True},
        batch_size=64,
        minibatch_size=64,
        forward_batch_size=None,
        ppo_epochs=2,
        learning_rate=1e-3,
        init_kl_coef=0.05,
        adaptive_kl=False,
    )
    first = sum(row["reward/mean"] for row in history[:3]) / 3
    last = sum(row["reward/mean"] for row in history[-3:]) / 3
    assert last > first + 0.25
    assert 0 < history[-1]["objective/kl"] < 15
