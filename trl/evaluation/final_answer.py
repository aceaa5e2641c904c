r"""Score the final answer of a response against the right one: numbers, fractions, LaTeX, units.

MathScorer(key="answer")        # for rows such as {"prompt": …, "answer": "\\frac{1}{2}"}
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from trl.batch import Rollout
from trl.config import check_values
from trl.config.types import Positive, Text
from trl.evaluation.cells import ask
from trl.evaluation.checks import responses_of
from trl.evaluation.row_by_row import column_of, score_rows
from trl.evaluation.scores import by_hand
from trl.scored import Scored

__all__ = ["MathScorer"]

MOST_READ, LONGEST_ANSWER = 20_000, 500
"""Characters: of the end of a response, where the answer is looked for; and of the answer."""

BOXES = "\\boxed{", "\\fbox{"
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
RATIO = r"-?[0-9]{1,50}\s*/\s*[0-9]{1,50}"
LAST_NUMBER = re.compile(rf"(?:(?<![\w.)])-)?(?:{RATIO}|{DIGITS})(?:\s*\\?%)?")
LAST_FORMULA = re.compile(r"\$([^$\n]{1,500})\$|\\\((.{1,500}?)\\\)")
NUMBER = re.compile(
    rf"""(?:[A-Za-z]\s*=\s*)?  # x =
    (?P<sign>[-+])?\s*(?P<money>\\?\$|€|£)?\s*
    (?:(?P<whole>[0-9]+)\s+(?P<part>[0-9]+/[0-9]+)|(?P<ratio>{RATIO})|(?P<digits>{DIGITS}))
    (?:\s*(?:\\times|\\cdot|×|\*)\s*10\^\{{?(?P<power>-?[0-9]{{1,3}})\}}?|e(?P<e>[-+]?[0-9]{{1,3}}))?
    \s*(?P<percent>\\?%)?
    \s*(?P<unit>[^\W\d_]+(?:(?:\s+|\s*/\s*)[^\W\d_]+){{0,2}}(?:\^?\{{?[23]\}}?|[²³])?)?""",
    re.VERBOSE,
)
PLAINER = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:left|right|displaystyle|[!,;:])", ""),
        (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r" \1/\2"),
        (r"\\frac\s*([0-9])\s*([0-9])", r" \1/\2"),
        (r"\{,\}", ","),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°", " degree"),
        (r"(?i)\bpercent\b", "%"),
        (r"−", "-"),
        (r"[~\s]+", " "),
    )
]
NO_UNITS = re.compile(
    r"\b(hundred|thousand|[mbtr]+illion|dozen|half|thirds?|quarters?|pi|sqrt|log|ln|sin|cos|tan|mod|"
    r"and|or|plus|minus|times|over|to|squared|cubed|factorial|inf|infinity|nan)\b"
)
"""Words after a number that make it another one, or several of it."""
LETTERS = frozenset("mghs")
"""Units of one letter; any other is a variable."""


class MathScorer:
    r"""1 if the final answer of a response is the right one, else 0.

    The final answer is in the last `\\boxed{…}`, or after the last `####`, whichever comes later;
    without either, it is the last number, or the last formula $…$ if the right one is no number.

    Where the right answer is a number, so must the final one be, and they must be the same exactly:
    1,234 = 1234.0, 1/2 = \\frac{1}{2} = 0.5 = 50\\%, 3\\frac{1}{2}, 1.2 \\times 10^3. What only
    comes to it is none: `12+30` leaves the work for 42 to the scorer. A unit may be left out; if
    both have one, it must be the same. Any other answer is compared by math-verify
    (the extra `math`), in a process that ends with its time.

    Args:
        key: Column of the right answers: numbers, or texts, such as a whole solution that ends in
            one of the two marks.
        seconds: Most time for an answer.
        marked: Whether an answer without a mark is none.
        name: For messages and metrics.
    """

    def __init__(
        self, key: str = "answer", *, seconds: float = 2.0, marked: bool = False, name: str = "math"
    ) -> None:
        kinds = {"key": (Text, key), "seconds": (Positive, seconds), "marked": (bool, marked)}
        check_values("MathScorer", kinds)
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("MathScorer needs math-verify: pip install math-verify.")
        self.key, self.seconds, self.marked, self.name = key, seconds, marked, name

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response; its note `answer` is what was read off it, in a plain form.

        Raises:
            ScoringError: if there is no such column, or a right answer in it is nothing.
        """
        scored = score_rows(self, rollout)
        rows = zip(responses_of(rollout), column_of(rollout, self.key, self.name), strict=True)
        return replace(scored, notes={"answer": tuple(self.answer(*row) for row in rows)})

    def answer(self, response: str, value: Any) -> str:
        """Return the final answer of a response: equal numbers as equal texts; "" for none."""
        number = number_in(plain(_piece(str(value))))
        found = plain(final_answer(response, marked=self.marked, number=number is not None) or "")
        read = number_in(found)
        return found if read is None else str(read.value / (100 if read.percent else 1))

    def right(self, value: Any) -> str:
        """Return a response that is right, for a value of the column."""
        return f"\\boxed{{{_piece(str(value))}}}"

    def score_one(self, response: str, value: Any) -> float:
        """Score a response, given the value of its row."""
        right = plain(_piece(str(value)))
        if not right:
            raise ValueError(f"the column {self.key!r} holds no answer: {value!r}")
        number = number_in(right)
        answer = final_answer(response, marked=self.marked, number=number is not None)
        if answer is None:
            return 0.0
        answer = plain(answer)
        if number is not None:
            return float(number.is_same_as(number_in(answer)))
        if answer == right:
            return 1.0
        given = {"answer": answer, "right": right}
        return float(ask("math", ["math_verify"], self.seconds, **given) is True)


def _piece(right: str) -> str:
    """Return the answer in a text of the column: behind its mark, or all of it."""
    return right.strip() if (found := marked_answer(right)) is None else found


def final_answer(text: str, *, marked: bool, number: bool) -> str | None:
    """Return the final answer of a response; None: it has none, or too long a one.

    Args:
        text: The response.
        marked: Whether it must have a mark.
        number: Whether it is to be a number, where there is no mark.
    """
    text = text[-MOST_READ:]
    found = marked_answer(text)
    if found is None and not marked:
        pattern = LAST_NUMBER if number else LAST_FORMULA
        matches = list(pattern.finditer(text))
        found = (matches[-1][matches[-1].lastindex or 0]) if matches else None
    return found if found and len(found) <= LONGEST_ANSWER else None


def marked_answer(text: str) -> str | None:
    """Return what is behind the last mark, "" if it is left open; None: there is no mark."""
    place, mark = max((text.rfind(mark), mark) for mark in (*BOXES, "####"))
    if place < 0:
        return None
    rest = text[place + len(mark) :]
    if mark not in BOXES:
        return rest.lstrip().partition("\n")[0].strip()
    depth = 1
    for end, sign in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth == 0:
            return rest[:end].strip()
    return ""


def plain(text: str) -> str:
    """Return an answer without what only shapes it."""
    text = text.strip()
    for start, end in ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"):
        if len(text) > 2 and text.startswith(start) and text.endswith(end):
            text = text[len(start) : -len(end)]
    for pattern, plainer in PLAINER:
        text = pattern.sub(plainer, text)
    return text.strip().rstrip(".").strip()


class Number(NamedTuple):
    """A number and its unit, if it has one; a percentage has the number of it as its value."""

    value: Fraction
    percent: bool
    unit: str

    def is_same_as(self, other: Number | None) -> bool:
        """Tell whether they are equal: 50 % is 1/2, and 50 where the other leaves its % out."""
        if other is None or (self.unit and other.unit and self.unit != other.unit):
            return False
        if self.value == other.value:
            return True
        one, two = (n.value / 100 if n.percent else n.value for n in (self, other))
        return self.percent != other.percent and one == two


def number_in(text: str) -> Number | None:
    """Return the number that a whole text is; None: it is something else."""
    found = NUMBER.fullmatch(text)
    if found is None:
        return None
    unit = (found["unit"] or "").casefold()
    words = re.findall(r"[^\W\d_]+", unit)
    if NO_UNITS.search(unit) or any(len(word) == 1 and word not in LETTERS for word in words):
        return None
    try:
        if found["whole"]:
            value = Fraction(found["whole"]) + Fraction(found["part"])
        else:
            value = Fraction((found["ratio"] or found["digits"]).replace(",", "").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None
    value *= Fraction(10) ** int(found["power"] or found["e"] or 0)
    value = -value if found["sign"] == "-" else value
    money = {"\\$": "dollar", "$": "dollar"}.get(found["money"], found["money"] or "")
    return Number(value, found["percent"] is not None, money or unit.rstrip("s"))
