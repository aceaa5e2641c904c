"""To judge in a notebook, without a server: a panel of ipywidgets.

    Panel("votes.sqlite")

as the last line of a cell. What waits for answers must not be a cell: the kernel would see no
click. See `trl.training.beside.Beside`, which trains beside the panel.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from trl.evaluation.people.asking import enough, waits
from trl.evaluation.people.items import BOTH_BAD, SKIP, TIE, Answer
from trl.evaluation.people.store import Refused, Shown, Store

__all__ = ["Panel", "need_widgets"]

EVERY = 0.5
"""Seconds between two looks for something new to judge."""
LETTERS = "ABCD"
RATINGS = ("very bad", "bad", "middling", "good", "very good")


def need_widgets() -> Any:
    """Return ipywidgets.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import ipywidgets
    except ImportError:
        told = "A panel needs ipywidgets: install it, or trl with the extra notebooks"
        raise ImportError(f"{told}, '.[notebooks]'.") from None
    return ipywidgets


class Panel:
    """Shows one person what is to be judged, and takes the answers.

    Args:
        path: The store; it may be made later, by who asks.
        name: Who judges.
        also: Called at each look for something new, in the thread that may change widgets.

    Attributes:
        widget: All of it, to be shown.
        answers: A box of buttons, one for each answer.
        undo, skip, enough: Buttons.
    """

    def __init__(
        self, path: str | Path, name: str = "me", *, also: Callable[[], Any] = lambda: None
    ) -> None:
        widgets = need_widgets()
        self.also = also
        self.store = Store(path, make=True)
        self.me = self.store.join(self.store.link(name))
        self.shown: Shown | None = None
        self.item, self.said, self.left = (widgets.HTML() for _ in range(3))
        self.answers = widgets.HBox(layout={"flex_flow": "row wrap"})
        self.undo = self._button("Undo", self._undo)
        self.skip = self._button("Skip", lambda: self._vote(SKIP))
        self.enough = self._button("Enough for now", self._enough)
        others = widgets.HBox([self.undo, self.skip, self.enough], layout={"flex_flow": "row wrap"})
        self.widget = widgets.VBox([self.left, self.item, self.answers, others, self.said])
        self._ticking: asyncio.Task[None] | None = None
        self.refresh()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)
        self.tick()

    def tick(self) -> None:
        """Look for something new to judge, again and again, where an event loop runs."""
        with suppress(RuntimeError):  # there is none: who shows the panel calls `refresh`
            self._ticking = self._ticking or asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            self.refresh()
            await asyncio.sleep(EVERY)

    def refresh(self) -> None:
        """Show what is to be judged now."""
        self.also()
        asked = self.store.fact("question")
        shown = self.store.next(self.me) if asked else None
        waiting = waits(self.store)
        left = (
            f"The training waits for {waiting.left} of {len(waiting.answers)}." if waiting else ""
        )
        _set(self.left, value=left)
        _set(self.undo, disabled=self.store.last(self.me) is None)
        _set(self.skip, disabled=shown is None)
        _set(self.enough, disabled=waiting is None)
        if shown == self.shown and self.item.value:
            return
        self.shown = shown
        self.item.value = _html(shown) if shown else "<em>Nothing is to be judged now.</em>"
        told = _choices(asked, len(shown.responses)) if shown else []
        self.answers.children = [self._answer(*each) for each in told]

    def close(self) -> None:
        """Look for nothing new any more."""
        if self._ticking is not None:
            self._ticking.cancel()
        self.store.close()

    def _answer(self, label: str, answer: Answer) -> Any:
        return self._button(label, lambda: self._vote(answer))

    def _button(self, label: str, act: Any) -> Any:
        button = need_widgets().Button(description=label)

        def clicked(_: Any) -> None:
            try:
                self.said.value = escape(act() or "")
            except Refused as error:
                self.said.value = escape(str(error))
            self.refresh()

        button.on_click(clicked)
        return button

    def _vote(self, answer: Answer) -> str:
        if self.shown is None:
            return ""
        self.store.vote(self.me, self.shown.id, uuid.uuid4().hex, answer)
        return "Stored."

    def _undo(self) -> str:
        last = self.store.last(self.me)
        if last is None:
            return ""
        self.store.undo(self.me, last)
        return "Undone: answer once more."

    def _enough(self) -> str:
        enough(self.store)
        return "Enough for now: the training goes on without the rest."


def _set(widget: Any, **values: Any) -> None:
    """Change what differs: everything else would be sent to the browser for nothing."""
    for name, value in values.items():
        if getattr(widget, name) != value:
            setattr(widget, name, value)


def _choices(question: str, count: int) -> list[tuple[str, Answer]]:
    """Return what may be answered, with words for it."""
    how = "better" if count == 2 else "best"
    best: list[tuple[str, Answer]] = [(f"{LETTERS[i]} is {how}", i) for i in range(count)]
    return {
        "pair": [*best, ("Tie", TIE), ("Both bad", BOTH_BAD)],
        "best": [*best, ("All bad", BOTH_BAD)],
        "thumbs": [("👎 Bad", False), ("👍 Good", True)],
        "rating": [(f"{i}: {text}", i) for i, text in enumerate(RATINGS, 1)],
    }[question]


def _html(shown: Shown) -> str:
    """Return an item; what a model wrote is text, whatever it looks like."""
    prompt = shown.prompt
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    titles = LETTERS if len(shown.responses) > 1 else ["Response"]
    named = [("Prompt", prompt), *zip(titles, shown.responses, strict=False)]
    return "".join(
        f"<b>{title}</b><pre style='white-space: pre-wrap'>{escape(text)}</pre>"
        for title, text in named
    )
