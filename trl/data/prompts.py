"""Where the prompts of a run come from, and the texts of a mixed pretraining loss.

prompts = load_prompts(recipe.data, tokenizer, seed=recipe.seed)
print(prompts)                      # how many there are, how many were left out, and why
prompts.train, prompts.held_out     # as `Sampler` and `Loop` take them
"""

from __future__ import annotations

import itertools
import json
import string
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl import starter
from trl.data.sources import (
    MODEL,
    STARTER,
    Table,
    beside,
    checked_texts,
    chosen_column,
    listed,
    nearest,
    read_table,
    short,
)
from trl.rollout.queries import encode_queries
from trl.rollout.sampler import Sampler

if TYPE_CHECKING:
    from trl.config.recipe import DataConfig

Prompt = str | list[dict[str, Any]]
"""A text, or a chat: a list of messages {"role": …, "content": …}."""

SPARE = "beyond data.held_out"
"""Why held-out prompts that are there are not used."""


@dataclass(frozen=True, slots=True, repr=False)
class PromptSplit:
    """The prompts of a run; they follow from the data, the settings and the seed alone."""

    train: list[Prompt]
    """Every prompt with each prefix, the combinations of a prompt side by side."""
    held_out: list[Prompt]
    """Likewise; none of them stands in `train`, unless equal prompts were asked for."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How many prompts of the source are in neither list, by the reason."""
    wanted: int = 0
    """The setting `data.held_out`."""

    def __str__(self) -> str:
        text = f"{len(self.train):,} prompts to train on, {len(self.held_out):,} held out"
        others = dict(self.left_out)
        if spare := others.pop(SPARE, 0):
            word = "prompt is" if spare == 1 else "prompts are"
            text += f"; {spare:,} more held-out {word} not used (data.held_out: {self.wanted:,})"
        return text + (f"; left out: {_reasons(others)}" if others else "")


def load_prompts(
    settings: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    policy: nn.Module | None = None,
) -> PromptSplit:
    """Read the prompts, bring them into shape, and split them.

    In this order: cut, template, chat, equal ones out, those of a wrong length out, shuffle, limit,
    split (the last ones are held out), prefixes. The starter prompts stay in the order of their
    files and are split by these.

    * A prompt that is cut is kept only if its text, encoded again, gives the tokens of the cut.
      With a template, it is the column that is cut.
    * Tokens are counted without those that the tokenizer adds around a text; a prompt stays if it
      has the right length with each of its prefixes, a chat as its template writes it.
    * The answer that ends a chat is removed: the policy is to write its own.

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
    _check(settings, tokenizer)
    prepare = _Preparation(settings, tokenizer, seed, policy)
    left_out = prepare.left_out
    prompts = prepare(settings.prompts, "data.prompts")
    if settings.held_out_prompts is not None or settings.prompts == STARTER:
        held_out = _held_out_apart(settings, prepare)
        if settings.deduplicate:
            taken = {_key(prompt) for prompt in held_out}
            train = [prompt for prompt in prompts if _key(prompt) not in taken]
            left_out["held out too"] += len(prompts) - len(train)
            prompts = train
        if not prompts:
            raise ValueError(
                "`data.prompts` must have prompts that are not held out, got "
                f"{settings.prompts!r}, all of whose prompts are: pass others in one of "
                "data.prompts and data.held_out_prompts."
            )
        train = _limited(prompts, settings.limit, left_out)
    else:
        prompts = _limited(prompts, settings.limit, left_out)
        if settings.held_out >= len(prompts):
            raise ValueError(
                f"`data.held_out` must be less than the number of prompts, {len(prompts):,}, got "
                f"{settings.held_out}: lower it, or add prompts"
                + (f" (left out: {_reasons(left_out)})." if +left_out else ".")
            )
        cut = len(prompts) - settings.held_out
        train, held_out = prompts[:cut], prompts[cut:]
    return PromptSplit(
        _with_prefixes(train, settings.prefixes),
        _with_prefixes(held_out, settings.prefixes),
        dict(+left_out),  # the counts above 0
        settings.held_out,
    )


class PretrainingText:
    """Rows of token ids for a mixed pretraining loss, cut from texts that are joined by EOS.

    Every row comes once, in random order, before any comes again. What is left at the end of the
    texts and fills no row is not used.

    Args:
        source: A file, a folder or a hub dataset: see this module.
        tokenizer: The policy's.
        column: Column with the text; None: the only one, or prompt, query or text.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset.
        tokens: Tokens of each row.
        seed: Of the order.
        name: What errors call the source.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: see `load_prompts`.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        column: str | None = None,
        subset: str | None = None,
        split: str = "train",
        tokens: int,
        seed: int,
        name: str = "source",
    ) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(
                f"`{beside(name, 'tokens')}` must be a whole number > 0, got {tokens!r}."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"`{name}` must be left out for a tokenizer without an EOS token, which is to "
                "stand between the texts: set tokenizer.eos_token."
            )
        table = read_table(source, subset=subset, split=split, name=name)
        chosen = chosen_column(table, column, name)
        texts = [text for text in checked_texts(table, chosen, name) if text.strip()]
        ends = [tokenizer.eos_token_id]
        pieces = [
            np.fromiter(itertools.chain.from_iterable(row + ends for row in rows), np.int32)
            for rows in _encoded(texts, tokenizer)
        ]
        ids = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0)
        if len(ids) < tokens:
            raise ValueError(
                f"`{beside(name, 'tokens')}` must be at most the {len(ids)} tokens of all texts "
                f"of {table.source}, got {tokens}: lower it, or add text."
            )
        self._rows = ids[: len(ids) // tokens * tokens].view(-1, tokens)
        self._checksum = zlib.crc32(self._rows.numpy())
        self._seed, self._name = seed, name
        self._turn, self._position = 0, 0
        self._order = self._shuffled()

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def __call__(self, n: int) -> list[Tensor]:
        """Return the next n rows of token ids, each [tokens]."""
        chosen: list[int] = []
        while len(chosen) < n:
            if self._position == len(self):
                self._turn, self._position = self._turn + 1, 0
                self._order = self._shuffled()
            more = self._order[self._position : self._position + n - len(chosen)].tolist()
            chosen += more
            self._position += len(more)
        return [self._rows[row].long() for row in chosen]

    def state_dict(self) -> dict[str, int]:
        """Return how far it has come, as plain numbers."""
        return {
            "turn": self._turn,
            "position": self._position,
            "seed": self._seed,
            "rows": len(self),
            "checksum": self._checksum,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: if it is that of another text, tokenizer, row length or seed.
        """
        mine = self.state_dict()
        for key in ("seed", "rows", "checksum"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"`{self._name}` must be the text that the state was saved with, but its "
                    f"{key} is {mine[key]}, not {state[key]}: pass the same text, tokenizer, "
                    "tokens and seed as before."
                )
        self._turn, self._position = state["turn"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        """Return the order of the rows in this turn."""
        return np.random.default_rng([self._seed, self._turn]).permutation(len(self))


# Tables become prompts.


class _Preparation:
    """Brings the prompts of one source after another into shape."""

    def __init__(
        self,
        settings: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        policy: nn.Module | None,
    ) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.seed, self.policy = seed, policy
        self.left_out: Counter[str] = Counter()

    def __call__(self, source: str, name: str, *, held_out: bool = False) -> list[Prompt]:
        """Return the prompts of a source, before the limit and the prefixes."""
        settings = self.settings
        # Sources of their own for what is random, so that one setting does not change another.
        cuts, order, writing = (
            np.random.default_rng([self.seed, int(held_out), use]) for use in range(3)
        )
        table = self._table(source, name, held_out, writing)
        before = self.left_out.copy()
        prompts = self._prompts(table, name, cuts)
        if settings.deduplicate:
            unique: dict[str, Prompt] = {}
            for prompt in prompts:
                unique.setdefault(_key(prompt), prompt)
            self.left_out["equal to another"] += len(prompts) - len(unique)
            prompts = list(unique.values())
        prompts = self._of_right_length(prompts)
        if not prompts:
            raise ValueError(
                f"`{name}` must have prompts to use, but all {table.size:,} of {table.source} are "
                f"left out: {_reasons(self.left_out - before)}."
            )
        if settings.shuffle and source != STARTER:
            prompts = [prompts[index] for index in order.permutation(len(prompts)).tolist()]
        return prompts

    def _table(self, source: str, name: str, held_out: bool, random: np.random.Generator) -> Table:
        if source == STARTER:
            texts = starter.prompts("held-out" if held_out else "train")
        elif source == MODEL:
            texts = self._written(int(random.integers(2**31)))
        else:
            settings = self.settings
            return read_table(source, subset=settings.subset, split=settings.split, name=name)
        return Table(source, ["text"], len(texts), lambda _: texts)

    def _prompts(self, table: Table, name: str, random: np.random.Generator) -> list[Prompt]:
        """Return the rows of a table as texts or chats, without the blank ones."""
        settings = self.settings
        texts: list[str | None]
        if settings.template is not None:
            texts = self._from_template(table, name, random)
        else:
            column = chosen_column(table, settings.column, name)
            if any(isinstance(entry, (list, tuple)) for entry in table.column(column)[:1]):
                return self._chats(table, column, name)
            texts = list(checked_texts(table, column, name))
            if settings.cut_tokens is not None:
                texts = _cut(texts, self.tokenizer, settings.cut_tokens, random)
        uncut = texts.count(None)
        self.left_out["not the same tokens when encoded again"] += uncut
        kept = [text for text in texts if text is not None and text.strip()]
        self.left_out["blank"] += len(texts) - uncut - len(kept)
        if not settings.chat:
            return kept
        begin = _system_message(settings.system)
        return [[*begin, {"role": "user", "content": text}] for text in kept]

    def _from_template(
        self, table: Table, name: str, random: np.random.Generator
    ) -> list[str | None]:
        """Return the template filled with each row; None where a text could not be cut."""
        settings = self.settings
        pieces = _template_pieces(settings.template, table)
        names = list(dict.fromkeys(key for _, key in pieces if key is not None))
        if settings.column is not None:
            chosen_column(table, settings.column, name)
            if settings.column not in names:
                raise ValueError(
                    f"`data.template` must use data.column, {{{settings.column}}}, got "
                    f"{settings.template!r}: put it in, or leave data.column out."
                )
        columns = {key: _written_out(table, key, name) for key in names}
        if settings.cut_tokens is not None:
            if settings.column is None and len(names) > 1:
                raise ValueError(
                    f"`data.column` must be given: data.cut_tokens cuts one column of the "
                    f"template, which has {', '.join(names)}."
                )
            cut = settings.column or names[0]
            columns[cut] = _cut(columns[cut], self.tokenizer, settings.cut_tokens, random)
        filled = []
        for row in range(table.size):
            entries = {key: columns[key][row] for key in names}
            parts = (literal + (entries[key] if key else "") for literal, key in pieces)
            filled.append(None if None in entries.values() else "".join(parts))
        return filled

    def _chats(self, table: Table, column: str, name: str) -> list[Prompt]:
        """Return the chats of a column, up to where the assistant is to speak."""
        settings = self.settings
        for key, unfit in (("cut_tokens", settings.cut_tokens), ("prefixes", settings.prefixes)):
            if unfit:
                raise ValueError(
                    f"`data.{key}` must be left out for chats, which column {column!r} of "
                    f"{table.source} holds, got {unfit!r}."
                )
        _check_chat_template(self.tokenizer, f"the chats in column {column!r} of {table.source}")
        begin = _system_message(settings.system)
        chats: list[Prompt] = []
        for row, entry in enumerate(table.column(column)):
            messages = _checked_messages(entry, table, row, name)
            if begin and messages and messages[0]["role"] == "system":
                raise ValueError(
                    "`data.system` must be None for chats with a system message of their own, as "
                    f"{table.place(row)} has, got {settings.system!r}."
                )
            before = len(messages)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            self.left_out["answers that ended a chat"] += before > len(messages) > 0
            if messages:
                chats.append([*begin, *messages])
        self.left_out["blank"] += table.size - len(chats)
        return chats

    def _of_right_length(self, prompts: list[Prompt]) -> list[Prompt]:
        """Leave out prompts with too few or too many tokens."""
        settings = self.settings
        low, high = settings.min_tokens or 0, settings.max_tokens
        if (low == 0 and high is None) or not prompts:
            return prompts
        enough = low if high is None else high + 1
        variants = len(settings.prefixes) or 1
        if isinstance(prompts[0], str):
            texts = _with_prefixes(prompts, settings.prefixes)
            counts = [len(row) for row in _first_tokens(texts, self.tokenizer, enough)]
        else:
            encoded = encode_queries(prompts, self.tokenizer, name="data.prompts")
            counts = [len(row) for row in encoded.rows]
        kept = []
        for index, prompt in enumerate(prompts):
            sizes = counts[index * variants : (index + 1) * variants]
            if min(sizes) < low:
                self.left_out["shorter than data.min_tokens"] += 1
            elif high is not None and max(sizes) > high:
                self.left_out["longer than data.max_tokens"] += 1
            else:
                kept.append(prompt)
        return kept

    def _written(self, seed: int) -> list[str]:
        """Return texts that the policy writes from nothing but the BOS token."""
        settings, tokenizer = self.settings, self.tokenizer
        if self.policy is None:
            raise ValueError(
                "`data.prompts` must not be 'model' without a policy to write them: pass "
                "load_prompts(policy=...), or a file of prompts."
            )
        if tokenizer.bos_token_id is None:
            raise ValueError(
                "`data.prompts` must not be 'model' for a tokenizer without a BOS token, from "
                "which the policy would begin: set tokenizer.bos_token, or pass a file of prompts."
            )
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
        raise ValueError(
            f"`data.model_prompts` must be a number of prompts that the policy can write, got "
            f"{settings.model_prompts}: in eight times as many attempts it wrote {len(texts)} that "
            "are good (different, not blank, the same tokens when encoded again). Lower it, or "
            "raise data.model_prompt_tokens."
        )


def _check(settings: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise one error for all that can be said before anything is read."""
    found = []
    for key in ("cut_tokens", "model_prompt_tokens"):
        pair = getattr(settings, key)
        if pair is not None and (len(pair) != 2 or not 0 < pair[0] <= pair[1]):
            found.append(
                f"`data.{key}` must be (least, most) with 0 < least <= most, got {pair!r}."
            )
    low, high = settings.min_tokens, settings.max_tokens
    if low is not None and high is not None and low > high:
        found.append(f"`data.min_tokens` must be <= data.max_tokens ({high}), got {low}: lower it.")
    for prefix in settings.prefixes:
        if not isinstance(prefix, str) or not prefix.strip():
            found.append(f"`data.prefixes` must be texts, got {prefix!r}: leave that one out.")
    if len(set(settings.prefixes)) < len(settings.prefixes):
        found.append(f"`data.prefixes` must differ from each other, got {settings.prefixes!r}.")
    if settings.chat and settings.prefixes:
        found.append(
            f"`data.prefixes` must be empty for chats, got {settings.prefixes!r}: write them into "
            "data.template."
        )
    if found:
        raise ValueError(" ".join(found))
    if settings.chat:
        _check_chat_template(tokenizer, "`data.chat`")


def _check_chat_template(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer must have a chat template for {what}, got none: use the tokenizer of "
            "an instruction-tuned model, set tokenizer.chat_template, or leave chats out."
        )


def _checked_messages(entry: Any, table: Table, row: int, name: str) -> list[dict[str, Any]]:
    """Return the messages of one chat as plain dicts."""
    messages = list(entry) if isinstance(entry, (list, tuple)) else [None]
    if not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
        raise TypeError(
            f"`{name}` must have chats in every row like the first, lists of messages "
            f"{{'role': ..., 'content': ...}}, got {short(entry)} in {table.place(row)}."
        )
    return [dict(message) for message in messages]


def _system_message(system: str | None) -> list[dict[str, Any]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _held_out_apart(settings: DataConfig, prepare: _Preparation) -> list[Prompt]:
    """Return the held-out prompts that have a source of their own."""
    apart = settings.held_out_prompts
    if settings.held_out == 0:
        return []
    name = "data.held_out_prompts" if apart else "data.prompts"
    prompts = prepare(apart or STARTER, name, held_out=True)
    if settings.held_out > len(prompts):
        which = (
            f"the held-out prompts of {apart!r}"
            if apart
            else ("the held-out prompts that ship with trl")
        )
        raise ValueError(
            f"`data.held_out` must be at most {len(prompts)}, {which}, got {settings.held_out}: "
            "lower it."
        )
    prepare.left_out[SPARE] += len(prompts) - settings.held_out
    return prompts[: settings.held_out]


def _limited(prompts: list[Prompt], limit: int | None, left_out: Counter[str]) -> list[Prompt]:
    kept = prompts[:limit]
    left_out["beyond data.limit"] += len(prompts) - len(kept)
    return kept


def _with_prefixes(prompts: Sequence[Prompt], prefixes: Sequence[str]) -> list[Any]:
    """Return every combination, those of one prompt side by side."""
    if not prefixes:
        return list(prompts)
    return [prefix + prompt for prompt in prompts for prefix in prefixes]


def _key(prompt: Prompt) -> str:
    """Return what two prompts share if they are equal."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


# Templates and tokens.


def _template_pieces(template: str, table: Table) -> list[tuple[str, str | None]]:
    """Return the template as (text, name of the column that follows it, if any)."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"`data.template` must have names of columns between single braces, got {template!r}: "
            f"{error}. Write {{{{ and }}}} for braces of the text."
        ) from error
    pieces: list[tuple[str, str | None]] = []
    for literal, key, spec, conversion in parts:
        if spec or conversion:
            key = f"{key}!{conversion}" if conversion else f"{key}:{spec}"
        if key is not None and key not in table.names:
            raise ValueError(
                f"`data.template` must name columns between its braces, got {{{key}}}: "
                f"{listed(table)}.{nearest(key, table.names)} Write {{{{ and }}}} for braces of "
                "the text."
            )
        pieces.append((literal, key))
    if not any(key for _, key in pieces):
        raise ValueError(
            f"`data.template` must name at least one column, got {template!r}: {listed(table)}."
        )
    return pieces


def _written_out(table: Table, column: str, name: str) -> list[Any]:
    """Return the entries of a column for a template: texts, and numbers as they are written."""
    entries = table.column(column)
    if all(isinstance(entry, str) for entry in entries):
        return checked_texts(table, column, name)
    texts = [str(entry) if isinstance(entry, (str, int, float)) else entry for entry in entries]
    return checked_texts(table._replace(column=lambda _: texts), column, name)


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
    cut = [index for index, row in enumerate(rows) if len(row) > sizes[index]]
    result: list[str | None] = list(texts)
    again = _decoded_again([rows[index][: sizes[index]] for index in cut], tokenizer)
    for index, text in zip(cut, again, strict=True):
        result[index] = text
    return result


def _decoded_again(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str | None]:
    """Yield the text of each row of tokens; None where that gives other tokens."""
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
    again = itertools.chain.from_iterable(_encoded(texts, tokenizer))
    for text, row, tokens in zip(texts, rows, again, strict=True):
        yield text if row == tokens else None


def _first_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[list[int]]:
    """Return the first `count` tokens of each text, or all if it has fewer.

    To encode only the beginning of a long text is many times faster. It ends before a space, and
    counts only if it has a token to spare: the last one might be another in the whole text.
    """
    beginnings = []
    for text in texts:
        end = text.find(" ", 6 * count + 24)
        beginnings.append(text if end < 0 else text[:end])
    rows = list(itertools.chain.from_iterable(_encoded(beginnings, tokenizer)))
    short = [
        index
        for index, row in enumerate(rows)
        if len(row) <= count and len(beginnings[index]) < len(texts[index])
    ]
    whole = _encoded([texts[index] for index in short], tokenizer)
    for index, row in zip(short, itertools.chain.from_iterable(whole), strict=True):
        rows[index] = row
    return [row[:count] for row in rows]


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[list[int]]]:
    """Yield the tokens of the texts, some thousand texts at a time."""
    for begin in range(0, len(texts), 2048):
        yield tokenizer(
            list(texts[begin : begin + 2048]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a text may be longer than the model takes: that is looked at later
        )["input_ids"]


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
