"""Score code by tests: of its functions, or of what it prints."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from socket import socketpair
from typing import Any

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse, shown
from trl.config.types import Positive, Text
from trl.evaluation.cells import Cell, CellError, warden
from trl.evaluation.checks import last_block
from trl.evaluation.row_by_row import score_rows
from trl.evaluation.scores import by_hand
from trl.scored import Scored

__all__ = ["CodeScorer"]

LONGEST_CODE = 100_000
"""Characters; what is longer is not run."""


class CodeScorer:
    """1 if the code of a response passes all tests of its row, else 0.

        CodeScorer(tests="tests")
        {"prompt": …, "tests": ["import math", "assert area(1) == math.pi"]}
        {"prompt": …, "tests": [{"input": "3 4", "output": "7"}]}

    The code is the last block ``` … ``` of the response, or all of it. It is Python, and runs in a
    process with an empty environment, limits on time, memory, files and processes, and, where the
    kernel gives it, no other process, no network and no file in sight but Python's own.

    Tests are Python with `assert`, or an input and the output that is wanted, blanks at the ends of
    lines left out. Code cannot judge itself: tests of functions run in another process, arguments
    and results cross over as Python literals (numbers, texts, lists, dicts, …), and what is printed
    is compared here. So it takes more than to end with exit code 0, or to define another `==`.

    Args:
        tests: Column of the tests: one or a list for each row; or a list, for all rows.
        seconds: Most time for all tests of a response.
        share: Score the share of the tests that are passed.
        allow_unisolated: Run code though the kernel does not give it a world of its own.
        name: For messages and metrics.

    Raises:
        ValueError: if the kernel does not and it is not allowed.
    """

    def __init__(
        self,
        tests: str | Sequence[Any] = "tests",
        *,
        seconds: float = 2.0,
        share: bool = False,
        allow_unisolated: bool = False,
        name: str = "code",
    ) -> None:
        checks = {"share": (bool, share), "allow_unisolated": (bool, allow_unisolated)}
        check_values("CodeScorer", {**checks, "seconds": (Positive, seconds)})
        if isinstance(tests, str):
            check_values("CodeScorer", {"tests": (Text, tests)})
        else:
            tests = list_of_tests(tests)
        with warden() as one:
            missing = one.missing
        if missing:
            told = ", ".join(missing)
            if not allow_unisolated:
                fix = "allow_unisolated=True (--allow-unisolated) runs it all the same"
                refuse("allow_unisolated", f"be true where code is not kept from {told}", fix=fix)
            warnings.warn(f"CodeScorer runs code that is not kept from {told}.", stacklevel=2)
        self.tests, self.key = tests, tests if isinstance(tests, str) else None
        self.seconds, self.share, self.name = seconds, share, name

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response; its figure `passed` is the share of the tests that it passes.

        Raises:
            ScoringError: if there is no such column, or what is in it is no test.
        """
        shares = score_rows(self, rollout).scores
        return Scored(shares if self.share else (shares == 1).float(), figures={"passed": shares})

    def score_one(self, response: str, value: Any) -> float:
        """Return the share of the tests that a response passes, given those of its row."""
        code, tests = last_block(response), list_of_tests(value if self.key else self.tests)
        if len(code) > LONGEST_CODE:
            return 0.0
        until = time.monotonic() + self.seconds
        if isinstance(tests[0], str):
            held = tested(code, tests, until)
        else:
            held = [prints(code, test, until) for test in tests]
        return sum(held) / len(held)


def list_of_tests(tests: Any) -> list[Any]:
    """Return the tests of a row as a list, all of one kind.

    Raises:
        ValueError: if they are something else.
    """
    some = [tests] if isinstance(tests, str | Mapping) else tests
    listed = isinstance(some, Sequence) and some
    if listed and all(isinstance(test, str) and "\0" not in test for test in some):
        return list(some)
    named = {"input", "output"}
    if listed and all(isinstance(t, Mapping) and named <= t.keys() for t in some):
        return [{name: str(test[name]) for name in named} for test in some]
    rule = "be Python with assert, or {'input': …, 'output': …}, one or more of a kind"
    return refuse("tests", rule, shown(tests))


def tested(code: str, tests: Sequence[str], until: float) -> list[bool]:
    """Return which tests hold, of those that are more than a definition.

    Raises:
        ValueError: if none is.
    """
    found = None
    with suppress(CellError), warden() as one, warden() as other:
        ours, theirs = socketpair()
        with (
            ours,
            theirs,
            Cell(one, "answer", until=until, peer=ours, code=code),
            Cell(other, "tests", until=until, peer=theirs, tests=tests) as judge,
        ):
            ours.close()
            theirs.close()
            with suppress(CellError):
                found = judge.receive()
    if found == []:
        refuse("tests", "hold at least one that can fail", shown(tests), "write assert …")
    return found or [False]


def prints(code: str, test: Mapping[str, str], until: float) -> bool:
    """Tell whether a script prints what it should, and ends well."""
    with (
        suppress(CellError),
        warden() as keeper,
        Cell(keeper, "script", until=until, code=code, text=test["input"]) as cell,
        suppress(CellError),
    ):
        found = cell.rest().decode(errors="replace")
        return cell.end() and _lines(found) == _lines(test["output"])
    return False


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
