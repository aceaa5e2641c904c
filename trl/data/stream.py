"""Prompts that are read as they are used: of endless sources, and of data larger than memory.

stream = stream_of(lambda: map(json.loads, open("prompts.jsonl")))
stream.draw(16, generator)          # 16 prompts, each drawn from the next thousand
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch import Generator, Tensor

from trl.config import check_values
from trl.config.errors import refuse
from trl.config.types import Count, Whole
from trl.data.sources import streamed_dataset

BUFFER = 1000
"""Prompts to draw from, as in the package datasets."""
CHUNK = 256
"""Rows that are read, and brought into shape, at once."""
MOST_UNFIT = 100_000
"""Rows at the beginning that give no prompt; an endless source may never give one."""
FIRST = 64
"""Prompts at the beginning that tell one source from another."""

Rows = list[Any]


class PromptStream:
    """Prompts from a source, drawn from a buffer that is filled as they are.

    Every prompt comes up once before the source is read again from its beginning.

    Args:
        read: The source, called as read(position, size): gives its rows, from that position on, in
            lists of `size`.
        buffer: So many prompts are read ahead, one of which at random is the next: 1 leaves them in
            their order.
        held_out: The first so many prompts never come up; they are in the attribute `held_out`.
        limit: Most prompts of the source besides; None: all.
        prepare: Makes prompts, or rows of them, from some rows and the position of the first.
        finish: Makes what is drawn from those that are not held out.
        name: What errors call it.
        once: The source can be read but once, so that no run can be gone on with.
    """

    def __init__(
        self,
        read: Callable[[int, int], Iterator[Rows]],
        *,
        buffer: int = BUFFER,
        held_out: int = 0,
        limit: int | None = None,
        prepare: Callable[[Rows, int], Rows] = lambda rows, position: rows,
        finish: Callable[[Rows], Rows] = lambda rows: rows,
        name: str = "prompts",
        once: bool = False,
    ) -> None:
        checks = {"shuffle_buffer": (Count, buffer), "held_out": (Whole, held_out)}
        check_values("PromptStream", checks)
        self.read, self.prepare, self.finish = read, prepare, finish
        self.buffer_size, self.limit, self.name, self.once = buffer, limit, name, once
        self.form: Callable[[Any], Any] = lambda row: row
        """Makes of a prompt, or a row, what is sent; a state holds it as it was read."""
        self.held_out: Rows = []
        self._to_hold_out = held_out
        self._saved = self._ended = False
        self._buffer: Rows = []
        self._position = self._seen = 0
        self._chunks = self._chunks_from(0, 0)
        # What was read since the last state; read again after going back to it.
        self._journal: list[tuple[int, int, Rows | None]] = []
        self._again: list[tuple[int, int, Rows | None]] = []
        self._state: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"a stream of prompts, shuffled within {self.buffer_size:,}"

    def look(self) -> Rows:
        """Return what is in the buffer, which is filled first.

        Raises:
            TypeError, ValueError: if the source gives no prompts.
        """
        self._fill()
        return list(map(self.form, self._buffer))

    @property
    def first(self) -> Rows:
        """A few prompts, before any is drawn those at the beginning."""
        return self.look()[:FIRST]

    def to_be_saved(self) -> None:
        """Refuse from now on what no checkpoint can hold.

        Raises:
            TypeError: for a source that can be read but once, or rows that have something else than
                plain values and tensors.
        """
        if self.once:
            rule = "be a list, or a function that returns a new iterable, where checkpoints are"
            fix = "pass a function, as prompts=lambda: rows(), or leave `out` away"
            got = "an iterator, which no run could go on with"
            refuse(self.name, f"{rule} written", got, fix, error=TypeError)
        self._saved = True
        self._check_plain(self.look())

    def draw(self, number: int, generator: Generator) -> Rows:
        """Return the next prompts, or rows of them."""
        drawn = []
        for _ in range(number):
            self._fill()
            index = int(torch.randint(len(self._buffer), (), generator=generator))
            self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
            drawn.append(self.form(self._buffer.pop()))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Return how far it has come, and what is in the buffer."""
        self._journal = []
        self._state = {
            "position": self._position,
            "seen": self._seen,
            "ended": self._ended,
            "buffer": list(self._buffer),
        }
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; what lies before is read, and passed over.

        To go back to the last state, as after a failed step, reads nothing.
        """
        if state is self._state:
            self._again = self._journal + self._again
        else:
            self._chunks, self._again = self._chunks_from(state["position"], state["seen"]), []
        self._journal, self._buffer = [], list(state["buffer"])
        self._position, self._seen, self._ended = (state[k] for k in ("position", "seen", "ended"))

    def _fill(self) -> None:
        """Fill the buffer; behind the end of the source only when nothing is left in it."""
        while len(self._buffer) < self.buffer_size and not (self._ended and self._buffer):
            try:
                read = self._again.pop(0) if self._again else next(self._chunks)
            except BaseException:  # it would be at its end then
                self._chunks = self._chunks_from(self._position, self._seen)
                raise
            if self._state:
                self._journal.append(read)
            self._position, self._seen, rows = read
            self._ended = rows is None
            self._buffer += rows or []

    def _chunks_from(self, position: int, seen: int) -> Iterator[tuple[int, int, Rows | None]]:
        """Yield, again and again, the rows of the source, and None at its end.

        Before them stands the position behind them, and how many prompts there were until there.
        """
        held_out, last_fit = self._to_hold_out, position
        stop = None if self.limit is None else held_out + self.limit
        while True:
            for rows in self.read(position, min(CHUNK, self.buffer_size)):
                prompts = self.prepare(rows, position)
                if len(self.held_out) < held_out:
                    self.held_out += prompts[: held_out - len(self.held_out)]
                end = None if stop is None else max(0, stop - seen)
                kept = self.finish(prompts[max(0, held_out - seen) : end])
                position, seen = position + len(rows), seen + len(prompts)
                if self._saved:
                    self._check_plain(kept)
                yield position, seen, kept
                last_fit = position if kept else last_fit
                never = last_fit == 0 and position > MOST_UNFIT
                if never or (stop is not None and seen >= stop):
                    break
            if last_fit == 0:
                besides = f" besides the {held_out} held out" if held_out else ""
                refuse(self.name, f"have prompts to use{besides}", f"none in {position:,} rows")
            position = seen = 0
            yield position, seen, None
            if self.once:
                rule = "go on until the last step, or be a list or a function"
                refuse(self.name, rule, f"an iterator that ended after {last_fit:,} rows")
            last_fit = 0

    def _check_plain(self, rows: Rows) -> None:
        for row in rows:
            for column, value in row.items() if isinstance(row, Mapping) else [("prompt", row)]:
                if not _is_plain(value):
                    rule = "have texts, numbers, lists, dicts and tensors alone for checkpoints"
                    got = f"{type(value).__name__} in {column!r}"
                    refuse(self.name, rule, got, "leave the column out, or make it a text")


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in (str, int, float, bool, type(None), Tensor)


# -- what is read ----------------------------------------------------------------------------------


def stream_of(
    prompts: Any, *, buffer: int = BUFFER, held_out: int = 0, name: str = "prompts"
) -> PromptStream | None:
    """Return a stream of what is no list of prompts; None for any other.

    Args:
        prompts: A `datasets.IterableDataset`; a path, or several, of files (with * for many); a
            function that returns an iterable, a new one at each call; an iterable that has no
            length; or an iterator, which can be read but once.
        buffer: See `PromptStream`, as the others.
        held_out: The first so many are held out.
        name: What errors call it.
    """
    more: dict[str, Any] = {"buffer": buffer, "held_out": held_out, "name": name}
    several = isinstance(prompts, list | tuple) and prompts
    if isinstance(prompts, os.PathLike) or (several and isinstance(prompts[0], os.PathLike)):
        paths = [os.fspath(path) for path in (prompts if several else [prompts])]
        return PromptStream(reader_of_dataset(streamed_dataset(paths, name=name)), **more)
    if hasattr(prompts, "load_state_dict") and hasattr(prompts, "skip"):
        return PromptStream(reader_of_dataset(prompts), **more)
    if callable(prompts):
        return PromptStream(_reader_of_function(prompts, name), **more)
    if isinstance(prompts, Iterator):
        read = _reader_of_function(lambda: prompts, name)
        return PromptStream(lambda position, size: read(0, size), **more, once=True)
    if isinstance(prompts, Iterable) and not isinstance(prompts, Sized | Sequence):
        return PromptStream(_reader_of_function(lambda: prompts, name), **more)
    return None


def all_or_rest(rows: Iterator[Any]) -> Rows | Iterator[Any]:
    """Return what an iterator gives as a list if it ends soon, else an iterator of the same."""
    first = list(islice(rows, BUFFER + 1))
    return first if len(first) <= BUFFER else chain(first, rows)


def reader_of_dataset(dataset: Any) -> Callable[[int, int], Iterator[Rows]]:
    """Return what reads a `datasets.IterableDataset` for a `PromptStream`."""

    def read(position: int, size: int) -> Iterator[Rows]:
        # Not by its own state: that has no place for the rows of shuffle buffers.
        for columns in (dataset.skip(position) if position else dataset).iter(size):
            rows = zip(*columns.values(), strict=True)
            yield [dict(zip(columns, row, strict=True)) for row in rows]

    return read


def _reader_of_function(
    function: Callable[[], Iterable[Any]], name: str
) -> Callable[[int, int], Iterator[Rows]]:
    """Return what reads the iterables that a function returns."""

    def read(position: int, size: int) -> Iterator[Rows]:
        given = function()
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping | Tensor):
            rule, got = "return an iterable of prompts", type(given).__name__
            refuse(f"{name}()", rule, got, error=TypeError)
        rows = iter(given)
        if (there := sum(1 for _ in islice(rows, position))) < position:
            refuse(name, f"have the {position:,} rows that were read before", f"{there:,}")
        while chunk := list(islice(rows, size)):
            yield chunk

    return read
