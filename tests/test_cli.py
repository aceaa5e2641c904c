import ast
import json
import os
import resource
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml

import trl
from trl import cli
from trl import config as settings
from trl.batch import Rollout
from trl.cli.recipes import read_environment, read_recipe
from trl.config import PPOConfig, SettingsError
from trl.config.recipe import (
    ClassifierRecipe,
    LoRAConfig,
    ModelConfig,
    PreferencesRecipe,
    Recipe,
    RewardConfig,
    RewardRecipe,
)
from trl.scored import Scored

DEMO = "{steps: 190, ppo: {learning_rate: 2.0e-4, init_kl_coef: 0.052}}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of recipes that ships with trl, the only one for this test; we stand beside it."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "sentiment.yaml").write_text(DEMO)
    (folder / "reviews.yaml").write_text("{task: classifier, train: a.csv}")
    monkeypatch.setattr("trl.cli.recipes.recipe_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def runs(folder, monkeypatch):
    """The recipes that were run, and what they were gone on from, in place of the runs."""
    seen = []
    module = types.ModuleType("trl.training.run")
    module.run_recipe = lambda recipe, resume=None, trust=(): seen.append((recipe, resume))
    monkeypatch.setitem(sys.modules, "trl.training.run", module)
    classifier = types.ModuleType("trl.training.classifier")
    classifier.train_classifier = lambda recipe, resume: seen.append((recipe, resume))
    monkeypatch.setitem(sys.modules, "trl.training.classifier", classifier)
    return seen


def failing_run(monkeypatch, error):
    def run_recipe(recipe, resume=None, trust=()):
        raise error

    monkeypatch.setattr(sys.modules["trl.training.run"], "run_recipe", run_recipe)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "trl", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(trl.__file__).parents[1],
        env=os.environ | {"COLUMNS": "100"} | environment,
    )


def told(capsys):
    return capsys.readouterr().err


# -- train and demo ------------------------------------------------------------------------------


def test_a_recipe_by_name_by_file_and_by_the_folder_of_its_run(runs, folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 3")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "recipe.yaml").write_text("steps: 4")
    for name in ("sentiment", "mine.yaml", str(tmp_path / "mine.yaml"), "runs/a"):
        assert cli.main(["train", name]) == 0
    assert [recipe.steps for recipe, _ in runs] == [190, 3, 3, 4]


def test_defaults_are_less_than_the_recipe_and_the_recipe_less_than_flags(runs):
    assert cli.main(["train", "sentiment", "--ppo.init-kl-coef", "0.5", "--seed=3"]) == 0
    expected = Recipe(
        steps=190, seed=3, ppo=PPOConfig.that_learns(learning_rate=2e-4, init_kl_coef=0.5)
    )
    assert runs == [(expected, None)]


def test_demo_is_a_recipe_with_a_folder_of_its_own(runs):
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--steps", "2", "--out", "a_b/c_d"]) == 0
    (first, _), (second, _) = runs
    assert (first.out, first.steps, first.ppo.learning_rate) == ("runs/demo", 190, 2e-4)
    assert (second.out, second.steps) == ("a_b/c_d", 2)


def test_flags_of_every_kind_in_both_spellings_before_and_after_the_recipe(runs):
    flags = "--ppo.learning-rate 1e-5 --ppo.minibatch_size=8 --ppo.adaptive-kl FALSE --quiet"
    others = ["--ppo.max-grad-norm", "none", "--model.lora", "{rank: 8}", "--reward.0.weight", "-2"]
    assert (
        cli.main(["train", *flags.split(), "sentiment", *others, "--data.template", "a_b: {text}"])
        == 0
    )
    ((recipe, _),) = runs
    assert recipe.ppo.learning_rate == 1e-5
    assert recipe.ppo.minibatch_size == 8
    assert recipe.ppo.adaptive_kl is False
    assert recipe.ppo.max_grad_norm is None
    assert recipe.quiet is True
    assert recipe.model.lora == LoRAConfig(rank=8)
    assert recipe.reward == (RewardConfig(weight=-2.0),)
    assert recipe.data.template == "a_b: {text}"


def test_a_classifier_is_trained_by_a_recipe_that_says_so(runs, capsys):
    assert cli.main(["train", "reviews", "--epochs", "2"]) == 0
    assert cli.main(["train", "reviews", "--resume"]) == 0
    recipe = ClassifierRecipe(train="a.csv")
    assert runs == [(replace(recipe, epochs=2.0), False), (recipe, True)]
    assert cli.main(["train", "reviews", "--resume", "step-1"]) == 2
    assert "--resume must stand alone for a classifier, got 'step-1'" in told(capsys)
    assert cli.main(["train", "sentiment", "--task", "clasifier"]) == 2
    assert "`--task` must be classifier" in told(capsys)
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("given", "resume"),
    [
        ([], None),
        (["--resume"], "auto"),
        (["--resume", "auto"], "auto"),
        (["--resume=r"], "r"),
        (["--resume-changed"], "changed:auto"),
        (["--resume=r", "--resume-changed"], "changed:r"),
    ],
)
def test_resume(given, resume, runs, tmp_path):
    (tmp_path / "r").mkdir()
    assert cli.main(["train", "sentiment", *given]) == 0
    assert runs[0][1] == resume


def test_a_folder_that_has_a_run_is_told_before_anything_is_loaded(runs, tmp_path, capsys):
    rows = '{"step":0,"episodes":0}\n'
    for text, code in ((rows, 0), (rows + rows.replace("0", "1"), 2)):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert cli.main(["train", "sentiment", "--out", str(tmp_path)]) == code
    assert "`out` must be a folder without a run: go on with it" in told(capsys)
    assert cli.main(["train", "sentiment", "--out", str(tmp_path), "--print-config"]) == 0
    assert cli.main(["train", "sentiment", "--out", str(tmp_path), "--resume"]) == 0
    assert [resume for _, resume in runs] == [None, "auto"]


def test_a_checkpoint_that_is_not_there_names_the_closest(runs, tmp_path, capsys):
    (tmp_path / "runs/run/checkpoints/step-000050").mkdir(parents=True)
    given = ["--resume", "runs/run/checkpoints/step-00005"]
    assert cli.main(["train", "sentiment", *given]) == 2
    assert "Did you mean `runs/run/checkpoints/step-000050`?" in told(capsys)
    assert runs == []


def test_print_config_prints_what_would_be_run(runs, capsys):
    assert cli.main(["train", "sentiment", "--print_config", "--model.lora.rank", "4"]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert values["ppo"]["init_kl_coef"] == 0.052
    expected = Recipe(
        steps=190,
        ppo=PPOConfig.that_learns(learning_rate=2e-4, init_kl_coef=0.052),
        model=ModelConfig(lora=LoRAConfig(rank=4)),
    )
    assert settings.build(Recipe, values) == expected
    assert runs == []
    assert cli.main(["train", "sentiment", "--print-config", "--steps", "0"]) == 2


def test_functions_are_found_beside_their_recipe(runs, folder, tmp_path):
    (folder / "rewards.py").write_text("")
    (folder / "sentiment.yaml").write_text(
        "reward: [{kind: function, name: 'rewards.py:f'}, {kind: function, name: 'other.py:f'}]"
    )
    (tmp_path / "other.py").write_text("")  # where we stand
    assert cli.main(["train", "sentiment", "--out", "here", "--trust", "other.py"]) == 0
    first, second = runs[0][0].reward
    assert first.name == f"{folder.resolve()}/rewards.py:f"
    assert second.name == f"{tmp_path.resolve()}/other.py:f"


def test_prompts_are_found_beside_their_recipe(runs, folder):
    (folder / "mine.txt").write_text("A\nB\n")
    (folder / "sentiment.yaml").write_text("data: {prompts: mine.txt, held_out_prompts: not/a}")
    assert cli.main(["train", "sentiment", "--out", "here"]) == 0
    data = runs[0][0].data
    assert (data.prompts, data.held_out_prompts) == (f"{folder.resolve()}/mine.txt", "not/a")


def test_all_that_is_not_there_is_told_at_once(runs, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quests.csv").write_text("question\nA\n")
    (folder / "rewards.py").write_text("def good(texts): ...")
    (folder / "sentiment.yaml").write_text(
        "model: {name: ./none}\ndata: {prompts: quest.csv, held_out_prompts: ./c}\n"
        "reward: [{kind: function, name: 'rewards.py:goood'}]"
    )
    assert cli.main(["train", "sentiment"]) == 2
    error = told(capsys)
    assert "sentiment.yaml has 4 problems:\n" in error
    assert (
        "`data.prompts` must be a file that is there, got 'quest.csv'. Did you mean `quests.c"
        in error
    )
    for part in ("`model.name` must be the folder", "got './c'", "Did you mean `good`?"):
        assert part in error
    flags = ["--data.prompts", "x.csv", "--model.name", "./y", "--data.held-out-prompts", "none"]
    assert cli.main(["train", "sentiment", *flags, "--reward", "[{}]"]) == 2
    assert told(capsys).startswith("trl: command line has 2 problems:")
    flags = ["--data.limit", "3", "--model.name", "starter", "--reward", "[{}]"]
    assert cli.main(["train", "sentiment", *flags]) == 2
    assert "sentiment.yaml has 2 problems:\n  `data.prompts`" in told(capsys)  # no flag's fault
    assert runs == []


def test_a_file_of_functions_that_is_not_there_is_looked_for_beside_the_recipe(
    runs, folder, capsys
):
    (folder / "rewards.py").write_text("")
    (folder / "sentiment.yaml").write_text("reward: [{kind: function, name: 'reward.py:f'}]")
    assert cli.main(["train", "sentiment"]) == 2
    assert told(capsys) == (
        f"trl: {folder / 'sentiment.yaml'}: `reward[0].name` must name a file that is there, got "
        f"'reward.py', but there is no {folder.resolve() / 'reward.py'}: mend the path. "
        "Did you mean `rewards.py`?\n"
    )
    assert runs == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sentimnt", "Did you mean `sentiment`?"),
        ("shipped/sentimnt.yaml", "Did you mean `shipped/sentiment.yaml`?"),
        ("nothing/of/the/kind", "(reviews, sentiment)"),
    ],
)
def test_a_recipe_that_is_not_there_names_those_that_are(name, message, runs, capsys):
    assert cli.main(["train", name]) == 2
    error = told(capsys)
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", cli.recipe_names())
def test_every_recipe_that_ships_is_good(name, tmp_path, monkeypatch):
    (tmp_path / "runs/imdb-classifier/classifier").mkdir(parents=True)  # another recipe writes it
    monkeypatch.chdir(tmp_path)
    recipe = cli.read_recipe(name)
    assert settings.build(type(recipe), settings.as_mapping(recipe)) == recipe


# -- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "sentiment", "--resme"], "Did you mean `--resume`?"),
        (["train", "sentiment", "--print-confg"], "Did you mean `--print-config`?"),
        (["train", "sentiment", "--steps"], "--steps: expected a value"),
        (["train", "sentiment", "--steps", "--quiet"], "--steps: expected a value"),
        (["train"], "RECIPE"),
        (["train", "sentiment", "another"], "unknown argument 'another'"),
        (["sample", "a", "--max-new-token", "3"], "Did you mean `--max-new-tokens`?"),
        (["sample", "a", "--n", "x"], "--n: invalid int value: 'x'"),
        (["sample", "a", "--prompt", "b", "--prompts", "c"], "not allowed with"),
        (["score"], "TEXTS"),
        (["compare"], "RUN must be given: the folder of a run. See `trl compare --help`."),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(arguments, message, runs, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = told(capsys)
    assert message in error
    assert error.count("\n") == 1
    assert runs == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["domo"], "unknown command 'domo'. Did you mean `demo`?"),
        (["demo", "--ppo.lerning_rate", "1"], "Did you mean `--ppo.learning-rate`?"),
        (["demo", "--step", "1"], "Did you mean `--steps`?"),
        (["demo", "--lora", "none"], "Did you mean `--model.lora`?"),
        (["demo", "--ppo.learning-rate", "x"], "`--ppo.learning-rate` must be a finite number > 0"),
        (["demo", "--steps", "1.5"], "`--steps` must be an integer > 0 or None, got 1.5"),
        (["demo", "--ppo.adaptive-kl=maybe"], "`--ppo.adaptive-kl` must be True or False"),
        (["demo", "--ppo.cliprange", "-0.2"], "> 0 and <= 1, got -0.2."),
        (["demo", "--ppo.precision", "bf61"], "Did you mean `bf16`?"),
        (["report", "nowhere"], "There is no run in 'nowhere'"),
        (["compare", "shiped"], "Did you mean `shipped`?"),
        (["score", "The actor is here"], "for a text: echo '…' | trl score -"),
        (["sample", "./nowhere"], "There is no run in './nowhere'"),
        (["score", "a.txt", "--reward.0.weigth", "1"], "Did you mean `--reward.0.weight`?"),
        (["score", "a.txt", "--recipe", "sentimnt"], "Did you mean `sentiment`?"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(arguments, message, runs, capsys):
    assert cli.main(arguments) == 2
    error = told(capsys)
    assert message in error
    assert error.count("\n") == 1
    assert runs == []


def test_everything_wrong_is_told_at_once(runs, folder, capsys):
    (folder / "bad.yaml").write_text("{steps: many, ppo: {lr: 1}}")
    assert cli.main(["train", "bad", "--seed", "-1", "--reward.0.knd", "x"]) == 2
    error = told(capsys)
    assert "bad.yaml has 4 problems:\n" in error
    for path in ("ppo.lr", "--reward.0.knd", "steps", "--seed"):
        assert f"\n  `{path}` " in error


def test_bad_yaml_names_file_and_line(runs, folder, capsys):
    (folder / "bad.yaml").write_text("steps: 1\nsteps: 2")
    assert cli.main(["train", "bad"]) == 2
    assert "bad.yaml: line 2: `steps` must be set once" in told(capsys)


def test_torch_is_not_imported_before_the_settings_are_good(folder):
    codes = [
        (["train", "sentiment", "--print-config"], 0),
        (["train", "sentiment", "--steps", "0"], 2),
        (["train", "sentimnt"], 2),
        (["train", "sentiment", "--resume", "nowhere"], 2),
        (["demo", "--help"], 0),
        (["score", "a.txt", "--reward.0.weight", "x"], 2),
        (["report", "nowhere"], 2),
    ]
    program = (
        "import pathlib, sys\n"
        "from trl import cli\n"
        f"cli.recipe_folder = lambda: pathlib.Path({str(folder)!r})\n"
        f"for arguments, expected in {codes!r}:\n"
        "    try: code = cli.main(arguments)\n"
        "    except SystemExit as stop: code = stop.code\n"
        "    assert (code or 0) == expected, (arguments, code)\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'rich', 'accelerate'} & set(sys.modules)\n"
        "    assert not heavy, (arguments, heavy)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(trl.__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr


# -- how a run ends ------------------------------------------------------------------------------


def test_a_missing_file_is_one_line_and_exit_code_2(runs, monkeypatch, capsys):
    failing_run(monkeypatch, FileNotFoundError(2, "No such file", "prompts.txt"))
    assert cli.main(["demo"]) == 2
    assert told(capsys) == "trl: No such file: 'prompts.txt'\n"


def test_an_error_that_trl_raised_on_purpose_is_one_line(runs, monkeypatch, capsys):
    def diverge(recipe, resume=None, trust=()):
        Scored.of([float("nan")], Rollout.from_lists(*2 * [torch.ones(1, 1).long()]))

    monkeypatch.setattr(sys.modules["trl.training.run"], "run_recipe", diverge)
    assert cli.main(["demo"]) == 2
    assert "`scores` must be finite numbers" in told(capsys)


def test_a_package_that_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    assert cli.main(["score", "reviews"]) == 2
    error = told(capsys)
    assert error.startswith("trl: `TEXTS` needs the package datasets")
    assert "There is no file 'reviews'." in error
    assert error.count("\n") == 1


def test_what_a_part_of_a_recipe_lacks_is_named_as_it_was_given(monkeypatch):
    from trl.training.named import load_function
    from trl.training.parts import peft_config

    with pytest.raises(SettingsError, match=r"is there, got 'nofile\.py', looked for in"):
        load_function("nofile.py:f", "reward[0].name")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install peft\."):
        peft_config(LoRAConfig())


def test_an_import_that_fails_keeps_its_traceback(runs, monkeypatch):
    def bug(recipe, resume=None, trust=()):
        exec(compile("import nothing_of_the_kind", trl.__file__, "exec"))

    monkeypatch.setattr(sys.modules["trl.training.run"], "run_recipe", bug)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_what_cannot_go_on_exits_1(runs, monkeypatch, capsys):
    def stop(recipe, resume=None, trust=()):
        from trl.evaluation.scores import score

        score(lambda rollout: 1 / 0, Rollout.from_lists(*2 * [torch.ones(1, 1).long()]))

    monkeypatch.setattr(sys.modules["trl.training.run"], "run_recipe", stop)
    assert cli.main(["demo"]) == 1
    assert "ZeroDivisionError" in told(capsys)


def test_ctrl_c_exits_130(runs, monkeypatch, capsys):
    failing_run(monkeypatch, KeyboardInterrupt())
    assert cli.main(["demo"]) == 130
    assert "interrupted" in told(capsys)


@pytest.mark.parametrize(("interrupted", "code"), [(True, 130), (False, 0)])
def test_a_run_that_was_stopped_exits_130(interrupted, code, runs, monkeypatch):
    result = types.SimpleNamespace(interrupted=interrupted)
    module = sys.modules["trl.training.run"]
    monkeypatch.setattr(module, "run_recipe", lambda recipe, resume=None, trust=(): result)
    assert cli.main(["demo"]) == code


def test_a_bug_keeps_its_traceback(runs, monkeypatch):
    def bug(recipe, resume=None, trust=()):
        ast.literal_eval("f()")  # a ValueError that does not come out of trl

    monkeypatch.setattr(sys.modules["trl.training.run"], "run_recipe", bug)
    with pytest.raises(ValueError, match="malformed node"):
        cli.main(["demo"])


def test_only_the_main_process_speaks(runs, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "sentiment", "--print-config"]) == 0
    assert cli.main(["train", "sentiment", "--steps", "0"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["train", "sentiment", "--resme"])
    assert capsys.readouterr() == ("", "")


# -- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "cls"),
    [
        (["demo", "--help"], Recipe),
        (["train", "--help"], Recipe),
        (["train", "sentiment", "--help"], Recipe),
        (["train", "reviews", "-h"], ClassifierRecipe),
        (["reward", "-h"], RewardRecipe),
        (["taste", "-h"], PreferencesRecipe),
    ],
)
def test_help_has_every_setting_with_its_default_and_text(arguments, cls, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.split())
    for setting in settings.paths(cls):
        assert f" --{setting.path.replace('_', '-')} " in text
        assert " ".join(setting.text.split()) in text
    default = "auto" if issubclass(cls, Recipe) else "5e-05"
    assert f"default: {default})" in text


def test_the_help_of_each_command_explains_its_options(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert f"usage: trl {command}" in capsys.readouterr().out


def test_version():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"trl {trl.__version__}\n")


@pytest.mark.parametrize(("arguments", "most"), [(["--help"], 0.7), (["demo", "--help"], 1.2)])
def test_help_is_instant(arguments, most):
    def used():  # CPU time: other work on the machine does not count
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def seconds():
        start = used()
        assert run(*arguments).returncode == 0
        return used() - start

    assert any(seconds() < most for _ in range(3))


def test_no_command_shows_the_help_which_names_all_of_them(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert "usage: trl" in text
    for command in cli.COMMANDS:
        assert f"\n    trl {command} " in text


# -- sample, score, report, compare --------------------------------------------------------------


def test_sample_then_score(tmp_path, folder, capsys):
    written = tmp_path / "s.jsonl"
    given = ["--prompt", "This film was", "I saw", "--n", "2", "--max-new-tokens", "6"]
    assert cli.main(["sample", "starter", *given, "--out", str(written)]) == 0
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["This film was"] * 2 + ["I saw"] * 2
    assert all(row["response"] and 0 < row["tokens"] <= 6 for row in rows)
    assert len({row["response"] for row in rows}) == 4
    capsys.readouterr()

    flags = ["--reward.1.output", "probability", "--reward.1.weight", "2"]
    assert cli.main(["score", str(written), "--out", "-", *flags]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in scored] == [row["prompt"] + row["response"] for row in rows]
    for row in scored:
        logit, probability = row["parts"].values()
        assert 0 <= probability <= 1
        assert row["score"] == pytest.approx(logit + 2 * probability, rel=1e-5)


def test_sample_has_prompts_of_its_own_and_is_the_same_for_a_seed(capsys):
    from trl.training.tools import SHOWN_PROMPTS

    answers = []
    for options in (["--top-k", "3"], ["--top-k", "3"], ["--top-k", "3", "--seed", "1"]):
        assert cli.main(["sample", "starter", "--max-new-tokens", "3", "--out", "-", *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    assert answers[0].count("\n") == SHOWN_PROMPTS


def test_scores_of_good_and_bad_texts_from_the_standard_input(monkeypatch, capsys):
    texts = ["A wonderful film, I loved it.", "A terrible waste of time."]
    monkeypatch.setattr(sys, "stdin", [*[f"{text}\n" for text in texts], "\n"])
    assert cli.main(["score", "-"]) == 0
    table = capsys.readouterr().out
    assert all(text.split()[1] in table for text in texts)
    monkeypatch.setattr(sys, "stdin", texts)
    assert cli.main(["score", "-", "--out", "-"]) == 0
    good, bad = (json.loads(line)["score"] for line in capsys.readouterr().out.splitlines())
    assert good > bad


def test_the_rewards_of_a_recipe_score_texts_and_control_prefixes_are_no_part_of_them(
    folder, tmp_path, capsys
):
    (folder / "mine.py").write_text("def length(texts): return [float(len(t)) for t in texts]")
    (folder / "sentiment.yaml").write_text(
        "reward: [{kind: function, name: 'mine.py:length', weight: 0.5},"
        " {kind: control, targets: {'[pos] ': [0.5, 1]}, weight: 0}]\n"
        "data: {prefixes: ['[pos] ']}"
    )
    (tmp_path / "texts.txt").write_text("[pos] A wonderful film.\n[pos] Bad.\n")
    assert cli.main(["score", "texts.txt", "--recipe", "sentiment", "--out", "-"]) == 0
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert good["score"] == 0.5 * len("[pos] A wonderful film.")
    assert good["parts"]["control"] > 0 > bad["parts"]["control"]


def test_where_nothing_has_a_say_there_is_no_number(folder, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def sure(texts): return [None, 1.0]")
    (tmp_path / "texts.txt").write_text("Who?\nMe.\n")
    reward = "[{kind: function, name: mine.py:sure}, {kind: length, arguments: "
    given = ["texts.txt", "--reward", reward + "{max_tokens: 8, soft_tokens: 4}}]"]
    assert cli.main(["score", *given, "--out", "-"]) == 0
    unsure, sure = map(json.loads, capsys.readouterr().out.splitlines())
    assert unsure["score"] is unsure["parts"]["sure"] is sure["parts"]["length"] is None
    assert sure["score"] == 1.0
    assert cli.main(["score", *given]) == 0
    table = capsys.readouterr().out
    assert "–" in table
    assert "nan" not in table


def test_flags_that_no_recipe_has_are_told_with_a_recipe_that_is_not_there(runs, capsys):
    flags = ["--ppo.learningrate", "3", "--reward.0.arguments.key", "x", "--model.lora.r", "8"]
    assert cli.main(["train", "sentimnt", *flags, "--epochs", "2", "--vf-coef", "1"]) == 2
    error = told(capsys)
    assert "'sentimnt'. Did you mean `sentiment`? It is neither a file nor one that" in error
    assert "And `--ppo.learningrate` is not a setting. Did you" in error
    assert "mean `--ppo.learning-rate`? And `--vf-coef` is not" in error
    assert error.count(" And ") == 2


def test_the_policy_of_a_run(tmp_path):
    from trl.training.folder import RunFolder
    from trl.training.tools import policy_folder

    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no policy yet.*: go on with it, trl train"):
        policy_folder(run)
    with RunFolder(run).in_use(), pytest.raises(FileNotFoundError, match="it is at work now"):
        policy_folder(run)
    (run / "best").mkdir()
    assert policy_folder(run) == str(run / "best")
    (run / "policy").mkdir()
    assert policy_folder(run) == str(run / "policy")
    (run / "policy" / "config.json").write_text("{}")
    assert policy_folder(run / "policy") == str(run / "policy")
    assert policy_folder("gpt2") == "gpt2"


def test_a_run_that_is_not_there_is_no_model_of_the_hub(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs/my").mkdir(parents=True)
    (tmp_path / "runs/my/recipe.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "runs/mi"]) == 2
    assert "There is no run in 'runs/mi'" in (error := told(capsys))
    assert "Did you mean `runs/my`?" in error


def test_report_and_compare_get_the_runs(tmp_path, monkeypatch, capsys):
    from trl import report

    calls = []
    monkeypatch.setattr(
        report,
        "write_report",
        lambda runs, out: calls.append((runs, out)) or out,
        raising=False,
    )
    monkeypatch.setattr(report, "compare", lambda runs: f"{len(runs)} runs", raising=False)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert cli.main(["report", str(one), str(two)]) == 0
    assert cli.main(["report", str(one), "--out", str(two)]) == 0
    assert cli.main(["report", str(one), str(two), "--out", f"{two}/a.html"]) == 0
    both = one / "compare.html"  # report.html is the page of the first run alone
    assert calls == [([one, two], both), ([one], two), ([one, two], two / "a.html")]
    assert capsys.readouterr().out.splitlines()[0] == str(both)
    assert cli.main(["compare", str(one), str(two)]) == 0
    assert capsys.readouterr().out == "2 runs\n"


def test_every_section_of_a_recipe_has_a_heading(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for section in fields(Recipe):
        if hasattr(section.default_factory, "__dataclass_fields__"):
            assert f"\n{section.name}:\n" in text


@pytest.mark.parametrize("name", ["/not/there", "./not", r"C:\models\gpt2", "a b", "a/b/c"])
def test_a_model_that_is_nowhere_is_told_before_anything_is_loaded(name, runs, capsys):
    flags = ["--model.name", name, "--model.tokenizer", name]
    rewards = ["--reward", json.dumps([{"kind": "reward_model", "name": name}])]
    assert cli.main(["train", "sentiment", *flags, *rewards]) == 2
    error = told(capsys)
    for setting in ("model.name", "model.tokenizer", "reward[0].name"):
        rule = "must be the folder of a model, or its name on the Hugging Face Hub"
        assert f"`{setting}` {rule}, got {name!r}, which " in error
    assert "repo" not in error
    assert cli.main(["train", "reviews", "--model", name]) == 2
    assert f"`model` {rule}, got {name!r}, which " in told(capsys)
    assert runs == []


def test_a_run_without_an_environment_is_talked_to_without_its_reward(tmp_path):
    reward = RewardConfig(kind="function", name=f"{tmp_path}/elsewhere.py:f")
    recipe = settings.Recipe(reward=(reward,), out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(settings.dump(recipe))
    for model in (tmp_path / "run", tmp_path / "run" / "policy"):
        assert read_environment(None, str(model), ()) is None


def test_a_recipe_beside_what_others_wrote_keeps_its_folder(tmp_path):
    for name in ("votes.sqlite", "metrics.jsonl"):
        (tmp_path / name).touch()
    written = settings.dump(settings.Recipe(out="runs/mine"))
    (tmp_path / "mine.yaml").write_text(written)
    assert read_recipe(str(tmp_path / "mine.yaml")).out == "runs/mine"
    (tmp_path / "recipe.yaml").write_text(written)
    assert read_recipe(str(tmp_path)).out == str(tmp_path)  # a run goes on where it is


def test_a_file_that_a_flag_names_is_looked_for_where_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    with pytest.raises(SettingsError) as caught:
        read_recipe("sentiment", [("reward", "[{kind: function, name: 'mien.py:f'}]")])
    assert "command line" in str(caught.value)
    assert f"there is no {tmp_path / 'mien.py'}: mend the path. Did you mean `mine.py`?" in str(
        caught.value
    )


def test_folders_of_models_are_written_out_from_here_or_beside_the_recipe(
    tmp_path, monkeypatch, runs
):
    for name in ("here/policy", "there/judge", "here/starter"):
        (tmp_path / name).mkdir(parents=True)
    reward = "[{kind: reward_model, name: judge}, {kind: function, name: 'f.py:f'}]"
    (tmp_path / "there" / "f.py").write_text("def f(texts): return [0.0] * len(texts)\n")
    file = tmp_path / "there" / "r.yaml"
    file.write_text(f"model: {{name: policy}}\nreward: {reward}\n")
    monkeypatch.chdir(tmp_path / "here")
    recipe = cli.read_recipe(str(file))
    assert recipe.model.name == str(tmp_path / "here" / "policy")
    assert recipe.reward[0].name == str(tmp_path / "there" / "judge")
    file.write_text("steps: 1\n")
    assert cli.read_recipe(str(file)).model.name == "starter"  # never a folder of that name
