"""Settings as text: YAML files and flags in, checked dataclasses out, and back.

    build(Recipe, read_yaml("recipe.yaml"))            a Recipe, or one error with every problem
    build(Recipe, {}, flags=[("ppo.gamma", "0.99")])   defaults < values < flags
    dump(recipe)                                       YAML that reads back to an equal Recipe
    differences(before, recipe)                        {"ppo.gamma": (1.0, 0.99)}

The dataclasses say everything: their type hints how a value is read, their `__post_init__` what
it may be, the texts under their fields what it means. A word of YAML without quotes means what the
type of its setting makes of it: 1e-5 is a number for a number and a text for a text.

values.py     the types of settings, and values of them
yaml_text.py  what a YAML file says
flags.py      flags over it
reading.py    dataclasses from it
writing.py    YAML from dataclasses, and in what two of them differ
listing.py    what there is to set

Neither torch nor PyYAML is imported before it is needed.
"""

from trl.config.flags import override
from trl.config.listing import Setting, paths, texts_under_fields
from trl.config.ppo import OLD_SPELLINGS, PPOConfig, Problems, SettingsError, closest
from trl.config.reading import build
from trl.config.writing import as_mapping, differences, dump
from trl.config.yaml_text import read_yaml

__all__ = [
    "OLD_SPELLINGS",
    "PPOConfig",
    "Problems",
    "Setting",
    "SettingsError",
    "as_mapping",
    "build",
    "closest",
    "differences",
    "dump",
    "override",
    "paths",
    "read_yaml",
    "texts_under_fields",
]
