"""The contract of a scorer: what goes in, what comes out, and what an error tells."""

from __future__ import annotations

import asyncio
import inspect
import os
import sysconfig
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from trl.batch import Rollout

__all__ = ["Scorer", "ScoringError", "score"]

# What an error shows: so many texts, each cut to so many characters.
TEXTS_SHOWN = 3
CHARACTERS_SHOWN = 80

# Where code lies that is not the user's: this package, Python's own, and what is installed.
NOT_THE_USERS = (
    "<frozen ",
    str(Path(__file__).parents[1]) + os.sep,
    *(sysconfig.get_path(k) + os.sep for k in ("stdlib", "platstdlib", "purelib", "platlib")),
)


class Scorer(Protocol):
    """Whatever turns a rollout into scores [B], or into rewards [B, R] for each response token.

    Rewards are 0 outside `rollout.response_mask`. Both are float32 on the CPU.
    """

    def __call__(self, rollout: Rollout, /) -> Tensor:
        """Score each response of the rollout."""
        ...


class ScoringError(RuntimeError):
    """A scorer raised, or gave something else than finite scores, one for each response.

    The message names the scorer, and shows the first of the texts that may be at fault.
    """

    rows: tuple[int, ...] = ()
    """All rows of the rollout that may be at fault."""


def score(scorer: Scorer, rollout: Rollout) -> Tensor:
    """Call a scorer and check what it gives.

    Args:
        scorer: may also be `async`, and may also return what a `FunctionScorer`'s function may.
        rollout: of B responses, at most R tokens long.
    Returns:
        scores [B], or rewards [B, R] that are 0 outside the response mask; finite, float32, CPU.
    Raises:
        ScoringError: if the scorer raises, or gives the wrong count or shape, something that is
            not a number, NaN or infinity, or a reward where no token counts.
    """
    name = name_of(scorer)
    with failures_named(name, rollout):
        found: Any = result_of(scorer(rollout))
        if not isinstance(found, Tensor):
            found = lay_out(read_entries(found, rollout, range(len(rollout)), name), rollout, name)
    return check_scores(found, rollout, name)


# --- what goes in -------------------------------------------------------------------------------


def pairs_of(rollout: Rollout) -> list[tuple[str, str]]:
    """Return the texts of each query and its response."""
    if rollout.query_texts is None or rollout.response_texts is None:
        raise ScoringError(
            "the rollout must have texts for a scorer that reads text, got None: sample with "
            "Sampler(tokenizer), or fill query_texts and response_texts."
        )
    return list(zip(rollout.query_texts, rollout.response_texts, strict=True))


def texts_of(rollout: Rollout) -> list[str]:
    """Return each query and its response as one text."""
    pairs_of(rollout)  # says what is missing
    return list(rollout.texts or ())


# --- what comes out -----------------------------------------------------------------------------


def result_of(found: Any) -> Any:
    """Wait for `found` if it is a coroutine, else return it as it is."""
    if not inspect.iscoroutine(found):
        return found
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(found)
    # Inside a running event loop (Jupyter), which cannot be waited for from within.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, found).result()


def read_entries(
    found: Any, rollout: Rollout, rows: Sequence[int], name: str, *, of: str = ""
) -> list[float | list[float]]:
    """Take apart what was found for some rows: one number, or one list of numbers, for each.

    Args:
        found: list, tensor, array or other iterable, of len(rows) entries.
        rollout: that was scored.
        rows: of it that `found` is about.
        name: of the scorer.
        of: what a function was called with a list of.
    """
    found = _plain(found)
    rule = f"{name} must give one number for each of its {len(rows)} responses"
    # No text is at fault for what follows.
    if isinstance(found, (str, bytes, Mapping, Set)) or not isinstance(found, Iterable):
        got = f"the number {found}" if isinstance(found, Real) else shorten(found)
        advice = (
            f": the function is called once, with the list of all {of}, and returns a list of "
            "numbers"
        )
        raise ScoringError(f"{rule}, got {got}, not a list{advice if of else ''}.")
    entries = [_plain(entry) for entry in found]
    if len(entries) != len(rows):
        raise ScoringError(f"{rule}, got a list of {len(entries)}.")
    wrong = [index for index, entry in enumerate(entries) if not _is_numeric(entry)]
    if wrong:
        got = shorten(entries[wrong[0]])
        raise scoring_error(f"{rule}, got {got}.", rollout, [rows[index] for index in wrong])
    return entries


def lay_out(entries: Sequence[float | list[float]], rollout: Rollout, name: str) -> Tensor:
    """Make a tensor of one number for each response, or of one for each counted token.

    Returns:
        [B] or [B, R].
    """
    lists = [row for row, entry in enumerate(entries) if isinstance(entry, list)]
    if not lists:
        return torch.tensor(entries, dtype=torch.float64).float()
    if len(lists) < len(entries):
        raise scoring_error(
            f"{name} must give one number for each response, or one for each token of each "
            f"response, got both: lists for {len(lists)} of {len(entries)} responses.",
            rollout,
            lists,
        )
    mask = rollout.response_mask.cpu()
    counted = mask.sum(1).tolist()
    wrong = [row for row in lists if len(entries[row]) != counted[row]]
    if wrong:
        raise scoring_error(
            f"{name} must give one reward for each counted token of a response, "
            f"{counted[wrong[0]]} in row {wrong[0]}, got {len(entries[wrong[0]])}; or one plain "
            "number for the whole response, as scores.squeeze(-1) makes of [batch, 1].",
            rollout,
            wrong,
        )
    rewards = torch.zeros(mask.shape)
    flat = [reward for entry in entries for reward in entry]
    rewards[mask] = torch.tensor(flat, dtype=torch.float64).float()
    return rewards


def check_scores(scores: Tensor, rollout: Rollout, name: str) -> Tensor:
    """Return scores [B] or rewards [B, R] as float32 on the CPU, or raise a ScoringError."""
    every = range(len(rollout))
    mask = rollout.response_mask.cpu()
    if list(scores.shape) not in ([len(rollout)], list(mask.shape)) or scores.is_complex():
        column = list(scores.shape) == [len(rollout), 1]
        advice = ": use scores.squeeze(-1)" if column else ""
        raise scoring_error(
            f"{name} must give real numbers of the shape {[len(rollout)]}, one for each response, "
            f"or {list(mask.shape)}, one for each response token, got {scores.dtype} "
            f"{list(scores.shape)}{advice}.",
            rollout,
            every,
            suspects=False,
        )
    # A copy: one made in inference mode could not enter a graph, and the scorer may keep its own.
    scores = scores.detach().to("cpu", torch.float32, copy=True)
    by_row = scores.reshape(len(rollout), -1)
    wrong = (~by_row.isfinite()).any(1).nonzero().flatten().tolist()
    if wrong:
        row = by_row[wrong[0]]
        raise scoring_error(
            f"{name} must give finite numbers, got {row[~row.isfinite()][0].item()} for "
            f"{len(wrong)} of {len(rollout)} responses.",
            rollout,
            wrong,
        )
    if scores.ndim == 2 and (outside := (scores != 0) & ~mask).any():
        wrong = outside.any(1).nonzero().flatten().tolist()
        column = int(outside[wrong[0]].nonzero()[0])
        raise scoring_error(
            f"{name} must give rewards that are 0 where no token counts, got "
            f"{scores[wrong[0], column].item()} at token {column} of row {wrong[0]}: use "
            "torch.where(rollout.response_mask, rewards, 0).",
            rollout,
            wrong,
        )
    return scores


def _plain(found: Any) -> Any:
    """Turn tensors and arrays, also those inside lists, into Python numbers and lists."""
    if hasattr(found, "tolist"):
        found = found.tolist()
    return [_plain(entry) for entry in found] if isinstance(found, (list, tuple)) else found


def _is_numeric(entry: Any) -> bool:
    return isinstance(entry, Real) or (
        isinstance(entry, list) and all(isinstance(number, Real) for number in entry)
    )


# --- what an error tells ------------------------------------------------------------------------


def name_of(scorer: Any) -> str:
    """Return what messages and metrics call a scorer."""
    return str(
        getattr(scorer, "name", None) or getattr(scorer, "__name__", None) or type(scorer).__name__
    )


class failures_named:
    """Turns any exception of a block into a ScoringError with the texts that it was about.

    A class, since a generator could not tell a StopIteration of the block from its own end.

    Args:
        name: of the scorer.
        rollout: that is scored.
        rows: of it that the block is about; None: all.
    """

    def __init__(self, name: str, rollout: Rollout, rows: Sequence[int] | None = None) -> None:
        self.name = name
        self.rollout = rollout
        self.rows = range(len(rollout)) if rows is None else rows

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A scorer's own task that was cancelled has failed; Ctrl-C goes on as it is.
        failed = isinstance(error, (Exception, asyncio.CancelledError))
        if failed and not isinstance(error, ScoringError):
            problem = f"{self.name} raised {described(error)}{_place(trace)}."
            raise scoring_error(problem, self.rollout, self.rows, suspects=False) from error


def scoring_error(
    problem: str, rollout: Rollout, rows: Sequence[int], *, suspects: bool = True
) -> ScoringError:
    """Make an error that shows texts.

    Args:
        problem: what is wrong.
        rollout: that was scored.
        rows: of it that the problem is about.
        suspects: whether each of the rows is at fault, rather than an unknown one of them.
    """
    shown = ", ".join(f"row {row}: {_text(rollout, row)}" for row in rows[:TEXTS_SHOWN])
    if len(rows) > TEXTS_SHOWN:
        shown += f", and {len(rows) - TEXTS_SHOWN} more"
    which = "At fault:" if suspects else "Which text is at fault is unknown; it was one of"
    error = ScoringError(f"{problem} {which} {shown}.")
    error.rows = tuple(rows)
    return error


def described(error: BaseException) -> str:
    """Return the type of an exception and its message, if it has one."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _place(trace: TracebackType | None) -> str:
    """Return the last place in the user's own code that an exception went through, if any."""
    own = [
        (frame.f_code, line)
        for frame, line in traceback.walk_tb(trace)
        if not frame.f_code.co_filename.startswith(NOT_THE_USERS)
    ]
    if not own:
        return ""
    code, line = own[-1]
    return f" ({Path(code.co_filename).name}, line {line}, in {code.co_name})"


def shorten(value: object) -> str:
    """Return how a value is written, without its middle if that is long."""
    written = value if isinstance(value, str) else repr(value)
    if len(written) > CHARACTERS_SHOWN:
        half = CHARACTERS_SHOWN // 2
        written = f"{written[:half]} … {written[-half:]}"
    return repr(written) if isinstance(value, str) else written


def _text(rollout: Rollout, row: int) -> str:
    if rollout.texts is None:
        return f"tokens {shorten(rollout.responses[row][rollout.response_mask[row]].tolist())}"
    # The middle is left out: a prompt's beginning says which it is, the end is what was scored.
    return shorten(rollout.texts[row])
