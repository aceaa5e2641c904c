"""What is wrong with settings, in words: the parameter, the rule, what was given, how to mend it.

Nothing here imports pydantic: the command line needs it before there is anything to check.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NoReturn

OLD_SPELLINGS = {
    "lr": "learning_rate",
    "lam": "gae_lambda",
    "target": "kl_target",
    "horizon": "kl_horizon",
    "adap_kl_ctrl": "adaptive_kl",
    "mini_batch_size": "minibatch_size",
}
"""The parameter names of the first trl (the last one: of its releases 0.4 to 0.11), and ours."""

OTHER_IDEAS = {"target_kl": "max_approxkl", "early_stopping": "max_approxkl"}
"""Settings of releases 0.4 to 0.11 whose idea has another form here, and where to look."""

ELSEWHERE = {
    "num_generations": "group_size",
    "beta": "init_kl_coef",
    "max_completion_length": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_steps": "steps",
    "epsilon": "cliprange",
    "output_dir": "out",
    "eval_steps": "eval_every",
}
"""Names of the settings of TRL's GRPO, and ours."""

SECRET = "(?i:key|token|secret|passw|pwd|auth|sig|credential)"
"""Part of the name of a parameter of a URL whose value is one."""

_TOKEN = r"(?<=[/_-])(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{20,}(?=[/?#_-]|$)[\w-]*"
"""What no word and no number of a URL's path is."""

CHARACTERS_SHOWN = 80
"""Of a value or a text in an error."""


class SettingsError(ValueError):
    """What is wrong with a configuration, all at once.

    Attributes:
        owner: The name of the dataclass, or of the file.
        found: A sentence for each problem, which begins with the name of the setting.
        advice: A sentence on what to do about them all; nothing: each says it.
    """

    def __init__(self, owner: str, found: list[str], advice: str = "") -> None:
        super().__init__(f"{owner}: " + " ".join(filter(None, (*found, advice))))
        self.owner, self.found, self.advice = owner, found, advice


def problem(name: str, rule: str, got: object = "", fix: str = "") -> str:
    """Return the sentence: `name` must RULE, got GOT: FIX.

    Args:
        name: The parameter or the path of the setting.
        rule: What it must be or have: "be > 0".
        got: The value, as a message shows it; nothing: left out.
        fix: What to do; nothing: left out.
    """
    told = hidden(f"{got}")
    return f"`{name}` must {rule}{f', got {told}' if told else ''}{f': {fix}' if fix else ''}."


def hidden(text: str) -> str:
    """Return a text without the secrets that stand in its URLs: users, passwords and keys.

    A long run of letters and digits in the path is taken for one, as in https://host/v1/<token>.
    """
    text = re.sub(r"https?://[^\s'\"]+", lambda url: re.sub(_TOKEN, "…", url[0]), text)
    text = re.sub(r"(://)[^/?#\s'\"]*@", r"\1…@", text)
    return re.sub(rf"([?&;][\w.-]*(?:{SECRET})[\w.-]*=)(?!\$\{{)[^&#;\s'\"]+", r"\1…", text)


def tokens_in(url: str) -> list[str]:
    """Return what of a URL's path is taken for secrets."""
    return [found[0] for found in re.finditer(_TOKEN, url)]


def refuse(
    name: str, rule: str, got: object = "", fix: str = "", *, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise an error with the sentence of `problem`.

    Args:
        name: See `problem`, as the next three.
        rule: What it must be or have.
        got: The value.
        fix: What to do.
        error: ValueError, TypeError or another exception that takes one text.
    """
    raise error(problem(name, rule, got, fix))


def needed(package: str, by: str) -> Any:
    """Return a package that does not come with trl, or say who needs it and how to get it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"{by} needs the package {package}: pip install {package}.") from error


def shown(value: object) -> str:
    """Return a value as a message shows it, without its middle if that is long."""
    written = bounded(value if isinstance(value, str) else repr(value))
    return repr(written) if isinstance(value, str) else written


def bounded(text: str) -> str:
    """Return a text without its middle if that is long."""
    half = CHARACTERS_SHOWN // 2
    return text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}"


def closest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean …?' for the known name nearest to `name`, or nothing."""
    known = list(known)
    renamed = (OLD_SPELLINGS | OTHER_IDEAS | ELSEWHERE).get(name)
    alike = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), alike, 1, 0.7)
    match = [renamed] if renamed in known else [alike[each] for each in near]
    return f" Did you mean `{match[0]}`?" if match else ""


def closest_path(path: str, known: Iterable[str]) -> str:
    """Return ' Did you mean …?' for the settings that an unknown path may mean, or nothing.

    A setting of the same name counts most, then one of the same section.
    """
    above, _, name = path.replace("-", "_").rpartition(".")
    name = (OLD_SPELLINGS | OTHER_IDEAS | ELSEWHERE).get(name, name)

    def likeness(other: str) -> float:
        section, _, end = other.rpartition(".")
        alike = difflib.SequenceMatcher(None, name, end).ratio()
        beside = difflib.SequenceMatcher(None, above, section).ratio()
        return alike + 0.2 * beside if alike > 0.7 else 0.0

    near = max(known, key=likeness, default="")
    return f" Did you mean `{near}`?" if near and likeness(near) else ""
