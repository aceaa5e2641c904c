"""Settings: what there is to set, checked, read from YAML and flags, and written.

    build(Recipe, read_yaml("recipe.yaml"))            a Recipe, or one error with every problem
    build(Recipe, {}, flags=[("ppo.gamma", "0.99")])   defaults < values < flags
    dump(recipe)                                       YAML that reads back to an equal Recipe
    differences(before, recipe)                        {"ppo.gamma": (1.0, 0.99)}

The dataclasses say everything: their types what a value may be, the texts under their fields what
it means, their `contradictions` what does not go together.

types.py       the types of settings: limits, and what a message calls them
section.py     dataclasses that pydantic checks, with errors in our words
algorithms.py  what is known of each algorithm
ppo.py         the settings of PPO
recipe.py      those of `trl train`
reading.py     dataclasses from YAML and flags
writing.py     YAML from dataclasses, and in what two of them differ
listing.py     what there is to set
errors.py      a problem in words
code.py        what of a recipe is code, and by whose word it runs
places.py      names of models; what may be written to
secrets.py     ${NAME} in a text, from the environment
moved.py       what older releases called things

The names below load their module on first use: torch is never imported, and pydantic and PyYAML
not before there is something to set.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl.config.errors import OLD_SPELLINGS as OLD_SPELLINGS
from trl.config.errors import SettingsError as SettingsError
from trl.config.errors import closest as closest

_HOME = {
    "PPOConfig": "ppo",
    **dict.fromkeys(
        (
            *("ClassifierRecipe", "PreferencesRecipe", "Recipe", "RewardRecipe"),
            *("Scoring", "SupervisedRecipe"),
        ),
        "recipe",
    ),
    "paths": "listing",
    **dict.fromkeys(("as_mapping", "differences", "dump"), "writing"),
    **dict.fromkeys(("build", "is_null", "read_yaml"), "reading"),
    "check_values": "section",
}

__all__ = sorted([*_HOME, "OLD_SPELLINGS", "SettingsError", "closest"])

if TYPE_CHECKING:
    from trl.config.listing import paths as paths
    from trl.config.ppo import PPOConfig as PPOConfig
    from trl.config.reading import build as build
    from trl.config.reading import is_null as is_null
    from trl.config.reading import read_yaml as read_yaml
    from trl.config.recipe import ClassifierRecipe as ClassifierRecipe
    from trl.config.recipe import PreferencesRecipe as PreferencesRecipe
    from trl.config.recipe import Recipe as Recipe
    from trl.config.recipe import RewardRecipe as RewardRecipe
    from trl.config.recipe import Scoring as Scoring
    from trl.config.recipe import SupervisedRecipe as SupervisedRecipe
    from trl.config.section import check_values as check_values
    from trl.config.writing import as_mapping as as_mapping
    from trl.config.writing import differences as differences
    from trl.config.writing import dump as dump


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trl.config' has no attribute {name!r}")
    return getattr(import_module(f"trl.config.{_HOME[name]}"), name)
