"""Preferences in files: what each row says, and what is wrong with those that say nothing."""

import json

import pytest

from trl.data.preferences import Preference, as_read, read_preferences

ASKED = [{"role": "user", "content": "2 + 2?"}]


def said(text, role="assistant"):
    return {"role": role, "content": text}


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def voted(*answers, responses=("a", "b"), **more):
    votes = [{"annotator": "ann", "answer": answer} for answer in answers]
    return {"prompt": "p", "responses": list(responses), "votes": votes, **more}


@pytest.mark.parametrize(
    ("row", "preference"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            Preference("p", ("a", "b"), (1.0, 0.0, 0.0)),
        ),
        (
            {"chosen": "a", "rejected": "b", "margin": 1.5, "weight": 2, "more": 1},
            Preference("", ("a", "b"), (2.0, 0.0, 0.0), 1.5),
        ),
        (
            {"prompt": ASKED, "chosen": [said("4")], "rejected": [said("5")]},
            Preference(tuple(ASKED), ((said("4"),), (said("5"),)), (1.0, 0.0, 0.0)),
        ),
        (voted(1, 1, 0), Preference("p", ("a", "b"), (1.0, 2.0, 0.0))),
        (voted(0, "tie", "both_bad"), Preference("p", ("a", "b"), (1.0, 0.0, 2.0))),
        (voted(0, "skip", None, True), Preference("p", ("a", "b"), (1.0, 0.0, 0.0))),
        (voted(2, responses="abc"), Preference("p", ("a", "b", "c"), (0.0, 0.0, 1.0, 0.0))),
    ],
)
def test_a_row_says_who_preferred_what(tmp_path, row, preference):
    found, problems = read_preferences(write(tmp_path / "a.jsonl", row))
    assert (found, problems) == ([preference], [])


def test_a_vote_that_was_undone_says_nothing(tmp_path):
    row = voted(0, 1)
    row["votes"][1]["undone"] = True
    (found,), _ = read_preferences(write(tmp_path / "a.jsonl", row))
    assert found.votes == (1.0, 0.0, 0.0)


def test_other_files_are_read_too(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("chosen,rejected,margin\na,b,0.5\nc,d,\ne,f,much\n")
    found, problems = read_preferences(str(file))
    assert [each.margin for each in found] == [0.5, 0.0]
    assert problems == [f"line 4 of {file}: `margin` must be a number >= 0, got 'much'."]


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "`row` must be an object of JSON, got '{'"),
        ('["a"]', "`row` must be an object of JSON, got ['a']"),
        (100_000 * "[", "`row` must be an object of JSON, got '[["),
        (GOOD | {"margin": 10**400}, "`margin` must be a number >= 0, got 1000"),
        (
            {"prompt": "p", "chosen": "a"},
            "`row` must have `chosen` and `rejected` (or `responses`",
        ),
        (GOOD | {"prompt": 3}, "`prompt` must be a text, or messages"),
        (GOOD | {"chosen": []}, "`chosen` must be a text, or messages"),
        (GOOD | {"chosen": [{"role": "user"}]}, "`chosen` must be a text, or messages"),
        (GOOD | {"chosen": "\ud800"}, "`chosen` must be valid Unicode"),
        (GOOD | {"margin": -1}, "`margin` must be a number >= 0, got -1"),
        (GOOD | {"weight": float("nan")}, "`weight` must be a number >= 0, got nan"),
        (GOOD | {"weight": 0}, "`votes` must say something, got no answer"),
        (voted(2), "`votes[0].answer` must be an index of the 2 responses, got 2"),
        (voted(0, -1), "`votes[1].answer` must be an index of the 2 responses, got -1"),
        (voted("skip"), "`votes` must say something, got no answer"),
        (voted(0, responses=["a"]), "`responses` must be a list of at least two"),
        (voted() | {"votes": 3}, "`votes` must be a list of objects with an answer, got 3"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, row, told):
    file = write(tmp_path / "a.jsonl", GOOD, row, GOOD)
    found, problems = read_preferences(file)
    assert len(found) == 2
    (problem,) = problems
    assert problem.startswith(f"line 2 of {file}: {told}")


def test_a_file_of_nothing_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`train` must have preferences, got .*line 1 of"):
        read_preferences(write(tmp_path / "a.jsonl", "{"))
    with pytest.raises(ValueError, match=r"`test` must have preferences, .*it is empty"):
        read_preferences(write(tmp_path / "b.jsonl"), name="test")


@pytest.mark.parametrize(
    ("prompt", "response", "chat", "texts"),
    [
        ("q ", "a", [said("q ", "user")], ("q ", "a")),
        (ASKED, "4", ASKED, ("2 + 2?\n\n", "4")),
        (ASKED, [said("4")], ASKED, ("2 + 2?\n\n", "4")),
        ("2 + 2?", [said("4")], ASKED, ("2 + 2?\n\n", "4")),
        ("", [*ASKED, said("4")], ASKED, ("2 + 2?\n\n", "4")),  # the prompt is in both
        ("", [said("4")], [], ("", "4")),
        ([*ASKED, said("It is ")], "4", [*ASKED, said("It is ")], ("2 + 2?\n\nIt is ", "4")),
    ],
)
def test_what_a_reward_model_reads(prompt, response, chat, texts):
    assert as_read(prompt, response) == (chat, texts)


def test_the_order_of_responses_makes_no_other_preference():
    one, other = Preference("p", ("a", "b"), (1, 0, 0)), Preference("p", ("b", "a"), (1, 0, 0))
    assert one.key == other.key != Preference("q", ("a", "b"), (1, 0, 0)).key
