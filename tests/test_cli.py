import ast
import os
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import trl
from trl import cli
from trl.batch import Rollout, score_tensor
from trl.config import DemoConfig, PPOConfig


@pytest.fixture
def configs(monkeypatch):
    """The configurations that `trl demo` was run with, in place of the run."""
    seen = []
    module = type(sys)("trl.training.demo")
    module.run_demo = seen.append
    monkeypatch.setitem(sys.modules, "trl.training.demo", module)
    return seen


def failing_demo(monkeypatch, error):
    module = type(sys)("trl.training.demo")

    def run_demo(config):
        raise error

    module.run_demo = run_demo
    monkeypatch.setitem(sys.modules, "trl.training.demo", module)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "trl", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(trl.__file__).parents[1],
        env=os.environ | {"COLUMNS": "100"},
    )


def test_no_flags_mean_the_defaults(configs):
    assert cli.main(["demo"]) == 0
    assert configs == [DemoConfig()]


def test_flags_set_fields_also_nested_ones_in_both_spellings(configs):
    flags = "--model gpt2 --reward-model=my/model --steps 20 --seed 3 --out a_b/c_d"
    nested = "--ppo.learning-rate 1e-5 --ppo.minibatch_size=8 --ppo.adaptive-kl TRUE"
    assert cli.main(["demo", *flags.split(), *nested.split(), "--ppo.max-grad-norm", "none"]) == 0
    (config,) = configs
    assert (config.model, config.reward_model, config.steps) == ("gpt2", "my/model", 20)
    assert (config.seed, config.out) == (3, "a_b/c_d")
    assert config.ppo.learning_rate == 1e-5
    assert config.ppo.minibatch_size == 8
    assert config.ppo.adaptive_kl is True
    assert config.ppo.max_grad_norm is None
    # what was not given keeps the demo's default, not that of PPOConfig
    assert config.ppo.init_kl_coef == DemoConfig().ppo.init_kl_coef


@pytest.mark.parametrize("config", [DemoConfig(), DemoConfig().ppo])
def test_every_field_is_a_flag_with_a_help_text(config, capsys):
    prefix = "ppo." if isinstance(config, PPOConfig) else ""
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in fields(config):
        if field.name != "ppo":
            assert f"--{prefix}{field.name}".replace("_", "-") in text
            assert cli._texts_under_fields(type(config))[field.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--ppo.lerning_rate", "1"], "Did you mean `--ppo.learning-rate`?"),
        (["demo", "--step", "1"], "Did you mean `--steps`?"),
        (["demo", "--ppo.learning-rate", "x"], "must be a number, got 'x'"),
        (["demo", "--steps", "1.5"], "must be a whole number, got '1.5'"),
        (["demo", "--ppo.adaptive-kl", "yes"], "must be true or false, got 'yes'"),
        (["demo", "--ppo.precision", "bf61"], "Did you mean `bf16`?"),
        (["demo", "--steps"], "--steps: expected one argument"),
        (["domo"], "domo"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(arguments, message, configs, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert configs == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "`steps` must be an integer > 0, got 0"),
        (["--ppo.cliprange", "-0.2"], "`cliprange` must be a finite number > 0 and <= 1, got -0.2"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(arguments, message, configs, capsys):
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert configs == []


def test_a_missing_file_is_one_line_and_exit_code_2(monkeypatch, capsys):
    failing_demo(monkeypatch, FileNotFoundError(2, "No such file", "prompts.txt"))
    assert cli.main(["demo"]) == 2
    assert "No such file: 'prompts.txt'" in capsys.readouterr().err


def test_an_error_that_trl_raised_on_purpose_is_one_line(monkeypatch, capsys):
    def diverge(config):
        score_tensor([float("nan")], Rollout.from_lists(*2 * [torch.ones(1, 1).long()]))

    module = type(sys)("trl.training.demo")
    module.run_demo = diverge
    monkeypatch.setitem(sys.modules, "trl.training.demo", module)
    assert cli.main(["demo"]) == 2
    assert "`scores` must be finite" in capsys.readouterr().err


def test_ctrl_c_exits_130(monkeypatch, capsys):
    failing_demo(monkeypatch, KeyboardInterrupt())
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug(config):
        ast.literal_eval("f()")  # a ValueError that does not come out of trl

    module = type(sys)("trl.training.demo")
    module.run_demo = bug
    monkeypatch.setitem(sys.modules, "trl.training.demo", module)
    with pytest.raises(ValueError, match="malformed node"):
        cli.main(["demo"])


def test_version():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"trl {trl.__version__}\n")


def test_help_is_instant_and_names_the_command():
    def used():  # CPU time: other work on the machine does not count
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = used()
    result = run("--help")
    assert used() - start < 0.5
    assert result.returncode == 0
    assert "demo" in result.stdout


def test_no_command_shows_the_help():
    result = run()
    assert result.returncode == 0
    assert "usage: trl" in result.stdout
