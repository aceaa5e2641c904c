"""Files of other programs, there and back; broken lines are named and the others read."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl.evaluation.people.formats import FORMATS, read_items, write_items
from trl.evaluation.people.items import Item, Vote

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def written(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows):
    items, problems = read_items(written(tmp_path, *rows))
    assert problems == []
    return items


def said(item):
    return [(vote.annotator, vote.answer) for vote in item.votes]


QUESTIONS = {
    "pair": (2, [0, 1, "tie", "both_bad", "skip"]),
    "rating": (1, [1, 5, "skip"]),
    "thumbs": (1, [True, False, "skip"]),
    "best": (4, [0, 3, "both_bad", "skip"]),
}


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.json"])
@pytest.mark.parametrize("form", ["trl", "argilla", "argilla-flat", "label-studio"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_there_and_back(question, form, name, tmp_path):
    count, answers = QUESTIONS[question]
    responses = tuple(f"r{i} 🙂\nمرحبا" for i in range(count))
    sources = tuple(f"m{i}" for i in range(count))
    votes = tuple(Vote(f"ann{i}", answer, 1.5) for i, answer in enumerate(answers))
    items = [
        Item("p\u2028q", responses, sources, gold=answers[1], votes=votes),
        Item(CHAT, responses, votes=votes[:1]),
        Item("nobody yet", responses),
    ]
    assert write_items(tmp_path / name, question, items, form) == 3
    back, problems = read_items(tmp_path / name)
    assert problems == []
    assert back == items  # without votes
    assert [said(item) for item in back] == [said(item) for item in items]
    if form in ("trl", "label-studio"):
        assert [vote.seconds for vote in back[0].votes] == [1.5] * len(votes)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(
    prompt=texts,
    responses=st.lists(texts, min_size=2, max_size=4),
    seconds=st.none() | st.floats(0, 1e6),
    comment=texts,
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_our_lines_keep_every_vote(prompt, responses, seconds, comment, data, tmp_path_factory):
    order = tuple(data.draw(st.permutations(range(len(responses)))))
    vote = Vote(
        "ann", data.draw(st.sampled_from([*order, "tie"])), seconds, 5.0, order, True, comment
    )
    item = Item(prompt, tuple(responses), votes=(vote,))
    path = tmp_path_factory.mktemp("there") / "votes.jsonl"
    write_items(path, "best", [item])
    (back,), _ = read_items(path)
    assert (back, back.votes) == (item, item.votes)


# -- preferences -----------------------------------------------------------------------------------


def test_a_pair_is_what_most_people_prefer(tmp_path):
    def votes(*answers):
        return tuple(Vote(f"a{i}", answer) for i, answer in enumerate(answers))

    items = [
        Item("two of three", ("a", "b"), votes=votes(1, 1, 0, "skip")),
        Item("nobody", ("a", "b"), votes=votes(0, 1, "tie")),
        Item(CHAT, ("a", "b"), votes=votes(0)),
    ]
    rows = list(FORMATS["trl-preference"]("pair", items))
    assert rows == [
        {"prompt": "two of three", "chosen": "b", "rejected": "a", "weight": 1},
        {
            "prompt": CHAT,
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "weight": 1,
        },
    ]
    back = read(tmp_path, *rows)
    assert [(item.prompt, item.responses, said(item)) for item in back] == [
        ("two of three", ("b", "a"), [("file", 0)]),
        (CHAT, ("a", "b"), [("file", 0)]),
    ]


def test_the_best_of_several_is_better_than_each(tmp_path):
    item = Item("p", ("a", "b", "c"), votes=(Vote("x", 2), Vote("y", 2), Vote("z", 0)))
    assert list(FORMATS["trl-preference"]("best", [item])) == [
        {"prompt": "p", "chosen": "c", "rejected": "a", "weight": 1},
        {"prompt": "p", "chosen": "c", "rejected": "b", "weight": 2},
    ]


def test_ratings_make_pairs_with_margins_and_thumbs_rows_with_labels(tmp_path):
    rated = [
        Item("p", ("good",), votes=(Vote("x", 5), Vote("y", 4))),  # 4.5
        Item("p", ("bad",), votes=(Vote("x", 2),)),
        Item("q", ("alone",), votes=(Vote("x", 1),)),
    ]
    assert list(FORMATS["trl-preference"]("rating", rated)) == [
        {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 2.5}
    ]
    votes = (Vote("x", True), Vote("y", True), Vote("z", False))
    thumbs = [Item("p", ("a",), votes=votes), Item("p", ("b",), votes=votes[1:])]
    rows = list(FORMATS["trl-preference"]("thumbs", thumbs))
    assert rows == [{"prompt": "p", "completion": "a", "label": True}]  # of b: one each
    assert said(read(tmp_path, *rows)[0]) == [("file", True)]


def test_implicit_prompts(tmp_path):
    a, b = ([*CHAT, {"role": "assistant", "content": text}] for text in "ab")
    talk = "\n\nHuman: Hi\n\nAssistant:"
    items = read(
        tmp_path,
        {"chosen": a, "rejected": b},
        {"chosen": f"{talk} Yes, A", "rejected": f"{talk} Yes, B"},
        {"chosen": "Same start A", "rejected": "Same start B"},
        {"chosen": a, "rejected": a},
    )
    assert [(item.prompt, item.responses) for item in items] == [
        (CHAT, ("a", "b")),
        (talk, (" Yes, A", " Yes, B")),
        ("", ("Same start A", "Same start B")),
        (CHAT, ("a", "a")),
    ]


def test_ultrafeedback(tmp_path):
    ask = {"role": "user", "content": "Hi"}
    row = {
        "prompt": "Hi",
        "chosen": [ask, {"role": "assistant", "content": "Hello"}],
        "rejected": [ask, {"role": "assistant", "content": "No"}],
        "chosen-rating": 4.5,
        "rejected-rating": 2.0,
        "chosen-model": "m1",
        "rejected-model": "m2",
    }
    (item,) = read(tmp_path, row)
    assert item == Item("Hi", ("Hello", "No"), ("m1", "m2"), (4.5, 2.0))
    assert list(FORMATS["ultrafeedback"]("pair", [item])) == [row]
    raw = {
        "instruction": "Hi",
        "completions": [
            {"model": "m1", "response": "Hello", "overall_score": 8.5},
            {"model": "m2", "response": "No", "overall_score": 3},
        ],
    }
    assert read(tmp_path, raw) == [Item("Hi", ("Hello", "No"), ("m1", "m2"), (8.5, 3.0))]


def test_argilla_as_it_is_exported(tmp_path):
    nested = {
        "id": "1", "status": "completed", "metadata": {},
        "fields": {"instruction": "Hi", "response-a": "Hello", "response-b": "No"},
        "suggestions": {"better": {"value": "response-a", "score": None, "agent": "m"}},
        "responses": {"better": [{"value": "response-b", "user_id": "u1"}]},
    }  # fmt: skip
    flat = {
        "id": "1", "status": "completed", "prompt": "Hi", "completion": "Hello",
        "quality.responses": [4, 2, 5], "quality.responses.users": ["u1", "u2", "u3"],
        "quality.responses.status": ["submitted", "draft", "discarded"],
        "quality.suggestion": 3, "quality.suggestion.score": None, "quality.suggestion.agent": "m",
    }  # fmt: skip
    ranking = nested | {
        "responses": {"order": [{"value": [{"value": "response-b", "rank": 2},
                                           {"value": "response-a", "rank": 1}], "user_id": "u"}]}
    }  # fmt: skip
    items = read(tmp_path, nested, flat, ranking)
    assert [(i.prompt, i.responses, said(i)) for i in items] == [
        ("Hi", ("Hello", "No"), [("u1", 1)]),
        ("Hi", ("Hello",), [("u1", 4), ("u3", "skip")]),
        ("Hi", ("Hello", "No"), [("u", 0)]),
    ]


def test_label_studio_as_it_is_exported(tmp_path):
    def task(data, *results, **more):
        annotation = {"id": 1, "completed_by": 7, "was_cancelled": False, "ground_truth": False}
        annotation |= {"lead_time": 3.5, "result": list(results)}
        return {"id": 1, "data": data, "predictions": [], "annotations": [annotation | more]}

    def result(kind, **value):
        return {"id": "x", "from_name": "c", "to_name": "t", "type": kind, "value": value}

    two = {"prompt": "Hi", "answer1": "Hello", "answer2": "No"}
    one = {"prompt": "Hi", "text": "Hello"}
    several = {"prompt": "Hi", "items": [{"id": "a", "body": "A"}, {"id": "b", "body": "B"}]}
    items = read(
        tmp_path,
        task(two, result("pairwise", selected="left")),
        task(two, result("pairwise", selected="right"), result("textarea", text=["why"])),
        task(one, result("rating", rating=4)),
        task(two, result("choices", choices=["answer2"])),
        task(several, result("ranker", ranker=["b", "a"])),
        task(several, result("ranker", ranker={"_": ["a"], "best": ["b"]})),
        task(two, was_cancelled=True),
        task(two, result("pairwise", selected="right"), ground_truth=True),
        task(two, completed_by={"id": 3, "email": "a@b.c"}) | {"annotations": []},
    )
    assert [said(i) for i in items] == [
        *([("7", 0)], [("7", 1)], [("7", 4)], [("7", 1)], [("7", 1)], [("7", 1)]),
        *([("7", "skip")], [], []),
    ]  # fmt: skip
    assert items[1].votes[0].comment == "why"
    assert items[2].responses == ("Hello",)
    assert items[7].gold == 1


# -- what is broken --------------------------------------------------------------------------------

BROKEN = [
    b"{not json",
    b"[1, 2]",
    b"{}",
    b'"a text"',
    b"\xff\xfe\x00",
    b"[" * 10000,
    b'{"prompt": "p", "responses": []}',
    b'{"prompt": "p", "responses": "ab"}',
    b'{"prompt": "p", "responses": ["a", "b", "c", "d", "e"]}',
    b'{"prompt": "p", "responses": ["a", 5]}',
    b'{"prompt": 5, "responses": ["a", "b"]}',
    b'{"prompt": [{"role": "user"}], "responses": ["a", "b"]}',
    b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "responses": ["a", "b"]}',
    b'{"prompt": "\\ud800", "responses": ["a", "b"]}',
    b'{"prompt": "p", "responses": ["a", "b"], "sources": ["only one"]}',
    b'{"prompt": "p", "responses": ["a", "b"], "votes": [{"annotator": "x"}]}',
    b'{"prompt": "p", "responses": ["a", "b"], "votes": [{"annotator": "x", "answer": 2}]}',
    b'{"prompt": "p", "responses": ["a", "b"], "votes": [{"annotator": "x", "answer": [0]}]}',
    b'{"prompt": "p", "responses": ["a"], "votes": [{"annotator": "x", "answer": 1, "when": "1"}]}',
    b'{"prompt": "p", "responses": ["a", "b"], "votes": 5}',
    b'{"chosen": null, "rejected": "b"}',
    b'{"prompt": "p", "chosen": [], "rejected": []}',
    b'{"fields": {"prompt": "p"}, "responses": {}}',
    b'{"fields": {"prompt": "p", "response": "r"}, "responses": {"q": [{"user_id": "u"}]}}',
    b'{"fields": {"prompt": "p", "response": "r"}, "responses": {"q": [{"value": "odd"}]}}',
    b'{"data": {"prompt": "p"}}',
    b'{"data": {"prompt": "p", "text": "t"}, "annotations": [{"result": [{"value": {}}]}]}',
    b'{"prompt": "p", "completion": [{"role": "a"}, {"role": "b", "content": "c"}]}',
]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_and_the_others_are_read(line, tmp_path):
    good = b'{"prompt": "p", "responses": ["a", "b"]}'
    (tmp_path / "rows.jsonl").write_bytes(
        b"\n".join([good, b"", line, good.replace(b'"p"', b'"q"'), b""])
    )
    items, problems = read_items(tmp_path / "rows.jsonl")
    assert len(items) == 2
    (told,) = problems
    assert told.startswith(f"line 3 of {tmp_path / 'rows.jsonl'}: ")
    assert len(told) < 600
    (tmp_path / "alone.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=r"`--from` must have something to judge.*line 1"):
        read_items(tmp_path / "alone.jsonl")


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text("before")

    def broken():
        yield Item("p", ("a", "b"))
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_items(path, "pair", broken())
    assert path.read_text() == "before"
