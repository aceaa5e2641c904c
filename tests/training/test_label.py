"""`trl label`: what is judged, where it is stored, and what comes out."""

import json
from pathlib import Path

import pytest

from trl import cli
from trl.evaluation.people.items import Item
from trl.evaluation.people.store import Store
from trl.training import label as labelling
from trl.training.label import items_of_runs


def make_run(folder, texts, prompts=("p0", "p1")):
    """A run whose responses at each step are the texts, with the prompt's place."""
    folder.mkdir(parents=True)
    rows = [
        {"step": 10 * turn, "prompt": prompt, "response": f"{text} {place}"}
        for turn, text in enumerate(texts)
        for place, prompt in enumerate(prompts)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(f'{lines}{{"step": 90, "pro')  # it was killed
    return str(folder)


def run(*arguments):
    return cli.main(["label", *map(str, arguments)])


@pytest.fixture
def served(monkeypatch):
    """What would be served, with an answer of everybody to everything."""
    from trl.evaluation.people import server

    stores = []

    def serve(store, host, port, started):
        started("http://127.0.0.1:1/")
        stores.append((store.path, host, port))

    monkeypatch.setattr(server, "serve", serve)
    return stores


def test_a_run_is_judged_before_against_after(tmp_path):
    mine = make_run(tmp_path / "mine", ["before", "between", "after"])
    items = items_of_runs([mine], "pair")
    assert items == [
        Item(f"p{i}", (f"before {i}", f"after {i}"), (f"{mine}, step 0", f"{mine}, step 20"))
        for i in range(2)
    ]
    assert [item.responses for item in items_of_runs([mine], "rating")] == [
        ("after 0",),
        ("after 1",),
    ]
    best = items_of_runs([mine], "best")
    assert best[0].responses == ("before 0", "between 0", "after 0")


def test_two_runs_are_judged_against_each_other_where_they_differ(tmp_path):
    one = make_run(tmp_path / "one", ["x", "same"], ("p0", "p1", "p2"))
    two = make_run(tmp_path / "two", ["same"], ("p0", "q"))
    assert len(items_of_runs([one], "pair")) == 3
    with pytest.raises(ValueError, match="responses that differ, to the same prompts"):
        items_of_runs([one, two], "pair")
    other = make_run(tmp_path / "other", ["better"], ("p2", "p0"))
    found = items_of_runs([one, other], "pair")
    assert [(item.prompt, item.responses) for item in found] == [
        ("p0", ("same 0", "better 1")),
        ("p2", ("same 2", "better 0")),
    ]
    assert found[0].sources == (one, other)


@pytest.mark.parametrize(
    ("question", "told"),
    [("pair", "at most 2 runs"), ("best", "at most 4 runs")],
)
def test_too_many_runs_are_refused(question, told, tmp_path):
    runs = [make_run(tmp_path / f"{i}", [f"t{i}"]) for i in range(5)]
    with pytest.raises(ValueError, match=told):
        items_of_runs(runs, question)


def test_from_the_command_to_a_file_and_back(tmp_path, capsys, served):
    mine = make_run(tmp_path / "mine", ["before", "after"])
    assert run("--from", mine, "--annotator", "ann", "--annotator", "ben", "--port", 0) == 0
    told = capsys.readouterr()
    path = Path(mine) / "people.votes.sqlite"
    assert served == [(path, "127.0.0.1", 0)]
    assert "ann: http://127.0.0.1:1/#join=" in told.out
    assert f"trl label --store {path}" in told.out
    assert "2 items, 2 of them new" in told.err
    store = Store(path)
    ann = store.join(told.out.split("ann: http://127.0.0.1:1/#join=")[1].split()[0])
    while (item := store.next(ann)) is not None:
        store.vote(ann, item.id, str(item.id), int(item.responses[1].startswith("after")))
    out = tmp_path / "prefs.jsonl"
    assert run("--from", mine, "--export", out, "--format", "trl-preference") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("after 0", "before 0"), ("after 1", "before 1")
    ]  # fmt: skip
    capsys.readouterr()
    assert run("--store", path, "--agreement") == 0
    figures = json.loads(capsys.readouterr().out)
    (row,) = figures["sources"]
    assert row["sources"] == [f"{mine}, step 0", f"{mine}, step 10"]
    assert (row["share"], row["of"]) == (0.0, 2)
    assert run("--store", path, "--agreement", tmp_path / "a.html") == 0
    assert "<caption>Each</caption>" in (tmp_path / "a.html").read_text()
    assert run("--store", path, "--export", tmp_path / "votes.jsonl") == 0
    assert run("--from", tmp_path / "votes.jsonl", "--with-votes", "--question", "pair") == 0
    again = Store(tmp_path / "votes.votes.sqlite")
    assert [item.votes for item in again.items()] == [item.votes for item in store.items()]


@pytest.mark.parametrize("chats", [True, False])
def test_models_write_first(tmp_path, served, monkeypatch, chats):
    from trl.training import tools

    asked = []

    def sent(model, text):
        """As they are sent: to B, and maybe A, as chats."""
        return [{"role": "user", "content": text}] if chats or model == "B" else text

    def sample(model, prompts, *, n, **how):
        asked.append((model, n, how))
        return [
            {"prompt": sent(model, text), "response": f"{model} {text} {i}"}
            for text in prompts
            for i in range(n)
        ]

    monkeypatch.setattr(tools, "sample", sample)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    how = ("--from", tmp_path / "prompts.txt", "--seed", 3)
    assert run(*how, "--model", "A", "--model", "B") == 0
    sampling = {"max_new_tokens": 48, "temperature": 1.0, "seed": 3}
    assert asked == [("A", 1, sampling), ("B", 1, sampling)]
    items = list(Store(tmp_path / "prompts.votes.sqlite").items())
    assert [(item.prompt, item.responses, item.sources) for item in items] == [
        (sent("A", text), (f"A {text} 0", f"B {text} 0"), ("A", "B")) for text in ("one", "two")
    ]
    asked.clear()
    assert run(*how, "--model", "A", "--question", "best", "--store", tmp_path / "four") == 0
    assert asked == [("A", 4, sampling)]
    assert {len(item.responses) for item in Store(tmp_path / "four").items()} == {4}


def test_a_real_model_writes_too(tmp_path, served):
    (tmp_path / "prompts.txt").write_text("This film\n")
    how = ("--from", tmp_path / "prompts.txt", "--model", "starter", "--max-new-tokens", 4)
    assert run(*how) == 0
    (item,) = Store(tmp_path / "prompts.votes.sqlite").items()
    assert item.prompt == "This film"
    assert len(set(item.responses)) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "`--from` must name a run"),
        (["--from", "none.jsonl"], "No such file or directory: 'none.jsonl'"),
        (["--store", "none.sqlite"], "There is no store of votes 'none.sqlite'"),
        (["--from", "."], "`--from` must be a run with held-out samples, or a file, got ."),
        (["--from", "pairs.jsonl", "--host", "0.0.0.0"], "come with --i-know, got 0.0.0.0"),
        (["--from", "pairs.jsonl", "--question", "rating"], "`responses` must be 1 to 1"),
        (["--from", "pairs.jsonl", "--per-item", "0"], "`--per-item` must be >= 1, got 0"),
        (["--from", "pairs.jsonl", "--port", "99999"], "`--host` must be an address"),
        (["--from", "pairs.jsonl", "--host", "203.0.113.1", "--i-know"], "`--host` must be an"),
        (["--from", "pairs.jsonl", "--annotator", ""], "`annotator` must be a name"),
        (["--from", "pairs.jsonl", "--guidelines", "none.md"], "No such file"),
        (["--from", "pairs.jsonl", "--question", "who"], "invalid choice: 'who'"),
        (["--from", "a", "b", "--model", "m"], "`--from` must be one file of prompts for --model"),
    ],
)
def test_what_cannot_be_judged_is_told(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    try:
        code = run(*arguments)
    except SystemExit as error:
        code = error.code
    assert code == cli.USAGE_ERROR
    assert told in capsys.readouterr().err


def test_what_is_refused_leaves_no_store_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    assert run("--from", "pairs.jsonl", "--host", "0.0.0.0") == cli.USAGE_ERROR
    assert run("--from", "pairs.jsonl", "--per-item", "0") == cli.USAGE_ERROR
    assert run("--from", "pairs.jsonl", "--guidelines", "none") == cli.USAGE_ERROR
    assert not list(tmp_path.glob("*.sqlite*"))


def test_a_missing_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(labelling, "find_spec", lambda name: None if name == "nh3" else name)
    assert run("--from", "x") == cli.USAGE_ERROR
    assert (
        "`trl label` needs nh3: install trl with the extra people, '.[people]'."
        in capsys.readouterr().err
    )


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    told = capsys.readouterr().out
    for option in cli.COMMANDS["label"].options:
        assert option in told
