"""Recipes as text: what is read, what is refused and in which words, and what is written."""

import importlib
import json
import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import properties
from trl import config as settings
from trl.config import (
    PPOConfig,
    Problems,
    SettingsError,
    as_mapping,
    build,
    differences,
    dump,
    override,
    paths,
    read_yaml,
)
from trl.config.recipe import (
    CheckpointConfig,
    ClassifierRecipe,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    Recipe,
    RewardConfig,
    SamplingConfig,
    ScheduleConfig,
    StopConfig,
    TrackingConfig,
)


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


def test_the_default_of_another_kind_is_no_advice(problems):
    assert problems("reward: [{kind: function, name: actors}]") == [
        "`reward[0].name` must be package.module:function or file.py:function for kind 'function', "
        "got 'actors'."
    ]


# -- mutated files: each of them has one problem ---------------------------------------------------

TYPES = [
    # text, path, rule, value, fix
    ("ppo: {learning_rate: fast}", "ppo.learning_rate", "number > 0", "'fast'", "is 1.41e-05"),
    ("ppo: {learning_rate: [1.0e-5]}", "ppo.learning_rate", "number > 0", "[1e-05]", "is 1.41e"),
    ("ppo: {learning_rate: true}", "ppo.learning_rate", "number > 0", "True", "is 1.41e-05"),
    ("ppo: {batch_size: 12.5}", "ppo.batch_size", "integer > 0", "12.5", "is 256"),
    ("ppo: {batch_size: }", "ppo.batch_size", "integer > 0", "None", "is 256"),
    ("ppo: {batch_size: 1__0}", "ppo.batch_size", "integer > 0", "'1__0'", "is 256"),
    ("ppo: {adaptive_kl: maybe}", "ppo.adaptive_kl", "True or False", "'maybe'", "is true"),
    ("ppo: {adaptive_kl: 1}", "ppo.adaptive_kl", "True or False", "1", "is true"),
    ("ppo: {adaptive_kl: 'yes'}", "ppo.adaptive_kl", "True or False", "'yes'", "is true"),
    ("ppo: 1.0e-5", "ppo", "settings of its own", "1e-05", "write ppo: {algorithm: …}"),
    ("ppo: [{gamma: 1}]", "ppo", "settings of its own", "[{'gamma': 1}]", "write ppo: {"),
    ("model: {lora: yes}", "model.lora", "settings of its own", "'yes'", "write lora: {rank: …}"),
    ("model: {name: }", "model.name", "a text", "None", "is starter"),
    ("model: {name: [gpt2]}", "model.name", "a text", "['gpt2']", "is starter"),
    ("reward: {kind: endpoint}", "reward", "a list", "{'kind': 'endpoint'}", "with a dash, - kind"),
    ("reward: [classifier]", "reward[0]", "settings of its own", "'classifier'", "write - kind: …"),
    ("data: {prefixes: 'a '}", "data.prefixes", "a list of texts", "'a '", 'write ["a "]'),
    ("data: {cut_tokens: 4}", "data.cut_tokens", "two integers > 0", "4", "[least, most]"),
    ("data: {cut_tokens: [2, 4, 8]}", "data.cut_tokens", "two integers", "[2, 4, 8]", "[least,"),
    ("tracking: {to: wandb}", "tracking.to", "a list of texts", "'wandb'", "write [wandb]"),
    ("steps: 1e400", "steps", "integer > 0", "inf", "or None"),
]
RANGES = [
    ("ppo: {learning_rate: -1e-5}", "ppo.learning_rate", "> 0", "-1e-05", "is 1.41e-05"),
    ("ppo: {learning_rate: .nan}", "ppo.learning_rate", "finite", "nan", "is 1.41e-05"),
    ("ppo: {gamma: 1.5}", "ppo.gamma", "between 0 and 1", "1.5", "is 1.0"),
    ("ppo: {cliprange: 0}", "ppo.cliprange", "> 0 and <= 1", "0.0", "is 0.2"),
    ("ppo: {algorithm: ppo2}", "ppo.algorithm", "one of", "'ppo2'", "mean `ppo`"),
    ("ppo: {precision: bf61}", "ppo.precision", "one of", "'bf61'", "mean `bf16`"),
    ("model: {lora: {rank: 0}}", "model.lora.rank", "> 0", "0", "is 16"),
    ("model: {lora: {dropout: 2}}", "model.lora.dropout", "between 0 and 1", "2.0", "is 0.0"),
    ("data: {model_prompt_tokens: [8, 2]}", "data.model_prompt_tokens", "two", "(8, 2)", "[2, 8]"),
    ("sampling: {group_size: -2}", "sampling.group_size", "> 0", "-2", "is 1"),
    ("reward: []", "reward", "at least one scorer", "()", "a list"),
    ("reward: [{label: A}, {output: odds}]", "reward[1].output", "one of", "'odds'", "log_odds"),
    ("schedule: {final: 2}", "schedule.final", "between 0 and 1", "2.0", "is 0.0"),
    ("checkpoints: {best: reward}", "checkpoints.best", "a figure", "'reward'", "held_out/…"),
    ("tracking: {to: [wanbd]}", "tracking.to", "one of", "'wanbd'", "mean `wandb`"),
]
NAMES = [
    ("ppo: {lerning_rate: 1}", "ppo.lerning_rate", "not a setting", "1", "`ppo.learning_rate`"),
    ("ppo: {lr: 1e-5}", "ppo.lr", "not a setting", "1e-05", "`ppo.learning_rate`"),
    ("lr: 1e-5", "lr", "not a setting", "1e-05", "`ppo.learning_rate`"),
    ("learning_rate: 3", "learning_rate", "not a setting", "3", "`ppo.learning_rate`"),
    ("ppo: {learning-rate: 3}", "ppo.learning-rate", "not a setting", "3", "`ppo.learning_rate`"),
    ("ppo: {target_kl: 6}", "ppo.target_kl", "not a setting", "6", "`ppo.max_approxkl`"),
    ("ppo.gamma: 0.9", "ppo.gamma", "not a setting", "0.9", "a section, ppo: {gamma: …}"),
    ("lora: {rank: 8}", "lora", "not a setting", "{'rank': 8}", "`model.lora`"),
    ("rewards: []", "rewards", "not a setting", "[]", "`reward`"),
    ("stop: {after: 3}", "stop.after", "not a setting", "3", "are kl, patience, min_gain"),
    ("sampling: {temperature: 0.7}", "sampling.temperature", "not", "0.7", "`ppo.temperature`"),
    ("reward: [{wieght: 2}]", "reward[0].wieght", "not a setting", "2", "`reward[0].weight`"),
]
CONTRADICTIONS = [
    ("{steps: 3, episodes: 512}", "episodes", "None beside `steps`", "512", "keep one"),
    ("{episodes: 100}", "episodes", ">= ppo.batch_size", "100", "(256)"),
    ("sampling: {group_size: 3}", "ppo.batch_size", "a multiple", "256", "group_size (3)"),
    ("ppo: {algorithm: rloo}", "sampling.group_size", "> 1 for", "1", "set 4"),
    ("model: {reference: none}", "ppo.init_kl_coef", "0 with", "0.2", "reference 'none'"),
    (
        "model: {reference: adapters-off}",
        "model.reference",
        "without `lora`",
        "'adapters-off'",
        "set",
    ),
    ("model: {lora: {}, unfrozen_layers: 2}", "model.unfrozen_layers", "None", "2", "keep one"),
    ("data: {min_tokens: 9, max_tokens: 8}", "data.min_tokens", "<= max_tokens", "9", "lower it"),
    ("data: {system: Be kind.}", "data.system", "None unless", "`chat`", "set chat: true"),
    (
        "data: {prefixes: [a, b]}",
        "data.prefixes",
        "empty unless",
        "['a', 'b']",
        "of kind 'control'",
    ),
    ("reward: [{kind: endpoint}]", "reward[0].name", "given", "'endpoint'", "a classifier only"),
    (
        "reward: [{kind: function, name: f}]",
        "reward[0].name",
        "file.py:f",
        "'f'",
        "module:function",
    ),
    ("reward: [{kind: control}]", "reward[0].targets", "for each prefix", "none", "a range"),
    ("schedule: {warmup_steps: 100}", "schedule.warmup_steps", "< the steps", "100", "lower it"),
    (
        "stop: {patience: 2}\ndata: {held_out: 0}",
        "data.held_out",
        "> 0",
        "stop.patience",
        "compares",
    ),
    (
        "reward: [{}, {kind: control, targets: {a: [0, 1]}}]\ndata: {prefixes: [b]}",
        "reward[1].targets",
        "each of data.prefixes",
        "['a']",
        "['b']",
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
    # text, line, what is wrong, what helps
    ("ppo:\n\tgamma: 1", 2, "a tab", "use spaces"),
    ("ppo:\n  gamma: 1\n gae_lambda: 1", 3, "'gae_lambda: 1'", "mend the spaces before it"),
    ("steps: 1\n  seed: 2", 2, "'seed: 2'", "mend the spaces"),
    ("out: runs: here", 1, "'out: runs: here'", "in quotes"),
    ("steps: 1\nseed: 2\nsteps: 3", 3, "`steps` must be set once", "in line 1 too: keep one"),
    ("ppo:\n  gamma: 1\nppo:\n  vf_coef: 1", 3, "`ppo` must be set once", "keep one"),
    ("- steps: 3", 1, "name: value", "a list"),
    ("steps", 1, "name: value", "'steps'"),
    ("data: {prefixes: [a, b", 1, "expected ',' or ']'", "close what is open"),
    ("out: 'runs", 1, "unexpected end", "close what is open"),
    ("steps: 1\n---\nsteps: 2", 2, "one document", "take out the line ---"),
    ("out: @here", 1, "'@'", "in quotes"),
    ("ppo: *base", 1, "undefined alias", "&name"),
    ("data: &a {prefixes: [*a]}", 1, "inside itself", "take it out"),
    ("steps: 1\nout: !!python/object/apply:os.getcwd []", 2, "!!python/object", "be left out"),
    ("out: !!python/name:os.system", 1, "!!python/name", "be left out"),
    ("out: !here runs", 1, "!here", "be left out"),
    ("? [a]\n: 1", 1, "a word", "got a list"),
    ("<<: 3", 1, "<<", "the alias of a section"),
    ("steps: 1\nout: \x07", 2, r"'\x07'", "take it out"),
]


@pytest.mark.parametrize(("text", "line", "problem", "fix"), BAD_YAML)
def test_bad_yaml_is_one_sentence_with_file_line_and_fix(text, line, problem, fix, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_yaml(path)
    assert error.value.owner == str(path)
    (found,) = error.value.found
    assert found.startswith(f"line {line}: ")
    assert problem in found
    assert fix in found


def test_there_are_fifty_mutated_files():
    assert len(TYPES + RANGES + NAMES + CONTRADICTIONS + BAD_YAML) >= 50


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_told_with_its_line(encoding, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes("steps: 1\nout: größe".encode(encoding))
    with pytest.raises(SettingsError, match=r"line [12]: .*UTF-8, got the byte 0xf[6f]: save it"):
        read_yaml(path)


def test_a_file_that_is_not_there_names_the_closest(tmp_path):
    (tmp_path / "sentiment.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no file .*sentimnt\.yaml\. .*sentiment\.yaml\?"):
        read_yaml(tmp_path / "sentimnt.yaml")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        read_yaml(tmp_path)


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
        "reward.7.weight",
        "data.prefixes",
        "model.lora.alpah",
        "model.lora.rank",
        "ppo.lr",
        "ppo.vf_coeff",
        "ppo.gamma",
        "ppo.batch_size",
        "reward[0].weight",
        "reward[1].kind",
        "stop",
        "sed",
        "seed",
    ]


def test_contradictions_are_told_beside_other_problems(problems):
    found = problems("ppo: {gamma: 2, batch_size: 10}\nsampling: {group_size: 4}\nsteps: 3")
    assert len(found) == 2
    assert found[0].startswith("`ppo.gamma` must be")
    assert found[1] == "`ppo.batch_size` must be a multiple of sampling.group_size (4), got 10."


@pytest.mark.parametrize(
    "text",
    [
        "step: 500\nschedule: {warmup_steps: 150}",  # a typo of steps
        "steps: many\nschedule: {warmup_steps: 150}",
        "episodes: many\nschedule: {warmup_steps: 150}",
        "ppo: {init_kl_coef: none}\nmodel: {reference: none}",
        "ppo: {batch_size: x}\nsampling: {group_size: 3}",
        "model: {lora: 8, reference: adapters-off}",
        "model: {unfrozen_layers: two, reference: shared-trunk}",
        "reward: [{kind: contrl, targets: {a: [0, 1]}}]\ndata: {prefixes: [a]}",
        "reward: [{kind: control, targets: {a: [0, 2]}}]\ndata: {prefixes: [a]}",
        "reward: [{kind: endpoint, name: 3.5, nam: 3}]",
        "data: {prefixes: a}\nreward: [{kind: control, targets: {a: [0, 1]}}]",
    ],
)
def test_no_problem_is_told_that_follows_from_another(text, problems):
    assert len(problems(text)) == 1


def test_a_setting_is_judged_itself_though_a_typo_may_mean_it(problems):
    assert len(problems("ppo: {learning_rate: -1, lr: 1}")) == 2


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
    "written", ["1e-5", "1E-5", "1.0e-05", "0.00001", "'1e-5'", "0.000_01", "+1e-5", ".00001"]
)
def test_numbers_are_numbers_however_they_are_written(written, read):
    assert read(f"ppo: {{learning_rate: {written}}}").ppo.learning_rate == 1e-5


@pytest.mark.parametrize("written", ["1000", "1_000", "1e3", "+1000", "'1000'", "01000"])
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


@dataclass(frozen=True)
class Inner:
    a: int = 1
    b: int = 2


@dataclass(frozen=True)
class Unchecked:
    """Its fields have no checks of their own, one has no default, a section another one."""

    name: str
    share: float = 0.5
    kind: Literal["x", "y"] = "x"
    counts: Mapping[str, int] = field(default_factory=dict)
    inner: Inner = field(default_factory=lambda: Inner(a=7))


def test_a_dataclass_without_checks_is_checked_by_its_types():
    with pytest.raises(SettingsError) as error:
        build(Unchecked, {"name": 3, "share": "big", "kind": "z", "counts": {"a": "b"}})
    rules = ["a text", "a number", "one of x, y", "a mapping from texts to a whole number"]
    for rule, name in zip(rules, ("name", "share", "kind", "counts"), strict=True):
        assert any(found.startswith(f"`{name}` must be {rule}") for found in error.value.found)
    assert len(error.value.found) == 4


def test_a_field_without_a_default_must_be_set():
    with pytest.raises(SettingsError, match="`name` must be set"):
        build(Unchecked, {})
    assert build(Unchecked, {"name": "me"}).name == "me"


def test_a_section_begins_with_the_defaults_that_it_has_there():
    assert build(Unchecked, {"name": "me", "inner": {"b": 3}}).inner == Inner(a=7, b=3)


def test_a_fault_of_a_dataclass_is_no_fault_of_the_settings():
    @dataclass(frozen=True)
    class Faulty:
        a: int = 1

        def __post_init__(self):
            raise ZeroDivisionError

    globals()["Faulty"] = Faulty
    with pytest.raises(ZeroDivisionError):
        build(Faulty, {"a": 2})


# -- flags -----------------------------------------------------------------------------------------


def test_flags_count_more_than_the_file_and_the_file_more_than_defaults(read):
    text = "{steps: 5, seed: 4, ppo: {gamma: 0.5, vf_coef: 0.25}}"
    recipe = read(text, flags=[("steps", "6"), ("ppo.gamma", "0.75"), ("steps", "7")])
    expected = PPOConfig(gamma=0.75, vf_coef=0.25)
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
        ("data.split", "'a", lambda r: r.data.split, "'a"),
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
        ("ppo.lerning-rate", "1", "`ppo.lerning_rate` is not a setting, got 1. Did you mean"),
        ("modl.lora.rnk", "1", "Did you mean `model.lora.rank`?"),
        ("steps.many", "1", "`steps.many` is not a setting"),
        ("reward.2.weight", "1", "`reward.2.weight` must have a number from 0 to 1"),
        ("reward.x.weight", "1", "`reward.x.weight` must have a number from 0 to 1"),
        ("reward.0", "1", "`reward.0` must have a number from 0 to 1 and the name of a setting"),
        ("reward.0.wieght", "1", "Did you mean `reward[0].weight`?"),
        ("data.cut_tokens", "[1", "`data.cut_tokens` must be YAML, as […, …], got '[1'"),
        ("model.lora", "{rank: [", "`model.lora` must be YAML, as {name: …}"),
        ("tracking.to", "wandb", "`tracking.to` must be a list of texts, got 'wandb': write [wan"),
        ("ppo", "3", "`ppo` must have settings of its own, got 3"),
        ("data.subset", "", "`data.subset` must be a text or None, not an empty one, got ''"),
    ],
)
def test_a_bad_flag(path, text, message, problems):
    (problem,) = problems("", flags=[(path, text)])
    assert message in problem


def test_a_flag_inside_of_what_is_wrong_in_the_file_is_no_second_problem(problems):
    flags = [("reward.0.weight", "2")]
    assert len(problems("reward: {weight: 1}", flags=flags)) == 1
    assert len(problems("reward: [3]", flags=flags)) == 1


def test_override_changes_a_copy():
    values = {"ppo": {"gamma": 0.5}, "reward": [{"weight": 1}]}
    flags = [("ppo.gamma", "1"), ("reward.0.weight", "2")]
    changed = override(Recipe, values, flags)
    assert values == {"ppo": {"gamma": 0.5}, "reward": [{"weight": 1}]}
    assert build(Recipe, changed) == Recipe(
        ppo=PPOConfig(gamma=1.0), reward=(RewardConfig(weight=2.0),)
    )
    with pytest.raises(SettingsError, match=r"reward\.9\.weight"):
        override(Recipe, {}, [("reward.9.weight", "2")])


# -- what is written -------------------------------------------------------------------------------

words = st.one_of(
    st.text(min_size=1, max_size=12),
    st.text("aeno:# -[]{}'\"\\\n\t,&*!|>%@`~?.1", min_size=1, max_size=8),
    st.sampled_from(
        "no null none ~ 1e5 1e-5 0x1f 012 1_0 .inf true y - ? # --- ... : a: a:b =".split()
    ),
    st.sampled_from(
        ["[negative] ", " a", "a ", "\ud800", "\ufeff", "\u2028", "😀", "größe", "\x7f", "\x85"]
    ),
)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
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
    prefixes = tuple(draw(st.lists(words, max_size=3, unique=True)))
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
            prompts=draw(words),
            subset=draw(maybe(words)),
            template=draw(maybe(words)),
            prefixes=prefixes,
            cut_tokens=draw(maybe(st.tuples(counts, counts).map(lambda pair: tuple(sorted(pair))))),
            shuffle=draw(st.booleans()),
        ),
        sampling=SamplingConfig(stop_strings=tuple(draw(st.lists(words, max_size=3)))),
        reward=tuple(rewards),
        ppo=PPOConfig(
            learning_rate=draw(positive),
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
def test_what_is_written_reads_back_to_the_same(recipe, skip_defaults):
    from trl.config.yaml_text import parse_yaml

    text = dump(recipe, skip_defaults=skip_defaults)
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
    [
        ("starter", "starter"),
        ("runs/a-b_c.d", "runs/a-b_c.d"),
        ("rewards.py:f", "rewards.py:f"),
        ("no", '"no"'),
        ("1e5", '"1e5"'),
        ("null", '"null"'),
        ("none", '"none"'),
        (".5", '".5"'),
        ("nan", '"nan"'),
        ("[negative] ", '"[negative] "'),
        ("größe", '"größe"'),
        ('say "a\\b"\n', '"say \\"a\\\\b\\"\\n"'),
        ("\x7f\u2028\U000e0001", '"\\x7f\\u2028\\U000e0001"'),
    ],
)
def test_texts_are_in_quotes_where_they_need_them(value, written):
    assert f"\nout: {written}\n" in dump(Recipe(out=value))


@pytest.mark.parametrize(
    ("value", "written"),
    [(1e-05, "1.0e-05"), (1.41e-05, "1.41e-05"), (1e16, "1.0e+16"), (0.1, "0.1"), (3, "3")],
)
def test_numbers_are_written_so_that_yaml_knows_them(value, written):
    assert f"\n  learning_rate: {written}\n" in dump(Recipe(ppo=PPOConfig(learning_rate=value)))


def test_dump_of_a_few_changes():
    recipe = Recipe(
        model=ModelConfig(lora=LoRAConfig()),
        reward=(RewardConfig(), RewardConfig(label="A", weight=0.5)),
        ppo=PPOConfig(learning_rate=2e-5),
        steps=3,
    )
    assert dump(recipe, skip_defaults=True) == (
        "model:\n"
        "  lora: {}\n"
        "reward:\n"
        "  - {}\n"
        "  - label: A\n"
        "    weight: 0.5\n"
        "ppo:\n"
        "  learning_rate: 2.0e-05\n"
        "steps: 3\n"
    )
    assert dump(Recipe(), skip_defaults=True) == "{}\n"


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
        ppo=PPOConfig(gamma=0.5),
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
    assert differences(Recipe(ppo=PPOConfig(kl_target=6)), Recipe()) == {}
    with pytest.raises(TypeError, match="same class, got Recipe and PPOConfig"):
        differences(one, PPOConfig())


def test_nan_does_not_differ_from_itself():
    assert differences(Unchecked("a", math.nan), Unchecked("a", math.nan)) == {}


# -- what there is to set --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Recipe, ClassifierRecipe])
def test_every_setting_has_a_text_and_a_kind(cls):
    for setting in paths(cls):
        assert setting.text, setting.path
        assert setting.text[0] in string.ascii_letters + "βγλε", setting.path
        assert setting.kind, setting.path
        assert setting.default, setting.path
    assert len({setting.path for setting in paths(cls)}) == len(paths(cls))


def test_paths_name_type_default_and_text():
    found = {setting.path: setting for setting in paths(Recipe)}
    assert found["ppo.learning_rate"][1:] == ("a number", "1.41e-05", "Step size of Adam.", False)
    assert found["model.lora"].default == "null"
    assert found["model.lora.rank"].default == "16"
    assert found["reward.N.output"].kind == "one of logit, probability, log_odds"
    assert found["data.cut_tokens"].kind == "a list of 2 whole numbers or null"
    assert found["data.model_prompt_tokens"].default == "[2, 8]"
    assert found["quiet"].is_truth
    assert "ppo" not in found
    assert {path: each.default for path, each in found.items() if "inner" in path} == {}
    assert {each.path: each.default for each in paths(Unchecked)}["inner.a"] == "7"


def test_every_setting_can_be_set_by_its_path():
    """The default, written as the list has it, is what a flag gives."""
    flags = [
        (setting.path.replace(".N", ".0"), setting.default)
        for setting in paths(Recipe)
        if not setting.path.startswith("model.lora.")
    ]
    assert build(Recipe, {}, flags=flags) == Recipe()


def test_problems_of_dataclasses_begin_with_the_name_of_the_field():
    problems = Problems("X")
    problems.number("a", -1, "> 0", lambda value: value > 0)
    assert problems.found[0].startswith("`a` ")


def test_settings_need_no_package_but_pyyaml():
    for name in ("values", "reading", "flags", "writing", "listing", "yaml_text"):
        source = importlib.import_module(f"trl.config.{name}").__file__
        with open(source) as file:
            found = re.findall(r"^(?:from|import) ([\w.]+)", file.read(), re.MULTILINE)
        assert not {each.split(".")[0] for each in found} & {"torch", "yaml", "numpy", "rich"}
    assert settings.build is build


def test_python_may_give_lists_and_gets_what_cannot_change():
    data = DataConfig(prefixes=["[a] ", "[b] "], cut_tokens=[2, 5])
    assert (data.prefixes, data.cut_tokens) == (("[a] ", "[b] "), (2, 5))
    reward = RewardConfig(kind="control", targets={"[a] ": [0.0, 0.25]})
    assert reward.targets == {"[a] ": (0.0, 0.25)}
    assert Recipe(reward=[RewardConfig()]).reward == (RewardConfig(),)
    with pytest.raises(SettingsError, match=r"`cut_tokens` must be two integers > 0"):
        DataConfig(cut_tokens=[5, 2])
