"""Talking to a model in the terminal, or to two side by side: as it was, and as it is.

talk("runs/mine")                 # a run: the model that it began as, and its policy
talk("gpt2", lines=["Hello."])    # one model, and what is said to it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl.anatomy import position_limits
from trl.config.code import Trust
from trl.config.errors import refuse
from trl.config.recipe import Recipe
from trl.environments import Episodes
from trl.rollout.sampler import Sampler
from trl.training.named import load_environment
from trl.training.parts import sampling_of
from trl.training.tools import conversation, loaded, recipe_of, sent_as, show
from trl.watch.markdown import visible

CLEAR = "/clear"
"""What one says to begin anew."""
MOST = 256
"""Tokens of a response, if nothing says how many."""


class Speaker:
    """A model, and its side of a conversation.

    Args:
        model: A model's folder or hub name, starter, or the folder of a run.
        how: See `sent_as`; its model need not have a chat template: it goes on from each text then.
        where: Passed to `load_policy`.
        episodes: Gives the model tools, see `load_environment`; None: there are none.
        **sampling: Settings of `Sampler`; without max_new_tokens, a response may have `MOST`, or
            half of what the model can read.

    Raises:
        ValueError: if the environment is a game, which leaves nothing for a person to say.
    """

    def __init__(
        self,
        model: str | Path,
        how: Mapping[str, Any],
        where: Mapping[str, Any] | None = None,
        episodes: Callable[[Sampler], Episodes] | None = None,
        **sampling: Any,
    ) -> None:
        sampling = {"max_new_tokens": lambda: self.most} | sampling
        self.policy, self.sampler, self.form = loaded(model, (), how, where, **sampling)
        positions, _ = position_limits(self.policy)
        self.most = MOST if positions is None else min(MOST, positions // 2)
        self.sampler = self.sampler if episodes is None else episodes(self.sampler)
        self.history: list[dict[str, Any]] = []
        if isinstance(self.sampler, Episodes) and not self.sampler.world.schemas({}):
            rule, fix = "have tools", "trl sample shows how it is played"
            refuse("environment", rule, "a game, which is between it and the model", fix)

    def forget(self) -> None:
        """Begin anew."""
        self.history = []
        if isinstance(self.sampler, Episodes):
            self.sampler.goes_on = False

    def answer(self, text: str) -> str:
        """Return what the model says to a message, and remember both.

        With tools, also what it called on the way, and what the tools said.

        Raises:
            ValueError: if the conversation is too long for the model, which has then not heard it.
        """
        asked = [*self.history, {"role": "user", "content": text}]
        row: Any = self.form(asked) if self.form.chat else text
        if isinstance(self.sampler, Episodes):  # what is typed is all that there is of a row
            row = {"prompt": row} | dict.fromkeys(self.sampler.world.needs({}) - {"prompt"}, text)
        with torch.no_grad():
            rollout = self.sampler(self.policy, [row])
        (answer,) = rollout.response_texts or ("",)
        said = [{"role": "assistant", "content": answer}]
        if rollout.episodes is not None and isinstance(self.sampler, Episodes):
            self.sampler.goes_on = True
            said, answer = (
                rollout.episodes[0]["messages"],
                conversation(rollout.episodes[0]["messages"]),
            )
            asked = list((rollout.query_messages or [asked])[0])
        self.history = [*asked, *said]
        return answer


def talk(
    model: str | Path,
    before: str | None = None,
    *,
    lines: Iterable[str] | None = None,
    out: str | None = None,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    trust: Trust = (),
    **sampling: Any,
) -> list[dict[str, str]]:
    """Let a person talk to a model, or to two at once.

    Args:
        model: A model's folder or hub name, starter, or the folder of a run.
        before: A model that gets the same messages; None: that which the run began as, if it is one
            and its model is there.
        lines: What is said; None: what is typed, or comes through a pipe, a message each line.
        out: See `show`; None: the answers are printed as they come.
        system: The system message; None: that of the run.
        chat_template_kwargs: What the chat template is told besides; None: as in the run.
        recipe: Of whose `environment` the models have the tools; None: they have none.
        trust: Modules and files whose code may run.
        **sampling: Settings of `Sampler`: max_new_tokens (else those of the run, see `Speaker`),
            temperature, top_p, seed.

    Returns:
        A row for each message: message, and the answer, or answers before and after.
    """
    how = sent_as(model, {"system": system, "chat_template_kwargs": chat_template_kwargs})
    how["chat"] = None  # a prompt of the run may be no chat, but this is
    if recipe is not None:
        sampling = sampling_of(recipe) | {"group_size": 1} | sampling
        if (environment := recipe.environment) is not None:  # one for each, that goes on
            sampling["episodes"] = lambda sampler: load_environment(environment, trust)(sampler)
    speakers, start = dict[str, Speaker](), recipe_of(model)
    if start is not None:
        sampling = {"max_new_tokens": start.sampling.max_new_tokens} | sampling
    if before is not None:
        speakers["before"] = Speaker(before, how, **sampling)
    elif start is not None:
        where = {"revision": start.model.revision, "gguf_file": start.model.gguf_file}
        where = {key: value for key, value in where.items() if value}
        try:
            speakers["before"] = Speaker(start.model.name, how, where, **sampling)
        except OSError:
            told = f"what the run began as, {start.model.name!r}, is not here: name it by --before"
            print(f"trl: {told}.", file=sys.stderr)
    speakers["after" if speakers else "answer"] = Speaker(model, how, **sampling)
    if not all(speaker.form.chat for speaker in speakers.values()):
        print("trl: no chat template: each line is gone on with as plain text.", file=sys.stderr)
    limit = sampling.get("max_new_tokens")
    if start is not None and isinstance(limit, int) and limit > start.sampling.max_new_tokens:
        told = f"the run's answers had at most {start.sampling.max_new_tokens} tokens, here {limit}"
        print(f"trl: {told} (--max-new-tokens).", file=sys.stderr)
    console, rows = Console(), list[dict[str, str]]()
    for text in filter(str.strip, _typed() if lines is None else lines):
        if text.strip() == CLEAR:
            for speaker in speakers.values():
                speaker.forget()
            continue
        try:
            with console.status("…") if console.is_terminal and not out else nullcontext():
                answers = {name: speaker.answer(text) for name, speaker in speakers.items()}
        except ValueError as error:  # too long
            if not sys.stdin.isatty():
                raise
            told = f"{CLEAR} begins anew; --max-new-tokens N allows shorter answers"
            print(f"trl: {error} {told}.", file=sys.stderr)
            continue
        rows.append({"message": text} | answers)
        if out is None:
            _print(console, answers)
    if out is not None:
        show(rows, out)
    return rows


def _typed() -> Iterator[str]:
    """Yield the lines of the standard input, up to its end: Ctrl-D in a terminal."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  lets lines be edited, and called up again
    print(f"Ctrl-D ends, {CLEAR} begins anew.")
    with suppress(EOFError):
        while True:
            yield input("> ")


def _print(console: Console, answers: Mapping[str, str]) -> None:
    """Print what each said: side by side in a terminal, one after another in a pipe."""
    texts = {name: visible(text.strip()) for name, text in answers.items()}
    if len(texts) > 1 and console.is_terminal:
        table = Table(*texts, expand=True)
        table.add_row(*map(Text, texts.values()))
        console.print(table)
    else:
        for name, text in texts.items():
            print(f"{name}: {text}" if len(texts) > 1 else text, flush=True)
