import dataclasses
import subprocess
import sys

import pytest

from trl.config import OLD_SPELLINGS, PPOConfig


def test_defaults_are_those_of_the_2020_trainer():
    config = PPOConfig()
    assert config.learning_rate == 1.41e-5
    assert config.adaptive_kl is True
    assert (config.init_kl_coef, config.kl_target, config.kl_horizon) == (0.2, 6, 10_000)
    assert (config.gamma, config.gae_lambda) == (1, 0.95)
    assert (config.cliprange, config.cliprange_value, config.vf_coef) == (0.2, 0.2, 0.1)
    assert (config.batch_size, config.forward_batch_size, config.ppo_epochs) == (256, 16, 4)


def test_spellings_of_2020_set_our_fields():
    config = PPOConfig.from_kwargs(lr=1e-3, lam=0.5, target=3, horizon=7, adap_kl_ctrl=False)
    assert config.learning_rate == 1e-3
    assert config.gae_lambda == 0.5
    assert config.kl_target == 3
    assert config.kl_horizon == 7
    assert config.adaptive_kl is False
    names = {entry.name for entry in dataclasses.fields(PPOConfig)}
    assert set(OLD_SPELLINGS.values()) <= names
    assert not set(OLD_SPELLINGS) & names


def test_a_setting_given_under_both_names_is_refused():
    with pytest.raises(ValueError, match="`learning_rate` must be given once"):
        PPOConfig.from_kwargs(lr=1e-3, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("learning_rate", 0.0, "> 0"),
        ("learning_rate", "1e-4", "a finite number > 0 and <= 100, or auto"),
        ("learning_rate", float("nan"), "a finite number"),
        ("cliprange", -0.2, "> 0"),
        ("cliprange", 1.5, "> 0 and <= 1"),
        ("cliprange_value", 0, "> 0"),
        ("cliprange_high", -1.0, "> 0 or None"),
        ("init_kl_coef", -0.1, ">= 0"),
        ("vf_coef", -1, ">= 0"),
        ("entropy_coef", float("inf"), "a finite number >= 0"),
        ("gamma", 1.01, "between 0 and 1"),
        ("gae_lambda", -0.01, "between 0 and 1"),
        ("batch_size", 0, "an integer > 0"),
        ("batch_size", -4, "an integer > 0"),
        ("seed", 2**64, "an integer >= 0"),  # torch's own error is "Overflow when unpacking"
        ("value_learning_rate", 1e38, "<= 100"),
        ("batch_size", 2.5, "an integer > 0"),
        ("batch_size", True, "an integer > 0"),
        ("forward_batch_size", 0, "an integer > 0 or None"),
        ("minibatch_size", -1, "an integer > 0 or None"),
        ("token_budget", 0, "an integer > 0"),
        ("ppo_epochs", 0, "an integer > 0"),
        ("kl_target", 0, "> 0"),
        ("kl_horizon", -1, "> 0"),
        ("temperature", 0, "> 0"),
        ("max_grad_norm", 0, "> 0 or None"),
        ("ratio_threshold", 1, "> 1"),
        ("max_approxkl", -1, "> 0 or None"),
        ("adaptive_kl", 1, "True or False"),
        ("kl_estimator", "k4", "one of"),
        ("precision", "bf61", "one of"),
        ("seed", -1, ">= 0"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(name, value, rule):
    with pytest.raises(ValueError, match=f"`{name}` must be.*") as error:
        PPOConfig(**{name: value})
    assert rule in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("text", ["1e-4", "8", "-3", ".5", "+2.5E+3"])
def test_a_number_in_quotes_is_told_to_be_written_without(text):
    with pytest.raises(ValueError, match="must be") as error:
        PPOConfig(learning_rate=text, batch_size=text, adaptive_kl="1e", precision="fast")
    assert str(error.value).count(f"got '{text}': write {text}, without quotes.") == 2
    assert str(error.value).count("without quotes") == 2


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError, match="PPOConfig: ") as error:
        PPOConfig(batch_size=0, gamma=2, precision="bf61")
    text = str(error.value)
    assert "`batch_size`" in text
    assert "`gamma`" in text
    assert "Did you mean `bf16`?" in text


@pytest.mark.parametrize("build", [PPOConfig, PPOConfig.from_kwargs])
def test_an_unknown_field_names_the_nearest(build):
    with pytest.raises(TypeError, match=r"no field `gae_lamda`. Did you mean `gae_lambda`\?"):
        build(gae_lamda=0.9)


def test_configs_cannot_be_changed_behind_their_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().gamma = 3


def test_default_update_size_is_a_quarter_of_the_batch():
    assert PPOConfig(batch_size=256).update_size == 64
    assert PPOConfig(batch_size=1).update_size == 1
    assert PPOConfig(batch_size=256, minibatch_size=1).update_size == 1


def test_the_starter_models_are_found_without_torch():
    code = (
        "import sys, trl; folder = trl.starter.LANGUAGE_MODEL; "
        "assert folder.is_dir() and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "value", "rule"), [("learning_rate", 1e38, "<= 100"), ("adam_eps", 1e-300, ">= 1e-30")]
)
def test_what_no_float32_update_survives_is_refused(name, value, rule):
    """The weights were NaN after the first update, and not "those after the last good one"."""
    with pytest.raises(ValueError, match=f"`{name}` must be a .*number .*{rule}.*, got "):
        PPOConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("GRPO", ["ppo", "grpo"], " Did you mean `grpo`?"),
        ("beta", ["init_kl_coef", "best"], " Did you mean `init_kl_coef`?"),
        ("max_length", ["max_new_tokens"], " Did you mean `max_new_tokens`?"),
        ("zebra", ["ppo"], ""),
    ],
)
def test_what_a_name_may_mean(name, known, meant):
    from trl.config.errors import closest

    assert closest(name, known) == meant


def test_names_of_other_libraries_on_the_command_line():
    from trl.config.errors import closest_path

    every = [
        "ppo.init_kl_coef",
        "checkpoints.best",
        "sampling.group_size",
        "sampling.max_new_tokens",
    ]
    assert closest_path("beta", every) == " Did you mean `ppo.init_kl_coef`?"
    assert closest_path("num-generations", every) == " Did you mean `sampling.group_size`?"
