"""`trl label`: what is to be judged, from runs, models or files; the page; what was answered.

open_store(...)   the store beside what is judged, with its items
label(...)        the page, until Ctrl-C
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl.config.errors import refuse
from trl.evaluation.people.agreement import agreement, write_agreement
from trl.evaluation.people.formats import read_items, write_items
from trl.evaluation.people.items import QUESTIONS, Item
from trl.evaluation.people.store import Store

__all__ = ["items_of_models", "items_of_runs", "label", "open_store"]

ENDING = ".votes.sqlite"
LOCAL = ("127.0.0.1", "::1", "localhost")
PACKAGES = ("starlette", "uvicorn", "markdown_it", "nh3", "krippendorff")


def label(options: Namespace) -> int:
    """Run the command with its options; see `trl label --help`."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        told = f"`trl label` needs {', '.join(missing)}"
        raise ImportError(f"{told}: install trl with the extra people, '.[people]'.")
    if options.host not in LOCAL and not options.i_know:
        refuse(
            "--host",
            "be 127.0.0.1, or come with --i-know",
            options.host,
            "others on the network can then reach the page; what they read and answer, and the "
            "links, are not encrypted on the way, so that who listens can answer in their place. "
            "`ssh -L 8321:127.0.0.1:8321 HOST` needs no open port",
        )
    if options.per_item is not None and options.per_item < 1:
        refuse("--per-item", "be >= 1", str(options.per_item))
    with closing(open_store(options)) as store:
        if options.export:
            question = store.fact("question")
            count = write_items(options.export, question, store.items(), options.format)
            print(f"{options.export}: {count} rows, {store.fact('votes')} votes, of {store.path}")
        if options.agreement:
            figures = agreement(store.fact("question"), store.items())
            if options.agreement == "-":
                sys.stdout.write(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
            else:
                write_agreement(figures, options.agreement)
                print(options.agreement)
        if not (options.export or options.agreement):
            _serve(store, options)
    return 0


def open_store(options: Namespace) -> Store:
    """Return the store that is meant, with all items that the options name.

    Raises:
        ValueError: if neither a store nor something to judge is named, or it fits no question.
    """
    sources: list[str] = options.sources or []
    if not sources and not options.store:
        refuse("--from", "name a run, or a file of prompts or pairs", "nothing", "or give --store")
    if options.model and len(sources) != 1:
        refuse("--from", "be one file of prompts for --model", " ".join(sources) or "nothing")
    path = Path(options.store or _beside(sources[0])).expanduser()
    looks = bool(options.export or options.agreement)
    if looks and path.is_file() and not options.model:
        return Store(path)  # nothing is added only because somebody looks
    question = options.question or _question(path)
    items = _items(sources, options, question)
    guidelines = options.guidelines and _text(options.guidelines)
    store = Store(path, make=bool(sources))
    store.ask(question, per_item=options.per_item, guidelines=guidelines)
    fresh = store.add(items, votes=options.with_votes)
    print(f"{path}: {store.fact('items')} items, {fresh} of them new", file=sys.stderr)
    return store


def items_of_runs(runs: Sequence[str], question: str) -> list[Item]:
    """Return the responses of runs to their held-out prompts.

    Of several runs, the last ones, against each other; of one run, those before it and those after,
    for `best` also some between; for a question about one response, the last ones.
    """
    told = [_samples(Path(run).expanduser()) for run in runs]
    most = QUESTIONS[question].most
    if len(runs) > most > 1:
        refuse("--from", f"be at most {most} runs for the question {question!r}", str(len(runs)))
    if len(runs) == 1 and most > 1:
        steps = sorted(told[0])
        count = min(most, len(steps))
        if count < 2:
            refuse("--from", "be a run with two evaluations, or two runs", runs[0])
        chosen = [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
        columns = {f"{runs[0]}, step {step}": told[0][step] for step in chosen}
    else:
        columns = {run: steps[max(steps)] for run, steps in zip(runs, told, strict=True)}
    return _beside_each_other(columns, question)


def items_of_models(prompts: str, models: Sequence[str], question: str, **how: Any) -> list[Item]:
    """Let models answer the prompts of a file: each once, or as often as the question needs.

    Args:
        prompts: The file.
        models: Folders, hub names or runs.
        question: What will be asked.
        **how: Settings of the sampler.
    """
    from trl.training import tools

    fewest, most = QUESTIONS[question].fewest, QUESTIONS[question].most
    if len(models) > most > 1:
        refuse("--model", f"be at most {most} for the question {question!r}", str(len(models)))
    texts = tools.read_prompts(prompts)
    each = 1 if len(models) >= fewest and question != "best" else max(most // len(models), 1)
    told = {model: tools.sample(model, texts, n=each, **how) for model in models}
    # As they were asked, chats with their system message, unless that is not the same for all.
    asked = [[row["prompt"] for row in rows[::each]] for rows in told.values()]
    prompts = asked[0] if all(one == asked[0] for one in asked) else texts
    columns = {
        model: [
            (prompt, [row["response"] for row in rows[i * each : (i + 1) * each]])
            for i, prompt in enumerate(prompts)
        ]
        for model, rows in told.items()
    }
    return _beside_each_other(columns, question)


def _items(sources: list[str], options: Namespace, question: str) -> list[Item]:
    """Return what the options name."""
    if options.model:
        how = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
        more = {**how, "seed": options.seed}
        return items_of_models(sources[0], options.model, question, **more)
    runs = [source for source in sources if Path(source).expanduser().is_dir()]
    items = items_of_runs(runs, question) if runs else []
    for source in sources:
        if source not in runs:
            found, problems = read_items(source)
            items += found
            for problem in problems:
                print(f"trl: left out: {problem}", file=sys.stderr)
    return items


def _samples(run: Path) -> dict[int, list[tuple[Any, list[str]]]]:
    """Return the prompts and responses of each evaluation of a run, by its step."""
    path = run / "samples.jsonl"
    if not path.is_file():
        refuse("--from", "be a run with held-out samples, or a file", str(run))
    found: dict[int, list[tuple[Any, list[str]]]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        found.setdefault(row["step"], []).append((row["prompt"], [row["response"]]))
    if not found:
        refuse("--from", "be a run that was evaluated on held-out prompts", str(run))
    return found


def _beside_each_other(
    columns: dict[str, list[tuple[Any, list[str]]]], question: str
) -> list[Item]:
    """Return an item for each prompt that all have, or for each response."""
    by_prompt: dict[str, list[tuple[Any, str, str]]] = {}
    for source, rows in columns.items():
        for prompt, responses in rows:
            key = json.dumps(prompt)
            by_prompt.setdefault(key, []).extend((prompt, text, source) for text in responses)
    items = []
    for told in by_prompt.values():
        prompt = told[0][0]
        if QUESTIONS[question].most == 1:
            items += [Item(prompt, (text,), (source,)) for _, text, source in told]
            continue
        different = list({text: (text, source) for _, text, source in reversed(told)}.values())
        if {source for _, _, source in told} == set(columns) and len(different) > 1:
            texts, sources = zip(*reversed(different), strict=True)
            items.append(Item(prompt, texts[:4], sources[:4]))
    if not items:
        refuse("--from", "have responses that differ, to the same prompts", ", ".join(columns))
    return items


def _question(path: Path) -> str:
    """Return what is asked in a store: what was asked before."""
    if not path.is_file():
        return "pair"
    with closing(Store(path)) as store:
        return str(store.fact("question") or "pair")


def _beside(source: str) -> Path:
    """Return the store that belongs to what is judged."""
    path = Path(source).expanduser()
    return path / f"people{ENDING}" if path.is_dir() else path.with_suffix(ENDING)


def _text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        refuse("--guidelines", "be a text in UTF-8", f"{path!r} ({error})")


def _serve(store: Store, options: Namespace) -> None:
    from trl.evaluation.people.server import serve

    tokens = {name: store.link(name) for name in options.annotator or ["me"]}

    def started(address: str) -> None:
        for name, token in tokens.items():
            print(f"{name}: {address}#join={token}")
        print(f"Each link is good once; afterwards {address} knows who it was. Ctrl-C ends.")
        sys.stdout.flush()

    serve(store, options.host, options.port, started=started)
    again = f"trl label --store {shlex.quote(str(store.path))}"
    print(f"\n{store.fact('votes')} votes. Go on: {again}. Out: {again} --export votes.jsonl")
