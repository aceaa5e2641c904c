"""Secrets in texts that are kept and shown: they stay in the environment, as ${NAME}."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from urllib.parse import quote

from trl.config.errors import hidden, refuse

_VARIABLE = re.compile(r"\$\{(\w+)\}")

SHORTEST = 4
"""Characters of what is masked: a shorter value is no secret, and stands in any text."""


def filled(text: str, name: str) -> str:
    """Return a text with the values of the variables of the environment that it names as ${NAME}.

    Args:
        text: A URL, or what a header says.
        name: The parameter that it is, for the error.

    Raises:
        ValueError: naming a variable that is not set.
    """
    for variable in _VARIABLE.findall(text):
        if not os.environ.get(variable):
            fix = f"export {variable}=… first"
            refuse(name, "name variables of the environment that are set", f"${{{variable}}}", fix)
    return _VARIABLE.sub(lambda found: os.environ[found[1]], text)


def masked(text: str, templates: Iterable[str], secrets: Iterable[str] = ()) -> str:
    """Return a text in which no secret can be read.

    Args:
        text: To be shown: an error, say, with what a server answered.
        templates: Texts whose variables are secrets; of these the ${NAME} is shown.
        secrets: Others, which are shown as ….
    """
    variables = {name for template in templates for name in _VARIABLE.findall(template)}
    shown = {os.environ.get(name, ""): f"${{{name}}}" for name in sorted(variables)}
    shown = dict.fromkeys(secrets, "…") | shown
    for secret in sorted(shown, key=len, reverse=True):
        for form in {secret, quote(secret, safe="")} if len(secret) >= SHORTEST else ():
            text = text.replace(form, shown[secret])
    return hidden(text)
