"""Items and votes in files: our lines, and those of TRL, Argilla, Label Studio and UltraFeedback.

    trl             {"prompt", "responses", "votes": [{"annotator", "answer", "seconds", "when"}]}
    trl-preference  {"prompt", "chosen", "rejected"}; for thumbs {"prompt", "completion", "label"}
    argilla         {"fields", "responses": {question: [{"value", "user_id"}]}, "metadata"}
    argilla-flat    {"prompt", "response_1", "q.responses": […], "q.responses.users": […]}
    label-studio    {"data", "annotations": [{"result": [{"type": "pairwise", "value": …}]}]}
    ultrafeedback   {"prompt", "chosen", "rejected", "chosen-rating", "chosen-model", …}

Files are lines of JSON, or one list of them (.json). A row says itself which form it has.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

from trl.config.errors import refuse, shown
from trl.evaluation.people.items import BOTH_BAD, SKIP, TIE, Answer, Item, Prompt, Vote

__all__ = ["FORMATS", "read_items", "write_items"]

Row = dict[str, Any]

FILE = "file"
"""The annotator of a preference whose file does not say who it was."""
PROMPTS = ("prompt", "instruction", "question", "query", "input")
RESPONSE = re.compile(r"(?:response|answer|completion|output|text|item)[-_ ]?(\d|[a-d])?", re.I)
WRONG = (AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)
"""What reading a row of the wrong form may raise."""
ANSWERS = "\n\nAssistant:"
"""What the answer follows in a dialogue that is one text."""
WORDS: dict[Answer, str] = {True: "good", False: "bad"}


def read_items(path: str | Path) -> tuple[list[Item], list[str]]:
    """Read what can be read.

    Args:
        path: A file of lines of JSON, or of a list (.json).

    Returns:
        The items with their votes, and a sentence for each row that is none.

    Raises:
        OSError, ValueError: if no row can be read.
    """
    path = Path(path).expanduser()
    items, problems = list[Item](), list[str]()
    for place, written in _rows(path):
        try:
            row = json.loads(written) if isinstance(written, bytes) else written
            if not isinstance(row, dict):
                refuse("row", "be an object", shown(row))
            items.append(_item(row))
        except WRONG as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            told = told or "it has no form that is known"
            problems.append(f"{place} of {path}: {told}")
    if not items:
        told = problems[0] if problems else "it is empty"
        refuse("--from", "have something to judge", f"{str(path)!r}, of which nothing is ({told})")
    return items, problems


def write_items(path: str | Path, question: str, items: Iterable[Item], form: str = "trl") -> int:
    """Write items and their votes, whole or not at all; return how many rows.

    Args:
        path: The file; .json: one list.
        question: What was asked.
        items: See `Store.items`.
        form: One of FORMATS.
    """
    path = Path(path).expanduser()
    lines = [json.dumps(row, ensure_ascii=False) for row in FORMATS[form](question, items)]
    text = "".join(f"{line}\n" for line in lines)
    if path.suffix == ".json":
        text = "[" + ",\n".join(lines) + "]\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return len(lines)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json":
        rows = json.loads(data)
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            yield f"row {number}", row
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", line


# -- in ------------------------------------------------------------------------------------------


def _item(row: Row) -> Item:
    """Return what a row says, by the fields that it has."""
    if isinstance(row.get("data"), dict):
        return _label_studio(row)
    if isinstance(row.get("fields"), dict):
        given = {q: [(r["value"], r.get("user_id"), None) for r in responses]
                 for q, responses in (row.get("responses") or {}).items()}  # fmt: skip
        return _argilla(row["fields"], row.get("metadata") or {}, given)
    if asked := [name.removesuffix(".responses") for name in row if name.endswith(".responses")]:
        given = {q: _flat_votes(row, q) for q in asked}
        return _argilla(row, row, given)
    if "chosen" in row and "rejected" in row:
        return _preference(row)
    prompt = _prompt(row)
    if "completion" in row:
        votes = [Vote(FILE, row["label"])] if isinstance(row.get("label"), bool) else []
        return Item(prompt, (_said(row["completion"]),), votes=tuple(votes))
    if isinstance(row.get("completions"), list):  # of UltraFeedback, before it was made pairs
        told = row["completions"]
        scores = [each.get("overall_score", each.get("fine-grained_score")) for each in told]
        sources = [each.get("model") for each in told]
        return _made(prompt, [_said(each["response"]) for each in told], sources, scores)
    responses = row["responses"] if "responses" in row else [row["response"]]
    if not isinstance(responses, list):
        refuse("responses", "be a list of texts", shown(responses))
    item = _made(
        prompt, [_said(each) for each in responses], row.get("sources"), row.get("ratings")
    )
    votes = [_vote(each, len(responses)) for each in row.get("votes") or ()]
    return Item(
        item.prompt, item.responses, item.sources, item.ratings, row.get("gold"), tuple(votes)
    )


def _vote(row: Row, count: int) -> Vote:
    answer, order = row["answer"], row.get("shown") or ()
    _check_answer(answer, count)
    numbers = [row.get("seconds"), row.get("when")]
    if any(isinstance(x, bool) or not isinstance(x, int | float | None) for x in numbers):
        refuse("votes", "have numbers as seconds and when", shown(row))
    if order and sorted(order) != list(range(count)):
        refuse("shown", f"be an order of the {count} responses", shown(order))
    more = (bool(row.get("flag")), str(row.get("comment") or ""))
    return Vote(
        str(row["annotator"]), answer, row.get("seconds"), row.get("when"), tuple(order), *more
    )


def _check_answer(answer: Any, count: int) -> None:
    index = type(answer) is int and (0 <= answer < count if count > 1 else True)
    if not (index or isinstance(answer, bool) or answer in (TIE, BOTH_BAD, SKIP)):
        refuse("answer", f"be an index of {count} responses, a rating or a word", shown(answer))


def _made(prompt: Prompt, responses: Sequence[str], sources: Any, ratings: Any) -> Item:
    """Return an item; sources and ratings count only if all are there."""
    names = [str(each) for each in sources or ()]
    names = [] if None in (sources or ()) else names
    numbers = [] if None in (ratings or ()) else [float(each) for each in ratings or ()]
    return Item(prompt, tuple(responses), tuple(names), tuple(numbers))


def _preference(row: Row) -> Item:
    """Read chosen and rejected, with or without the prompt, with what UltraFeedback adds."""
    both = [row["chosen"], row["rejected"]]
    prompt: Any = row.get("prompt")
    if prompt is None:
        count = sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(*both, strict=False)))
        if isinstance(both[0], str):  # a dialogue in one text, or no prompt at all
            count = (
                both[0].rfind(ANSWERS, 0, count) + len(ANSWERS) if ANSWERS in both[0][:count] else 0
            )
        count = (
            min(count, *(len(each) - 1 for each in both)) if isinstance(both[0], list) else count
        )
        prompt, both = both[0][:count], [each[count:] for each in both]
    responses = [_said(each, prompt) for each in both]
    sides = ("chosen", "rejected")
    scores = [row.get(f"{side}-rating", row.get(f"score_{side}")) for side in sides]
    item = _made(
        _prompt({"prompt": prompt}), responses, [row.get(f"{s}-model") for s in sides], scores
    )
    return Item(item.prompt, item.responses, item.sources, item.ratings, votes=(Vote(FILE, 0),))


def _prompt(row: Mapping[str, Any]) -> Prompt:
    name = next((name for name in PROMPTS if row.get(name) is not None), None)
    if name is None:
        return ""
    found = row[name]
    if isinstance(found, list):
        return [{"role": each["role"], "content": each["content"]} for each in found]
    return found  # type: ignore[no-any-return]


def _said(completion: Any, prompt: Any = None) -> str:
    """Return the text of a response: itself, or the one message that it is beside its prompt."""
    if not isinstance(completion, list):
        return completion  # type: ignore[no-any-return]
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if len(completion) > 1 and completion[:-1] != before:
        refuse("response", "be one message after its prompt", shown(completion))
    return completion[-1]["content"]  # type: ignore[no-any-return]


def _argilla(fields: Row, metadata: Row, given: dict[str, list[tuple[Any, Any, Any]]]) -> Item:
    """Read fields and, of the first question that was answered, the votes."""
    names = [name for name in fields if name not in PROMPTS and RESPONSE.fullmatch(name)]
    names = [name for name in names if fields[name] is not None]
    responses = tuple(_said(fields[name]) for name in names)
    votes = [
        Vote(str(user), SKIP if status == "discarded" else _answer(value, names))
        for answers in list(given.values())[:1]
        for value, user, status in answers
        if status != "draft" and value is not None
    ]
    gold = metadata.get("gold", metadata.get("metadata.gold"))
    sources = tuple(metadata.get(f"source_{place + 1}") for place in range(len(names)))
    return Item(
        _prompt(fields), responses, sources if None not in sources else (),
        gold=None if gold is None else _answer(gold, names), votes=tuple(votes),
    )  # fmt: skip


def _flat_votes(row: Row, question: str) -> list[tuple[Any, Any, Any]]:
    columns = [row.get(f"{question}.responses{end}") or [] for end in ("", ".users", ".status")]
    width = len(columns[0])
    columns = [column + [None] * (width - len(column)) for column in columns]
    return list(zip(*columns, strict=True))


def _answer(value: Any, names: Sequence[str]) -> Answer:
    """Return what a value means: a response by its name, a place in a ranking, a rating, a word."""
    if isinstance(value, list):  # of a ranking, or of choices
        ranks = [each.get("rank", 0) if isinstance(each, dict) else 0 for each in value]
        first = [each for each, rank in zip(value, ranks, strict=True) if rank == min(ranks)]
        ranked = isinstance(value[0], dict)
        if ranked and len(first) > 1:
            return TIE
        value = first[0]["value"] if ranked else first[0]
    if isinstance(value, str) and value in names:
        return list(names).index(value)
    words: dict[Any, Answer] = {"good": True, "bad": False, "left": 0, "right": 1}
    if isinstance(value, str):
        value = words.get(value.lower(), int(value) if value.isdecimal() else value)
    if value not in (TIE, BOTH_BAD, SKIP) and not isinstance(value, int):
        refuse("value", f"be one of {[*names, *words, TIE, BOTH_BAD]} or a rating", shown(value))
    return value  # type: ignore[no-any-return]


def _label_studio(task: Row) -> Item:
    data = task["data"]
    if isinstance(data.get("items"), list):  # of a ranker
        names = [str(each["id"]) for each in data["items"]]
        responses = [each.get("body", each.get("title")) for each in data["items"]]
    else:
        names = [name for name in data if name not in PROMPTS and RESPONSE.fullmatch(name)]
        responses = [data[name] for name in names]
    votes, gold = list[Vote](), None
    for annotation in task.get("annotations") or ():
        results = annotation.get("result") or ()
        found = [each["value"] for each in results if each.get("type") != "textarea"]
        notes = [text for each in results for text in each["value"].get("text", ())]
        answer = (
            SKIP if annotation.get("was_cancelled") or not found else _selected(found[0], names)
        )
        who = annotation.get("completed_by")
        if annotation.get("ground_truth"):
            gold = answer
            continue
        name = str(who.get("email") or who.get("id")) if isinstance(who, dict) else str(who)
        votes.append(Vote(name, answer, annotation.get("lead_time"), comment="\n".join(notes)))
    sources = tuple(data.get(f"source{place + 1}") for place in range(len(names)))
    told = sources if None not in sources else ()
    return Item(_prompt(data), tuple(responses), told, gold=gold, votes=tuple(votes))


def _selected(value: Row, names: Sequence[str]) -> Answer:
    """Return what one result of Label Studio means."""
    if "ranker" in value:
        ranked = value["ranker"]
        if isinstance(ranked, dict):  # buckets: what is in one that has a name
            ranked = next(
                (ids for name, ids in ranked.items() if name != "_" and ids), ranked.get("_")
            )
        return _answer(str(ranked[0]), names)
    return _answer(next(value[k] for k in ("selected", "rating", "choices") if k in value), names)


# -- out -----------------------------------------------------------------------------------------


def _ours(question: str, items: Iterable[Item]) -> Iterator[Row]:
    for item in items:
        more = {"sources": list(item.sources), "ratings": list(item.ratings)}
        row: Row = {"prompt": item.prompt, "responses": list(item.responses)}
        row |= {name: value for name, value in more.items() if value}
        row |= {} if item.gold is None else {"gold": item.gold}
        yield row | {"votes": [vote.row() for vote in item.votes]}


def _answers(item: Item) -> list[Answer]:
    return [vote.answer for vote in item.votes if vote.answer != SKIP]


def _preferences(question: str, items: Iterable[Item]) -> Iterator[Row]:
    """Pairs by the majority, `weight` votes ahead; of ratings, `margin` points apart."""
    rated: dict[str, tuple[Prompt, list[tuple[float, str]]]] = {}
    for item in items:
        answers = _answers(item)
        if question == "thumbs" and answers and sum(answers) * 2 != len(answers):  # type: ignore[arg-type]
            good = sum(answers) * 2 > len(answers)  # type: ignore[arg-type]
            yield {"prompt": item.prompt, **_completion(item, "completion", 0), "label": good}
        elif question == "rating" and answers:
            key = json.dumps(item.prompt, default=dict)
            told = rated.setdefault(key, (item.prompt, []))[1]
            told.append((mean(map(float, answers)), item.responses[0]))
        elif question in ("pair", "best"):
            counts = [
                sum(type(a) is int and a == i for a in answers) for i in range(len(item.responses))
            ]
            best = max(range(len(counts)), key=counts.__getitem__)
            for other, count in enumerate(counts):
                if ahead := counts[best] - count:
                    yield _pair(item, best, other) | {"weight": ahead}
    for prompt, told in rated.values():
        for high, chosen in told:
            for low, rejected in told:
                if high > low:
                    yield _pair(Item(prompt, (chosen, rejected)), 0, 1) | {"margin": high - low}


def _pair(item: Item, chosen: int, rejected: int) -> Row:
    return (
        {"prompt": item.prompt}
        | _completion(item, "chosen", chosen)
        | _completion(item, "rejected", rejected)
    )


def _completion(item: Item, name: str, index: int) -> Row:
    text = item.responses[index]
    chat = [{"role": "assistant", "content": text}]
    return {name: text if isinstance(item.prompt, str) else chat}


def _ultrafeedback(question: str, items: Iterable[Item]) -> Iterator[Row]:
    for item in items:
        for row in _preferences(question, [item]):
            sides = ("chosen", "rejected")
            texts = [row[s] if isinstance(row[s], str) else row[s][0]["content"] for s in sides]
            chat = (
                item.prompt
                if not isinstance(item.prompt, str)
                else [{"role": "user", "content": item.prompt}]
            )
            made: Row = {"prompt": item.prompt}
            for side, text in zip(sides, texts, strict=True):
                made[side] = [*chat, {"role": "assistant", "content": text}]
                index = item.responses.index(text)
                made |= {f"{side}-rating": item.ratings[index]} if item.ratings else {}
                made |= {f"{side}-model": item.sources[index]} if item.sources else {}
            yield made


def _worded(answer: Answer, names: Sequence[str]) -> Answer:
    """Return an answer as other programs have it: the name of a response, a word, a rating."""
    if isinstance(answer, bool):
        return WORDS[answer]
    return names[answer] if isinstance(answer, int) and len(names) > 1 else answer


def _argilla_rows(question: str, items: Iterable[Item]) -> Iterator[Row]:
    for row in _argilla_flat_rows(question, items):
        fields = {
            name: row.pop(name)
            for name in list(row)
            if name == "prompt" or RESPONSE.fullmatch(name)
        }
        values, users = row.pop(f"{question}.responses"), row.pop(f"{question}.responses.users")
        row.pop(f"{question}.responses.status")
        told = [
            {"value": value, "user_id": user} for value, user in zip(values, users, strict=True)
        ]
        yield {"fields": fields, "metadata": row, "suggestions": {}, "responses": {question: told}}


def _argilla_flat_rows(question: str, items: Iterable[Item]) -> Iterator[Row]:
    for item in items:
        names = [f"response_{place + 1}" for place in range(len(item.responses))]
        row: Row = {"prompt": item.prompt, **dict(zip(names, item.responses, strict=True))}
        row |= {f"source_{place + 1}": source for place, source in enumerate(item.sources)}
        row |= {} if item.gold is None else {"gold": _worded(item.gold, names)}
        row[f"{question}.responses"] = [_worded(vote.answer, names) for vote in item.votes]
        row[f"{question}.responses.users"] = [vote.annotator for vote in item.votes]
        status = ["discarded" if vote.answer == SKIP else "submitted" for vote in item.votes]
        yield row | {f"{question}.responses.status": status}


def _label_studio_rows(question: str, items: Iterable[Item]) -> Iterator[Row]:
    for number, item in enumerate(items, 1):
        names = [f"answer{place + 1}" for place in range(len(item.responses))]
        data: Row = {"prompt": item.prompt} | {
            f"source{i + 1}": s for i, s in enumerate(item.sources)
        }
        if question == "best":
            bodies = zip(names, item.responses, strict=True)
            data["items"] = [{"id": name, "body": body} for name, body in bodies]
        else:
            data |= dict(zip(names, item.responses, strict=True))
        told = [(vote, False) for vote in item.votes]
        told += [] if item.gold is None else [(Vote("gold", item.gold), True)]
        made = defaultdict[str, Any](list, id=number, data=data)
        for vote, is_gold in told:
            result = [] if vote.answer == SKIP else [_result(question, vote.answer, names)]
            if vote.comment:
                note = {"from_name": "comment", "to_name": names[0], "type": "textarea"}
                result.append(note | {"value": {"text": [vote.comment]}})
            made["annotations"].append(
                {"completed_by": {"email": vote.annotator}, "was_cancelled": vote.answer == SKIP}
                | {"ground_truth": is_gold, "lead_time": vote.seconds, "result": result}
            )
        yield {"annotations": [], **made}


def _result(question: str, answer: Answer, names: Sequence[str]) -> Row:
    target = {"from_name": "comparison", "to_name": ",".join(names)}
    if type(answer) is int and question == "pair":
        return target | {"type": "pairwise", "value": {"selected": ("left", "right")[answer]}}
    if type(answer) is int and question == "best":
        ranked = [names[answer], *(name for name in names if name != names[answer])]
        return target | {"type": "ranker", "value": {"ranker": ranked}}
    if type(answer) is int:
        return target | {"type": "rating", "value": {"rating": answer}}
    return target | {"type": "choices", "value": {"choices": [_worded(answer, names)]}}


FORMATS: dict[str, Callable[[str, Iterable[Item]], Iterator[Row]]] = {
    "trl": _ours,
    "trl-preference": _preferences,
    "argilla": _argilla_rows,
    "argilla-flat": _argilla_flat_rows,
    "label-studio": _label_studio_rows,
    "ultrafeedback": _ultrafeedback,
}
"""What makes the rows of a file, by the name of its form."""
