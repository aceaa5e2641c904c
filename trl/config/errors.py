"""One form for a refused input: the parameter, the rule, what was given, and how to mend it."""

from __future__ import annotations

from typing import NoReturn


def refuse(
    name: str, rule: str, got: str = "", fix: str = "", *, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise an error in the words: `name` must RULE, got GOT: FIX.

    Args:
        name: The parameter or the path of the setting.
        rule: What it must be or have: "be > 0".
        got: The value, as a message shows it; nothing: left out.
        fix: What to do; nothing: left out.
        error: ValueError, TypeError or another exception that takes one text.
    """
    raise error(f"`{name}` must {rule}{f', got {got}' if got else ''}{f': {fix}' if fix else ''}.")
