"""Prompts that are read as they are used."""

import gc
import gzip
import io
import itertools
import json
import resource
import sys
import time
import warnings
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
import torch

from tests.training.test_loop import tokenizer
from trl.config.recipe import DataConfig
from trl.data import stream as streams
from trl.data.prompts import load_prompts
from trl.data.sources import beside_recipe
from trl.data.stream import PromptStream, all_or_rest, stream_of

datasets = pytest.importorskip("datasets")

TEXTS = [f"w{number}" for number in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The texts in three files of each kind."""
    folder = tmp_path_factory.mktemp("files")
    for number, texts in enumerate((TEXTS[:20], TEXTS[20:21], TEXTS[21:])):
        rows = [json.dumps({"text": text, "n": int(text[1:])}) for text in texts]
        (folder / f"{number}.jsonl").write_text("\n".join(rows))
        (folder / f"{number}.txt").write_text("\n".join(f" {text} " for text in texts))
        for ending in ("csv", "tsv"):
            (folder / f"{number}.{ending}").write_text("\n".join(["text", *texts]))
    return folder


def seeded():
    return torch.Generator().manual_seed(0)


def texts_of(rows):
    return [row["text"] if isinstance(row, dict) else row for row in rows]


def saved(stream):
    """The state of a stream as a checkpoint has it."""
    buffer = io.BytesIO()
    torch.save(stream.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Reiterable:
    """Like a `torch.utils.data.IterableDataset`: it has no length."""

    def __iter__(self):
        return iter(TEXTS)


def rows():
    for text in TEXTS:
        yield {"text": text, "tokens": torch.tensor([int(text[1:])])}


SOURCES = {
    "function": lambda folder: rows,
    "function of a list": lambda folder: lambda: TEXTS,
    "no length": lambda folder: Reiterable(),
    "dataset": lambda folder: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(3),
    "shuffled": lambda folder: (
        datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(3).shuffle(1, None, 16)
    ),
    "streaming=True": lambda folder: datasets.load_dataset(
        "json", data_files=str(folder / "*.jsonl"), split="train", streaming=True
    ),
    "files": lambda folder: folder / "*.jsonl",
    "list of files": lambda folder: [folder / f"{number}.jsonl" for number in range(3)],
    "lines": lambda folder: folder / "*.txt",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_each_prompt_comes_once_a_turn_and_a_saved_stream_goes_on_bit_for_bit(kind, folder):
    """Saved in the first turn, where it ends, and behind."""
    source = SOURCES[kind]

    def made():
        return stream_of(source(folder), buffer=7)

    whole, random = made(), seeded()
    drawn, states = [], []
    for _ in range(25):
        states.append((saved(whole), random.get_state(), len(drawn)))
        drawn += whole.draw(5, random)
    turns = [texts_of(drawn[start : start + 50]) for start in (0, 50)]
    assert [sorted(turn) for turn in turns] == [sorted(TEXTS)] * 2
    assert turns[0] != turns[1] != TEXTS
    for state, numbers, done in states[1:25:4]:
        stream, random = made(), seeded().set_state(numbers)
        stream.look()
        stream.load_state_dict(state)
        again = stream.draw(125 - done, random)
        assert texts_of(again) == texts_of(drawn[done:])


def test_what_is_read_ahead_is_bounded_and_the_buffer_is_what_mixes():
    """Of a source without end no more is read than the buffer needs."""
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield number

    stream, random = stream_of(endless, buffer=100), seeded()
    drawn = stream.draw(1000, random)
    assert len(read) <= 1000 + 2 * 100
    assert max(abs(number - place) for place, number in enumerate(drawn)) > 50
    assert max(number - place for place, number in enumerate(drawn)) < 200
    assert stream_of(endless, buffer=1).draw(10, random) == list(range(10))
    assert stream_of(endless).draw(10, seeded()) == stream_of(endless).draw(10, seeded())


@pytest.mark.parametrize("once", [True, False])
def test_to_go_back_to_the_last_state_reads_nothing_again(once):
    """As after a step that failed, in the midst of a turn and across its end."""
    opened = []

    def read():
        opened.append(1)
        return iter([str(number) for number in range(10)])

    stream, random = stream_of(read() if once else read, buffer=3), seeded()
    for _ in range(3 if once else 6):
        before, numbers = {"stream": stream.state_dict()}, random.get_state()
        first = stream.draw(3, random)
        for _ in range(2):
            times = len(opened)
            stream.load_state_dict(before["stream"])
            random.set_state(numbers)
            assert stream.draw(3, random) == first
            assert len(opened) == times


def test_a_source_that_fails_may_be_read_again():
    fails = iter([False, True, False])

    def read():
        yield from "abcd"
        if next(fails):
            raise ConnectionError
        yield from "efgh"

    stream, random = stream_of(read, buffer=2), seeded()
    assert sorted(stream.draw(8, random)) == list("abcdefgh")
    before = stream.state_dict()
    with pytest.raises(ConnectionError):
        stream.draw(8, random)
    stream.load_state_dict(before)
    assert sorted(stream.draw(8, random)) == list("abcdefgh")


def test_what_can_be_read_but_once():
    """It works without checkpoints, until it ends, and is refused where there are some."""
    assert all_or_rest(iter(TEXTS)) == TEXTS
    numbers = map(str, itertools.count())
    stream = stream_of(all_or_rest(numbers))
    assert len(set(stream.draw(3000, seeded()))) == 3000
    with pytest.raises(TypeError, match="`prompts` must be a list, or a function.*read on|go on"):
        stream.to_be_saved()
    ends = stream_of(iter(TEXTS), buffer=5)
    ends.draw(50, seeded())
    with pytest.raises(ValueError, match="`prompts` must go on.*ended after 50 rows"):
        ends.draw(1, seeded())


def test_the_first_may_be_held_out():
    stream, random = stream_of(lambda: TEXTS, held_out=20, buffer=4), seeded()
    assert sorted(stream.draw(30, random)) == sorted(stream.draw(30, random)) == sorted(TEXTS[20:])
    assert stream.held_out == TEXTS[:20]
    assert stream_of(lambda: TEXTS, held_out=2, buffer=4).first == TEXTS[2:8]
    with pytest.raises(ValueError, match="`prompts` must have prompts to use besides the 50 held"):
        stream_of(lambda: TEXTS, held_out=50).look()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: "text", r"`prompts\(\)` must return an iterable of prompts, got str"),
        (lambda: None, r"`prompts\(\)` must return an iterable of prompts, got NoneType"),
        (lambda: [], "`prompts` must have prompts to use, got none in 0 rows"),
        (Path("/not/there/*.jsonl"), "`prompts` must be files, got '/not/there/"),
        ([Path(__file__)], "`prompts` must be files of one ending, one of .jsonl,"),
    ],
)
def test_what_cannot_be_read_is_refused(source, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        stream_of(source).look()


def test_a_source_that_never_gives_a_prompt_is_given_up(monkeypatch):
    monkeypatch.setattr(streams, "MOST_UNFIT", 1000)
    read = stream_of(itertools.count).read
    stream = PromptStream(read, prepare=lambda rows, position: [])
    with pytest.raises(ValueError, match="must have prompts to use, got none in 1,0.. rows"):
        stream.look()


def test_a_source_that_has_become_shorter_is_told():
    texts = list(TEXTS)
    state = None
    stream = stream_of(lambda: texts, buffer=4)
    stream.draw(40, seeded())
    state = saved(stream)
    del texts[20:]
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match="have the 4. rows that were read before, got 20"):
        stream.draw(10, seeded())


@pytest.mark.parametrize("late", [False, True])
def test_rows_that_no_checkpoint_holds_are_refused(late):
    times = [{"text": "a", "at": [{"on": datetime(2026, 1, 1)}]}]
    stream = stream_of(lambda: [{"text": "a", "at": None}] * 5 * late + times, buffer=5)
    with pytest.raises(ValueError, match="for checkpoints, got list in 'at': leave the column"):
        stream.to_be_saved() or stream.draw(2, seeded())


@pytest.mark.parametrize("prompts", [TEXTS, (), [Path], "text", {"text": TEXTS}, torch.ones(2, 3)])
def test_what_has_a_length_is_no_stream(prompts):
    assert stream_of([] if prompts == [Path] else prompts) is None


# -- of a recipe -----------------------------------------------------------------------------------


def recipe_stream(prompts, **settings):
    settings = {"held_out": 5, "shuffle_buffer": 8} | settings
    return load_prompts(DataConfig(prompts=prompts, **settings), tokenizer(), seed=0)


@pytest.mark.parametrize("ending", ["jsonl", "txt", "csv", "tsv"])
@pytest.mark.parametrize("as_list", [False, True])
def test_files_of_a_recipe(ending, as_list, folder):
    names = tuple(str(folder / f"{number}.{ending}") for number in range(3))
    with warnings.catch_warnings():  # its reader of csv leaves files open
        warnings.simplefilter("ignore", ResourceWarning)
        split = recipe_stream(names if as_list else str(folder / f"*.{ending}"))
        drawn = split.train_rows.draw(45, seeded())
        gc.collect()
    assert sorted(row["prompt"] for row in drawn) == sorted(TEXTS[5:])
    assert split.held_out == TEXTS[:5]
    assert split.train == TEXTS[5:16]  # the buffer, and the rest of what was read with it
    assert {row.get("n") for row in drawn} == set(range(5, 50) if ending == "jsonl" else [None])
    assert str(split) == "a stream of prompts, shuffled within 8, 5 held out"


def test_what_a_recipe_does_to_prompts_it_does_to_a_stream(folder, tmp_path):
    """The same prompts as those of a list, in each turn and after a resume."""
    file = tmp_path / "prompts.jsonl"
    texts = [f"w{n} w{n % 7} w{n % 5} w{n % 3}" for n in range(40)] + ["w1", " "] + ["w0 w0 w0 w0"]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = {"template": "w9 {text}", "min_tokens": 3, "prefixes": ("w1 ", "w2 ")}
    split = recipe_stream(str(file), **settings)
    of_list = load_prompts(
        DataConfig(prompts=str(file), shuffle=False, held_out=0, **settings), tokenizer(), seed=0
    )
    stream, random = split.train_rows, seeded()
    turns = [[row["prompt"] for row in stream.draw(72, random)] for _ in range(2)]
    assert Counter(turns[0]) == Counter(turns[1]) == Counter(of_list.train[10:])
    assert split.held_out == of_list.train[:10]  # with each prefix
    cut = recipe_stream(str(file), cut_tokens=(1, 3), deduplicate=False).train_rows
    turns = [sorted(row["prompt"] for row in cut.draw(len(texts) - 6, random)) for _ in range(2)]
    assert turns[0] == turns[1]
    limited = recipe_stream(str(file), limit=12, held_out_prompts=str(folder / "1.txt"), held_out=1)
    stream = limited.train_rows
    turns = [sorted(row["prompt"] for row in stream.draw(12, random)) for _ in range(2)]
    assert turns == [sorted(texts[:12])] * 2
    assert limited.held_out == ["w20"]


def test_bad_rows_of_a_stream_are_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "w1"}\n{"text": "w2"}\n{"text": null}\n')
    with pytest.raises(TypeError, match=f"got None in row 3 of {file}"):
        recipe_stream(str(file), held_out=0)
    with pytest.raises(ValueError, match="`data.column` must name a column.* are 'text'"):
        recipe_stream(str(file), column="other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompts": ("a.jsonl", "b.jsonl")},
            "`prompts` must be one file without `shuffle_buffer`",
        ),
        ({"prompts": "*.jsonl"}, "`prompts` must be one file without `shuffle_buffer`"),
        ({"shuffle_buffer": 10}, "`shuffle_buffer` must be None for the prompts of 'starter'"),
        (
            {"prompts": "a.jsonl", "shuffle_buffer": 10, "shuffle": False},
            "`shuffle` must be true with",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b""), ("a.txt.gz", gzip.compress(b"\n"))], ids=["empty", "blank"]
)
def test_files_with_nothing_in_them_are_told_before_anything_is_loaded(
    name, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"`prompts` must have .*got '{path}', which is empty"):
        stream_of(path)


def test_files_beside_a_recipe(folder):
    assert beside_recipe("*.jsonl", folder) == str(folder / "*.jsonl")
    assert beside_recipe(("0.txt", "owner/name"), folder) == (str(folder / "0.txt"), "owner/name")
    assert beside_recipe(None, folder) is None


# -- larger than memory ----------------------------------------------------------------------------


def write_rows(file, count):
    with file.open("w") as lines:
        for start in range(0, count, 10_000):
            numbers = range(start, min(start + 10_000, count))
            lines.write("".join(f'{{"text": "w{n % 50} w{n % 7} w{n % 3}"}}\n' for n in numbers))


@pytest.mark.parametrize(
    "count", [20_000, pytest.param(10_000_000, marks=pytest.mark.slow, id="ten million")]
)
def test_rows_of_any_number_take_no_memory_and_begin_at_once(count, tmp_path, capsys):
    """Read far into the file, then gone on with from a state near its end."""
    file = tmp_path / "prompts.jsonl"
    write_rows(file, count)

    def opened():
        return recipe_stream(str(file), deduplicate=False, shuffle_buffer=1000).train_rows

    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    stream, drawing = opened(), seeded()
    first = stream.draw(64, drawing)
    seconds = [time.process_time() - started]
    stream.draw(count // 100, drawing)
    state, numbers = saved(stream), drawing.get_state()
    expected = stream.draw(64, drawing)
    started = time.process_time()
    again, drawing = opened(), seeded()
    again.load_state_dict(state)
    drawing.set_state(numbers)
    assert again.draw(64, drawing) == expected
    again.load_state_dict(state | {"position": count - 2000, "seen": count - 2000})
    drawn = again.draw(1500, drawing)
    seconds.append(time.process_time() - started)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken) / 1024
    with capsys.disabled():
        print(
            f" {count:,} rows: begun in {seconds[0]:.2f} s, gone on with after "
            f"{seconds[1]:.1f} s, {taken:.0f} MiB"
        )
    assert len(first) == 64
    assert len(drawn) == 1500
    assert seconds[0] < 5
    assert taken < 300
