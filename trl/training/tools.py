"""What is done with a policy or a reward outside of training: let it write, let it judge.

rows = sample("runs/demo", ["This film was"], n=4)
rows = score_texts(["A wonderful film."], (RewardConfig(),))
show(rows)
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl import starter
from trl.batch import Rollout
from trl.config.code import Trust
from trl.config.errors import shown
from trl.config.recipe import RewardConfig
from trl.data.sources import checked_texts, chosen_column, read_table
from trl.evaluation.scores import score
from trl.models.loading import quiet_transformers
from trl.models.with_value_head import load_policy
from trl.rollout.sampler import Sampler
from trl.training.parts import find_tokenizer, load_scorer, model_name
from trl.watch.markdown import UNSEEN, visible

Row = dict[str, Any]
Pair = tuple[str, str]
"""A prompt, which may be empty, and what follows it."""

AT_ONCE = 64
"""Rows that are sampled or scored at once."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+(\[[^\]]*\])?)?")
"""How a dataset on the hub may be called, with its split."""
SHOWN_PROMPTS = 8
"""Of the starter's held-out prompts, if there are no others."""


def sample(model: str | Path, prompts: Sequence[str], *, n: int = 1, **sampling: Any) -> list[Row]:
    """Let a policy go on from prompts.

    Args:
        model: A model's folder or hub name, starter, or the folder of a run.
        prompts: Texts.
        n: Responses to each.
        **sampling: Settings of `Sampler`: max_new_tokens, temperature, top_k, top_p, seed.

    Returns:
        n rows for each prompt, side by side: prompt, response, tokens, ended.
    """
    name = policy_folder(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_transformers():
        policy = load_policy(name).to(device).eval()
        tokenizer = find_tokenizer(None, name, policy, {})
    settings = {"group_size": n, "max_rows": AT_ONCE, "add_bos": tokenizer.bos_token_id is not None}
    with warnings.catch_warnings():  # what it warns of matters in training only
        warnings.filterwarnings("ignore", message=".*from a cut distribution")
        sampler = Sampler(tokenizer, **settings, **sampling)
    with torch.no_grad():
        rollout = sampler(policy, list(prompts))
    lengths, ended = rollout.response_mask.sum(1).tolist(), rollout.ended.tolist()
    return [
        {"prompt": prompts[row // n], "response": text, "tokens": lengths[row], "ended": ended[row]}
        for row, text in enumerate(rollout.response_texts)
    ]


def policy_folder(model: str | Path) -> str:
    """Return the folder or hub name of a policy: of a run's folder, that of the policy in it.

    Raises:
        FileNotFoundError: if it is a run without one, as it was stopped before its end.
    """
    name = model_name(str(model))
    folder = Path(name).expanduser()
    if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        return name
    for inside in (folder / "policy", folder / "best"):
        if inside.is_dir():
            return str(inside)
    if (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(
            f"The run in {folder} has no policy yet, which is written at its end: go on with it, "
            f"trl train {folder} --resume."
        )
    return name


def score_texts(
    texts: Sequence[str | Pair], rewards: Sequence[RewardConfig], trust: Trust = ()
) -> list[Row]:
    """Score texts as a recipe does.

    Args:
        texts: Whole texts, or prompts and what follows them.
        rewards: The scorers. Those that read tokens do not fit here.
        trust: Modules and packages whose functions may run.

    Returns:
        A row for each text: text, score, and the score of each part by its name, without its
        weight.
    """
    with quiet_transformers():
        _, scorer = load_scorer(rewards, trust)
    prefixes = [prefix for reward in rewards for prefix in reward.targets]
    pairs = [_pair(text, prefixes) if isinstance(text, str) else text for text in texts]
    rows: list[Row] = []
    for start in range(0, len(pairs), AT_ONCE):
        prompts, responses = zip(*pairs[start : start + AT_ONCE], strict=True)
        none = torch.zeros(len(prompts), 1, dtype=torch.long)  # tokens that stand for none
        rollout = Rollout.from_lists(none, none)
        scored = score(scorer, replace(rollout, query_texts=prompts, response_texts=responses))
        for row, total in enumerate(scored.totals.tolist()):
            parts = {name: part[row].item() for name, part in scored.parts.items()}
            rows.append({"text": prompts[row] + responses[row], "score": total, "parts": parts})
    return rows


def _pair(text: str, prefixes: Sequence[str]) -> Pair:
    """Return a text after the control prefix that it begins with, if it does."""
    prefix = max((each for each in prefixes if text.startswith(each)), key=len, default="")
    return prefix, text.removeprefix(prefix)


# -- texts in, rows out --------------------------------------------------------------------------


def read_prompts(source: str | None) -> list[str]:
    """Return the prompts of a file or dataset; without one, a few that ship with trl."""
    if source is None:
        return starter.prompts("held-out")[:SHOWN_PROMPTS]
    table = read_table(source, name="--prompts")
    return checked_texts(table, chosen_column(table, None, "--prompts"), "--prompts")


def read_texts(source: str) -> list[str | Pair]:
    """Return the texts of a file or dataset, or of the standard input (-), one a line.

    A table with the columns prompt and response, as `trl sample` writes it, gives pairs.
    """
    if source == "-":
        return list(filter(None, map(str.strip, sys.stdin)))
    if not Path(source).expanduser().exists() and not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            "TEXTS must be a file with one text a line, a table, or a dataset on the hub, got "
            f"{shown(source)}, which is not there; for a text: echo '…' | trl score -."
        )
    table = read_table(source, name="TEXTS")
    if {"prompt", "response"} <= set(table.names):
        columns = [checked_texts(table, name, "TEXTS") for name in ("prompt", "response")]
        return list(zip(*columns, strict=True))
    column = "text" if "text" in table.names else chosen_column(table, None, "TEXTS")
    return list(checked_texts(table, column, "TEXTS"))


def show(rows: Sequence[Row], out: str | None) -> None:
    """Print rows as a table, or write them as lines of JSON.

    Args:
        rows: All with the same names.
        out: A file to write; "-": lines to the standard output; None: a table.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    lines = re.sub(UNSEEN, lambda sign: f"\\u{ord(sign.group()):04x}", lines)
    if out == "-":
        sys.stdout.write(lines)
    elif out is not None:
        Path(out).expanduser().write_text(lines, encoding="utf-8")
        print(out)
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 120
        table, flat = Table(show_lines=True), [_flat(row) for row in rows]
        for name, value in (flat[0] if flat else {}).items():
            table.add_column(name, justify="left" if isinstance(value, str) else "right")
        for row in flat:
            table.add_row(*(Text(_cell(value)) for value in row.values()))
        console.print(table)


def _flat(row: Row) -> Row:
    """Return a row with its parts as columns; one part with a weight of 1 is the score itself."""
    parts = row.get("parts", {})
    shown = parts if len(parts) > 1 or row.get("score") not in parts.values() else {}
    return {name: value for name, value in row.items() if name != "parts"} | shown


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:+.3f}" if isinstance(value, float) else " ".join(visible(str(value)).split())
