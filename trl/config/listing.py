"""What there is to set: for help, and for pages of documentation."""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

from trl.config.types import bare, is_optional, kinds_of, section_in, words


class Setting(NamedTuple):
    """One setting of a dataclass or of those inside it."""

    path: str
    """As `ppo.learning_rate`; N stands for the number of an entry, from 0: `reward.N.weight`."""
    kind: str
    """What its values are, in words."""
    default: str
    """As YAML, or as a flag has it."""
    text: str
    """The text under the field."""
    is_truth: bool
    """Whether it is true or false."""


@functools.cache
def paths(cls: Any, prefix: str = "", instance: Any = None) -> tuple[Setting, ...]:
    """Return every setting of a dataclass and of those inside it, in order.

    A section is there by what is in it; an optional one, and a list, by itself too.

    Args:
        cls: The dataclass.
        prefix: What stands before each path.
        instance: One of it whose values are the defaults; None: those of the class.
    """
    found: list[Setting] = []
    for name, kind in kinds_of(cls).items():
        field = cls.__pydantic_fields__[name]
        default = field.get_default(call_default_factory=True)
        default = getattr(instance, name, default)
        inner, path = section_in(kind), f"{prefix}{name}"
        many = inner is not None and bare(kind) is not inner
        if inner is None or many or is_optional(kind):
            if not isinstance(default, str):
                default = json.dumps(default, default=lambda _: {})
            text = field.description or ""
            found.append(Setting(path, words(kind), default, text, bare(kind) is bool))
        if inner is not None:
            whole = default if isinstance(default, inner) else None
            found += paths(inner, f"{path}.N." if many else f"{path}.", whole)
    return tuple(found)
