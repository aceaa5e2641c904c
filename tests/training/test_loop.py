"""`trl.train` and the loop under it."""

import copy
import math

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Adafactor, AutoTokenizer, PreTrainedTokenizerFast

import trl
from tests.families import tiny_model
from tests.llama2c import load_model, load_tokenizer
from trl.config import PPOConfig
from trl.evaluation import ScoringError
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.scored import Scored
from trl.training.loop import Loop, of_all_processes

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
        steps=12,
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
    assert [row["step"] for row in history] == list(range(1, 13))
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


def test_a_loop_takes_a_function_of_texts():
    trainer = PPOTrainer(trl.CausalLMWithValueHead(tiny_model("llama")), config=PPOConfig(**SMALL))
    loop = Loop(
        trainer, Sampler(tokenizer(), max_new_tokens=2), lambda texts: [3.0] * len(texts), ["w5"]
    )
    assert loop.step()["reward/mean"] == 3


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
        ({"steps": 0}, ValueError, "`steps` must be an integer > 0 or None, got 0"),
        ({"prompts": []}, ValueError, "`prompts` must have at least one entry"),
        ({"reward": "distilbert"}, TypeError, "`reward` must be a scorer or a function"),
        ({"tokenizer": None}, ValueError, "`tokenizer` must be given"),
        ({"config": PPOConfig()}, TypeError, "in `config` or as keyword arguments, not both"),
        ({"lerning_rate": 1.0}, TypeError, "Did you mean `learning_rate`"),
        ({"num_steps": 3}, TypeError, r"no parameter `num_steps`. Did you mean `steps`\?"),
        ({"batchsize": 3, "verbose": 1}, TypeError, r"`batch_size`\? train has .* `verbose`\.$"),
        ({"group_size": 4}, TypeError, r"Pass it as sampler_kwargs=\{'group_size': \.\.\.\}"),
        (
            {"algorithm": "grpo", "sampler_kwargs": {"group_size": 1}},
            ValueError,
            "`group_size` must be > 1 with algorithm='grpo'",
        ),
        ({"reward": lambda *, texts: [0.0]}, TypeError, "it gets one list of texts"),
        ({"sampler_kwargs": {"group_size": 3}}, ValueError, "`batch_size` must be a multiple"),
        ({"sampler_kwargs": {"temperature": 0.5}}, ValueError, "the same for sampler and trainer"),
    ],
)
def test_bad_settings_are_named_before_anything_is_trained(changes, error, message):
    settings = {"prompts": ["w5"], "reward": count_w7, "tokenizer": tokenizer(), "steps": 1}
    with pytest.raises(error, match=message):
        trl.train(tiny_model("llama"), **SMALL | settings | changes)


@pytest.mark.slow
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
        steps=16,
        tokenizer=words,
        max_new_tokens=16,
        sampler_kwargs={"add_bos": True},
        batch_size=64,
    )
    first = sum(row["reward/mean"] for row in history[:3]) / 3
    last = sum(row["reward/mean"] for row in history[-3:]) / 3
    assert last > first + 0.25
    assert 0 < history[-1]["objective/kl"] < 15


def test_an_optimiser_without_a_rate_of_its_own_is_let_be():
    """Adafactor with lr=None finds its steps by itself; a schedule has nothing to scale."""
    model = trl.CausalLMWithValueHead(tiny_model("llama"))
    optimizer = Adafactor(model.parameters(), lr=None)
    trainer = PPOTrainer(model, optimizer=optimizer, **SMALL)
    loop = Loop(
        trainer,
        Sampler(tokenizer(), max_new_tokens=4),
        trl.as_scorer(count_w7),
        ["w5 w6", "w3"] * 4,
        schedule=lambda step: 0.5,
    )
    assert math.isnan(loop.step()["learning_rate"])
    assert trainer.optimizer.param_groups[0]["lr"] is None


# --- before anything is trained ------------------------------------------------------------------


@pytest.mark.parametrize("prompts", ["w5 w6", b"w5", {"role": "user"}, None, 3])
def test_prompts_that_are_no_list_are_named(prompts):
    with pytest.raises(TypeError, match=r"`prompts` must be a list.*pass \[prompt\]"):
        trl.train(tiny_model("llama"), prompts, count_w7, tokenizer=tokenizer(), **SMALL)
    with pytest.raises(TypeError, match=r"`prompts` must be a list.*pass \[prompt\]"):
        Loop(llama_trainer(), Sampler(tokenizer()), count_w7, prompts)


def test_any_iterable_of_prompts_will_do():
    prompts = (f"w{n}" for n in (5, 6))
    assert Loop(llama_trainer(), Sampler(tokenizer()), count_w7, prompts).prompts == ["w5", "w6"]


def llama_trainer(**settings):
    model = trl.CausalLMWithValueHead(tiny_model("llama"))
    return PPOTrainer(model, config=PPOConfig(**SMALL | settings))


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, r"`prompts\[40\]` must have at least one token, got ''"),
        ("w5 " * 60, ValueError, r"got 60 \+ 24 tokens in row 40 of `prompts`"),
        (
            7,
            TypeError,
            r"`prompts\[40\]` must be of the same kind .*, str, got int",
        ),
    ],
)
def test_a_bad_prompt_is_found_before_the_training(prompt, error, message):
    steps = []
    with pytest.raises(error, match=message):
        trl.train(
            tiny_model("llama"),
            ["w5"] * 40 + [prompt],
            count_w7,
            tokenizer=tokenizer(),
            on_step=lambda *row: steps.append(row),
            sampler_kwargs={"add_bos": False},
            **SMALL,
        )
    assert steps == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"on_step": 3}, TypeError, "`on_step` must be a function"),
        ({"sampler_kwargs": {"max_new_tokens": 3}}, TypeError, "must not have `max_new_tokens`"),
        ({"sampler_kwargs": {"grup_size": 3}}, TypeError, "`grup_size`. Did you mean `group_size`"),
        ({"sampler_kwargs": [3]}, TypeError, "`sampler_kwargs` must be a dict or None"),
        ({"sampler_kwargs": {"seed": None}}, ValueError, "`seed` must be an integer"),
    ],
)
def test_more_bad_settings(changes, error, message):
    settings = {"prompts": ["w5"], "reward": count_w7, "tokenizer": tokenizer(), "steps": 1}
    with pytest.raises(error, match=message):
        trl.train(tiny_model("llama"), **SMALL | settings | changes)


def test_weights_that_an_earlier_run_has_frozen_are_counted():
    plain = tiny_model("llama")
    settings = {"steps": 1, "tokenizer": tokenizer(), "max_new_tokens": 2} | SMALL
    trl.train(plain, ["w5"], count_w7, unfrozen_layers=1, **settings)
    frozen = sum(not weight.requires_grad for weight in plain.parameters())
    total = len(list(plain.parameters()))
    assert 0 < frozen < total
    with pytest.warns(UserWarning, match=f"but {frozen} of its {total} weights do not .*unfrozen"):
        trl.train(plain, ["w5"], count_w7, **settings)
    trl.train(plain, ["w5"], count_w7, unfrozen_layers=1, **settings)  # says why: no warning


# --- steps that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_ends_the_training_early_carries_what_there_is(kind):
    calls = []

    def reward(texts):
        calls.append(texts)
        if len(calls) == 3:
            raise kind
        return [0.0] * len(texts)

    plain = tiny_model("llama")
    settings = {"steps": 5, "tokenizer": tokenizer(), "max_new_tokens": 2} | SMALL
    with pytest.raises(ScoringError if kind is ValueError else kind) as caught:
        trl.train(plain, ["w5"], reward, **settings)
    model, history = caught.value.trained
    assert model.language_model is plain
    assert [row["step"] for row in history] == [1, 2]

    def interrupt(step, row):
        raise kind

    with pytest.raises(kind) as caught:
        trl.train(tiny_model("llama"), ["w5"], count_w7, on_step=interrupt, **settings)
    assert len(caught.value.trained.history) == 1


def test_a_step_that_failed_can_be_repeated():
    def run(fail_at):
        calls, seen = [], []

        def scorer(rollout):
            calls.append(rollout)
            if len(calls) in fail_at:
                raise OSError("the server is away")
            seen.append((rollout.query_lists(), rollout.response_lists()))
            return rollout.response_mask.sum(1)

        prompts = [torch.tensor([n]) for n in range(3, 15)]
        loop = Loop(llama_trainer(), Sampler(max_new_tokens=(1, 4)), scorer, prompts)
        rows = []
        while len(rows) < 4:
            try:
                rows.append(loop.step())
            except ScoringError:
                continue
        weights = [weight.clone() for weight in loop.trainer.model.parameters()]
        return seen, weights, [row["ppo/loss/total"] for row in rows]

    whole, interrupted = run(()), run((1, 3, 4))
    assert whole[0] == interrupted[0]
    assert whole[2] == interrupted[2]
    assert all(map(torch.equal, whole[1], interrupted[1]))


def test_a_step_that_failed_draws_the_same_texts_again():
    class Texts:
        turn = 0

        def __call__(self, rows):
            self.turn += 1
            return [torch.tensor([3, 4 + self.turn % 20])] * rows

        def state_dict(self):
            return {"turn": self.turn}

        def load_state_dict(self, state):
            self.turn = state["turn"]

    class Once(Exception):
        pass

    def run(fails):
        trainer = llama_trainer(pretraining_coef=1.0)
        trainer.pretraining = Texts()
        prompts = [torch.tensor([n]) for n in range(3, 15)]
        loop = Loop(trainer, Sampler(max_new_tokens=3), each_length, prompts)
        if fails:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trainer.updater, "backward", fail)
                with pytest.raises(Once):
                    loop.step()
        loop.step()
        return [weight.clone() for weight in trainer.model.parameters()]

    def each_length(rollout):
        return rollout.response_mask.sum(1)

    def fail(*_):
        raise Once

    assert all(map(torch.equal, run(False), run(True)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("order", [99]),
        ("order", [-1]),
        ("order", None),
        ("steps_done", "many"),
        ("sampler_calls", -3),
    ],
)
def test_the_state_of_another_loop_is_refused(name, value):
    prompts = [torch.tensor([n]) for n in range(3, 15)]
    loop = Loop(llama_trainer(), Sampler(), lambda rollout: [0.0] * len(rollout), prompts)
    before = loop.state_dict()
    for state in (before | {name: value}, {}):
        with pytest.raises(ValueError, match="`state` must be what `state_dict` returned for 12"):
            loop.load_state_dict(state)
        assert str(loop.state_dict()) == str(before)
    loop.load_state_dict(before)


def test_only_a_weighted_sum_adds_the_means_of_its_parts():
    class Mine:
        means = "of no concern"

        def __call__(self, rollout):
            return rollout.response_mask.sum(1)

    prompts = [torch.tensor([3])]
    row = Loop(llama_trainer(), Sampler(max_new_tokens=2), Mine(), prompts).step()
    assert [name for name in row if name.startswith("reward/")] == ["reward/mean", "reward/std"]
    parts = trl.WeightedSum([(Mine(), 1.0)])
    assert "reward/Mine" in Loop(llama_trainer(), Sampler(), parts, prompts).step()


def test_a_figure_over_several_processes_is_the_mean_of_all_rows_that_have_it(monkeypatch):
    none, names = float("nan"), ("sure", "seldom")
    columns = [(1.0, 1.0, 1.0), (1.0, none, none)], [(3.0, none, none), (none, none, none)]
    each = [
        Scored(torch.zeros(3), dict(zip(names, map(torch.tensor, rows), strict=True)))
        for rows in columns
    ]
    monkeypatch.setattr("trl.training.loop.gather_object", lambda own: [*own, each[1]])
    assert of_all_processes(each[0]).means() == {"sure": 1.5, "seldom": 1.0}


# --- what is loaded ------------------------------------------------------------------------------


def test_the_seed_fixes_an_adapters_first_weights():
    def first(seed, state):
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        model, _ = trl.train(
            tiny,
            ["w5"],
            count_w7,
            steps=1,
            tokenizer=tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            max_new_tokens=2,
            seed=seed,
            **SMALL,
        )
        assert torch.equal(before, torch.random.get_rng_state())  # the caller's own goes on
        named = model.named_parameters()
        return torch.cat([weight.flatten() for name, weight in named if "lora_A" in name])

    def fresh():
        return tiny_model("llama")

    tiny = fresh()
    one = first(0, 1)
    tiny = fresh()
    assert torch.equal(first(0, 2), one)
    tiny = fresh()
    assert not torch.equal(first(1, 1), one)


def test_an_adapters_folder_takes_the_tokenizer_of_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model("llama").save_pretrained(base)
    tokenizer().save_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = {"steps": 1, "max_new_tokens": 2} | SMALL
    model, _ = trl.train(base, ["w5"], count_w7, peft_config=config, **settings)
    model.save_pretrained(adapter)
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer_config.json").unlink()
    _, history = trl.train(adapter, ["w5"], count_w7, **settings)
    assert len(history) == 1


def test_where_the_model_is_is_where_its_tokenizer_is(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "inner")
    tokenizer().save_pretrained(tmp_path / "inner")
    settings = {"steps": 1, "max_new_tokens": 2, "model_kwargs": {"subfolder": "inner"}} | SMALL
    _, history = trl.train(tmp_path, ["w5"], count_w7, **settings)
    assert len(history) == 1


# --- what a new user relies on -------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_the_tokenizer_is_saved_beside_the_model(again, tmp_path):
    settings = {"steps": 1, "tokenizer": tokenizer(), "max_new_tokens": 2} | SMALL
    model, _ = trl.train(tiny_model("llama"), ["w5"], count_w7, **settings)
    if again:  # a policy that was trained before, and a copy of it
        model, _ = trl.train(copy.deepcopy(model), ["w5"], count_w7, **settings)
    next(model.parameters()).data.fill_(0.5)
    model.save_pretrained(tmp_path / "tuned")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert loaded("w5 w7")["input_ids"] == tokenizer()("w5 w7")["input_ids"] != []
    weights = trl.CausalLMWithValueHead.from_pretrained(tmp_path / "tuned").state_dict()
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())


def test_texts_begin_with_bos_as_in_recipes():
    def first_tokens(tokenizer, **sampler_kwargs):
        seen = []

        def scorer(rollout):
            seen.extend(rollout.query_lists())
            return [0.0] * len(rollout)

        settings = {"steps": 1, "max_new_tokens": 2, "sampler_kwargs": sampler_kwargs} | SMALL
        trl.train(tiny_model("llama"), ["w5"], scorer, tokenizer=tokenizer, **settings)
        return seen[0]

    w5 = tokenizer().convert_tokens_to_ids("w5")
    assert first_tokens(tokenizer()) == [tokenizer().bos_token_id, w5]
    assert first_tokens(tokenizer(), add_bos=False) == [w5]
    without = tokenizer()
    without.bos_token = None
    assert first_tokens(without) == [w5]


@pytest.mark.parametrize(
    ("more", "lines"), [({}, 1), ({"quiet": True}, 0), ({"on_step": lambda step, row: None}, 0)]
)
def test_what_training_shows_in_a_log(tmp_path, capfd, more, lines):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    trl.train(tmp_path, ["w5"], count_w7, steps=1, max_new_tokens=2, **SMALL, **more)
    shown, told = capfd.readouterr()
    assert told == ""
    assert shown.count("\n") == lines
    assert shown.startswith("step 1/1 · reward") is bool(lines)
