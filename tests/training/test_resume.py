"""A run that is stopped, killed or out of disk goes on as if nothing had happened, bit for bit."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.families import tiny_model
from tests.rows import quick
from tests.training.runs import (
    assert_same_run,
    last_state,
    lines,
    make_parts,
    tiny_recipe,
    without_time,
)
from tests.training.test_classifier_training import tiny_bert
from trl import cli, ppo
from trl import config as settings
from trl.compute.updater import Updater
from trl.config import SettingsError
from trl.config.recipe import (
    CheckpointConfig,
    LoRAConfig,
    ModelConfig,
    PretrainingConfig,
    Recipe,
    RewardConfig,
    SamplingConfig,
    ScheduleConfig,
    StopConfig,
)
from trl.evaluation import ScoringError
from trl.optimization.clock import Clock
from trl.ppo import AdaptiveKLController, PPOTrainer
from trl.report import read_runs
from trl.training import run, undo
from trl.training.checkpoints import MANIFEST, CheckpointError, write_manifest
from trl.training.folder import RunFolder, best_step
from trl.training.held_out import HeldOut
from trl.training.resume import changed_settings, opened, problem_of
from trl.training.run import run_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Pictures take seconds, and have tests of their own."""
    monkeypatch.setattr(run, "write_report", lambda runs, out: out / "report.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_parts(folder)
    return folder


@pytest.fixture
def parts(made, tmp_path):
    """The folder of the parts of runs, this test's own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def whole(made):
    """A run of each variant that was never stopped: one for all tests of the module."""
    runs = {}

    def run_once(variant="plain"):
        if variant not in runs:
            runs[variant] = made.parent / f"{made.name} {variant}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run, "write_report", lambda runs, out: out / "report.html")
                run_recipe(tiny_recipe(made, runs[variant], **variants(made)[variant]))
        return runs[variant]

    return run_once


def variants(parts):
    """Changes of the recipe that give the state of a run another part each."""
    model = ModelConfig(name=str(parts / "model"))
    drawing = f"{parts / 'reward.py'}:drawing"
    stateful = RewardConfig(kind="function", name=f"{parts / 'reward.py'}:counting")
    return {
        "plain": {},
        "moments, adaptive KL, several epochs": {
            "ppo": {"center_scores": True, "scale_scores": True, "ppo_epochs": 2},
            "schedule": ScheduleConfig(kind="cosine", warmup_steps=2),
        },
        "moments, adaptive KL, auto rate": {
            "ppo": {"center_scores": True, "scale_scores": True, "learning_rate": "auto"},
        },
        "value warm-up": {"ppo": {"value_warmup_steps": 3}},
        "a scorer with a state": {"reward": (stateful,)},
        "a scorer that draws": {"reward": (replace(stateful, name=drawing),)},
        "groups": {"ppo": {"algorithm": "grpo"}, "sampling": SamplingConfig(group_size=2)},
        "lengths drawn": {"sampling": SamplingConfig(max_new_tokens=6, shortest_limit=2)},
        "an adapter": {"model": replace(model, lora=LoRAConfig(rank=2))},
        "frozen layers": {"model": replace(model, unfrozen_layers=1)},
        "a critic of its own": {
            "model": replace(model, lora=LoRAConfig(rank=2), critic="copy", value_head="bins"),
            "ppo": {"value_warmup_steps": 2},
        },
        "a critic above frozen layers": {
            "model": replace(model, unfrozen_layers=1, critic="copy", value_head="mlp"),
            "ppo": {"value_pretraining": 2, "learning_rate": "auto", "value_learning_rate": 1e-3},
        },
        "pretraining": {
            "ppo": {"pretraining_coef": 0.5},
            "pretraining": PretrainingConfig(text=str(parts / "prompts.txt"), tokens=4),
        },
        "checkpoints between evaluations": {"checkpoints": CheckpointConfig(every=1, keep=1)},
    }


NAMES = list(variants(Path()))


def stopped_in(call, monkeypatch, how):
    """Make the reward stop the process in its n-th call, which is the n-th step's."""
    from trl.training import loop

    calls = 0
    score = loop.score

    def score_and_stop(scorer, rollout):
        nonlocal calls
        calls += 1
        if calls == call:
            how()
        return score(scorer, rollout)

    monkeypatch.setattr(loop, "score", score_and_stop)


OFTEN = ("plain", "groups", "moments, adaptive KL, auto rate", "a critic of its own")


@pytest.mark.parametrize("variant", quick(NAMES, *OFTEN))
def test_ctrl_c_finishes_the_step_and_the_run_goes_on_bit_for_bit(
    parts, whole, monkeypatch, variant
):
    recipe = tiny_recipe(parts, parts / "stopped", **variants(parts)[variant])
    with monkeypatch.context() as patch:
        stopped_in(3, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped = run_recipe(recipe)
    assert stopped.interrupted
    assert stopped.steps == 3
    assert not json.loads((parts / "stopped" / "summary.json").read_text())["finished"]
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # as in another process
        seed(99)
    result = run_recipe(recipe, resume="auto")
    assert not result.interrupted
    assert result.steps == 6
    assert_same_run(whole(variant), parts / "stopped")
    assert not (parts / "stopped" / "policy" / "critic").exists()
    assert (parts / "stopped" / "critic").is_dir() == ("a critic" in variant)


def test_ctrl_c_in_the_last_step_of_a_part_ends_what_would_follow(parts, tmp_path, monkeypatch):
    recipe = tiny_recipe(parts, tmp_path / "run", steps=3)
    with monkeypatch.context() as patch:
        stopped_in(2, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        result = run_recipe(recipe, until=2)
    assert (result.steps, result.interrupted) == (2, True)
    assert not run_recipe(recipe, resume="auto", until=2).interrupted


@pytest.mark.parametrize(
    ("load", "told", "threads"), [(0.3, False, 2), (3.0, True, 2), (3.0, True, 1)]
)
def test_a_busy_machine_is_told(parts, tmp_path, monkeypatch, capsys, load, told, threads):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    run_recipe(tiny_recipe(parts, tmp_path / "run", steps=1, quiet=False))
    shown = " ".join("".join(capsys.readouterr()).split())
    assert ("busy: a load of 3.0 on 2 cores" in shown) is told
    assert ("OMP_NUM_THREADS=1" in shown) is (told and threads > 1)


def test_what_was_not_measured_since_the_start_is_no_after(parts, monkeypatch):
    recipe = tiny_recipe(parts, parts / "early", eval_every=5, steps=6)
    for call, measured in ((2, False), (4, True)):  # after steps 2 and 5
        with monkeypatch.context() as patch:
            stopped_in(call, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
            summary = run_recipe(recipe, resume="auto").summary
        assert summary["before"]["held_out/length"] > 0
        assert bool(summary["after"]) is measured
        (read,) = read_runs([parts / "early"])
        assert bool(read.after) is measured


@pytest.mark.parametrize("variant", ["plain", "a scorer with a state", "an adapter"])
def test_a_crash_goes_back_to_the_last_checkpoint(parts, whole, monkeypatch, variant):
    recipe = tiny_recipe(parts, parts / "crashed", **variants(parts)[variant])

    def crash():
        raise KeyboardInterrupt  # at once, as a kill

    with monkeypatch.context() as patch:
        stopped_in(4, patch, crash)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe)
    assert len(lines(parts / "crashed" / "metrics.jsonl")) == 4  # steps 0 to 3, and 3 is done again
    run_recipe(recipe, resume="auto")
    assert_same_run(whole(variant), parts / "crashed")


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    parts, whole, monkeypatch, capsys
):
    recipe = replace(tiny_recipe(parts, parts / "damaged"), quiet=False)
    with monkeypatch.context() as patch:
        stopped_in(5, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        run_recipe(recipe)
    checkpoints = parts / "damaged" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["step-000004", "step-000005"]
    os.truncate(checkpoints / "step-000005" / "state.pt", 1000)
    run_recipe(recipe, resume="auto")
    told = " ".join(capsys.readouterr().out.split())
    assert "step-000005: state.pt has 1000 bytes in place of" in told
    assert "Going on after step 4" in told
    assert_same_run(whole(), parts / "damaged")

    for path in checkpoints.iterdir():
        os.truncate(path / "state.pt", 1000)
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        run_recipe(recipe, resume="auto")


def test_from_a_checkpoint_by_name(parts):
    recipe = tiny_recipe(parts, parts / "run", checkpoints=CheckpointConfig(every=2, keep=9))
    run_recipe(recipe)
    whole = last_state(parts / "run"), lines(parts / "run" / "metrics.jsonl")
    run_recipe(recipe, resume=parts / "run" / "checkpoints" / "step-000002")
    again = last_state(parts / "run"), lines(parts / "run" / "metrics.jsonl")
    assert without_time(whole[1]) == without_time(again[1])
    with pytest.raises(ValueError, match="`resume` must be auto or a checkpoint of this run"):
        run_recipe(recipe, resume=parts / "model")


def test_a_folder_in_use_and_other_settings_are_refused(parts, capsys):
    recipe = tiny_recipe(parts, parts / "run", steps=2)
    assert run_recipe(recipe).steps == 2
    before = lines(parts / "run" / "metrics.jsonl")
    with pytest.raises(FileExistsError, match="--resume"):
        run_recipe(recipe)
    other = replace(recipe, seed=1, ppo=replace(recipe.ppo, learning_rate=0.5))
    with pytest.raises(SettingsError) as caught:
        run_recipe(other, resume="auto")
    assert "`ppo.learning_rate` must be as in the run so far" in str(caught.value)
    assert "`seed` must be as in the run so far" in str(caught.value)
    assert str(caught.value).count("--resume-changed") == 1
    assert lines(parts / "run" / "metrics.jsonl") == before
    # More steps may follow.
    longer = replace(recipe, steps=3, quiet=False)
    assert run_recipe(longer, resume="auto").steps == 3
    told = " ".join(capsys.readouterr().out.split())
    assert "Going on after step 2" in told
    assert "learning rate is that of 3 steps from here on, and was that of 2." in told
    run_recipe(longer, resume="auto")
    assert "schedule" not in capsys.readouterr().out
    assert [row["step"] for row in lines(parts / "run" / "metrics.jsonl")] == [0, 1, 2, 3]


def test_the_resolved_recipe_runs_again_as_it_is(parts, whole):
    values = settings.read_yaml(whole() / "recipe.yaml") | {"out": str(parts / "b")}
    run_recipe(settings.build(Recipe, values))
    assert_same_run(whole(), parts / "b")


def test_what_a_run_leaves_behind(parts):
    from trl.models.with_value_head import load_policy

    result = run_recipe(tiny_recipe(parts, parts / "run"))
    found = {path.name for path in (parts / "run").iterdir()}
    assert found >= {
        "recipe.yaml",
        "metrics.jsonl",
        "scores.jsonl",
        "samples.jsonl",
        "summary.json",
        "checkpoints",
        "policy",
    }
    rows = lines(parts / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    measured = [row["step"] for row in rows if "held_out/reward/mean" in row]
    assert measured == [0, 2, 4, 6]
    samples = lines(parts / "run" / "samples.jsonl")
    assert [s["step"] for s in samples] == [step for step in measured for _ in range(6)]
    assert {s["prompt"] for s in samples[:6]} == {s["prompt"] for s in samples[-6:]}
    loaded = load_policy(parts / "run" / "policy").state_dict()
    own = result.model.state_dict()
    assert all((loaded[name] == own[name]).all() for name in own)
    rates = [row["learning_rate"] for row in rows[1:]]
    assert rates == pytest.approx([1e-2 * (1 - step / 6) for step in range(6)])


def test_early_stops(parts):
    result = run_recipe(tiny_recipe(parts, parts / "kl", stop=StopConfig(kl=1e-9)))
    assert result.steps < 6
    assert "above stop.kl" in result.summary["reason"]
    stop = StopConfig(patience=2, min_gain=1e9)
    result = run_recipe(tiny_recipe(parts, parts / "plateau", stop=stop, steps=20))
    assert result.steps == 4  # the evaluations of steps 2 and 4 were no better
    assert "stop.patience" in result.summary["reason"]
    recipe = tiny_recipe(parts, parts / "plateau", stop=stop, steps=20)
    result = run_recipe(recipe, resume="auto")
    assert (result.steps, result.summary["finished"]) == (4, True)
    result = run_recipe(replace(recipe, stop=StopConfig(), steps=5), resume="auto")
    assert (result.steps, result.summary["reason"]) == (5, "all 5 steps are made")


def test_a_failing_reward_leaves_what_was_there(parts):
    (parts / "reward.py").write_text("def count_w7(texts): return [float('nan')] * len(texts)")
    with pytest.raises(ScoringError, match="count_w7"):
        run_recipe(tiny_recipe(parts, parts / "run"))


def test_a_start_that_is_refused_leaves_no_folder(parts):
    recipe = tiny_recipe(parts, parts / "run")
    missing = replace(recipe, model=replace(recipe.model, name=str(parts / "none")))
    with pytest.raises(OSError, match="none"):
        run_recipe(missing)
    assert not (parts / "run").exists()
    (parts / "run").mkdir()
    with pytest.raises(OSError, match="none"):
        run_recipe(missing)
    assert (parts / "run").exists()  # it is the user's


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(parts):
    (parts / "file").write_text("")
    with pytest.raises(OSError, match="`out` must be a folder that can be written"):
        run_recipe(tiny_recipe(parts, parts / "file" / "run"))


@pytest.fixture
def disk(tmp_path):
    """Mount disks in memory; only root can."""
    mounted = []

    def mount(options):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_disk_that_is_read_only_is_told(parts, disk):
    with pytest.raises(OSError, match=r"`out` must be a folder that can be written \(Read-only"):
        run_recipe(tiny_recipe(parts, disk("ro") / "run"))


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_good(parts, whole, disk):
    small_disk = disk("size=2m")
    recipe = tiny_recipe(parts, small_disk / "run")
    filler = small_disk / "filler"
    size = 2_000_000 - 2 * (os.path.getsize(whole() / "checkpoints" / "step-000006" / "state.pt"))
    filler.write_bytes(b"x" * size)  # room for one checkpoint and a half
    with pytest.raises(OSError, match="the disk is full") as caught:
        run_recipe(recipe)
    assert "step-000002" in str(caught.value)
    assert "--resume" in str(caught.value)
    filler.unlink()
    run_recipe(recipe, resume="auto")
    assert_same_run(whole(), small_disk / "run")


# -- what a review found ---------------------------------------------------------------------------


def test_files_of_others_are_not_touched(parts):
    out = parts / "project"
    (out / "policy").mkdir(parents=True)
    (out / "policy" / "thesis.txt").write_text("mine")
    for resume in (None, "auto"):
        with pytest.raises(FileExistsError, match="there are policy in it, which the run would"):
            run_recipe(tiny_recipe(parts, out), resume=resume)
    assert (out / "policy" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("held_out", [6, 0])
def test_a_start_that_failed_is_no_run(parts, held_out):
    good = (parts / "reward.py").read_text()
    data = replace(tiny_recipe(parts, parts).data, held_out=held_out)
    recipe = tiny_recipe(parts, parts / "run", data=data, steps=1)
    (parts / "reward.py").write_text("def count_w7(texts): return [float('nan')] * len(texts)")
    with pytest.raises(ScoringError, match="count_w7"):
        run_recipe(recipe)
    (parts / "reward.py").write_text(good)
    assert run_recipe(recipe).steps == 1
    run_recipe(replace(recipe, out=str(parts / "whole")))
    assert_same_run(parts / "whole", parts / "run")


@pytest.mark.parametrize("saved", [0, 1])
def test_how_to_go_on_with_a_mended_reward_is_said(parts, saved):
    """Only to a checkpoint it is another reward than before."""
    good = (parts / "reward.py").read_text()
    fails = "calls = []\n\ndef count_w7(texts):\n    calls.append(1)\n"
    fails += f"    assert len(calls) <= {saved}\n    return [float(len(text)) for text in texts]\n"
    (parts / "reward.py").write_text(fails)
    data = replace(tiny_recipe(parts, parts).data, held_out=0)
    recipe = tiny_recipe(parts, parts / "run", data=data, steps=2)
    with pytest.raises(ScoringError, match="count_w7") as caught:
        run_recipe(recipe)
    (note,) = caught.value.__notes__
    (parts / "reward.py").write_text(good)
    if not saved:
        assert note.startswith("Nothing is saved")
        assert " --resume --trust " in note
        assert run_recipe(recipe, resume="auto").steps == 2
        return
    assert " Mend it, and go on with: trl train " in note
    assert " --resume-changed --trust " in note
    with pytest.raises(CheckpointError, match="another scorer `count_w7`"):
        run_recipe(recipe, resume="auto")
    with pytest.warns(UserWarning, match="another scorer `count_w7`"):
        assert run_recipe(recipe, resume="changed").steps == 2


def test_what_may_be_lost_is_a_run(parts, monkeypatch):
    def crash():
        raise MemoryError

    recipe = tiny_recipe(parts, parts / "run")
    with monkeypatch.context() as patch:
        stopped_in(2, patch, crash)  # after a step, before the first checkpoint
        with pytest.raises(MemoryError):
            run_recipe(recipe)
    before = (parts / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="go on with it by resume"):
        run_recipe(recipe)
    assert (parts / "run" / "metrics.jsonl").read_bytes() == before

    (parts / "mine").mkdir()
    (parts / "mine" / "recipe.yaml").write_text("steps: 1  # written by hand")
    with pytest.raises(FileExistsError):
        run_recipe(tiny_recipe(parts, parts / "mine"))
    (parts / "other" / "checkpoints").mkdir(parents=True)
    (parts / "other" / "metrics.jsonl").write_text("")
    with pytest.raises(FileExistsError):
        run_recipe(tiny_recipe(parts, parts / "other"))


def test_a_crash_before_the_first_checkpoint_leaves_no_lines(parts, whole, monkeypatch):
    recipe = tiny_recipe(parts, parts / "early")

    def crash():
        with (parts / "early" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "rew')  # a line that is cut
        raise MemoryError

    with monkeypatch.context() as patch:
        stopped_in(2, patch, crash)
        with pytest.raises(MemoryError):
            run_recipe(recipe)
    run_recipe(recipe, resume="auto")
    assert_same_run(whole(), parts / "early")


def test_a_run_that_was_moved_goes_on_where_it_is(parts, monkeypatch):
    monkeypatch.chdir(parts)
    recipe = tiny_recipe(parts, Path("a"))
    with monkeypatch.context() as patch:
        stopped_in(2, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        run_recipe(recipe)
    os.rename("a", "moved")
    monkeypatch.chdir("/")
    trust = ["--trust", str(parts / "reward.py")]  # it is not beside the recipe of the run
    assert cli.main(["train", str(parts / "moved"), "--resume"]) == 2
    assert cli.main(["train", str(parts / "moved"), "--resume", *trust]) == 0
    assert not (parts / "a").exists()
    assert len(lines(parts / "moved" / "metrics.jsonl")) == 7


def test_the_state_of_a_scorer_must_be_readable_again(parts):
    reward = (parts / "reward.py").read_text()
    (parts / "reward.py").write_text(
        "import numpy\n" + reward.replace('{"calls": self.calls}', '{"calls": numpy.zeros(2)}')
    )
    counting = RewardConfig(kind="function", name=f"{parts / 'reward.py'}:counting")
    with pytest.raises(TypeError, match="scorer counting.* must give plain values and tensors"):
        run_recipe(tiny_recipe(parts, parts / "run", reward=(counting,)))


def test_a_scorer_that_is_only_measured_has_a_state_too(parts, monkeypatch):
    reward = tiny_recipe(parts, parts).reward[0]
    counting = RewardConfig(kind="function", name=f"{parts / 'reward.py'}:counting", weight=0)
    changes = {"reward": (reward, counting)}
    run_recipe(tiny_recipe(parts, parts / "whole", **changes))
    recipe = tiny_recipe(parts, parts / "stopped", **changes)
    with monkeypatch.context() as patch:
        stopped_in(3, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        run_recipe(recipe)
    run_recipe(recipe, resume="auto")
    assert_same_run(parts / "whole", parts / "stopped")


def test_what_is_best_is_known_before_anything_is_loaded(parts):
    checkpoints = CheckpointConfig(best="held_out/reward/maen")
    with pytest.raises(SettingsError, match=r"Did you mean `held_out/reward/mean`\?"):
        run_recipe(tiny_recipe(parts, parts / "run", checkpoints=checkpoints))
    assert not (parts / "run" / "recipe.yaml").exists()
    # Of another figure than before, what was best does not count.
    recipe = tiny_recipe(parts, parts / "run", steps=2)
    run_recipe(recipe)
    checkpoints = CheckpointConfig(best="held_out/kl", mode="min")
    result = run_recipe(replace(recipe, steps=4, checkpoints=checkpoints), resume="auto")
    measured = {
        row["step"]: row["held_out/kl"]
        for row in lines(parts / "run" / "metrics.jsonl")
        if "held_out/kl" in row
    }
    assert result.summary["best"] == {"step": 4, "held_out/kl": measured[4]}


def test_titles_that_are_taken(parts):
    reward = replace(tiny_recipe(parts, parts).reward[0], title="mean")
    with pytest.raises(SettingsError, match=r"`reward\[0\].title` must not be one of"):
        run_recipe(tiny_recipe(parts, parts / "run", reward=(reward,)))


def test_an_early_stop_is_measured(parts):
    result = run_recipe(
        tiny_recipe(parts, parts / "run", stop=StopConfig(kl=1e-9), eval_every=5, steps=9)
    )
    rows = lines(parts / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == result.steps < 5
    assert result.summary["after"]["held_out/kl"] == rows[-1]["held_out/kl"]


def die_in(folder):
    """Be killed in the midst of a run, and say what is wrong if none can be begun."""
    try:
        with RunFolder(folder).in_use():
            os.kill(os.getpid(), signal.SIGKILL)
    except OSError as error:
        (folder / "told").write_text(str(error))
    os._exit(1)


def test_one_run_at_a_time_in_a_folder_and_a_dead_one_blocks_none(parts, monkeypatch):
    recipe = tiny_recipe(parts, parts / "run", steps=2)
    ends = []

    def another():
        process = multiprocessing.get_context("fork").Process(target=die_in, args=[parts / "run"])
        process.start()
        process.join(60)
        ends.append(process.exitcode)

    another()  # is killed while it has the lock
    stopped_in(1, monkeypatch, another)
    run_recipe(recipe)
    assert ends == [-signal.SIGKILL, 1]
    told = (parts / "run" / "told").read_text()
    assert "`out` must be a folder in which no process is at work, as one is now" in told


def test_a_saved_recipe_runs_with_another_seed(parts):
    run_recipe(replace(tiny_recipe(parts, parts / "run", steps=1), seed=3))
    flags = ["--seed", "5", "--out", str(parts / "other"), "--trust", str(parts / "reward.py")]
    assert cli.main(["train", str(parts / "run"), *flags]) == 0


# -- what changed since ----------------------------------------------------------------------------


def other_weights(parts):
    model = tiny_model("llama", seed=5)
    model.save_pretrained(parts / "model")


def other_tokenizer(parts):
    text = (parts / "model" / "tokenizer_config.json").read_text()
    config = json.loads(text) | {"chat_template": "{{ messages }}"}
    (parts / "model" / "tokenizer_config.json").write_text(json.dumps(config))


def other_reward(parts):
    code = (parts / "reward.py").read_text()
    (parts / "reward.py").write_text(code.replace('count("w7"))', 'count("w6"))'))


def other_code_beside(parts):
    (parts / "weights.py").write_text("W7 = 2.0\n")


def other_prompts(parts):
    text = (parts / "prompts.txt").read_text()
    (parts / "prompts.txt").write_text(text.replace("w3", "w4"))


def other_classifier(parts):
    model = AutoModelForSequenceClassification.from_pretrained(parts / "bert")
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(1.1)
    model.save_pretrained(parts / "bert")


def no_recipe(parts):
    (parts / "run" / "recipe.yaml").unlink()


def nothing(parts):
    pass


@pytest.mark.parametrize(
    ("ppo", "others"),
    [
        ({"batch_size": 8}, ["ppo.batch_size"]),
        ({"batch_size": 8, "kl_horizon": 99.0}, ["ppo.batch_size", "ppo.kl_horizon"]),
        ({"kl_horizon": 99.0}, ["ppo.kl_horizon"]),
        ({"algorithm": "grpo"}, ["ppo.algorithm"]),
    ],
)
def test_what_follows_from_another_setting_is_not_told_beside_it(ppo, others):
    """Of grpo it is the size of a group, the rate of the values, and that scores are centred."""
    before, now = (settings.build(Recipe, {"ppo": each}) for each in ({}, ppo))
    assert sorted(changed_settings(settings.as_mapping(before), now)) == others


def of_ppo(**changes):
    return lambda recipe: {"ppo": replace(recipe.ppo, **changes)}


def of_adapter(recipe):
    return {"model": replace(recipe.model, lora=LoRAConfig(rank=2, alpha=7))}


EXPERIMENTS = {
    "weights": (other_weights, None, "began with another model"),
    "tokenizer": (other_tokenizer, None, "another tokenizer"),
    "reward code": (other_reward, None, "another scorer `count_w7`"),
    "code beside the reward": (other_code_beside, None, "another scorer `count_w7`"),
    "data": (other_prompts, None, "on other prompts: the file or dataset of `data.prompts`"),
    "recipe": (nothing, of_ppo(gamma=0.9), "`ppo.gamma` (must be as in the run so far|was)"),
    "adapter": (no_recipe, of_adapter, "`model.lora.alpha` (must be|was)"),
    "model of a scorer": (other_classifier, None, "another scorer `1_logit`"),
    "seed": (
        no_recipe,
        lambda recipe: {"seed": 5},
        "`seed` (must be as in the run so far|was 0 up to here, and is 5)",
    ),
    "precision": (no_recipe, of_ppo(precision="bf16"), "`ppo.precision` (must be|was)"),
}
"""What makes a run another experiment, besides versions: what is done to its files, what to its
recipe, and what is said."""


@pytest.mark.parametrize("what", quick(EXPERIMENTS, "recipe", "data", "weights", "reward code"))
def test_another_experiment_is_refused_by_name(parts, what):
    harm, changes, words = EXPERIMENTS[what]
    tiny_bert(parts / "bert")
    (parts / "weights.py").write_text("W7 = 1.0\n")
    code = "import weights\n" + (parts / "reward.py").read_text()
    (parts / "reward.py").write_text(code.replace("float(text.split", "weights.W7 * (text.split"))
    count = RewardConfig(kind="function", name=f"{parts / 'reward.py'}:count_w7")
    judge = RewardConfig(kind="classifier", name=str(parts / "bert"), label="1")
    lora = ModelConfig(name=str(parts / "model"), lora=LoRAConfig(rank=2), reference="none")
    ppo = {"init_kl_coef": 0.0, "adaptive_kl": False}
    given = {"steps": 1, "model": lora, "ppo": ppo, "reward": (count, judge)}
    recipe = tiny_recipe(parts, parts / "run", **given)
    run_recipe(recipe)
    harm(parts)
    other = replace(recipe, steps=2, **(changes(recipe) if changes else {}))
    sys.modules.pop("weights", None)  # another process imports it anew
    with pytest.raises((CheckpointError, SettingsError), match=words) as caught:
        run_recipe(other, resume="auto")
    assert "--resume-changed" in str(caught.value)
    with pytest.warns(UserWarning, match=words):
        assert run_recipe(other, resume="changed").steps == 2
    sys.modules.pop("weights", None)


def edit_state(checkpoint, edit):
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    edit(state)
    torch.save(state, checkpoint / "state.pt")
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)


def test_other_versions_are_told(parts):
    recipe = tiny_recipe(parts, parts / "run", steps=1)
    run_recipe(recipe)
    versions = {"versions": {"trl": "0.1", "torch": "1.0"}}
    edit_state(parts / "run" / "checkpoints" / "step-000001", lambda state: state.update(versions))
    with pytest.warns(UserWarning, match="torch 1.0, now"):
        assert run_recipe(replace(recipe, steps=2), resume="auto").steps == 2


def test_a_state_without_a_key_falls_back_to_the_one_before(parts):
    recipe = replace(tiny_recipe(parts, parts / "run", steps=4), quiet=True)
    run_recipe(recipe)
    checkpoints = parts / "run" / "checkpoints"
    edit_state(checkpoints / "step-000004", lambda state: state.pop("best"))
    assert problem_of(checkpoints / "step-000004") == "state.pt has no best"
    os.rename(checkpoints / "step-000002", checkpoints / ".step-000002.old")  # between two renames
    run_recipe(replace(recipe, steps=3), resume="auto")
    assert [row["step"] for row in lines(parts / "run" / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize("call", [4, 5])
def test_a_reward_that_raises_once_loses_no_step(parts, whole, monkeypatch, call):
    stateful = variants(parts)["a scorer with a state"]
    recipe = tiny_recipe(parts, parts / "run", **stateful)

    def fail():
        random.random()
        raise RuntimeError("once")

    with monkeypatch.context() as patch:
        stopped_in(call, patch, fail)
        with pytest.raises(RuntimeError, match="once"):
            run_recipe(recipe)
    newest = max((parts / "run" / "checkpoints").iterdir()).name
    assert newest == f"step-{call - 1:06d}"
    run_recipe(recipe, resume="auto")
    assert_same_run(whole("a scorer with a state"), parts / "run")


FAULTS = {
    "the reference": (PPOTrainer, "reference_logprobs", 1),
    "targets": (PPOTrainer, "advantages", 1),
    "a gradient": (PPOTrainer, "_gradient", 2),
    "the first update": (torch.optim.Adam, "step", 1),
    "the second update": (torch.optim.Adam, "step", 2),
    "between an update and its end": (Updater, "end", 2),
    "statistics": (ppo, "step_statistics", 1),
    "the KL controller": (AdaptiveKLController, "update", 1),
    "after it": (Clock, "stats", 1),
}
"""Where a step fails: what is called there, and in which of its calls in the fourth step."""
AFTER_IT = ["the first update", "between an update and its end", "after it"]
"""Where a failure after the work is none before that of another."""


def failing(patch, owner, name, call, *, first):
    """Make the n-th call of a function in step 4 fail, before it does its work or after it."""
    work, step, inside = getattr(owner, name), PPOTrainer.step, []
    calls = 0

    def fail(*given, **named):
        nonlocal calls
        calls += inside == [3]
        at_fault = calls == call and inside == [3]
        result = None if first and at_fault else work(*given, **named)
        if at_fault:
            torch.rand(1)
            raise RuntimeError("once")
        return result

    def watched(self, *given):
        inside.append(self.steps_done)
        try:
            return step(self, *given)
        finally:
            inside.clear()

    patch.setattr(owner, name, fail)
    patch.setattr(PPOTrainer, "step", watched)


CASES = [*((place, True) for place in FAULTS), *((place, False) for place in AFTER_IT)]
SOME = [("a gradient", True), ("the second update", True), ("after it", False)]


@pytest.mark.parametrize(("place", "first"), quick(CASES, *SOME))
def test_a_step_that_fails_in_its_midst_is_taken_back(parts, whole, monkeypatch, place, first):
    variant = "moments, adaptive KL, auto rate"
    recipe = tiny_recipe(parts, parts / "run", **variants(parts)[variant])
    with monkeypatch.context() as patch:
        failing(patch, *FAULTS[place], first=first)
        with pytest.raises(RuntimeError, match="once") as caught:
            run_recipe(recipe)
    newest = parts / "run" / "checkpoints" / "step-000003"
    assert newest.is_dir()
    assert caught.value.__notes__[0].startswith(f"Saved is {newest}. Go on with: trl train ")
    run_recipe(recipe, resume="auto")
    assert_same_run(whole(variant), parts / "run")


def test_weights_in_the_midst_of_a_step_are_not_saved(parts, whole, monkeypatch):
    monkeypatch.setattr(undo, "SHARE", 0.0)  # no room for a copy
    for place, kept in (("the second update", 2), ("the first update", 3)):
        recipe = tiny_recipe(parts, parts / place)
        with monkeypatch.context() as patch:
            failing(patch, *FAULTS[place], first=True)
            with pytest.raises(RuntimeError, match="once") as caught:
                run_recipe(recipe)
        newest = max((parts / place / "checkpoints").iterdir())
        assert newest.name == f"step-{kept:06d}"
        amid = "It failed amid its updates; memory was short" in caught.value.__notes__[0]
        assert amid is (kept == 2)
        run_recipe(recipe, resume="auto")
        assert_same_run(whole(), parts / place)


def best_every_time(monkeypatch):
    """Make each evaluation better than the one before."""
    values, measure = iter(range(99)), HeldOut.measure

    def better(self):
        samples, figures = measure(self)
        return samples, figures | {"held_out/reward/mean": float(next(values))}

    monkeypatch.setattr(HeldOut, "measure", better)


def test_the_best_policy_is_of_a_step_that_counts(parts, monkeypatch):
    every = CheckpointConfig(every=4, keep=2)
    recipe = tiny_recipe(parts, parts / "run", checkpoints=every, steps=8)
    with monkeypatch.context() as patch:
        best_every_time(patch)

        def die():
            raise KeyboardInterrupt

        stopped_in(7, patch, die)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe)
    best = parts / "run" / "best"
    assert (best / "step.txt").read_text() == "4\n"  # that of step 6 is not in its place yet
    result = run_recipe(replace(recipe, steps=4), resume="auto")
    assert result.summary["best"]["step"] == 4
    assert (best / "step.txt").read_text() == "4\n"
    assert not (parts / "run" / ".best").exists()


@pytest.mark.parametrize("harm", ["cut", "deleted", "changed"])
def test_lines_that_are_lost_are_named(parts, harm):
    recipe = tiny_recipe(parts, parts / "run", steps=2)
    run_recipe(recipe)
    file = parts / "run" / "metrics.jsonl"
    text = file.read_text()
    if harm == "cut":
        os.truncate(file, len(text) - 20)
    elif harm == "changed":
        file.write_text(text.replace('"episodes":8', '"episodes":9'))
    else:
        file.unlink()
    with pytest.warns(
        UserWarning, match=r"metrics.jsonl is not as it was after step 2: of 3 lines"
    ):
        run_recipe(replace(recipe, steps=3), resume="auto")
    steps = {"cut": [0, 1, 3], "deleted": [3], "changed": [0, 1, 2, 3]}[harm]
    assert [row["step"] for row in lines(file)] == steps


def test_lines_and_steps_that_are_none_are_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    odd = ['{"step": 1e999}', "[" * 100_000, '{"step": "x"}', '{"step": [1]}', "3", '{"step": 1']
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + "\n".join(odd))
    assert folder.rows("metrics") == [{"step": 0}]
    folder.cut({}, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
    for text, step in (("7\n", 7), ("", -1), ("seven", -1), ("9" * 5000, -1), ("٣", -1)):
        (tmp_path / "step.txt").write_text(text)
        assert best_step(tmp_path) == step


@pytest.mark.parametrize("made_again", [False, True])
def test_a_folder_that_is_deleted_while_it_runs_is_told(parts, monkeypatch, made_again):
    def delete():
        shutil.rmtree(parts / "run")
        if made_again:
            (parts / "run").mkdir()

    stopped_in(2, monkeypatch, delete)
    with pytest.raises(FileNotFoundError, match="`out` must stay where it is while a run is in it"):
        run_recipe(tiny_recipe(parts, parts / "run"))
    assert not made_again or not list((parts / "run").iterdir())


def test_a_lock_that_is_deleted_lets_no_other_run_in(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.in_use():
        (tmp_path / "run" / ".lock").unlink()
        other = RunFolder(tmp_path / "run").in_use()
        with pytest.raises(BlockingIOError, match="in which no process is at work"), other:
            pass
    with RunFolder(tmp_path / "run").in_use():
        pass


def test_a_folder_that_a_host_does_not_see_is_refused(tmp_path, monkeypatch):
    """Else one process would begin a run that another goes on with."""
    monkeypatch.setattr("trl.compute.processes.gather_object", lambda mine: [*mine, "step-000004"])
    processes = SimpleNamespace(num_processes=2, is_main_process=False)
    message = "`out` must be a folder that every process sees: .* got no checkpoint, step-0"
    with (
        pytest.raises(ValueError, match=message),
        opened(RunFolder(tmp_path / "run"), "auto", processes),
    ):
        pass


def test_a_rate_that_sets_itself_cannot_become_a_number_and_nothing_else_is_offered(parts):
    recipe = tiny_recipe(parts, parts / "run", steps=1)
    auto = replace(recipe, ppo=replace(recipe.ppo, learning_rate="auto"))
    run_recipe(auto)
    for resume in ("auto", "changed"):
        with pytest.raises(
            SettingsError, match=r"`ppo.learning_rate` .* begin from the policy"
        ) as caught:
            run_recipe(replace(recipe, steps=2), resume=resume)
        assert "--resume-changed" not in str(caught.value)
