"""What is done with a policy or a reward outside of training: let it write, let it judge.

rows = sample("runs/demo", ["This film was"], n=4)
rows = score_texts(["A wonderful film."], (RewardConfig(),))
show(rows)
"""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from trl import starter
from trl.batch import Rollout
from trl.config import build, read_yaml
from trl.config.code import Trust
from trl.config.errors import refuse, shown
from trl.config.recipe import STARTER, DataConfig, Recipe, RewardConfig
from trl.data.prompts import checked_messages, load_prompts
from trl.data.sources import Table as Columns
from trl.data.sources import checked_texts, chosen_column, read_table
from trl.data.stream import PromptStream
from trl.environments import Episodes
from trl.evaluation.scores import PARAGRAPH, rollout_of, score, texts_of, words_of
from trl.models.loading import quiet_transformers
from trl.models.with_value_head import load_policy
from trl.rollout.queries import SENT_AS_CHATS, Chat, ChatForm
from trl.rollout.sampler import Sampler
from trl.training.folder import is_at_work
from trl.training.named import load_environment, load_scorer
from trl.training.parts import find_tokenizer, model_name, sampling_of
from trl.watch.markdown import UNSEEN, visible

Row = dict[str, Any]
Prompt = str | Chat
Pair = tuple[Prompt, str]
"""A prompt, which may be empty, and what follows it."""

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("query", "response"))
"""Columns of a prompt and of what follows it."""
OF_PROMPTS = {"queries", "prompts", "rollout"}
"""Parameters of a function that reads prompts by themselves."""
AT_ONCE = 64
"""Rows that are sampled or scored at once."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+(\[[^\]]*\])?)?")
"""How a dataset on the hub may be called, with its split."""
SHOWN_PROMPTS = 8
"""Of the starter's held-out prompts, if there are no others."""


def sample(
    model: str | Path,
    prompts: Sequence[Prompt] | None = None,
    *,
    n: int = 1,
    chat: bool | None = None,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    trust: Trust = (),
    **sampling: Any,
) -> list[Row]:
    """Let a policy go on from prompts, or answer them.

    Args:
        model: A model's folder or hub name, starter, or the folder of a run.
        prompts: Texts, or chats; or rows of a data set with one as "prompt". None: the first that
            the run was measured on, else openings of film reviews; with a `recipe`, its held-out
            rows.
        n: Responses to each.
        chat: See `trl.train`, as the next two. None: as in the run.
        system: None: as in the run.
        chat_template_kwargs: None: as in the run.
        recipe: Whose sampling this is; with an `environment`, the responses are conversations
            with it. None: there is none, also for a run that has one.
        trust: Modules and files whose code may run.
        **sampling: Settings of `Sampler`: max_new_tokens, temperature, top_k, top_p, seed.

    Returns:
        n rows for each prompt, side by side: prompt (a chat as its messages), response, tokens,
        ended; with an environment also episode, see `Rollout.episodes`, and the reward that it
        gave, if it gives any.
    """
    if recipe is not None:
        sampling = sampling_of(recipe) | sampling
    given = {"chat": chat, "system": system, "chat_template_kwargs": chat_template_kwargs}
    how = sent_as(model, given)
    if prompts is None and recipe is not None:
        how |= {"chat": False}  # they are sent as the recipe says
    elif prompts is None:
        prompts = _prompts_of_run(model, how.get("system"))
        how |= {} if prompts or chat else {"chat": False}
        prompts = prompts or starter.prompts("held-out")[:SHOWN_PROMPTS]
    told = sampling | {"group_size": n, "max_rows": AT_ONCE}
    policy, sampler, form = loaded(model, prompts or (), how, **told)
    if form.decided:
        print("trl:", SENT_AS_CHATS.format("--no-chat"), file=sys.stderr)
    if recipe is not None and recipe.environment is not None:
        sampler = load_environment(recipe.environment, trust)(sampler)
    asked = [_sent(form, prompt) for prompt in prompts or ()]
    if prompts is None and recipe is not None:
        split = load_prompts(recipe.data, sampler.tokenizer, seed=recipe.seed)  # type: ignore[arg-type]
        rows: Any = split.held_out_rows or split.train_rows
        asked = list(rows.look() if isinstance(rows, PromptStream) else rows)[:SHOWN_PROMPTS]
    if isinstance(sampler, Episodes):
        sampler.check(policy, asked, name="prompts")
        if sampler.told:
            print(f"trl: {sampler.told}.", file=sys.stderr)
    with torch.no_grad():
        return _rows(sampler(policy, asked), asked, n)


def _sent(form: ChatForm, prompt: Any) -> Any:
    """Return a prompt, or a row with one, as it is sent."""
    if isinstance(prompt, dict):
        return {**prompt, "prompt": form(prompt["prompt"])}
    return form(prompt)


def _rows(rollout: Rollout, asked: Sequence[Any], n: int) -> list[Row]:
    """Return what `sample` returns of a rollout."""
    assert rollout.ended is not None
    lengths, ended = rollout.response_mask.sum(1).tolist(), rollout.ended.tolist()
    rows: list[Row] = [
        {"prompt": asked[row // n], "response": text, "tokens": lengths[row], "ended": ended[row]}
        for row, text in enumerate(rollout.response_texts or ())
    ]
    if rollout.episodes is not None:
        begun: Any = rollout.query_messages or rollout.query_texts  # with what environments added
        for row, prompt, episode in zip(rows, begun, rollout.episodes, strict=True):
            row |= {"prompt": prompt, "episode": episode}
        if rollout.turn_rewards is not None and rollout.turn_rewards.any():
            for row, reward in zip(rows, rollout.turn_rewards.sum(1).tolist(), strict=True):
                row["reward"] = reward
    return rows


def loaded(
    model: str | Path,
    first: Sequence[Prompt],
    how: Mapping[str, Any],
    where: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> tuple[nn.Module, Sampler, ChatForm]:
    """Return a policy, what samples from it, and what makes prompts for it.

    Args:
        model: See `sample`.
        first: Some prompts.
        how: See `sent_as`.
        where: Passed to `load_policy`.
        **sampling: Settings of `Sampler`.
    """
    name, where = policy_folder(model), where or {}
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*from a cut distribution")  # in training only
        tokenizer = find_tokenizer(None, name, None, where, needed=False)
        form = None if tokenizer is None else ChatForm(tokenizer, first, **how)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        policy = load_policy(name, **where).to(device).eval()
        tokenizer = tokenizer or find_tokenizer(None, name, policy, where)
        told: dict[str, Any] = {"chat_template_kwargs": how.get("chat_template_kwargs")}
        has_bos = tokenizer.bos_token_id is not None
        sampler = Sampler(tokenizer, **{"add_bos": has_bos} | told | sampling)
    return policy, sampler, form or ChatForm(tokenizer, first, **how)


def sent_as(model: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `ChatForm`: those given, else those of the run that a model is of."""
    data = recipe.data if (recipe := recipe_of(model)) and given.get("chat") is not False else None
    return (of_recipe(data) if data else {}) | {k: v for k, v in given.items() if v is not None}


def of_recipe(data: DataConfig) -> dict[str, Any]:
    """Return the settings of `ChatForm` in a recipe."""
    told = {"system": data.system, "chat_template_kwargs": data.chat_template_kwargs}
    return {"chat": data.sends_chats} | told


def recipe_of(model: str | Path) -> Recipe | None:
    """Return the recipe of the run whose folder, or policy, this is; None: it is of none."""
    folder = Path(model).expanduser()
    for file in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if file.is_file() and "task" not in (values := read_yaml(file)):
            return build(Recipe, values, owner=str(file))
    return None


def _prompts_of_run(model: str | Path, system: str | None) -> list[Prompt]:
    """Return the first prompts that a run was measured on, if it was."""
    file = Path(model).expanduser() / "samples.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()[:SHOWN_PROMPTS] if file.is_file() else []
    before = f"{system}{PARAGRAPH}" if system else ""
    texts = [json.loads(line)["prompt"].removeprefix(before) for line in lines]
    return list(dict.fromkeys(texts))  # of a few prompts, those of two evaluations


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
        what = f"go on with it, trl train {folder} --resume"
        if is_at_work(folder):
            what = "it is at work now, wait for that (what it wrote so far is in rollouts.jsonl)"
        told = f"The run in {folder} has no policy yet, which is written at its end: {what}."
        raise FileNotFoundError(told)
    return name


def score_texts(
    texts: Sequence[str | Pair],
    rewards: Sequence[RewardConfig],
    trust: Trust = (),
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    form: ChatForm | None = None,
) -> list[Row]:
    """Score texts as a recipe does.

    Args:
        texts: Whole texts, or prompts, which may be chats, and what follows them.
        rewards: The scorers. Those that read tokens do not fit here.
        trust: Modules and packages whose functions may run.
        columns: What else is known of each text, which functions may ask for.
        form: How prompts are sent; None: as they are.

    Returns:
        A row for each text: text, score, and the score of each part by its name, without its
        weight; None where nothing has a say. The text of a chat is what its messages say, with a
        blank line between two.
    """
    with quiet_transformers():
        _, scorer = load_scorer(rewards, trust)
    prefixes = [prefix for reward in rewards for prefix in reward.targets]
    pairs = [_pair(text, prefixes) if isinstance(text, str) else text for text in texts]
    functions = [getattr(part, "function", None) for part, _ in scorer.parts.values()]
    codes = [each.__code__ for each in functions if hasattr(each, "__code__")]
    asked = {name for code in codes for name in code.co_varnames[: code.co_argcount]}
    if asked & OF_PROMPTS and not any(prompt for prompt, _ in pairs):
        told = "the reward reads prompts, and TEXTS has none: give columns prompt and response"
        print(f"trl: {told}, or messages.", file=sys.stderr)
    if form is not None:
        pairs = [(form(prompt) if prompt else prompt, answer) for prompt, answer in pairs]
    rows: list[Row] = []
    for start in range(0, len(pairs), AT_ONCE):
        more = {k: v[start : start + AT_ONCE] for k, v in (columns or {}).items()}
        rollout = rollout_of(pairs[start : start + AT_ONCE], more)
        if "episode" in more:
            rollout = replace(rollout, episodes=tuple(more["episode"]))
        scored = score(scorer, rollout)
        totals = scored.totals.tolist()
        for row, text in enumerate(texts_of(rollout)):
            parts = {name: _number(part[row].item()) for name, part in scored.parts.items()}
            rows.append({"text": text, "score": _number(totals[row]), "parts": parts})
    return rows


def _number(score: float) -> float | None:
    """Return a score; None, as JSON has no NaN, where nothing has a say."""
    return None if math.isnan(score) else score


def _pair(text: str, prefixes: Sequence[str]) -> Pair:
    """Return a text after the control prefix that it begins with, if it does."""
    prefix = max((each for each in prefixes if text.startswith(each)), key=len, default="")
    return prefix, text.removeprefix(prefix)


def form_of(values: Mapping[str, Any], path: Path) -> ChatForm | None:
    """Return how prompts are sent in a recipe; None: as they are, or its model is not here.

    Args:
        values: What the file says.
        path: The file, which may be that of a run.
    """
    data = build(DataConfig, values.get("data") or {}, owner=str(path))
    if data.sends_chats is False:
        return None
    name = (values.get("model") or {}).get("name", STARTER)
    beside = policy_folder(path.parent) if (path.parent / "policy").is_dir() else model_name(name)
    tokenizer = find_tokenizer(None, beside, None, {}, needed=False)
    there = getattr(tokenizer, "chat_template", None) is not None
    return ChatForm(tokenizer, (), **of_recipe(data)) if there else None


# -- texts in, rows out --------------------------------------------------------------------------


def read_rows(source: str) -> list[Row]:
    """Return the rows of a file or dataset, each with its prompt: see `read_prompts`."""
    table = read_table(source, name="--prompts")
    column = chosen_column(table, None, "--prompts")
    others = {name: table.column(name) for name in table.names if name != column}
    return [
        {"prompt": prompt} | {name: values[row] for name, values in others.items()}
        for row, prompt in enumerate(read_prompts(source))
    ]


def read_prompts(source: str) -> list[Prompt]:
    """Return the prompts of a file or dataset; chats up to where the assistant is to speak."""
    table = read_table(source, name="--prompts")
    column = chosen_column(table, None, "--prompts")
    if isinstance(table.columns[column][0], str):
        return list(checked_texts(table, column, "--prompts"))
    chats = []
    for row, entry in enumerate(table.column(column)):
        chat = checked_messages(entry, table.place(row), "--prompts")
        while len(chat) > 1 and chat[-1]["role"] == "assistant":
            chat.pop()
        chats.append(chat)
    return chats


def read_texts(
    source: str, column: str | None = None
) -> tuple[list[str | Pair], dict[str, list[Any]]]:
    """Return the texts of a file or dataset, or of the standard input (-), one a line.

    A table with the columns messages, or a pair of `PAIRS` as `trl sample` writes it, gives pairs;
    its other columns come second. Prompts may also stand in `column`, as a recipe calls it.
    """
    if source == "-":
        return list(filter(None, map(str.strip, sys.stdin))), {}
    if not Path(source).expanduser().exists() and not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            "TEXTS must be a file with one text a line, a table, or a dataset on the hub, got "
            f"{shown(source)}, which is not there; for a text: echo '…' | trl score -."
        )
    table = read_table(source, name="TEXTS")
    own = [(column, answer) for answer in ("response", "completion") if column]
    kinds = (("messages", "response"), ("messages",), *own, *PAIRS)  # the first: samples of a run
    found = [each for each in kinds if set(each) <= set(table.names)]
    if found:
        names = found[0]
        entries = zip(*(table.column(name) for name in names), strict=True)
        texts: list[Any] = [_answered(table, row, entry) for row, entry in enumerate(entries)]
    else:
        names = ("text",) if "text" in table.names else (chosen_column(table, None, "TEXTS"),)
        texts = checked_texts(table, names[0], "TEXTS")
    return texts, {name: table.column(name) for name in table.names if name not in names}


def _answered(table: Columns, row: int, entry: Sequence[Any]) -> Pair:
    """Return a prompt and its answer, from the texts or messages of both, or of all in one."""
    if len(entry) == 2 and all(isinstance(each, str) for each in entry):
        return entry[0], entry[1]
    roles = ("user", "assistant")
    every = [m for each, role in zip(entry, roles, strict=False) for m in _as_messages(each, role)]
    *before, last = checked_messages(every, table.place(row), "TEXTS")
    if not before or last["role"] != "assistant":
        rule = "have chats that end with the assistant's answer"
        refuse("TEXTS", rule, f"{shown(every)} in {table.place(row)}")
    return before, words_of(last)


def _as_messages(entry: Any, role: str) -> Any:
    return [{"role": role, "content": entry}] if isinstance(entry, str) else entry or [None]


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
            is_text = isinstance(value, str | list)
            table.add_column(name, justify="left" if is_text else "right")
        for row in flat:
            table.add_row(*(Text(_cell(value)) for value in row.values()))
        console.print(table)


def conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return what was said, turn by turn: what the policy did not say has its source before it."""
    texts = [(each["role"], each.get("name"), words_of(each)) for each in messages]
    return "\n".join(
        text if role == "assistant" else f"[{name or role}] {text}" for role, name, text in texts
    )


def _flat(row: Row) -> Row:
    """Return a row with its parts as columns; one part with a weight of 1 is the score itself."""
    if "episode" in row:
        row = row | {"response": conversation(row["episode"]["messages"])}
        row = {name: value for name, value in row.items() if name != "episode"}
    parts = row.get("parts", {})
    shown = parts if len(parts) > 1 or row.get("score") not in parts.values() else {}
    return {name: value for name, value in row.items() if name != "parts"} | shown


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):  # a chat
        value = PARAGRAPH.join(map(words_of, value))
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:+.3f}" if isinstance(value, float) else " ".join(visible(str(value)).split())
