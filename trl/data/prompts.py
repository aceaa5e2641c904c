"""The prompts of a run: where they come from, and what a recipe does to them.

prompts = load_prompts(recipe.data, tokenizer, seed=recipe.seed)
print(prompts)                      # how many there are, how many were left out, and why
prompts.train, prompts.held_out     # as `Sampler` and `Loop` take them
"""

from __future__ import annotations

import itertools
import json
import math
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl import starter
from trl.config import closest
from trl.config.errors import refuse, shown
from trl.config.recipe import ENVIRONMENT, STARTER, DataConfig
from trl.data.sources import (
    MODEL,
    Table,
    checked_texts,
    chosen_column,
    listed,
    read_table,
    streamed_dataset,
)
from trl.data.stream import PromptStream, reader_of_dataset
from trl.rollout.queries import SENT_AS_CHATS, ChatForm, encode_queries
from trl.rollout.sampler import Sampler

T = TypeVar("T")
Prompt = str | list[dict[str, Any]]
"""A text, or a chat: a list of messages {"role": …, "content": …}."""


@dataclass(frozen=True, slots=True, repr=False)
class PromptSplit:
    """The prompts of a run; they follow from the data, the settings and the seed alone."""

    train: list[Prompt]
    """Every prompt with each prefix, the combinations of a prompt side by side; of a stream, the
    first few."""
    held_out: list[Prompt]
    """Likewise; none of them stands in `train`, unless equal prompts were asked for."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many prompts of the source are in neither list, by the reason."""
    train_rows: Sequence[Any] | PromptStream = ()
    """`train` as `Sampler` and `Loop` take it: with the other columns of the source, which rewards
    may ask for, as rows {"prompt": …, column: …}."""
    held_out_rows: Sequence[Any] = ()
    """Likewise of `held_out`."""
    note: str = ""
    """What may not be as it was meant: some that are empty; how they are sent, if nobody has said
    how."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_rows", self.train_rows or self.train)
        object.__setattr__(self, "held_out_rows", self.held_out_rows or self.held_out)

    def __str__(self) -> str:
        stream = isinstance(self.train_rows, PromptStream)
        trained = str(self.train_rows) if stream else f"{len(self.train):,} prompts to train on"
        text = f"{trained}, {len(self.held_out):,} held out"
        text += f"; {self.note}" if self.note else ""
        return text + (f"; left out: {_reasons(self.left_out)}" if self.left_out else "")


def load_prompts(
    settings: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    policy: nn.Module | None = None,
) -> PromptSplit:
    """Read the prompts, bring them into shape, and split them.

    In this order: template, cut, chat, equal ones out, those of a wrong length out, shuffle, limit,
    split (the last ones are held out), prefixes. The starter prompts stay in the order of their
    files and are split by these.

    * A prompt that is cut is kept only if its text, encoded again, gives the tokens of the cut.
      With a template, it is the column that is cut.
    * Tokens are counted without those that the tokenizer adds around a text; a prompt stays if it
      has the right length with each of its prefixes, a chat as its template writes it.
    * The answer that ends a chat is removed: the policy is to write its own.
    * With `settings.shuffle_buffer`, the prompts are a stream: the first ones are held out, and of
      the others only those equal to one of them are left out as equal.

    Args:
        settings: The section `data` of a recipe.
        tokenizer: The policy's.
        seed: Of the shuffle, the cuts and what the policy writes.
        policy: Writes the prompts if the settings say so. Prompts come out the same again only if
            its weights are the same, so give it as it was before the first step.

    Raises:
        FileNotFoundError: if a file is not there.
        ImportError: if the source needs a package that is not installed.
        TypeError: if an entry is neither a text nor a chat.
        ValueError: if the data and the settings do not fit each other.
    """
    prepare = _Preparation(settings, tokenizer, seed, policy)
    if settings.prompts == ENVIRONMENT:  # which adds to them
        return _empty(prepare)
    if settings.shuffle_buffer is not None:
        return _streamed(prepare, settings.shuffle_buffer)
    prompts = prepare(settings.prompts, "data.prompts")
    apart = settings.held_out_prompts is not None or settings.prompts == STARTER
    held_out = prepare.held_out() if apart else []
    if settings.deduplicate:
        taken = {_key(prompt) for prompt in held_out}
        unseen = [prompt for prompt in prompts if _key(prompt) not in taken]
        if not unseen:
            _refuse_all_held_out(settings, len(prompts))
        prompts = prepare.kept(unseen, prompts, "held out too")
    train = prepare.kept(prompts[: settings.limit], prompts, "beyond data.limit")
    # What is held out is cut off the rest, unless it has a source of its own.
    end = len(train) - (0 if apart else settings.held_out)
    if end <= 0:
        rule = f"be more than those held out (data.held_out: {settings.held_out:,})"
        got = f"{len(train):,} (left out: {_reasons(prepare.left_out) or 0})"
        refuse("data.prompts", rule, got)
    rows = [_finished(side, settings.prefixes) for side in (train[:end], held_out or train[end:])]
    prompts_alone = [[row["prompt"] for row in side] for side in rows]
    with_more = [side if side and len(side[0]) > 1 else () for side in rows]
    counts = dict(+prepare.left_out)  # those above 0
    empty = sum(map(_says_nothing, prompts_alone[0]))
    told = [f"{empty} of them empty"] if 0 < empty < end else []  # all: as it was meant
    for column in rows[0][0]:
        lacking = sum(row[column] is None for row in rows[0])
        told += [f"{lacking:,} of them without `{column}` (None)"] if 0 < lacking < end else []
    note = "; ".join(filter(None, (*told, prepare.note)))
    return PromptSplit(*prompts_alone, counts, *with_more, note=note)


def _refuse_all_held_out(settings: DataConfig, count: int) -> NoReturn:
    """Raise, as every prompt to train on is held out too."""
    whose = f"data.held_out_prompts, {settings.held_out_prompts!r}"
    got = f"{settings.prompts!r}, whose {count:,} prompts all stand among those of {whose}, too"
    fix = "give two files of different prompts, or leave data.held_out_prompts out: some of "
    fix += "data.prompts are held out then"
    refuse("data.prompts", "have prompts that are not held out", got, fix)


def _says_nothing(prompt: Prompt) -> bool:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return isinstance(text, str) and not text.strip()


def _empty(prepare: _Preparation) -> PromptSplit:
    """Return prompts that say nothing."""
    sent = prepare.sent([""])
    train, held_out = sent * (prepare.settings.limit or 1024), sent * prepare.settings.held_out
    return PromptSplit(train, held_out, {}, (), (), note=prepare.note)


def columns_for_rewards(settings: DataConfig) -> list[list[str]]:
    """Return the columns that rewards will know of the prompts of each source, without a model."""
    found: list[list[str]] = []
    for key in ("prompts", "held_out_prompts"):
        source, name = getattr(settings, key), f"data.{key}"
        where: Any = {"subset": settings.subset, "split": settings.split, "name": name}
        if source in (None, STARTER, MODEL, ENVIRONMENT):
            found += [[]] if source else []
            continue
        if settings.shuffle_buffer is None:
            table = read_table(source, **where)
        else:
            rows = streamed_dataset((source,) if isinstance(source, str) else source, **where)
            table = Table(str(source), {column: [x] for column, x in next(iter(rows), {}).items()})
        column = None if settings.template else chosen_column(table, settings.column, name)
        found.append([each for each in table.names if each not in (column, "prompt")])
    return found


def _streamed(prepare: _Preparation, buffer: int) -> PromptSplit:
    """Return the prompts as they are read."""
    settings, name = prepare.settings, "data.prompts"
    sources = settings.prompts if isinstance(settings.prompts, tuple) else (settings.prompts,)
    where = {"subset": settings.subset, "split": settings.split, "name": name}
    dataset, source = streamed_dataset(sources, **where), ", ".join(sources)

    def prepared(rows: list[Any], position: int) -> list[dict[str, Any]]:
        columns = {key: [_as_text(row[key]) for row in rows] for key in rows[0]}
        random = np.random.default_rng([prepare.seed, 0, 0, position])
        return prepare.of_table(Table(source, columns, before=position), name, random)

    def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        taken = {_key(row) for row in (apart or stream.held_out) if settings.deduplicate}
        unseen = [row for row in rows if _key(row) not in taken]
        return _finished(unseen, settings.prefixes)

    apart = prepare.held_out() if settings.held_out_prompts is not None else None
    stream = PromptStream(
        reader_of_dataset(dataset),
        buffer=buffer,
        held_out=settings.held_out if apart is None else 0,
        limit=settings.limit,
        prepare=prepared,
        finish=finished,
        name=name,
    )
    stream.to_be_saved()
    held_out = _finished(stream.held_out if apart is None else apart, settings.prefixes)
    first, held_out_prompts = ([row["prompt"] for row in side] for side in (stream.first, held_out))
    return PromptSplit(first, held_out_prompts, {}, stream, held_out, prepare.note)


def _as_text(value: Any) -> Any:
    """Return a time or an exact number, which a checkpoint does not hold, as a text."""
    return str(value) if isinstance(value, date | time | timedelta | Decimal) else value


def _with_prefixes(prompts: Sequence[Prompt], prefixes: Sequence[str]) -> list[Any]:
    """Return every combination, those of one prompt side by side."""
    return [prefix + prompt for prompt in prompts for prefix in prefixes] or list(prompts)


def _finished(rows: Sequence[dict[str, Any]], prefixes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows with every combination."""
    prompts = _with_prefixes([row["prompt"] for row in rows], prefixes)
    of_prompts = (row for row in rows for _ in prefixes or ("",))
    return [row | {"prompt": text} for row, text in zip(of_prompts, prompts, strict=True)]


def _key(row: Mapping[str, Any]) -> str:
    """Return what two rows share if their prompts are equal."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)


# A table becomes prompts


@dataclass
class _Preparation:
    """Brings the prompts of one source after another into shape."""

    settings: DataConfig
    tokenizer: PreTrainedTokenizerBase
    seed: int
    policy: nn.Module | None
    left_out: Counter[str] = field(default_factory=Counter)
    form: ChatForm | None = None

    def __call__(self, source: str, name: str, *, held_out: bool = False) -> list[dict[str, Any]]:
        """Return the rows of a source with their "prompt", before the limit and the prefixes."""
        settings = self.settings
        # Sources of their own for what is random, so that one setting does not change another.
        cuts, order, writing = (
            np.random.default_rng([self.seed, int(held_out), use]) for use in range(3)
        )
        if source == STARTER:
            table = Table(source, {"text": starter.prompts("held-out" if held_out else "train")})
        elif source == MODEL:
            table = Table(source, {"text": self._written(int(writing.integers(2**31)))})
        else:
            table = read_table(source, subset=settings.subset, split=settings.split, name=name)
        before = self.left_out.copy()
        prompts = self.of_table(table, name, cuts, unique=settings.deduplicate)
        if not prompts:
            reasons = _reasons(self.left_out - before)
            refuse(name, "have prompts to use", f"{table.source}, all left out: {reasons}")
        if settings.shuffle and source != STARTER:
            prompts = [prompts[index] for index in order.permutation(len(prompts)).tolist()]
        return prompts

    def of_table(
        self, table: Table, name: str, cuts: np.random.Generator, *, unique: bool = False
    ) -> list[dict[str, Any]]:
        """Return the rows of a table with their "prompt", those of a wrong length left out."""
        prompts = self.sent(self._prompts(table, name, cuts))
        if unique:
            each = {_key(prompt): prompt for prompt in prompts}  # where it stood first
            prompts = self.kept(list(each.values()), prompts, "equal to another")
        return self._of_right_length(prompts)

    def sent(self, rows: Sequence[Any]) -> list[Any]:
        """Return prompts, or rows with them, as they are sent."""
        settings = self.settings
        if self.form is None:  # for all sources, and all of a stream
            told = {k: getattr(settings, k) for k in ("system", "chat_template_kwargs")}
            told["chat"] = settings.sends_chats
            self.form = ChatForm(self.tokenizer, rows, **told, section="data.")
        return list(map(self.form, rows))

    @property
    def note(self) -> str:
        """How texts are sent, if nobody has said how."""
        decided = self.form is not None and self.form.decided
        return SENT_AS_CHATS.format("data.chat: false") if decided else ""

    def held_out(self) -> list[dict[str, Any]]:
        """Return the held-out rows that have a source of their own."""
        wanted, source = self.settings.held_out, self.settings.held_out_prompts
        if wanted == 0:
            return []
        name = "data.held_out_prompts" if source else "data.prompts"
        prompts = self(source or STARTER, name, held_out=True)
        if wanted > len(prompts) and wanted != DataConfig().held_out:  # all, if nobody says
            rule = f"be at most {len(prompts)}, the held-out prompts of {source or STARTER!r}"
            refuse("data.held_out", rule, str(wanted), "lower it")
        return self.kept(prompts[:wanted], prompts, "held-out prompts beyond data.held_out")

    def kept(self, kept: list[T], every: Sequence[Any], reason: str) -> list[T]:
        """Return those that are kept of all, and count why the others are not."""
        self.left_out[reason] += len(every) - len(kept)
        return kept

    def _prompts(
        self, table: Table, name: str, random: np.random.Generator
    ) -> list[dict[str, Any]]:
        """Return the rows of a table, without the blank ones, and their texts or chats as "prompt".

        A template leaves the columns that it is made of in the row.
        """
        settings = self.settings
        column = settings.column
        if settings.template is not None:
            pieces = _template_pieces(settings.template, table)
            columns = {key: _written_out(table, key, name) for _, key in pieces if key}
        else:
            column = chosen_column(table, column, name)
            if isinstance(table.columns[column][0], (list, tuple)):
                return self._chats(table, column, name)
            pieces = [("", column)]
            columns = {column: checked_texts(table, column, name)}
        ambiguous = settings.cut_tokens is not None and column is None and len(columns) > 1
        if ambiguous or column not in (None, *columns):
            rule = f"be the column of data.template to cut, one of {list(columns)}"
            refuse("data.column", rule, repr(column))
        if settings.cut_tokens is not None:
            cut = column or next(iter(columns))
            columns[cut] = _cut(columns[cut], self.tokenizer, settings.cut_tokens, random)
        literals, keys = zip(*pieces, strict=True)
        texts = [
            None
            if None in entries
            else "".join(itertools.chain(*zip(literals, entries, strict=True)))
            for entries in zip(*(columns[k] if k else [""] * table.size for k in keys), strict=True)
        ]
        rows = _rows(table, texts, None if settings.template else column)
        whole = [row for row in rows if row["prompt"] is not None]
        self.kept(whole, rows, "not the same tokens when encoded again")
        return self.kept([row for row in whole if row["prompt"].strip()], whole, "blank")

    def _chats(self, table: Table, column: str, name: str) -> list[dict[str, Any]]:
        """Return the rows with the chats of a column, up to where the assistant is to speak."""
        settings = self.settings
        for key in ("cut_tokens", "prefixes"):
            if unfit := getattr(settings, key):
                where = f"column {column!r} of {table.source}"
                refuse(f"data.{key}", f"be left out for chats, as in {where}", repr(unfit))
        chats: list[Any] = []
        for row, entry in enumerate(table.column(column)):
            messages = checked_messages(entry, table.place(row), name)
            if settings.system and messages and messages[0]["role"] == "system":
                place = f"a system message of its own in {table.place(row)}"
                refuse("data.system", f"be None for a chat that has {place}", repr(settings.system))
            before = len(messages)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            self.left_out["answers that ended a chat"] += before > len(messages) > 0
            chats.append(messages)
        every = _rows(table, chats, column)
        return self.kept([row for row in every if row["prompt"]], every, "blank")

    def _of_right_length(self, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out rows whose prompts have too few or too many tokens."""
        settings = self.settings
        low, high = settings.min_tokens or 0, settings.max_tokens
        if (low == 0 and high is None) or not table:
            return table
        prompts = [row["prompt"] for row in table]
        if isinstance(prompts[0], str):
            enough = low if high is None else high + 1
            texts = _with_prefixes(prompts, settings.prefixes)
            rows: Sequence[Any] = _first_tokens(texts, self.tokenizer, enough)
        else:
            told = {"chat_template_kwargs": settings.chat_template_kwargs, "name": "data.prompts"}
            rows = encode_queries(prompts, self.tokenizer, **told).rows
        sizes = np.array([len(row) for row in rows]).reshape(len(prompts), -1)  # [., prefixes]
        too_short = sizes.min(1) < low
        too_long = ~too_short & (sizes.max(1) > (math.inf if high is None else high))
        self.left_out["shorter than data.min_tokens"] += int(too_short.sum())
        self.left_out["longer than data.max_tokens"] += int(too_long.sum())
        return list(itertools.compress(table, ~(too_short | too_long)))

    def _written(self, seed: int) -> list[str]:
        """Return texts that the policy writes from nothing but the BOS token."""
        settings, tokenizer = self.settings, self.tokenizer
        if self.policy is None or tokenizer.bos_token_id is None:
            rule = "not be 'model' without a policy that writes them, from a BOS token"
            fix = "pass policy=, set tokenizer.bos_token, or name a file"
            refuse("data.prompts", rule, fix=fix)
        low, high = settings.model_prompt_tokens
        sampler = Sampler(tokenizer, max_new_tokens=(low, high), eos_token_id=None, seed=seed)
        begin = [torch.tensor([tokenizer.bos_token_id])] * min(settings.model_prompts, 256)
        special = set(tokenizer.all_special_ids)
        texts: list[str] = []
        for _ in range(8 * -(-settings.model_prompts // len(begin))):
            rows = sampler(self.policy, begin).response_lists()
            rows = [row for row in rows if not special & set(row)]
            texts += [text for text in _decoded_again(rows, tokenizer) if text and text.strip()]
            texts = list(dict.fromkeys(texts)) if settings.deduplicate else texts
            if len(texts) >= settings.model_prompts:
                return texts[: settings.model_prompts]
        rule = f"be at most {len(texts)}, which the policy wrote in eight times as many attempts"
        advice = "lower it, or raise data.model_prompt_tokens"
        refuse("data.model_prompts", rule, str(settings.model_prompts), advice)


def _rows(table: Table, prompts: Sequence[Any], column: str | None) -> list[dict[str, Any]]:
    """Return each row's prompt, and its other columns: those but `column`, which prompts are from.

    None: they are from a template, and a column alone has nothing to add to it.
    """
    names = [name for name in table.names if name not in (column, "prompt")]
    columns = {name: table.column(name) for name in names if len(table.names) > 1}
    return [
        {"prompt": prompt} | {name: columns[name][row] for name in columns}
        for row, prompt in enumerate(prompts)
    ]


def _template_pieces(template: str, table: Table) -> list[tuple[str, str | None]]:
    """Return the template as (text, name of the column that follows it, if any)."""
    pieces: list[tuple[str, str | None]] = []
    try:
        for literal, key, spec, conversion in string.Formatter().parse(template):
            if key is not None:  # what Python would take for a format is part of the name
                key += (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            pieces.append((literal, key))
    except ValueError as error:
        rule = "be a template, with {{ and }} for braces of the text"
        refuse("data.template", rule, f"{template!r} ({error})")
    for key in [key for _, key in pieces if key is not None] or [""]:
        if key not in table.names:
            raise ValueError(
                "`data.template` must name columns between braces ({{ }} are braces of the text), "
                f"got {{{key}}} in {template!r}: {listed(table)}.{closest(key, table.names)}"
            )
    return pieces


def _written_out(table: Table, column: str, name: str) -> list[Any]:
    """Return the entries of a column for a template: texts, and numbers as they are written."""
    texts = [str(e) if isinstance(e, (int, float)) else e for e in table.column(column)]
    return checked_texts(Table(table.source, {column: texts}, table.lines), column, name)


def checked_messages(entry: Any, place: str, name: str) -> list[dict[str, Any]]:
    """Return the messages of one chat as plain dicts."""
    messages = list(entry) if isinstance(entry, (list, tuple)) else [None]
    if not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
        rule = "have chats in every row like the first, lists of {'role': ..., 'content': ...}"
        refuse(name, rule, f"{shown(entry)} in {place}", error=TypeError)
    return [dict(message) for message in messages]


# Tokens


def _cut(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: tuple[int, int],
    random: np.random.Generator,
) -> list[str | None]:
    """Return the first tokens of each text as text; None where that gives other tokens."""
    low, high = limits
    sizes = random.integers(low, high + 1, size=len(texts)).tolist()
    # One token more tells whether there is anything to cut.
    rows = _first_tokens(texts, tokenizer, high + 1)
    cut = _decoded_again([row[:size] for row, size in zip(rows, sizes, strict=True)], tokenizer)
    return [
        beginning if len(row) > size else text
        for text, row, size, beginning in zip(texts, rows, sizes, cut, strict=True)
    ]


def _decoded_again(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str | None]:
    """Yield the text of each row of tokens; None where that gives other tokens."""
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
    for text, row, tokens in zip(texts, rows, encoded(texts, tokenizer), strict=True):
        yield text if row == tokens else None


def _first_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[list[int]]:
    """Return the first `count` tokens of each text, or all if it has fewer.

    To encode only the beginning of a long text is many times faster. It ends before a space, and
    counts only if it has a token to spare: the last one might be another in the whole text.
    """
    ends = [text.find(" ", 6 * count + 24) for text in texts]
    beginnings = [text if end < 0 else text[:end] for text, end in zip(texts, ends, strict=True)]
    rows = list(encoded(beginnings, tokenizer))
    too_few = [index for index, row in enumerate(rows) if len(row) <= count and ends[index] >= 0]
    whole = encoded([texts[index] for index in too_few], tokenizer)
    for index, row in zip(too_few, whole, strict=True):
        rows[index] = row
    return [row[:count] for row in rows]


def encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of each text; some thousand texts are encoded at a time."""
    for begin in range(0, len(texts), 2048):
        yield from tokenizer(
            list(texts[begin : begin + 2048]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a text may be longer than the model takes: that is looked at later
        )["input_ids"]
