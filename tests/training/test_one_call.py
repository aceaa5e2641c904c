"""`trl.train` in a folder: measured, watched, stopped, gone on with."""

import io
import itertools
import json
import math
import os
import re
import signal
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

import trl
from tests.families import tiny_model
from tests.training.runs import assert_same_run, lines, make_parts
from tests.training.test_loop import count_w7, tokenizer
from trl import config as settings
from trl.config import SettingsError
from trl.config.recipe import Recipe
from trl.evaluation import ScoringError
from trl.report import compare, read_runs, write_report
from trl.training import run
from trl.training.checkpoints import CheckpointError

PROMPTS = [f"w{a} w{b}" for a in range(1, 8) for b in range(9, 14)]
SMALL = {
    "steps": 6,
    "held_out": ["w1 w2", "w4 w5", "w6"],
    "eval_every": 2,
    "checkpoint_every": 2,
    "max_new_tokens": (2, 5),
    "batch_size": 8,
    "minibatch_size": 4,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "ppo_epochs": 1,
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Pictures take seconds, and have tests of their own."""
    monkeypatch.setattr(run, "write_report", lambda runs, out: out / "report.html")


def train_small(out, reward=count_w7, **changes):
    model = changes.pop("model", None) or tiny_model("llama")
    given = {"prompts": PROMPTS, "tokenizer": tokenizer()} | SMALL | changes
    return trl.train(model, reward=reward, out=out, **given)


train = train_small


def untimed(history):
    timed = ("time/", "tokens_per_second")
    rows = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in history]
    return json.dumps(rows)  # where NaN equals NaN


def stopping(call=0, how=None):
    """A reward that does something in its n-th call."""
    calls = []

    def count_w7(texts):
        calls.append(texts)
        if len(calls) == call:
            how()
        return [float(text.split().count("w7")) for text in texts]

    return count_w7


def test_held_out_prompts_are_measured_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [tiny_model("llama") for _ in range(2)]
    state = torch.get_rng_state()
    seen = []
    plain = train(None, model=models[0], held_out=None, steps=3)
    _, history = train(
        None, model=models[1], steps=3, on_step=lambda step, row: seen.append((step, row))
    )
    assert torch.equal(state, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    measured = [row["step"] for row in history if "held_out/reward/mean" in row]
    assert measured == [0, 2, 3]
    assert "held_out/reward/count_w7" in history[0]
    assert seen == [(1, history[1]), (2, history[2]), (3, history[3])]
    # Measuring changes nothing.
    own = [{k: v for k, v in row.items() if "held_out" not in k} for row in history[1:]]
    assert untimed(own) == untimed(plain.history)


def test_a_folder_is_that_of_a_run(tmp_path):
    out = tmp_path / "run"
    model, history = train(out)
    free, _ = train(None)  # the folder changes nothing
    assert all(map(torch.equal, model.parameters(), free.parameters()))
    (read,) = read_runs([out])
    assert read.notes == []
    assert read.finished
    assert (read.model, read.algorithm, read.last_step) == ("LlamaForCausalLM", "ppo", 6)
    assert read.after["reward/mean"] == history[-1]["held_out/reward/mean"]
    assert [len(samples) for samples in read.samples.values()] == [3] * 4
    assert [row["step"] for row in read.metrics] == [row["step"] for row in history]
    assert read.recipe["ppo.learning_rate"] == 1e-2
    assert read.recipe["reward.0.name"] == "tests.training.test_loop:count_w7"
    assert read.recipe["data.prompts"] == "35 prompts given in Python"
    assert (read.recipe["sampling.shortest_limit"], read.recipe["sampling.max_new_tokens"]) == (
        2,
        5,
    )
    recipe = settings.build(Recipe, settings.read_yaml(out / "recipe.yaml"))
    assert recipe.ppo == settings.PPOConfig.that_learns(
        **{name: SMALL[name] for name in list(SMALL)[-5:]}
    )
    assert write_report([out], out).is_file()
    train(tmp_path / "other", learning_rate=1e-3)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(compare([out, tmp_path / "other"]))
    assert re.search(r"ppo.learning_rate\W+0.01\W+0.001", console.export_text())
    loaded = trl.CausalLMWithValueHead.from_pretrained(out / "policy").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_the_result_has_the_last_samples_and_each_step_leaves_some(tmp_path):
    out = tmp_path / "run"
    measured = train(out, steps=2)
    assert [sample["prompt"] for sample in measured.samples] == SMALL["held_out"]
    assert measured.report == out / "report.html"
    rows = lines(out / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4
    assert rows[4]["reward"] == lines(out / "scores.jsonl")[1]["scores"][0]
    assert {"prompt", "response", "reward", "length", "ended"} <= rows[0].keys()
    plain = train(None, steps=1, held_out=None)
    assert plain.report is None
    assert len(plain.samples) == SMALL["batch_size"]
    texts = [f"{sample['prompt']} {sample['response']}" for sample in plain.samples]
    assert [sample["reward"] for sample in plain.samples] == [x.split().count("w7") for x in texts]


def test_several_rewards_are_added_up(tmp_path):
    def short(responses):
        return [-float(len(text)) for text in responses]

    _, history = train(tmp_path / "run", [count_w7, (short, 0.1)], steps=1)
    row = history[-1]
    parts = row["reward/count_w7"] + 0.1 * row["reward/short"]
    assert row["reward/mean"] == pytest.approx(parts)


def test_a_failure_of_the_first_step_says_that_nothing_is_saved_and_how_to_start_anew(tmp_path):
    def fails(texts):
        raise RuntimeError("once")

    short = {"steps": 1, "held_out": None}
    with pytest.raises(ScoringError, match="once") as caught:
        train(tmp_path, fails, **short)
    (note,) = caught.value.__notes__
    told = "Nothing is saved, as no step is made: mend it, and start from the beginning with: "
    assert note == told + 'the same call with resume="auto"'
    assert train(tmp_path, resume="auto", **short).history[-1]["reward/mean"]  # as it says


def test_the_optimizers_state_is_dropped_at_the_end_unless_it_is_to_be_kept(tmp_path):
    states = {}
    for keep in (False, True):
        out = tmp_path / str(keep)
        model, history = train(out, keep_optimizer=keep, decay_learning_rate=False)
        found = sorted(out.glob("checkpoints/*/state.pt"))
        states[keep] = [path.stat().st_size for path in found]
        finished = train(out, resume="auto", decay_learning_rate=False)  # no step is left
        assert untimed(finished.history) == untimed(history)
        weights = model.parameters(), finished.model.parameters()
        assert all(map(torch.equal, *weights))
    assert len(states[True]) == 2
    assert len(states[False]) == 1
    assert states[False][0] < 0.5 * states[True][0]
    more = {"resume": "auto", "decay_learning_rate": False, "steps": 7}
    with pytest.raises(CheckpointError, match="without the state of the optimiser.*policy"):
        train(tmp_path / "False", **more)
    assert len(train(tmp_path / "True", **more).history) == 8


def test_prompts_of_tokens_without_a_tokenizer(tmp_path):
    prompts = [torch.tensor([n]) for n in range(3, 9)]
    changes = {"steps": 2, "max_new_tokens": 3, "batch_size": 4, "precision": "fp32"}
    _, history = trl.train(
        tiny_model("llama"), prompts, lambda rollout: [0.5] * 4, out=tmp_path / "run", **changes
    )
    assert len(history) == 2
    assert (tmp_path / "run" / "policy" / "config.json").is_file()
    again = trl.train(
        tiny_model("llama"),
        prompts,
        lambda rollout: [0.5] * 4,
        out=tmp_path / "run",
        resume="auto",
        **changes,
    )
    assert untimed(again.history) == untimed(history)
    with pytest.raises(ValueError, match="`tokenizer` must be given"):
        trl.train(tiny_model("llama"), prompts, count_w7, held_out=prompts[:2], **changes)


@pytest.mark.parametrize("how", ["crash", "Ctrl-C", "crash of a stream"])
def test_what_was_stopped_goes_on_bit_for_bit(tmp_path, how):
    how, _, is_stream = how.partition(" of ")
    # The stream ends, and begins anew, in the step that fails.
    stream = {"prompts": lambda: iter(PROMPTS), "shuffle_buffer": 9, "held_out": 3}
    train = partial(train_small, **(stream if is_stream else {}))
    whole = train(tmp_path / "whole", stopping())

    def stop():
        if how == "crash":
            raise MemoryError
        os.kill(os.getpid(), signal.SIGINT)

    error, call = {
        "crash": (ScoringError, 8),  # in step 5, after the evaluations of steps 0, 2 and 4
        "Ctrl-C": (KeyboardInterrupt, 6),  # in step 4, which is finished first
    }[how]
    with pytest.raises(error) as caught:
        train(tmp_path / "part", stopping(call, stop))
    assert [row["step"] for row in caught.value.trained.history] == [0, 1, 2, 3, 4]
    (read,) = read_runs([tmp_path / "part"])
    assert not read.finished
    assert read.last_step == 4
    seen = []
    model, history = train(
        tmp_path / "part", stopping(), resume="auto", on_step=lambda step, row: seen.append(step)
    )
    assert seen == [5, 6]
    assert untimed(history) == untimed(whole.history)
    assert all(map(torch.equal, model.parameters(), whole.model.parameters()))
    for name in ("whole", "part"):
        file = tmp_path / name / "recipe.yaml"
        file.write_text(file.read_text().replace(f"{name}", "run"))
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_streams_without_a_folder_and_what_is_refused(tmp_path):
    """A source without end is never listed."""
    endless = {"prompts": (f"w{n % 7} w{n % 50}" for n in itertools.count()), "steps": 1}
    _, history = train(None, **endless, held_out=4)
    assert [row["step"] for row in history] == [0, 1]
    with pytest.raises(TypeError, match="`prompts` must be a list, or a function.*an iterator"):
        train(tmp_path / "run", **endless)
    with pytest.raises(TypeError, match="`prompts` must be a list, or a function.*an iterator"):
        train(tmp_path / "run", prompts=iter(PROMPTS))
    with pytest.raises(TypeError, match="`held_out` must be a list of prompts, or a number"):
        train(None, held_out=map(str, itertools.count()))
    with pytest.raises(ValueError, match="`held_out` must be less than the 35 prompts, got 35"):
        train(None, held_out=35)
    with pytest.raises(ValueError, match="`shuffle_buffer` must be an integer > 0"):
        train(None, shuffle_buffer=0)
    assert not (tmp_path / "run").exists()
    model, history = train(None, prompts=iter(PROMPTS), steps=1, held_out=3)
    again, rows = train(None, prompts=PROMPTS[3:], steps=1, held_out=PROMPTS[:3])
    assert untimed(history) == untimed(rows)  # of a few, all are there
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_run_is_kept_from_others(tmp_path):
    out = tmp_path / "run"
    model, _ = train(out)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="resume='auto'"):
        train(out)
    with pytest.raises(SettingsError, match=r"`ppo.learning_rate` must be as in the run so far"):
        train(out, resume="auto", learning_rate=1e-3)
    with pytest.raises(CheckpointError, match="of a run on other prompts"):
        train(out, resume="auto", held_out=["w1 w2", "w4 w5", "w7"])
    with pytest.raises(CheckpointError, match="of a run with another reference.*load the model"):
        train(out, resume="auto", model=model.language_model)
    with pytest.raises(ValueError, match="`resume` must be None without `out`, got 'auto'"):
        train(None, resume="auto")
    with pytest.raises(ValueError, match="`eval_every`"):
        train(None, eval_every=0)
    with pytest.raises(ValueError, match="`held_out` must have at least one entry, got none"):
        train(None, held_out=[])
    assert (out / "metrics.jsonl").read_bytes() == before


def test_on_step_ends_a_run_that_may_go_on(tmp_path):
    _, history = train(tmp_path / "run", on_step=lambda step, row: step == 3)
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["reason"]) == (3, "`on_step` ended it")
    # Step 3 was not due for an evaluation; as the last one it gets it.
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert summary["after"] == {k: v for k, v in last.items() if k.startswith("held_out/")}
    assert summary["after"]["held_out/kl"] != summary["before"]["held_out/kl"]
    model, history = train(tmp_path / "run", resume="auto")
    assert [row["step"] for row in history] == list(range(7))
    whole = train(tmp_path / "whole")
    assert all(map(torch.equal, model.parameters(), whole.model.parameters()))


def test_what_looks_wrong_is_warned_of_once(tmp_path):
    def one_for_all(texts):
        return [1.0] * len(texts)

    with pytest.warns(UserWarning, match="trl.train, step 3: All responses") as caught:
        train(tmp_path / "run", one_for_all, steps=5, learning_rate=1e-5)
    (found,) = [each for each in caught if "step 3: All responses" in str(each.message)]
    assert found.filename == __file__
    rows = lines(tmp_path / "run" / "warnings.jsonl")
    assert [row["name"] for row in rows].count("constant_score") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(None, steps=2, learning_rate=1e-5)


def test_figures_that_are_not_measured_come_back_as_nan(tmp_path):
    changes = {"ref_model": "none", "init_kl_coef": 0.0, "adaptive_kl": False, "steps": 2}
    whole = train(tmp_path / "run", **changes)
    again = train(tmp_path / "run", resume="auto", **changes)
    assert math.isnan(again.history[0]["held_out/kl"])
    assert untimed(again.history) == untimed(whole.history)


def test_an_adapter_that_the_kl_is_measured_against_must_be_the_same(tmp_path):
    def trained(number):
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model("llama"), config)
        for name, weight in model.named_parameters():
            weight.data.fill_(number) if "lora_B" in name else None
        return model

    changes = {"held_out": None, "steps": 2, "learning_rate": 1e-3}
    torch.manual_seed(0)
    train(tmp_path / "run", model=trained(0.5), **changes)
    torch.manual_seed(0)
    assert len(train(tmp_path / "run", model=trained(0.5), resume="auto", **changes).history) == 2
    torch.manual_seed(0)
    with pytest.raises(CheckpointError, match="of a run with another reference"):
        train(tmp_path / "run", model=trained(0.25), resume="auto", **changes)


def test_an_adapter_and_a_model_by_name(tmp_path):
    make_parts(tmp_path)
    changes = {
        "model": tmp_path / "model",
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "tokenizer": None,
        "steps": 4,
    }
    whole = train(tmp_path / "whole", stopping(), **changes)

    def stop():
        raise MemoryError

    with pytest.raises(ScoringError, match="MemoryError"):
        train(tmp_path / "part", stopping(6, stop), **changes)
    again = train(tmp_path / "part", stopping(), resume="auto", **changes)
    assert untimed(again.history) == untimed(whole.history)
    (read,) = read_runs([tmp_path / "part"])
    assert read.model == str(tmp_path / "model")


def test_held_out_prompts_that_are_trained_on_are_told(capsys):
    def told(prompts, held_out):
        with pytest.raises(OSError, match="no/such"):
            trl.train("no/such-model", prompts, len, held_out=held_out)
        return [line for line in capsys.readouterr().err.splitlines() if "trained on too" in line]

    rows = [{"prompt": f"w{n % 3}", "answer": n % 3} for n in range(9)]
    assert told(rows, 2) == [
        "trl.train: 2 of the 2 held-out prompts are trained on too: leave these out, to measure on "
        "new ones."
    ]
    assert told(["w1", "w2", "w3"], ["w3", "w4"])[0].startswith("trl.train: 1 of the 2 held-out")
    assert told(["w1", "w2", "w3"], 1) == told(["w1", "w2"], None) == []
    assert told([{"prompt": "w1", "answer": n} for n in range(9)], 2) == []  # other tasks
