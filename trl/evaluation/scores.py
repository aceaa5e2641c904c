"""The contract of a scorer: what goes in, what comes out, and what an error tells."""

from __future__ import annotations

import asyncio
import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trl.batch import Rollout, axes_of
from trl.config.errors import refuse, shown
from trl.scored import BadScores, Scored

__all__ = ["Scorer", "ScoringError", "score"]

Own = TypeVar("Own")
Texts = Sequence[str] | Sequence[tuple[str | Sequence[Mapping[str, Any]], str]]
"""Responses, or pairs of a query, which may be a chat, and its response."""

Finish = Callable[[Any], Scored]

# So many texts are shown in an error.
TEXTS_SHOWN = 3

# Where code lies that is not the user's: this package, Python's own, and what is installed.
NOT_THE_USERS = (
    "<frozen ",
    str(Path(__file__).parents[1]) + os.sep,
    *(sysconfig.get_path(k) + os.sep for k in ("stdlib", "platstdlib", "purelib", "platlib")),
)


class Scorer(Protocol):
    """Whatever turns a rollout into scores: those of trl give a `Scored`.

    One's own may also give what that is made of: scores [B] as a tensor or a list, or rewards
    [B, R] for each response token, 0 outside `rollout.response_mask`. It may be `async`.
    """

    def __call__(self, rollout: Rollout, /) -> Scored | Tensor | Sequence[Any]:
        """Score each response of the rollout."""
        ...


class ScoringError(RuntimeError):
    """A scorer raised, or gave something else than finite scores, one for each response.

    The message names the scorer, and shows the first of the texts that may be at fault.
    """

    rows: tuple[int, ...] = ()
    """All rows of the rollout that may be at fault."""


def score(scorer: Scorer, rollout: Rollout | Texts, **columns: Sequence[Any]) -> Scored:
    """Call a scorer and check what it gives.

    Args:
        scorer: See `Scorer`.
        rollout: of B responses, at most R tokens long; or their texts, see `rollout_of`.
        **columns: B values each, of texts.
    Raises:
        ScoringError: if the scorer raises, or gives the wrong count or shape, something that is
            not a number, NaN or infinity, or a reward where no token counts; or if it writes into
            the rollout, which would then be trained as it has made it.
    """
    return score_all({"": scorer}, rollout_of(rollout, columns))[""]


def score_all(scorers: Mapping[str, Scorer], rollout: Rollout) -> dict[str, Scored]:
    """Call scorers and check what they give, as `score` does of one.

    They are called one after another; what is `async` is then waited for in one event loop, where
    all go on together.
    """
    before, found = _state(rollout), dict[str, Scored]()
    waiting = dict[str, tuple[Any, Finish]]()
    try:
        for name, scorer in scorers.items():
            with failures_named(name_of(scorer), rollout):
                given, finish = _begun(scorer, rollout)
                if inspect.iscoroutine(given):
                    waiting[name] = given, finish
                else:
                    found[name] = finish(given)
            _check_left(rollout, before, [scorer])
        named = [(name_of(scorers[name]), given) for name, (given, _) in waiting.items()]
        results = result_of(_together(named, rollout)) if named else []
        for (name, (_, finish)), result in zip(waiting.items(), results, strict=True):
            with failures_named(name_of(scorers[name]), rollout):
                found[name] = finish(result)
        _check_left(rollout, before, [scorers[name] for name in waiting])
    finally:
        for given, _ in waiting.values():  # that has not begun, since another one failed
            given.close()
    return {name: found[name] for name in scorers}


def _begun(scorer: Scorer, rollout: Rollout) -> tuple[Any, Finish]:
    """Call a scorer; return what it gives, or a coroutine that will, and what checks that."""
    begin = vars(type(scorer)).get("begin_scoring")  # a subclass may have a call of its own
    if begin is not None:
        return begin(scorer, rollout)  # type: ignore[no-any-return]
    return scorer(rollout), lambda found: Scored.of(found, rollout)


async def _together(named: Sequence[tuple[str, Coroutine[Any, Any, Any]]], rollout: Rollout) -> Any:
    """Wait for coroutines of scorers, called so, at the same time."""

    async def waited(name: str, given: Coroutine[Any, Any, Any]) -> Any:
        with failures_named(name, rollout):
            return await given

    return await asyncio.gather(*(waited(*each) for each in named))


def _check_left(rollout: Rollout, before: Mapping[str, Any], scorers: Sequence[Scorer]) -> None:
    """Raise a ScoringError if one of the scorers has written into the rollout."""
    after = _state(rollout) if scorers else before
    if changed := [name for name in before if after[name] != before[name]]:
        raise ScoringError(
            f"{' or '.join(map(name_of, scorers))} must leave the rollout as it is, but wrote into "
            f"its {', '.join(changed)}: change a copy, such as rollout.{changed[0]}.clone(), or "
            f"copy.deepcopy(rollout.{changed[0]}) of lists."
        )


def _state(rollout: Rollout) -> dict[str, Any]:
    """Return the contents of each field, in a form that can be compared."""
    state: dict[str, Any] = {}
    for name in axes_of(type(rollout)):
        value = getattr(rollout, name)
        if isinstance(value, Tensor):  # its bytes: torch counts no write through NumPy or `.data`
            whole = value.detach().cpu().contiguous()
            raw = whole.flatten().view(torch.uint8).numpy().tobytes()
            state[name] = whole.dtype, whole.shape, raw
        else:  # the text of a large array leaves numbers out
            arrays = (Tensor, np.ndarray)
            state[name] = repr(tree_map_only(arrays, lambda array: array.tolist(), value))
    return state


# --- what goes in -------------------------------------------------------------------------------

NO_TOKEN = -1
"""Stands for the tokens of a text that nobody has cut up."""


def rollout_of(given: Rollout | Texts, columns: Mapping[str, Sequence[Any]]) -> Rollout:
    """Return a rollout as it is, and texts as one without tokens, for scorers that read texts.

    Args:
        given: Responses, or (query, response) pairs.
        columns: What else is known of each text; a rollout has its own.
    Raises:
        TypeError, ValueError: if they are something else, or a column has another length.
    """
    if isinstance(given, Rollout):
        if columns:
            refuse("columns", "be left out beside a rollout, which has its own", list(columns))
        return given
    entries = list(given) if isinstance(given, list | tuple) else []
    pairs = [("", entry) if isinstance(entry, str) else entry for entry in entries]
    sound = [isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[1], str) for p in pairs]
    if not entries or not all(sound):
        rule = "be texts, (query, response) pairs, or a Rollout"
        fix = "scorer([text]), scorer([(query, response)], answer=[…]) with columns by name"
        refuse("responses", rule, shown(given), fix, error=TypeError)
    for name, values in columns.items():
        if isinstance(values, str) or len(values) != len(pairs):
            refuse(name, f"be a list of {len(pairs)} values, one for each text", shown(values))
    queries, responses = zip(*pairs, strict=True)
    chats = None
    if not all(isinstance(query, str) for query in queries):
        chats = tuple(
            [{"role": "user", "content": query}] if isinstance(query, str) else query
            for query in queries
        )
        queries = tuple(PARAGRAPH.join(map(words_of, chat)) for chat in chats)
    none = torch.full((len(pairs), 1), NO_TOKEN, device="cpu")
    return replace(
        Rollout.from_lists(none, none),
        query_texts=queries,
        response_texts=responses,
        query_messages=chats,
        columns={name: tuple(values) for name, values in columns.items()} or None,
    )


def has_tokens(rollout: Rollout) -> bool:
    """Tell whether a rollout is more than texts."""
    return bool((rollout.responses != NO_TOKEN).any())


def by_hand(
    call: Callable[[Own, Rollout], Scored],
) -> Callable[Concatenate[Own, Rollout | Texts, ...], Scored]:
    """Let a scorer also be called with texts, and columns by name, see `rollout_of`."""

    @wraps(call)
    def called(self: Own, rollout: Rollout | Texts, **columns: Sequence[Any]) -> Scored:
        return call(self, rollout_of(rollout, columns))

    return called


def pairs_of(rollout: Rollout) -> list[tuple[str, str]]:
    """Return the texts of each query and its response; of a chat, what its messages say."""
    if rollout.query_texts is None or rollout.response_texts is None:
        raise ScoringError(
            "the rollout must have texts for a scorer that reads text, got None: sample with "
            "Sampler(tokenizer), or fill query_texts and response_texts."
        )
    return list(zip(queries_of(rollout) or (), rollout.response_texts, strict=True))


def queries_of(rollout: Rollout) -> Sequence[str] | None:
    """Return the text of each query; of a chat, what its messages say, a blank line between two."""
    if rollout.query_messages is None:
        return rollout.query_texts
    return [PARAGRAPH.join(map(words_of, chat)) for chat in rollout.query_messages]


def texts_of(rollout: Rollout) -> list[str]:
    """Return each query and its response as one text.

    Of a chat: what the messages say, the answer last, with a blank line between two; neither their
    roles nor what a chat template adds.
    """
    pairs = pairs_of(rollout)
    if (chats := rollout.query_messages) is None:
        return list(rollout.texts or ())
    begun = [chat[-1]["role"] == "assistant" for chat in chats]  # an answer that is gone on with
    return [("" if on else PARAGRAPH).join(pair) for on, pair in zip(begun, pairs, strict=True)]


PARAGRAPH = "\n\n"
"""What stands between two messages of a chat."""


def words_of(message: Mapping[str, Any]) -> str:
    """Return what a message says: its content, or the texts among the parts of that."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


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


# --- what an error tells ------------------------------------------------------------------------


def name_of(scorer: Any) -> str:
    """Return what messages and metrics call a scorer."""
    name = getattr(scorer, "name", None) or getattr(scorer, "__name__", None)
    return str(name or type(scorer).__name__)


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

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, BadScores):
            rows = [self.rows[row] for row in error.rows]
            problem = f"{self.name} must give {error.problem}."
            raise scoring_error(problem, self.rollout, rows) from None
        # A scorer's own task that was cancelled has failed; Ctrl-C goes on as it is.
        failed = isinstance(error, (Exception, asyncio.CancelledError))
        if failed and not isinstance(error, ScoringError):
            problem = f"{self.name} raised {described(error)}{_place(trace)}."
            of_list = isinstance(error, AttributeError) and "'list' object" in str(error)
            if of_list:  # no text is at fault
                problem += " It is called once, with the list of all texts, and returns as many "
                problem += "numbers: write [… for text in texts]."
            elif isinstance(error, TypeError) and "string indices must be" in str(error):
                problem += " Completions are texts where prompts are texts; of chats they are "
                problem += "lists of messages."
            rows = () if of_list else self.rows
            raise scoring_error(problem, self.rollout, rows, suspects=False) from error


def scoring_error(
    problem: str, rollout: Rollout, rows: Sequence[int], *, suspects: bool = True
) -> ScoringError:
    """Make an error that shows texts.

    Args:
        problem: what is wrong.
        rollout: that was scored.
        rows: of it that the problem is about; none: no text is.
        suspects: whether each of the rows is at fault, rather than an unknown one of them.
    """
    shown = ", ".join(f"row {row}: {_text(rollout, row)}" for row in rows[:TEXTS_SHOWN])
    if len(rows) > TEXTS_SHOWN:
        shown += f", and {len(rows) - TEXTS_SHOWN} more"
    which = "At fault:" if suspects else "Which text is at fault is unknown; it was one of"
    error = ScoringError(f"{problem} {which} {shown}." if rows else problem)
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


def _text(rollout: Rollout, row: int) -> str:
    if rollout.texts is None:
        return f"tokens {shown(rollout.responses[row][rollout.response_mask[row]].tolist())}"
    # The middle is left out: a prompt's beginning says which it is, the end is what was scored.
    return shown(rollout.texts[row])
