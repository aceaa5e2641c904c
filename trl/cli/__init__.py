"""The command `trl`.

    trl train RECIPE         run a recipe: a YAML file, or the name of one that ships with trl
    trl demo                 tune a small GPT-2 to write positive film reviews
    trl reward PREFERENCES   train a reward model on what people preferred
    trl taste MODEL PROMPTS  tune a model by what people choose, on a page of this machine
    trl sample MODEL         let a policy, or the policy of a run, write
    trl chat MODEL           talk to a model, or to a run's before and after, side by side
    trl score TEXTS          score texts as a recipe does
    trl eval MODEL RECIPE    measure a policy on held-out prompts: accuracy, pass@k, majority@k
    trl report RUN ...       write the report of a run, or of several side by side
    trl compare RUN ...      show how runs ended and what they did differently
    trl label --from RUN     let people judge responses, on a page of this machine

    trl COMMAND --help       its options and settings
    trl --version

Every setting of a recipe is a flag: `ppo.learning_rate` there is `--ppo.learning-rate` here, and
the text under the field of the dataclass is its help.
"""

# Neither torch nor transformers is imported before all settings are known to be good.

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trl
from trl import config as settings
from trl.cli.options import COMMANDS, USAGE_ERROR, Parser
from trl.cli.recipes import (
    Flags,
    check_beside_runs,
    check_models,
    check_resume,
    find_recipe,
    folder,
    list_code,
    read_environment,
    read_recipe,
    recipe_names,
    scorers_with_code,
)
from trl.cli.words import complain, is_explained, is_main_process, sentence, told
from trl.config import SettingsError, closest
from trl.config.errors import hidden, refuse
from trl.config.places import has_run, refuse_run
from trl.watch.markdown import visible

if TYPE_CHECKING:  # making these classes takes longer than showing what commands there are
    from trl.config.recipe import SupervisedRecipe

__all__ = ["COMMANDS", "find_recipe", "main", "read_recipe", "recipe_names"]

FAILED = 1
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 if all went well, 1 if the run could not go on, 2 for a user's error, 130 for Ctrl-C.
    """
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt as error:
        complain("\n".join(["\ntrl: interrupted.", *getattr(error, "__notes__", [])]))
        return INTERRUPTED
    except SettingsError as error:
        complain(told(error))
        return USAGE_ERROR
    except Exception as error:
        if not is_explained(error):
            raise
        notes = getattr(error, "__notes__", [])
        lines = "\n".join([f"trl: {sentence(error)}", *notes])
        print(hidden(visible(lines)), file=sys.stderr)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        users = isinstance(error, (ImportError, OSError, TypeError, ValueError)) and not full
        return USAGE_ERROR if users else FAILED


def _run(arguments: list[str]) -> int:
    command, *others = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(f"usage: trl COMMAND ...\n{(__doc__ or '').partition('.')[2]}".rstrip())
    elif command == "--version":
        print(f"trl {trl.__version__}")
    elif command in COMMANDS:
        return RUN[command](*Parser(command).parse(others))
    else:
        complain(f"trl: unknown command {command!r}.{closest(command, COMMANDS)} See `trl --help`.")
        return USAGE_ERROR
    return 0


def _train(options: argparse.Namespace, flags: Flags) -> int:
    """Run a recipe, or print it."""
    recipe = read_recipe(options.recipe, flags, options.trust)
    check_resume(recipe, options.resume)
    resume = options.resume
    if options.resume_changed:
        resume = f"changed:{resume or 'auto'}"
    if options.print_config:
        if is_main_process():
            print(settings.dump(recipe, texts=True), end="")
        return 0
    if isinstance(recipe, settings.SupervisedRecipe):
        return _fit(recipe, options.resume)
    out = Path(recipe.out).expanduser()
    if resume is None and not isinstance(recipe, settings.PreferencesRecipe) and has_run(out):
        refuse_run(out)  # before the seconds that it takes to load anything
    code = (*recipe.reward, *(recipe.environment.code if recipe.environment else ()))
    hidden = recipe.people.simulated if isinstance(recipe, settings.PreferencesRecipe) else None
    code += hidden.reward if hidden else ()
    list_code(code, recipe.model.name if recipe.model.trust_remote_code else None)
    if isinstance(recipe, settings.PreferencesRecipe):
        from trl.training.taste import tune_to_taste

        done = tune_to_taste(recipe, resume=resume is not None, trust=options.trust)
        return INTERRUPTED if done is None else 0
    from trl.training.run import run_recipe

    result = run_recipe(recipe, resume=resume, trust=options.trust)
    return INTERRUPTED if getattr(result, "interrupted", False) else 0


def _fit(recipe: SupervisedRecipe, resume: str | None) -> int:
    """Train a classifier or a reward model."""
    if isinstance(recipe, settings.RewardRecipe):
        from trl.training.reward import train_reward  # torch and transformers: seconds

        train_reward(recipe, resume=resume is not None)
    elif isinstance(recipe, settings.ClassifierRecipe):
        from trl.training.classifier import train_classifier

        train_classifier(recipe, resume=resume is not None)
    return 0


def _reward(options: argparse.Namespace, flags: Flags) -> int:
    train = {"train": options.preferences}
    recipe = settings.build(settings.RewardRecipe, train, flags=flags)
    check_models(recipe, Path(options.preferences))
    check_resume(recipe, options.resume)
    if options.print_config:
        print(settings.dump(recipe, texts=True), end="")
        return 0
    return _fit(recipe, options.resume)


def _demo(options: argparse.Namespace, flags: Flags) -> int:
    options.recipe = "sentiment"
    return _train(options, [("out", "runs/demo"), *flags])


def _taste(options: argparse.Namespace, flags: Flags) -> int:
    given = [("model.name", options.model), ("data.prompts", options.prompts)]
    options.recipe = "human-preferences"
    return _train(options, [*given, *flags])


def _sample(options: argparse.Namespace, flags: Flags) -> int:
    check_beside_runs(options.model)
    from trl.training import tools

    given = _conversing(options, 48)
    source, prompts, out = given.pop("prompts"), given.pop("prompt"), given.pop("out")
    read = tools.read_prompts if given["recipe"] is None else tools.read_rows
    tools.show(tools.sample(prompts=read(source) if source else prompts, **given), out)
    return 0


def _chat(options: argparse.Namespace, flags: Flags) -> int:
    for name in filter(None, (options.model, options.before)):
        check_beside_runs(name)
    from trl.training.chat import talk

    talk(**_conversing(options, None))
    return 0


def _conversing(options: argparse.Namespace, most: int | None) -> dict[str, Any]:
    """Return options with the recipe whose environment a model talks with, if there is one.

    Args:
        options: Of `sample` or `chat`.
        most: Tokens, if neither they nor a recipe say how many; None: as the model or run has it.
    """
    given = vars(options)
    name, wanted = given.pop("recipe"), given.pop("environment")
    if not wanted and name is not None:
        refuse("--recipe", "be left out with --no-environment", name)
    recipe = read_environment(name, options.model, options.trust) if wanted else None
    if given["max_new_tokens"] is None:
        del given["max_new_tokens"]
        given |= {} if recipe or most is None else {"max_new_tokens": most}
    return given | {"recipe": recipe}


def _score(options: argparse.Namespace, flags: Flags) -> int:
    path = options.recipe and find_recipe(options.recipe)
    every = settings.read_yaml(path) if path else {}
    values = {"reward": every["reward"]} if "reward" in every else {}
    owner = str(path) if path else None
    rewards = settings.build(settings.Scoring, values, flags=flags, owner=owner).reward
    rewards = scorers_with_code(rewards, path or None, flags, options.trust)
    list_code(rewards)
    if options.validate is not None:
        from trl.training.validation import validate

        return validate(options.texts, rewards, options.validate, options.trust)
    from trl.training import tools

    column = (every.get("data") or {}).get("column")
    texts, columns = tools.read_texts(options.texts, column)
    form = tools.form_of(every, path) if path and "task" not in every else None
    rows = tools.score_texts(texts, rewards, options.trust, columns=columns, form=form)
    tools.show(rows, options.out)
    return 0


def _eval(options: argparse.Namespace, flags: Flags) -> int:
    check_beside_runs(options.model)
    given = vars(options)
    name = given.pop("recipe") or options.model
    if task := settings.read_yaml(find_recipe(name)).get("task"):
        refuse("RECIPE", "be one that trains a policy", f"{name}, whose task is {task}")
    recipe: Any = read_recipe(name, [("model.name", options.model), *flags], options.trust)
    code = (*recipe.reward, *(recipe.environment.code if recipe.environment else ()))
    list_code(code, options.model if recipe.model.trust_remote_code else None)
    from rich.console import Console

    from trl.training.evaluate import evaluate

    Console().print(evaluate(recipe=recipe, **given).table())
    return 0


def _report(options: argparse.Namespace, flags: Flags) -> int:
    runs = [folder(run) for run in options.runs]
    from trl.report import write_report

    out = Path(options.out or runs[0]).expanduser()
    if len(runs) > 1 and out.suffix != ".html":
        out /= "compare.html"  # the page of the run itself stays
    print(write_report(runs, out))
    return 0


def _compare(options: argparse.Namespace, flags: Flags) -> int:
    runs = [folder(run) for run in options.runs]
    from rich.console import Console

    from trl.report import compare

    Console().print(compare(runs))
    return 0


def _label(options: argparse.Namespace, flags: Flags) -> int:
    from trl.training.label import label

    return label(options)


RUN: dict[str, Callable[[argparse.Namespace, Flags], int]] = {
    "train": _train,
    "reward": _reward,
    "taste": _taste,
    "demo": _demo,
    "sample": _sample,
    "chat": _chat,
    "score": _score,
    "eval": _eval,
    "report": _report,
    "compare": _compare,
    "label": _label,
}
"""What each command does with its options, and the settings among its arguments."""
