"""Recipes as text: what is read, what is refused and in which words, and what is written."""

import json
import re
import string
import time
from dataclasses import replace
from typing import Annotated

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from trl.config import (
    PPOConfig,
    SettingsError,
    as_mapping,
    build,
    check_values,
    differences,
    dump,
    paths,
    read_yaml,
)
from trl.config.reading import parse_yaml
from trl.config.recipe import (
    CheckpointConfig,
    ClassifierRecipe,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    PreferencesRecipe,
    Recipe,
    RewardConfig,
    RewardRecipe,
    SamplingConfig,
    ScheduleConfig,
    StopConfig,
    TrackingConfig,
)
from trl.config.section import section
from trl.config.types import Count, Positive, Share


@pytest.fixture
def read(tmp_path):
    """Build a recipe from the text of a file."""

    def read(text, cls=Recipe, flags=()):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return build(cls, read_yaml(path), flags=flags, owner="recipe.yaml")

    return read


@pytest.fixture
def problems(read):
    """Everything that is wrong with the text of a file."""

    def problems(text, cls=Recipe, flags=()):
        with pytest.raises(SettingsError) as error:
            read(text, cls, flags)
        return error.value.found

    return problems


# -- mutated files: each of them has one problem ---------------------------------------------------

TYPES = [
    # text, path, rule, value, fix
    ("ppo: {learning_rate: fast}", "ppo.learning_rate", "finite number > 0", "'fast'", ""),
    ("ppo: {learning_rate: [1.0e-5]}", "ppo.learning_rate", "number > 0", "[1e-05]", ""),
    ("ppo: {learning_rate: true}", "ppo.learning_rate", "number > 0", "True", ""),
    ("ppo: {learning_rate: '1e-5'}", "ppo.learning_rate", "number > 0", "'1e-5'", ""),
    ("ppo: {batch_size: 12.5}", "ppo.batch_size", "integer > 0", "12.5", ""),
    ("ppo: {batch_size: '64'}", "ppo.batch_size", "integer > 0", "'64'", ""),
    ("ppo: {batch_size: true}", "ppo.batch_size", "integer > 0", "True", ""),
    ("ppo: {batch_size: }", "ppo.batch_size", "integer > 0", "None", ""),
    ("ppo: {batch_size: 1__0}", "ppo.batch_size", "integer > 0", "'1__0'", ""),
    ("ppo: {adaptive_kl: maybe}", "ppo.adaptive_kl", "True or False", "'maybe'", ""),
    ("ppo: {adaptive_kl: 1}", "ppo.adaptive_kl", "True or False", "1", ""),
    ("ppo: {adaptive_kl: 'yes'}", "ppo.adaptive_kl", "True or False", "'yes'", ""),
    ("ppo: 1.0e-5", "ppo", "a PPOConfig {algorithm: …}", "1e-05", ""),
    ("ppo: [{gamma: 1}]", "ppo", "a PPOConfig {algorithm: …}", "[{'gamma': 1}]", ""),
    ("model: {lora: yes}", "model.lora", "a LoRAConfig {rank: …} or None", "True", ""),
    ("model: {name: }", "model.name", "a text", "None", ""),
    ("model: {name: [gpt2]}", "model.name", "a text", "['gpt2']", ""),
    ("model: {name: ''}", "model.name", "a text", "''", ""),
    ("reward: {kind: endpoint}", "reward", "a list of scorers", "{'kind': 'endpoint'}", ""),
    ("reward: [classifier]", "reward[0]", "a RewardConfig {kind: …}", "'classifier'", ""),
    ("data: {prefixes: 'a '}", "data.prefixes", "a list of texts", "'a '", ""),
    ("data: {cut_tokens: 4}", "data.cut_tokens", "two integers > 0", "4", ""),
    ("data: {cut_tokens: [2, 4, 8]}", "data.cut_tokens", "[least, most]", "[2, 4, 8]", ""),
    ("tracking: {to: wandb}", "tracking.to", "a list of tensorboard, wandb", "'wandb'", ""),
    ("steps: 1e400", "steps", "integer > 0 or None", "inf", ""),
]
RANGES = [
    ("ppo: {learning_rate: -1e-5}", "ppo.learning_rate", "> 0", "-1e-05", ""),
    ("ppo: {learning_rate: .nan}", "ppo.learning_rate", "finite", "nan", ""),
    ("ppo: {learning_rate: nan}", "ppo.learning_rate", "finite", "nan", ""),
    ("ppo: {gamma: 1.5}", "ppo.gamma", "between 0 and 1", "1.5", ""),
    ("ppo: {cliprange: 0}", "ppo.cliprange", "> 0 and <= 1", "0", ""),
    ("ppo: {algorithm: ppo2}", "ppo.algorithm", "one of", "'ppo2'", "mean `ppo`"),
    ("ppo: {precision: bf61}", "ppo.precision", "one of", "'bf61'", "mean `bf16`"),
    ("model: {lora: {rank: 0}}", "model.lora.rank", "> 0", "0", ""),
    ("model: {lora: {dropout: 2}}", "model.lora.dropout", "between 0 and 1", "2", ""),
    ("data: {model_prompt_tokens: [8, 2]}", "data.model_prompt_tokens", "two", "[8, 2]", ""),
    ("sampling: {group_size: -2}", "sampling.group_size", "> 0", "-2", ""),
    ("reward: []", "reward", "a weight other than 0", "[]", ""),
    ("reward: [{label: A}, {output: odds}]", "reward[1].output", "one of", "'odds'", "log_odds"),
    ("schedule: {final: 2}", "schedule.final", "between 0 and 1", "2", ""),
    ("checkpoints: {best: reward}", "checkpoints.best", "a figure", "'reward'", ""),
    ("tracking: {to: [wanbd]}", "tracking.to", "a list of", "['wanbd']", "mean `wandb`"),
]
NAMES = [
    ("ppo: {lerning_rate: 1}", "ppo.lerning_rate", "not a setting", "1", "`ppo.learning_rate`"),
    ("ppo: {lr: 1e-5}", "ppo.lr", "not a setting", "1e-05", "`ppo.learning_rate`"),
    ("lr: 1e-5", "lr", "not a setting", "1e-05", "`ppo.learning_rate`"),
    ("learning_rate: 3", "learning_rate", "not a setting", "3", "`ppo.learning_rate`"),
    ("ppo: {learning-rate: 3}", "ppo.learning-rate", "not a setting", "3", "`ppo.learning_rate`"),
    ("ppo: {target_kl: 6}", "ppo.target_kl", "not a setting", "6", "`ppo.max_approxkl`"),
    ("lora: {rank: 8}", "lora", "not a setting", "{'rank': 8}", "`model.lora`"),
    ("rewards: []", "rewards", "not a setting", "[]", "`reward`"),
    ("sampling: {temperature: 0.7}", "sampling.temperature", "not", "0.7", "`ppo.temperature`"),
    ("reward: [{wieght: 2}]", "reward[0].wieght", "not a setting", "2", "`reward[0].weight`"),
]
CONTRADICTIONS = [
    ("{steps: 3, episodes: 512}", "episodes", "None beside `steps`", "512", "keep one"),
    ("{episodes: 30}", "episodes", ">= ppo.batch_size", "30", "(32)"),
    ("sampling: {group_size: 3}", "ppo.batch_size", "a multiple", "32", "group_size (3)"),
    ("sampling: {parts: 257}", "sampling.parts", "<= the prompts of a step", "257", "lower it"),
    (
        "{ppo: {algorithm: rloo}, sampling: {group_size: 1}}",
        "sampling.group_size",
        "> 1 with",
        "1",
        "set 4",
    ),
    (
        "{model: {reference: none}, ppo: {init_kl_coef: 0.1}}",
        *("ppo.init_kl_coef", "0 with", "0.1", "reference 'none'"),
    ),
    (
        "model: {reference: adapters-off}",
        "model.reference",
        "without `lora`",
        "adapters-off",
        "set",
    ),
    ("model: {lora: {}, unfrozen_layers: 2}", "model.unfrozen_layers", "None", "2", "keep one"),
    ("data: {min_tokens: 9, max_tokens: 8}", "data.min_tokens", "<= max_tokens", "9", "lower it"),
    (
        "data: {held_out: 0, held_out_prompts: a.txt}",
        "data.held_out_prompts",
        "None with held_out 0",
        "'a.txt'",
        "set it to null, or held_out > 0",
    ),
    (
        "data: {prompts: a.txt, chat: false, system: Be kind.}",
        "data.system",
        "None where texts are sent as they are",
        "'Be kind.'",
        "set chat: true",
    ),
    ("data: {prefixes: [a, b]}", "data.prefixes", "empty unless", "['a', 'b']", "kind 'control'"),
    ("data: {prefixes: [' ']}", "data.prefixes", "more than blanks", "[' ']", ""),
    ("reward: [{kind: endpoint}]", "reward[0].name", "given", "'starter'", "a classifier only"),
    ("reward: [{kind: function, name: f}]", "reward[0].name", "file.py:f", "'f'", "module:func"),
    ("reward: [{kind: control}]", "reward[0].targets", "for each prefix", "{}", "a range"),
    ("schedule: {warmup_steps: 100}", "schedule.warmup_steps", "< the steps", "100", "lower it"),
    (
        "stop: {patience: 2}\ndata: {held_out: 0}",
        "data.held_out",
        "> 0 with stop.patience",
        "0",
        "compares",
    ),
    (
        "reward: [{}, {kind: control, targets: {a: [0, 1]}}]\ndata: {prefixes: [b]}",
        "reward[1].targets",
        "each of data.prefixes ['b']",
        "{'a': [0.0, 1.0]}",
        "",
    ),
    ("pretraining: {text: a.txt}", "pretraining.text", "together", "'a.txt'", "pretraining_coef"),
    ("schedule: {kind: constant, final: 1}", "schedule.final", "left out", "1.0", "kind: linear"),
]


@pytest.mark.parametrize(
    ("text", "path", "rule", "value", "fix"), TYPES + RANGES + NAMES + CONTRADICTIONS
)
def test_a_wrong_setting_is_one_sentence_with_path_rule_value_and_fix(
    text, path, rule, value, fix, problems
):
    (problem,) = problems(text)
    assert problem.startswith(f"`{path}` ")
    assert rule in problem
    assert value in problem
    assert fix in problem


BAD_YAML = [
    # text, line, what is wrong
    ("ppo:\n\tgamma: 1", 2, "a tab; YAML is indented with spaces"),
    ("ppo:\n  gamma: 1\n gae_lambda: 1", 3, "block end"),
    ("steps: 1\n  seed: 2", 2, "mapping values are not allowed"),
    ("steps: 1\nseed: 2\nsteps: 3", 3, "`steps` must be set once, but is set in line 1 too"),
    ("ppo:\n  gamma: 1\nppo:\n  vf_coef: 1", 3, "`ppo` must be set once"),
    ("ppo: {gamma: 1, 'gamma': 1}", 1, "`gamma` must be set once"),
    ("data: {prefixes: [a, b", 1, "expected ',' or ']'"),
    ("steps: 1\n---\nsteps: 2", 2, "document"),
    ("out: @here", 1, "'@'"),
    ("ppo: *base", 1, "undefined alias"),
    ("data: &a {prefixes: [*a]}", 1, "recursive"),
    ("steps: 1\nout: !!python/object/apply:os.getcwd []", 2, "python/object"),
    ("out: !here runs", 1, "!here"),
    ("? [a]\n: 1", 1, "unhashable key"),
]


@pytest.mark.parametrize(("text", "line", "problem"), BAD_YAML)
def test_bad_yaml_is_one_sentence_with_file_and_line(text, line, problem, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_yaml(path)
    assert error.value.owner == str(path)
    (found,) = error.value.found
    assert found.startswith(f"line {line}: ")
    assert problem in found


@pytest.mark.parametrize("text", ["- steps: 3", "steps", "steps: 1\nout: \x07"])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"name: value, got|special characters"):
        read_yaml(path)


def repeated(form, first, levels=9):
    """A few hundred characters that stand for 9 ** levels values."""
    lines = [f"a0: &a0 {first}"]
    for n in range(1, levels + 1):
        lines.append(f"a{n}: &a{n} " + form.format(", ".join([f"*a{n - 1}"] * 9)))
    return "\n".join(lines)


TOO_MUCH = {
    "aliases": repeated("[{}]", "[x, x]"),
    "merges": repeated("{{<<: [{}], k: 1}}", "{x: 1}"),
    "levels": "a0: &a0 [1]\n" + "\n".join(f"a{n}: &a{n} [[*a{n - 1}]]" for n in range(1, 5000)),
    "text": f"a: &a {'x' * 99_999}\nb: [{'*a,' * 9999}]",
    "lists": "[" * 100_000,
    "mappings": "{a: " * 50_000,
    "lines": "".join(f"name{n}: 1\n" for n in range(18_000)),
    "length": "# \n" * 99_999,
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_file_that_says_too_much_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(TOO_MUCH[kind])
    started = time.process_time()
    for read in (read_yaml, lambda path: parse_yaml(path.read_text(), typed=True)):
        with pytest.raises((SettingsError, yaml.YAMLError), match="must (have|be) at most"):
            read(path)
    assert time.process_time() - started < 10


def test_of_many_problems_a_few_are_told():
    names = {f"name{n}": 1 for n in range(20_000)}
    flags = {"values": {}, "flags": [(n, "1") for n in names]}
    for settings, dashes in (({"values": names}, ""), (flags, "--")):
        with pytest.raises(SettingsError) as error:
            build(Recipe, **settings)
        assert len(str(error.value)) < 3000
        assert error.value.found[0].startswith(f"`{dashes}name0` is not a setting")
        assert error.value.found[-1] == "… and more."
    with pytest.raises(SettingsError) as error:
        build(Recipe, {"x" * 100_000: 1})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_told(encoding, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes("steps: 1\nout: größe".encode(encoding))
    with pytest.raises(SettingsError, match=r"UTF-8: .* byte 0xf[6f]"):
        read_yaml(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "sentiment.yaml")


# -- all at once -----------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(problems):
    found = problems(
        "model: {lora: {rank: 0, alpah: 3}}\n"
        "ppo: {lr: 1, gamma: 2, batch_size: many}\n"
        "reward: [{weight: heavy}, {kind: clasifier}]\n"
        "stop: 3\n"
        "seed: -1\n"
        "sed: 1\n",
        flags=[("reward.7.weight", "1"), ("data.prefixes", "[a"), ("ppo.vf-coeff", "1")],
    )
    assert [re.match(r"`(.*?)`", problem)[1] for problem in found] == [
        "--reward.7.weight",
        "--data.prefixes",
        "--ppo.vf-coeff",
        "model.lora.rank",
        "model.lora.alpah",
        "reward[0].weight",
        "reward[1].kind",
        "ppo.gamma",
        "ppo.batch_size",
        "ppo.lr",
        "stop",
        "seed",
        "sed",
    ]


def test_all_contradictions_are_told_at_once(problems):
    found = problems(
        "ppo: {algorithm: rloo, gamma: 0.9, whiten_rewards: true}\nmodel: {reference: shared-trunk}"
    )
    assert [re.match(r"`(.*?)`", problem)[1] for problem in found] == [
        "model.reference",
        "ppo.whiten_rewards",
        "ppo.gamma",
    ]
    found = problems("ppo: {batch_size: 10}\nsampling: {group_size: 4}\nstop: {patience: 3}")
    assert found == ["`ppo.batch_size` must be a multiple of group_size (4), got 10."]
    assert len(problems("{steps: 3, episodes: 5, schedule: {warmup_steps: 7}}")) == 3


def test_the_error_has_the_name_of_the_file(read):
    with pytest.raises(SettingsError, match=r"^recipe\.yaml: `steps` must be"):
        read("steps: 0")


def test_a_value_that_is_long_is_cut_in_the_message(problems):
    (problem,) = problems(f"recipe: [{', '.join(['abc'] * 100)}]")
    assert len(problem) < 400


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "---\n", "ppo:\nmodel: {}\n"])
def test_what_is_not_said_is_as_the_dataclass_has_it(text, read):
    assert read(text) == Recipe()


@pytest.mark.parametrize(
    "written", ["1e-5", "1E-5", "1.0e-05", "0.00001", "0.000_01", "+1e-5", ".00001"]
)
def test_numbers_are_numbers_however_they_are_written(written, read):
    assert read(f"ppo: {{learning_rate: {written}}}").ppo.learning_rate == 1e-5


@pytest.mark.parametrize("written", ["1000", "1_000", "1e3", "+1000", "01000"])
def test_whole_numbers_are_whole_numbers(written, read):
    steps = read(f"steps: {written}").steps
    assert steps == 1000
    assert type(steps) is int


def test_a_whole_number_for_a_number_becomes_one(read):
    target = read("ppo: {kl_target: 6}").ppo.kl_target
    assert type(target) is float


@pytest.mark.parametrize(
    ("written", "quiet"),
    [("true", True), ("True", True), ("yes", True), ("on", True), ("NO", False), ("off", False)],
)
def test_truths(written, quiet, read):
    assert read(f"quiet: {written}").quiet is quiet


@pytest.mark.parametrize("word", ["no", "yes", "1e5", "012", "0x1f", "2024-01-01", "true", "1:30"])
def test_a_text_is_a_text_whatever_it_looks_like(word, read):
    recipe = read(f"model: {{name: {word}}}\nsampling: {{stop_strings: [{word}, 'no']}}")
    assert recipe.model.name == word
    assert read(f"reward: [{{label: {word}}}]").reward[0].label == word
    assert recipe.sampling.stop_strings == (word, "no")


@pytest.mark.parametrize("word", ["null", "~", "none", "None", ""])
def test_none_has_several_names_and_a_text_in_quotes_is_none_of_them(word, read):
    assert read(f"data: {{subset: {word}}}").data.subset is None
    if word:
        assert read(f"data: {{subset: '{word}'}}").data.subset == word


def test_none_is_also_a_reference(read):
    text = "model: {{reference: {}}}\nppo: {{init_kl_coef: 0}}"
    assert read(text.format("none")).model.reference == "none"
    assert read(text.format("null")).model.reference is None


def test_ppo_has_the_seed_of_the_run_or_one_of_its_own(read):
    assert read("seed: 3").seeded_ppo.seed == 3
    assert read("{seed: 3, ppo: {seed: 0}}").seeded_ppo.seed == 3  # as older files have it
    assert read("{seed: 3, ppo: {seed: 5}}").seeded_ppo.seed == 5
    assert read("").seeded_ppo == PPOConfig.that_learns()


def test_sections_lists_and_mappings(read):
    recipe = read(
        "model: {lora: {rank: 4}}\n"
        "data: {prefixes: ['[neg] ', '[pos] '], cut_tokens: [2, 8]}\n"
        "reward:\n"
        "  - {kind: control, targets: {'[neg] ': [0, 0.25], '[pos] ': [0.75, 1]}}\n"
        "  - weight: -0.5\n"
    )
    assert recipe.model.lora == LoRAConfig(rank=4)
    assert recipe.data == DataConfig(prefixes=("[neg] ", "[pos] "), cut_tokens=(2, 8))
    control, other = recipe.reward
    assert control.targets == {"[neg] ": (0.0, 0.25), "[pos] ": (0.75, 1.0)}
    assert other == RewardConfig(weight=-0.5)


def test_anchors_and_merges(read):
    recipe = read(
        "reward:\n"
        "  - &first {label: NEGATIVE, weight: -1}\n"
        "  - <<: *first\n"
        "    weight: 2\n"
        "  - *first\n"
    )
    labels = [(reward.label, reward.weight) for reward in recipe.reward]
    assert labels == [("NEGATIVE", -1.0), ("NEGATIVE", 2.0), ("NEGATIVE", -1.0)]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("steps: 3\nout: größe".encode("utf-8-sig"))
    assert build(Recipe, read_yaml(path)).out == "größe"


def test_values_need_not_come_from_a_file():
    values = {"steps": 3, "data": {"prefixes": (), "chat": True}, "reward": ({"weight": 2},)}
    recipe = build(Recipe, values)
    assert recipe == Recipe(steps=3, data=DataConfig(chat=True), reward=(RewardConfig(weight=2.0),))
    assert build(Recipe, {"data": {"subset": "none"}}).data.subset == "none"
    with pytest.raises(SettingsError, match="`quiet` must be True or False, got 'true'"):
        build(Recipe, {"quiet": "true"})


def test_a_classifier_recipe(read, problems):
    recipe = read("{task: classifier, crop_words: [3, 9], labels: [a, b]}", ClassifierRecipe)
    assert recipe == ClassifierRecipe(crop_words=(3, 9), labels=("a", "b"))
    assert "`learning_rate`" in problems("lr: 3", ClassifierRecipe)[0]


# -- flags -----------------------------------------------------------------------------------------


def test_flags_count_more_than_the_file_and_the_file_more_than_defaults(read):
    text = "{steps: 5, seed: 4, ppo: {gamma: 0.5, vf_coef: 0.25}}"
    recipe = read(text, flags=[("steps", "6"), ("ppo.gamma", "0.75"), ("steps", "7")])
    expected = PPOConfig.that_learns(gamma=0.75, vf_coef=0.25)
    assert recipe == Recipe(steps=7, seed=4, ppo=expected)


@pytest.mark.parametrize(
    ("path", "text", "where", "value"),
    [
        ("ppo.learning-rate", "1e-5", lambda r: r.ppo.learning_rate, 1e-5),
        ("ppo.max_grad_norm", "none", lambda r: r.ppo.max_grad_norm, None),
        ("quiet", "TRUE", lambda r: r.quiet, True),
        ("model.lora", "{rank: 8}", lambda r: r.model.lora, LoRAConfig(rank=8)),
        ("model.lora.rank", "8", lambda r: r.model.lora, LoRAConfig(rank=8)),
        ("model.lora", "{}", lambda r: r.model.lora, LoRAConfig()),
        ("data.template", "Review: {text}", lambda r: r.data.template, "Review: {text}"),
        ("data.system", '"none"', lambda r: r.data.subset, None),
        ("data.split", "'a b'", lambda r: r.data.split, "a b"),
        ("data.cut-tokens", "[2, 4]", lambda r: r.data.cut_tokens, (2, 4)),
        ("sampling.stop_strings", '["a ", "no"]', lambda r: r.sampling.stop_strings, ("a ", "no")),
        ("reward.0.weight", "-0.5", lambda r: r.reward, (RewardConfig(weight=-0.5),)),
        ("reward[0].label", "1", lambda r: r.reward, (RewardConfig(label="1"),)),
        ("reward.1.weight", "2", lambda r: r.reward, (RewardConfig(), RewardConfig(weight=2.0))),
        ("reward", "[{weight: 3}]", lambda r: r.reward, (RewardConfig(weight=3.0),)),
    ],
)
def test_a_flag_for_each_kind_of_setting(path, text, where, value, read):
    before = "data: {chat: true}"
    assert where(read(before, flags=[(path, text)])) == value


def test_a_flag_for_a_section_leaves_what_it_does_not_name(read):
    text = "model: {lora: {rank: 4, alpha: 8}}"
    flags = [("model.lora", "{rank: 2}"), ("model.lora.dropout", "0.5")]
    lora = read(text, flags=flags).model.lora
    assert lora == LoRAConfig(rank=2, alpha=8.0, dropout=0.5)
    assert read(text, flags=[("model.lora", "none")]).model.lora is None


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        (
            "ppo.lerning-rate",
            "1",
            "`--ppo.lerning-rate` is not a setting, got '1'. Did you mean `--ppo.learning-rate`?",
        ),
        ("modl.lora.rnk", "1", "Did you mean `--model.lora.rank`?"),
        ("steps.many", "1", "`--steps.many` is not a setting"),
        ("reward.2.weight", "1", "`--reward.2.weight` must have a number from 0 to 1, got 2"),
        ("reward.x.weight", "1", "`--reward.x.weight` is not a setting"),
        ("reward.0", "1", "`--reward.0` must be a RewardConfig {kind: …}, got 1"),
        ("reward.0.wieght", "1", "Did you mean `--reward.0.weight`?"),
        ("data.cut_tokens", "[1", "`--data.cut-tokens` must be two integers > 0, [least, most] or"),
        ("model.lora", "{rank: [", "or None, as YAML, got '{rank: [': line 1"),
        ("tracking.to", "wandb", "`--tracking.to` must be a list of tensorboard, wandb"),
        ("ppo", "3", "`--ppo` must be a PPOConfig {algorithm: …}, got 3"),
        ("data.subset", "", "`--data.subset` must be a text or None, got ''"),
    ],
)
def test_a_bad_flag(path, text, message, problems):
    (problem,) = problems("", flags=[(path, text)])
    assert message in problem


def test_what_a_flag_has_done_is_not_the_fault_of_the_file():
    values = {"ppo": {"gama": 1, "batch_size": 8}, "steps": "many"}
    flags = [("steps", "3"), ("ppo.batch_size", "0"), ("model.lora", "{rank: x}")]
    with pytest.raises(SettingsError) as error:
        build(Recipe, values, flags=flags, owner="mine.yaml")
    assert error.value.owner == "mine.yaml"  # which has a fault of its own
    assert [told.split()[0] for told in error.value.found] == [
        *("`--model.lora.rank`", "`--ppo.batch-size`", "`ppo.gama`")
    ]
    with pytest.raises(SettingsError) as error:
        build(Recipe, {}, flags=flags, owner="mine.yaml")
    assert error.value.owner == "command line"


def test_flags_change_a_copy():
    values = {"ppo": {"gamma": 0.5}, "reward": [{"weight": 1}]}
    flags = [("ppo.gamma", "1"), ("reward.0.weight", "2")]
    recipe = build(Recipe, values, flags=flags)
    assert values == {"ppo": {"gamma": 0.5}, "reward": [{"weight": 1}]}
    assert recipe == Recipe(
        ppo=PPOConfig.that_learns(gamma=1.0), reward=(RewardConfig(weight=2.0),)
    )


# -- what is written -------------------------------------------------------------------------------

words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.text("aeno:# -[]{}'\"\\\n\t,&*!|>%@`~?.1", min_size=1, max_size=8),
    st.sampled_from(
        "no null none ~ 1e5 1e-5 0x1f 012 1_0 .inf true y - ? # --- ... : a: a:b =".split()
    ),
    st.sampled_from(["[negative] ", " a", "a ", "\ufeff", "\u2028", "😀", "größe", "\x7f", "\x85"]),
)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
rates = st.floats(1e-30, 100)
shares = st.floats(0, 1)
counts = st.integers(1, 2**62)


def maybe(values):
    return st.none() | values


@st.composite
def ranges(draw):
    low, high = sorted((draw(shares), draw(shares)))
    return (low, high) if low < high else (0.0, 1.0)


@st.composite
def recipes(draw):
    prefixes = tuple(draw(st.lists(words.filter(str.strip), max_size=3, unique=True)))
    rewards = draw(
        st.lists(
            st.builds(
                RewardConfig,
                name=words,
                label=words,
                output=st.sampled_from(["logit", "probability", "log_odds"]),
                weight=positive | positive.map(lambda x: -x),
            ),
            min_size=1,
            max_size=2,
        )
    )
    if prefixes:
        targets = {prefix: draw(ranges()) for prefix in prefixes}
        rewards.append(RewardConfig(kind="control", targets=targets))
    lora = draw(maybe(st.builds(LoRAConfig, rank=counts, alpha=positive, target_modules=words)))
    return Recipe(
        model=ModelConfig(
            name=draw(words),
            revision=draw(maybe(words)),
            lora=lora,
            reference=draw(st.sampled_from([None, "copy"])),
        ),
        data=DataConfig(
            prompts=draw(words.filter(lambda word: "*" not in word)),
            subset=draw(maybe(words)),
            template=draw(maybe(words)),
            prefixes=prefixes,
            cut_tokens=draw(maybe(st.tuples(counts, counts).map(lambda pair: tuple(sorted(pair))))),
            shuffle=draw(st.booleans()),
        ),
        sampling=SamplingConfig(stop_strings=tuple(draw(st.lists(words, max_size=3)))),
        reward=tuple(rewards),
        ppo=PPOConfig(
            learning_rate=draw(rates),
            gamma=draw(shares),
            init_kl_coef=draw(positive),
            clip_scores=draw(maybe(positive)),
        ),
        steps=draw(maybe(counts)),
        schedule=ScheduleConfig(final=draw(shares)),
        checkpoints=CheckpointConfig(
            every=draw(counts), mode=draw(st.sampled_from(["min", "max"]))
        ),
        stop=StopConfig(kl=draw(maybe(positive))),
        tracking=TrackingConfig(to=tuple(draw(st.lists(st.sampled_from(["wandb", "mlflow"]))))),
        out=draw(words),
        quiet=draw(st.booleans()),
    )


@properties
@given(recipes(), st.booleans())
def test_what_is_written_reads_back_to_the_same(recipe, texts):
    text = dump(recipe, texts=texts)
    again = build(Recipe, parse_yaml(text) or {})
    assert again == recipe
    assert repr(again) == repr(recipe)  # 1.0 is not 1, and -0.0 not 0.0
    assert differences(again, recipe) == {}
    assert build(Recipe, as_mapping(recipe)) == recipe


@properties
@given(recipes())
def test_other_readers_of_yaml_read_the_same_values(recipe):
    import yaml

    assert yaml.safe_load(dump(recipe)) == as_mapping(recipe)


@pytest.mark.parametrize(
    ("value", "written"),
    [("starter", "starter"), ("no", "'no'"), ("null", "'null'"), ("none", "'none'")],
)
def test_texts_are_in_quotes_where_they_need_them(value, written):
    assert f"\nout: {written}\n" in dump(Recipe(out=value))


@pytest.mark.parametrize(
    ("value", "written"), [(1e-05, "1.0e-05"), (1.41e-05, "1.41e-05"), (0.1, "0.1"), (3, "3.0")]
)
def test_numbers_are_written_so_that_yaml_knows_them(value, written):
    assert f"\n  learning_rate: {written}\n" in dump(Recipe(ppo=PPOConfig(learning_rate=value)))


def test_the_texts_under_the_fields_are_comments():
    text = dump(Recipe(model=ModelConfig(lora=LoRAConfig())), texts=True)
    assert "\nppo:\n  # How to learn from the scores. " in text
    assert "\n  lora:\n    # Rank of the update of each matrix.\n    rank: 16\n" in text
    assert "\n# Seed of everything that is random: " in text
    assert max(map(len, text.splitlines())) <= 100


def test_as_mapping_is_plain_and_a_copy():
    reward = RewardConfig(kind="control", targets={"a": (0, 1)})
    recipe = Recipe(reward=(reward,), data=DataConfig(prefixes=("a",)))
    mapping = as_mapping(recipe)
    assert json.loads(json.dumps(mapping)) == mapping
    mapping["reward"][0]["targets"]["a"] = None
    assert recipe.reward[0].targets == {"a": (0, 1)}


def test_differences():
    one = Recipe(steps=3, reward=(RewardConfig(), RewardConfig(weight=2.0)))
    other = Recipe(
        steps=4,
        ppo=PPOConfig.that_learns(gamma=0.5),
        model=ModelConfig(lora=LoRAConfig(rank=2)),
        reward=(RewardConfig(label="A"),),
    )
    found = differences(one, other)
    assert found["steps"] == (3, 4)
    assert found["ppo.gamma"] == (1.0, 0.5)
    assert found["reward[0].label"] == ("POSITIVE", "A")
    assert found["reward[1]"] == (as_mapping(RewardConfig(weight=2.0)), None)
    assert found["model.lora"][1]["rank"] == 2
    assert len(found) == 5
    assert differences(one, replace(one)) == {}
    # a whole number that stands for a number is no difference
    assert differences(Recipe(ppo=PPOConfig.that_learns(kl_target=6)), Recipe()) == {}


# -- what there is to set --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Recipe, ClassifierRecipe, RewardRecipe, PreferencesRecipe])
def test_every_setting_has_a_text_and_a_kind(cls):
    for setting in paths(cls):
        assert setting.text, setting.path
        assert setting.text[0] in string.ascii_letters + "αβγλε", setting.path
        assert setting.kind, setting.path
        assert setting.default, setting.path
    assert len({setting.path for setting in paths(cls)}) == len(paths(cls))


def test_paths_name_type_default_and_text():
    found = {setting.path: setting for setting in paths(Recipe)}
    assert found["ppo.learning_rate"][1:4] == (
        "a finite number > 0 and <= 100, or auto",
        "auto",
        "Step size of Adam: it moves every weight by about as much. auto: the rate that makes the\n"
        "policy go as far in each step as `auto_approxkl` says; a schedule then scales that way.",
    )
    assert found["model.lora"].default == "null"
    assert found["model.lora.rank"].default == "16"
    assert found["reward.N.output"].kind == "one of logit, probability, log_odds"
    assert found["data.cut_tokens"].kind == "two integers > 0, [least, most] or None"
    assert found["data.model_prompt_tokens"].default == "[2, 8]"
    assert found["quiet"].is_truth
    assert "ppo" not in found


def test_every_setting_can_be_set_by_its_path():
    """The default, written as the list has it, is what a flag gives."""
    flags = [
        (setting.path.replace(".N", ".0"), setting.default)
        for setting in paths(Recipe)
        if not setting.path.startswith(("model.lora.", "environment."))
    ]
    assert build(Recipe, {}, flags=flags) == Recipe()


def test_values_of_parameters_are_checked_as_fields_are():
    check_values("X", {"a": (Positive, np.float32(0.5)), "b": (Count | None, None)})
    with pytest.raises(SettingsError) as error:
        check_values(
            "X", {"a": (Positive, True), "b": (Count, 0), "c": (Count, 1)}, ["`d` is bad."]
        )
    assert error.value.owner == "X"
    assert error.value.found == [
        "`d` is bad.",
        "`a` must be a finite number > 0, got True.",
        "`b` must be an integer > 0, got 0.",
    ]


def test_python_may_give_lists_and_gets_what_cannot_change():
    data = DataConfig(prefixes=["[a] ", "[b] "], cut_tokens=[2, 5])
    assert (data.prefixes, data.cut_tokens) == (("[a] ", "[b] "), (2, 5))
    reward = RewardConfig(kind="control", targets={"[a] ": [0.0, 0.25]})
    assert reward.targets == {"[a] ": (0.0, 0.25)}
    assert Recipe(reward=[RewardConfig()]).reward == (RewardConfig(),)
    with pytest.raises(SettingsError, match=r"`cut_tokens` must be two integers > 0"):
        DataConfig(cut_tokens=[5, 2])


def test_python_may_give_numbers_of_numpy():
    config = PPOConfig(gamma=np.float64(0.5), batch_size=np.int64(8), tf_adam=np.bool_(True))
    assert (config.gamma, config.batch_size, config.tf_adam) == (0.5, 8, True)
    assert [type(x) for x in (config.gamma, config.batch_size, config.tf_adam)] == [
        float,
        int,
        bool,
    ]
    with pytest.raises(SettingsError, match="`gamma` must be"):
        PPOConfig(gamma=np.ones(1))


def test_a_section_of_another_class_is_refused_and_too_many_values_too():
    told = r"`ppo` must be a PPOConfig \{algorithm: …\}, got \{'g.*: pass PPOConfig\(\*\*\{…\}\)\.$"
    with pytest.raises(SettingsError, match=told):
        Recipe(ppo={"gamma": 0.5})
    with pytest.raises(SettingsError, match=r"`lora` must be a LoRAConfig .*pass LoRAConfig\("):
        ModelConfig(lora={"rank": 2})
    with pytest.raises(TypeError, match="too many positional arguments"):
        LoRAConfig(1, 2.0, 0.5, "a", 5)
    assert LoRAConfig(1, 2.0) == LoRAConfig(rank=1, alpha=2.0)
    with pytest.raises(TypeError, match="multiple values for argument 'algorithm'"):
        PPOConfig("rloo", algorithm="ppo")


@section
class Pair:
    """A section with a field that has no default."""

    count: Count
    share: Share = 0.5


@section
class Pairs:
    """A section with others inside of it."""

    first: Pair
    others: Annotated[tuple[Pair, ...], "a list of pairs"] = ()


def test_a_setting_that_must_be_given_is_named():
    with pytest.raises(SettingsError) as error:
        build(Pairs, {"others": [{"share": 1}], "first": {"shares": 2}})
    assert error.value.found == [
        "`first.count` must be given: an integer > 0.",
        "`first.shares` is not a setting, got 2. Did you mean `first.share`?",
        "`others[0].count` must be given: an integer > 0.",
    ]
    with pytest.raises(SettingsError, match="Pair: `count` must be given: an integer > 0"):
        Pair(share=1.0)
    with pytest.raises(SettingsError, match=r"Pairs: `first` must be given: a Pair \{count: …\}"):
        Pairs()


@pytest.mark.parametrize(
    "values", [{"foo": None}, {"ppo": {"foo": None}}, {"reward": [{"kind:function": None}]}]
)
def test_what_is_no_setting_is_told_though_it_is_nothing(values):
    with pytest.raises(SettingsError, match="is not a setting, got None"):
        build(Recipe, values)
