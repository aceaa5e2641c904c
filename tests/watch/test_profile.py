"""The profile of a run: its figures, its files, its trace, and the count of its work."""

import contextlib
import gzip
import json
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import trl
import trl.ppo
from tests.conftest import ragged
from tests.families import tiny_model
from tests.models.policies import lora_config
from tests.training.runs import make_parts, tiny_recipe
from trl.batch import Rollout
from trl.config import PPOConfig
from trl.models.with_value_head import CausalLMWithValueHead
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.training.loop import Loop
from trl.training.run import run_recipe
from trl.watch import profile as module
from trl.watch.profile import (
    PHASES,
    Tokens,
    Weights,
    backward_flops,
    count_weights,
    forward_flops,
    iteration_flops,
    measure_peak,
    profile_markdown,
)

SMALL = {"batch_size": 8, "minibatch_size": 4, "precision": "fp32", "ppo_epochs": 1}
CPU = torch.device("cpu")


def prompts():
    return ragged([2, 4, 3, 5], vocabulary=61)


def reward(rollout):
    return torch.linspace(-1, 1, len(rollout))


def make_loop(profile=None, policy=None, **settings):
    trainer = PPOTrainer(
        policy or CausalLMWithValueHead(tiny_model("llama")), config=PPOConfig(**SMALL | settings)
    )
    return Loop(trainer, Sampler(max_new_tokens=5), reward, prompts() * 4, profile=profile)


def read(folder):
    return json.loads((folder / "profile.json").read_text())


@pytest.fixture
def instant_peak(monkeypatch):
    monkeypatch.setattr(module, "measure_peak", lambda device, dtype: 1e12)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The folder of four steps, their loop, and the two files as they were after each."""
    folder, files = tmp_path_factory.mktemp("profile"), []
    loop = make_loop(folder)
    for _ in range(4):
        loop.step()
        files.append((read(folder), (folder / "profile.md").read_text()))
    return folder, loop, files


# -- figures ---------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Let time stand still but in the parts of a loop's step: each takes the seconds given."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def script(owner, name, seconds):
        original = getattr(owner, name)

        def slowed(*args, **kwargs):
            now[0] += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, slowed)

    def apply(loop):
        trainer = loop.trainer
        script(loop.sampler, "_encode", 1)
        script(loop, "scorer", 2)
        script(trainer, "before_update", 4)
        script(trainer, "reference_logprobs", 8)
        script(trainer, "loss", 16)
        script(trainer.accelerator, "backward", 32)
        script(trainer, "_apply", 64)
        script(trl.ppo, "step_statistics", 128)

    return apply


# Of a step: two updates of one pass each.
SECONDS = {
    "generation": 1,
    "scorer": 2,
    "policy": 4,
    "reference": 8,
    "forward": 32,
    "backward": 64,
    "optimizer": 128,
    "other": 128,
}


def test_phases_add_up_to_the_steps_after_those_traced(
    tmp_path, instant_peak, monkeypatch, scripted
):
    monkeypatch.setattr(torch.profiler, "profile", contextlib.nullcontext)
    loop = make_loop(tmp_path)
    scripted(loop)
    for _ in range(5):
        loop.step()
    found = read(tmp_path)
    total = sum(SECONDS.values())
    assert (found["steps"], found["kind"], found["seconds"]) == (2, "timed", 2 * total)
    assert {name: phase["seconds"] for name, phase in found["phases"].items()} == {
        name: 2 * seconds for name, seconds in SECONDS.items()
    }
    assert found["phases"]["scorer"]["share"] == pytest.approx(2 / total)
    assert found["tokens_per_second"] == pytest.approx(8 * 5 / total)
    assert found["precision"] == "fp32"


def test_the_stats_split_the_phases_of_a_step(scripted):
    loop = make_loop()
    scripted(loop)
    row = loop.step()
    times = {name: seconds for name, seconds in row.items() if name.startswith("time/")}
    parts = {name: SECONDS[name] for name in ("policy", "reference", "forward", "backward")}
    laps = {"forward_pass": 12, "compute_rewards": 0, "optimize_step": 224, "calc_stats": 128}
    ppo = parts | laps | {"optimizer": 128, "total": 364}
    whole = {"time/rollout": 1, "time/evaluation": 2, "time/optimisation": 364}
    assert times == {f"time/ppo/{name}": seconds for name, seconds in ppo.items()} | whole
    assert row["tokens_per_second"] == pytest.approx(40 / 367)
    assert row["tokens_per_second/rollout"] == pytest.approx(40)
    assert row["tokens_per_second/optimisation"] == pytest.approx(40 / 364)


def test_a_run_too_short_says_so(four_steps):
    _, _, files = four_steps
    found = [(figures["kind"], figures["steps"]) for figures, _ in files]
    assert found == [("warm-up", 1), ("traced", 1), ("traced", 2), ("timed", 1)]
    assert ["run four or more" in table for _, table in files] == [True, True, True, False]


def test_the_trace_is_of_two_steps_and_names_the_phases(four_steps):
    folder, _, _ = four_steps
    assert sorted(path.name for path in folder.iterdir()) == [
        "profile.json",
        "profile.md",
        "trace-step-2.json.gz",
        "trace-step-3.json.gz",
    ]
    with gzip.open(folder / "trace-step-3.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    counts = {name: names.count(f"trl: {label}") for name, label in PHASES.items()}
    once = dict.fromkeys(PHASES, 1)
    assert counts == once | {"forward": 2, "backward": 2, "optimizer": 2, "other": 0}
    assert "aten::mm" in names
    assert (folder / "trace-step-3.json.gz").stat().st_size < 2**20


def test_a_failed_step_is_not_counted_and_the_next_one_is(tmp_path, instant_peak, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", contextlib.nullcontext)
    loop = make_loop(tmp_path)
    loop.step()
    loop.scorer = lambda rollout: None
    with pytest.raises(trl.evaluation.ScoringError):
        loop.step()
    assert loop.trainer.clock.around is contextlib.nullcontext
    assert read(tmp_path)["kind"] == "warm-up"
    loop.scorer = reward
    loop.step()
    assert read(tmp_path)["kind"] == "traced"


def test_the_same_weights_with_and_without_a_profile(four_steps):
    _, profiled, _ = four_steps
    plain = make_loop()
    for _ in range(4):
        assert "machine_share" not in plain.step()
    first, second = (loop.trainer.model.state_dict() for loop in (profiled, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_profile_nothing_is_labelled_or_measured(monkeypatch):
    def never(*args):
        raise AssertionError

    for name in ("record_function", "measure_peak", "_wait"):
        monkeypatch.setattr(module, name, never)
    make_loop().step()


# -- ways in ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pictures")
def test_train_and_recipes_take_a_folder(tmp_path, instant_peak, capsys):
    _, history = trl.train(
        tiny_model("llama"), prompts(), reward, steps=1, profile=tmp_path / "a", **SMALL
    )
    assert 0 < history[0]["machine_share"] < 1
    assert read(tmp_path / "a")["steps"] == 1
    make_parts(tmp_path)
    profile = tmp_path / "b" / "c"
    recipe = tiny_recipe(tmp_path, tmp_path / "run", steps=1, profile=str(profile))
    run_recipe(replace(recipe, quiet=False))
    assert (profile / "profile.md").exists()
    assert f"Where the time went is in {profile}/" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(TypeError, match="`profile` must be the name of a folder or None, got True"):
        make_loop(True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_loop(tmp_path / "file")


# -- work ------------------------------------------------------------------------------------------


def test_tokens_of_a_rollout_by_hand():
    rollout = Rollout.from_lists(ragged([2, 3]), ragged([1, 4]))
    # Row 0: 2 are read and see 1 + 2. Row 1: 3 + 3 are read and see 1 + … + 6.
    assert Tokens.of(rollout) == Tokens(read=2 + 6, predicted=5, pairs=3 + 21)


def test_a_query_that_rows_share_counts_once():
    rollout = Rollout.from_lists(ragged([3]) * 2, ragged([2, 4]))
    rollout = replace(rollout, group_ids=torch.tensor([7, 7]))
    # The query: 1 + 2 + 3. One more token of row 0 sees 4; three more of row 1 see 4 + 5 + 6.
    assert Tokens.of(rollout) == Tokens(read=3 + 1 + 3, predicted=6, pairs=6 + 4 + 15)


def test_flops_by_hand():
    tokens = Tokens(read=10, predicted=4, pairs=30)
    weights = Weights(
        trained=100,
        passed=20,
        frozen=3,
        head=50,
        head_trained=False,
        attention=8,
        frozen_attention=2,
    )
    assert forward_flops(weights, tokens) == 2 * 123 * 10 + 2 * 50 * 4 + 4 * 10 * 30
    assert backward_flops(weights, tokens) == 2 * 220 * 10 + 2 * 50 * 4 + 8 * 8 * 30
    trained_head = replace(weights, head_trained=True)
    assert backward_flops(trained_head, tokens) - backward_flops(weights, tokens) == 2 * 50 * 4
    whole = Weights(trained=100, head=50, attention=8)
    both = forward_flops(whole, tokens) + backward_flops(whole, tokens)
    assert both == 6 * 100 * 10 + 6 * 50 * 4 + 12 * 8 * 30
    assert backward_flops(Weights(frozen=9, head=5, head_trained=False), tokens) == 0


def test_the_phases_of_an_iteration():
    tokens = Tokens(read=10, predicted=4, pairs=0)
    policy = Weights(trained=100, frozen=1000)
    assert iteration_flops(policy, tokens, epochs=0.5) == {
        "generation": 22000,
        "policy": 0,
        "reference": 0,
        "forward": 11000,
        "backward": 2000,
    }
    shared = iteration_flops(
        policy, tokens, reference=policy.above_trunk(), epochs=4, shared_trunk=True
    )
    assert shared == {
        "generation": 22000,
        "policy": 20000,  # the trunk, once
        "reference": 2000,
        "forward": 8000,
        "backward": 16000,
    }
    scored = iteration_flops(policy, tokens, scored=True, shared_trunk=True)
    assert scored["policy"] == 22000


def small_gpt2():
    config = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**config, attn_implementation="eager"))


def test_weights_are_those_of_the_matrices():
    policy = CausalLMWithValueHead(small_gpt2())
    layer = 12 * 32**2
    whole = Weights(trained=3 * layer, head=97 * 32, attention=3 * 32)
    assert count_weights(policy) == whole
    top = CausalLMWithValueHead.from_pretrained(small_gpt2(), unfrozen_layers=1)
    assert count_weights(top) == Weights(
        trained=layer,
        frozen=2 * layer,
        head=97 * 32,
        head_trained=False,
        attention=32,
        frozen_attention=64,
    )
    top.language_model.transformer.wte.requires_grad_(True)  # below all layers, and the head
    assert count_weights(top) == replace(whole, trained=layer, passed=2 * layer)


def test_weights_under_an_adapter_pass_the_gradient_on():
    policy = CausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=lora_config())
    counted = count_weights(policy)
    trained = [w for n, w in policy.named_parameters() if "lora" in n]
    assert counted.trained == sum(weight.numel() for weight in trained) > 0
    assert counted.passed > counted.trained
    assert counted.frozen == counted.frozen_attention == 0
    assert not counted.head_trained


def test_what_cannot_be_counted_has_no_share(tmp_path, instant_peak):
    assert count_weights(tiny_model("mixtral")) is None  # of whose experts only some run
    loop = make_loop(tmp_path, policy=trl.Seq2SeqLMWithValueHead(tiny_model("t5")))
    assert "machine_share" not in loop.step()
    assert "machine_share" not in read(tmp_path)
    assert "| generation |" in (tmp_path / "profile.md").read_text()


@pytest.mark.parametrize("unfrozen_layers", [None, 1])
def test_the_count_is_what_pytorch_counts(unfrozen_layers):
    """PyTorch multiplies all pairs of tokens, ours are the half that a causal model needs."""
    policy = CausalLMWithValueHead.from_pretrained(small_gpt2(), unfrozen_layers=unfrozen_layers)
    weights, size, length = count_weights(policy), 4, 20
    ids = torch.randint(97, (size, length))
    tokens = Tokens(size * length, size * length, size * length**2)
    with FlopCounterMode(display=False) as forward:
        logits = policy.language_model(ids, use_cache=False).logits
    assert forward.get_total_flops() == forward_flops(weights, tokens)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == backward_flops(weights, tokens)


def test_the_share_is_work_over_time_and_peak(tmp_path, instant_peak):
    loop = make_loop(tmp_path, ppo_epochs=2)
    rollout = Rollout.from_lists(ragged([4] * 8), ragged([5] * 8))
    share = loop.profile.count(rollout, updates=4.0, seconds=0.5)["machine_share"]
    weights, tokens = count_weights(loop.trainer.model), Tokens.of(rollout)
    # Nothing is recorded: generation, policy, reference and two epochs, a backward pass each.
    work = (3 + 2) * forward_flops(weights, tokens) + 2 * backward_flops(weights, tokens)
    assert share == pytest.approx(work / 0.5 / 1e12)
    half = loop.profile.count(rollout, updates=2.0, seconds=0.5)["machine_share"]
    assert share - half == pytest.approx(
        (forward_flops(weights, tokens) + backward_flops(weights, tokens)) / 0.5 / 1e12
    )


def test_the_peak_is_measured_in_little_time():
    started = time.process_time()
    slow, fast = measure_peak(CPU, torch.float64), measure_peak(CPU, torch.float32)
    assert time.process_time() - started < 1.5
    assert 1e8 < slow < fast < 1e14


# -- the table -------------------------------------------------------------------------------------


def test_the_table_of_known_figures():
    summary = {
        "steps": 2,
        "kind": "timed",
        "seconds": 4.0,
        "phases": {
            "generation": {"seconds": 3.0, "share": 0.75, "machine_share": 0.125},
            "other": {"seconds": 1.0, "share": 0.25},
        },
        "tokens_per_second": 1234.0,
        "peak_flops_per_second": 5e10,
        "device": "cpu",
        "threads": 1,
        "precision": "fp32",
        "machine_share": 0.09,
    }
    lines = profile_markdown(summary).splitlines()
    assert lines[2] == "2 steps, 2.000 s each."
    assert lines[3].startswith(
        "1,234 response tokens per second; cpu, fp32, 1 thread(s), at best 50"
    )
    assert lines[7:] == [
        "| generation | 1.5000 | 75.0% | 12.5% |",
        "| waiting and other | 0.5000 | 25.0% |  |",
        "| **all** | 2.0000 | 100.0% | 9.0% |",
    ]
