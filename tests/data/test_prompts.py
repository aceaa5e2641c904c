"""The prompts of a run: every kind of source, every setting, every message."""

import gzip
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.conftest import SHARED, tiny_gpt2
from tests.rollout.tokenizers_for_tests import CHAT_TEMPLATE, byte_level, sentence_pieces
from tests.strategies import properties
from trl import starter
from trl.config.recipe import DataConfig, PretrainingConfig
from trl.data.pretraining import PretrainingText
from trl.data.prompts import load_prompts
from trl.data.sources import read_table

TOKENIZER = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
TEXTS = ["one film", "a second film", "the third", "Größe, “四”", "five"]
AS_THEY_ARE = {"held_out": 0, "shuffle": False}


def load(source="starter", *, tokenizer=TOKENIZER, seed=0, policy=None, **settings):
    config = DataConfig(prompts=str(source), **settings)
    return load_prompts(config, tokenizer, seed=seed, policy=policy)


def written(path, content, **how):
    path.write_text(content, encoding="utf-8", newline="", **how)
    return path


def lines_of(tmp_path, texts, name="prompts.txt"):
    return written(tmp_path / name, "\n".join(texts))


def tokens(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Sources


def json_lines(texts):
    return "\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)) + "\n\n"


FILES = {
    "a.txt": "\n\n".join(TEXTS),
    "windows.txt": "\ufeff" + "\r\n".join(f" {text}\t" for text in TEXTS) + "\r\n\r\n",
    "old.txt": "\r".join(TEXTS),
    "a.jsonl": json_lines(TEXTS),
    "windows.jsonl": "\ufeff" + json_lines(TEXTS).replace("\n", "\r\n"),
    "texts.jsonl": "\n".join(json.dumps(text, ensure_ascii=False) for text in TEXTS),
    "a.csv": "n,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(TEXTS)),
    "a.tsv": "\ufefftext\tn\r\n" + "".join(f"{text}\t1\r\n" for text in TEXTS),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_every_kind(tmp_path, name, zipped):
    path = written(tmp_path / name, FILES[name])
    if zipped:
        path = tmp_path / f"{name}.GZ"
        path.write_bytes(gzip.compress(FILES[name].encode()))
    assert load(path, **AS_THEY_ARE).train == TEXTS


def test_csv_texts_may_be_long_and_have_quotes_commas_and_line_breaks(tmp_path):
    long = "word, " * 40_000
    text = 'prompt\n"he said ""no"",\nand left"\n\n"' + long + '"\nplain\n'
    path = written(tmp_path / "a.csv", text)
    assert load(path, **AS_THEY_ARE).train == ['he said "no",\nand left', long, "plain"]


def test_quotes_in_a_tsv_file_may_be_plain(tmp_path):
    path = written(tmp_path / "a.tsv", 'text\tlabel\n"great" film\t1\n"open\t0\n')
    assert load(path, **AS_THEY_ARE).train == ['"great" film', '"open']


def test_a_line_of_text_may_have_other_separators_in_it(tmp_path):
    texts = ["one\u2028line", "an\x0bother", "and\x85more"]
    assert load(lines_of(tmp_path, texts), **AS_THEY_ARE).train == texts
    path = written(
        tmp_path / "a.jsonl", "\n".join(json.dumps(t, ensure_ascii=False) for t in texts)
    )
    assert load(path, **AS_THEY_ARE).train == texts


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found.disable_progress_bars()
    return found


@pytest.mark.parametrize("ending", ["parquet", "json", "json.gz"])
def test_files_that_datasets_reads(tmp_path, datasets, ending):
    path = tmp_path / f"a.{ending}"
    made = datasets.Dataset.from_dict({"n": list(range(5)), "text": TEXTS})
    if ending == "parquet":
        made.to_parquet(path)
    else:
        text = json.dumps(made.to_list()).encode()
        path.write_bytes(gzip.compress(text) if ending == "json.gz" else text)
    assert load(path, split="test", **AS_THEY_ARE).train == TEXTS  # a file has one split
    assert read_table(str(path)).column("n") == [0, 1, 2, 3, 4]


def test_a_file_that_datasets_reads_as_it_is_now(tmp_path, datasets):
    path = written(tmp_path / "a.json", json.dumps(TEXTS))
    assert load(path, **AS_THEY_ARE).train == TEXTS
    written(path, json.dumps(["another"]))
    assert load(path, **AS_THEY_ARE).train == ["another"]


def test_folders_that_datasets_wrote(tmp_path, datasets):
    made = datasets.Dataset.from_dict({"n": list(range(5)), "text": TEXTS})
    made.with_format("numpy").save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one", **AS_THEY_ARE).train == TEXTS
    both = datasets.DatasetDict(train=made, test=made.select([4, 2]))
    both.save_to_disk(tmp_path / "both")
    assert load(tmp_path / "both", **AS_THEY_ARE).train == TEXTS
    assert load(tmp_path / "both", split="test", **AS_THEY_ARE).train == ["five", "the third"]
    assert load(f"{tmp_path}/both:test", **AS_THEY_ARE).train == ["five", "the third"]
    with pytest.raises(
        ValueError, match=r"`data.split` must be one of \['train', 'test'\].*got 'tests'"
    ):
        load(tmp_path / "both", split="tests")


def test_a_folder_of_data_files(tmp_path, datasets):
    folder = tmp_path / "reviews"
    folder.mkdir()
    written(folder / "train.jsonl", json_lines(TEXTS))
    written(folder / "test.jsonl", json_lines(["unseen"]))
    split = load(folder, held_out_prompts=f"{folder}:test", held_out=1, shuffle=False)
    assert (split.train, split.held_out) == (TEXTS, ["unseen"])
    with pytest.raises(ValueError, match=r"`data.prompts`.*split 'tset'.*Unknown split"):
        load(folder, split="tset")
    with pytest.raises(ValueError, match=r"`data.prompts`.*'en' not found"):
        load(folder, subset="en")


@pytest.mark.parametrize(
    ("source", "hint"), [("someone/reviews", "hub|Hub"), ("startr", "mean `starter`")]
)
def test_a_hub_dataset_that_is_not_here(source, hint, datasets):
    with pytest.raises(ValueError, match=rf"`data.prompts` .*{source}.*{hint}"):
        load(source)


def test_the_starter_prompts_stay_as_they_are():
    split = load(held_out=200)
    assert split.train == starter.prompts("train")
    assert split.held_out == starter.prompts("held-out")[:200]
    assert split.left_out == {"held-out prompts beyond data.held_out": 312}
    assert str(split).endswith("200 held out; left out: 312 held-out prompts beyond data.held_out")
    assert load(limit=10).train == starter.prompts("train")[:10]
    with pytest.raises(ValueError, match="`data.held_out` must be at most 512.*got 513"):
        load(held_out=513)


# Columns and templates


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["only"], "only"),
        (["text", "prompt"], "prompt"),
        (["query", "text"], "query"),
        (["id", "text"], "text"),
    ],
)
def test_the_likeliest_column(tmp_path, columns, found):
    row = {column: f"from {column}" for column in columns}
    path = written(tmp_path / "a.jsonl", json.dumps(row))
    assert load(path, **AS_THEY_ARE).train == [f"from {found}"]
    assert load(path, column=columns[0], **AS_THEY_ARE).train == [f"from {columns[0]}"]


def test_a_template_of_columns(tmp_path):
    rows = [{"review text": "good", "stars": 4}, {"review text": "{bad}", "stars": 1.5}]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    split = load(path, template="{{{stars}}} {review text}\n→", **AS_THEY_ARE)
    assert split.train == ["{4} good\n→", "{1.5} {bad}\n→"]


def test_with_a_template_its_column_is_cut(tmp_path):
    path = written(tmp_path / "a.jsonl", json.dumps({"a": "This film was bad", "b": "so it was"}))
    how = {"cut_tokens": (2, 2), "template": "{a}, {b}:"} | AS_THEY_ARE
    assert load(path, column="a", **how).train == ["This film, so it was:"]
    assert load(path, **how | {"template": "Review: {b}!"}).train == ["Review: so it!"]
    with pytest.raises(
        ValueError, match=r"`data.column` must be the column .*'a', 'b'\], got None"
    ):
        load(path, **how)


# Tokens


@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentence_pieces()], ids=["gpt2", "llama"])
def test_cut_texts_begin_the_whole_ones_and_encode_to_so_many_tokens(tmp_path, tokenizer):
    words = ["a", "good", "film", "was", "films"]
    random = np.random.default_rng(0)
    whole = [" ".join(random.choice(words, size=int(n))) for n in random.integers(4, 400, 200)]
    path = lines_of(tmp_path, whole)
    split = load(
        path, tokenizer=tokenizer, cut_tokens=(2, 4), deduplicate=False, seed=3, **AS_THEY_ARE
    )
    sizes = []
    for cut, text in zip(split.train, whole, strict=True):
        row = tokens(cut, tokenizer)
        assert row == tokens(text, tokenizer)[: len(row)]
        sizes.append(len(row))
    assert {size: sizes.count(size) > 40 for size in (2, 3, 4)} == dict.fromkeys((2, 3, 4), True)
    assert set(sizes) == {2, 3, 4}


def test_a_cut_inside_a_letter_is_left_out_and_counted(tmp_path):
    path = lines_of(tmp_path, ["四十四四十四", "short", "a film that is long"])
    assert len(tokens("四")) > 2  # so no cut into 2 tokens ends with a letter
    split = load(path, cut_tokens=(2, 2), **AS_THEY_ARE)
    assert len(split.train) == 2
    assert split.left_out == {"not the same tokens when encoded again": 1}


def test_a_text_that_is_short_enough_is_not_touched(tmp_path):
    strange = "a strange film"  # whose tokens say "a <unk> film"
    path = lines_of(tmp_path, [strange])
    for most in (3, 60):
        split = load(path, tokenizer=sentence_pieces(), cut_tokens=(most, most), **AS_THEY_ARE)
        assert split.train == [strange]


@pytest.mark.parametrize("prefixes", [(), ("+ ", "a long prefix ")])
def test_prompts_of_a_wrong_length_are_left_out(tmp_path, prefixes):
    texts = ["a " * n + "b" for n in range(60)]
    low, high = 5, 20
    split = load(
        lines_of(tmp_path, texts), min_tokens=low, max_tokens=high, prefixes=prefixes, **AS_THEY_ARE
    )
    lengths = {text: [len(tokens(p + text)) for p in prefixes or ("",)] for text in texts}
    fits = [text for text in texts if all(low <= size <= high for size in lengths[text])]
    assert 5 < len(fits) < 20
    assert split.train == [p + text for text in fits for p in prefixes or ("",)]
    assert sum(split.left_out.values()) == 60 - len(fits)
    short = sum(min(sizes) < low for sizes in lengths.values())
    assert split.left_out["shorter than data.min_tokens"] == short


def test_long_tokens_are_counted_too(tmp_path):
    words = ["x" * 50] * 10  # each one token, so the beginning of the text has few of them
    path = lines_of(tmp_path, [" ".join(words), " ".join(words[:4])])
    split = load(path, tokenizer=sentence_pieces(), max_tokens=4, **AS_THEY_ARE)
    assert split.train == [" ".join(words[:4])]


def test_only_a_lower_bound(tmp_path):
    path = lines_of(tmp_path, ["a", "a film that is long enough"])
    assert load(path, min_tokens=3, **AS_THEY_ARE).train == ["a film that is long enough"]


# Chats


def chatty():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_texts_as_chats(tmp_path):
    path = lines_of(tmp_path, ["abc", "abcd", "abc"])
    split = load(path, tokenizer=chatty(), chat=True, system="be brief.", held_out=1, shuffle=False)
    system = {"role": "system", "content": "be brief."}
    assert split.train == [[system, {"role": "user", "content": "abc"}]]
    assert split.held_out == [[system, {"role": "user", "content": "abcd"}]]
    length = len(tokens("user: abc\nassistant:", chatty()))
    kept = load(path, tokenizer=chatty(), chat=True, max_tokens=length, **AS_THEY_ARE)
    assert [chat[0]["content"] for chat in kept.train] == ["abc"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_texts_are_chats_for_a_model_with_a_template_unless_they_are_openings(tmp_path):
    path = written(tmp_path / "a.txt", "abc\nbcd\n")
    split = load(path, tokenizer=chatty(), **AS_THEY_ARE)
    assert split.train == [[user("abc")], [user("bcd")]]
    assert "data.chat: false" in str(split)
    assert load(path, tokenizer=chatty(), chat=True, **AS_THEY_ARE).note == ""
    for openings in ({"cut_tokens": (9, 9)}, {"prefixes": ("+",)}, {"chat": False}):
        plain = load(path, tokenizer=chatty(), **openings, **AS_THEY_ARE)
        assert plain.train[0].endswith("abc")
        assert plain.note == ""
    own = chatty()
    own.chat_template = "<bos>" + CHAT_TEMPLATE
    path = written(tmp_path / "b.txt", "<bos>user: abc\n")
    assert load(path, tokenizer=own, **AS_THEY_ARE).train == ["<bos>user: abc"]
    with pytest.raises(ValueError, match=r"`data.system` .* set tokenizer.chat_template"):
        load(path, system="be", **AS_THEY_ARE)


def chat_lines(chats):
    return "\n".join(json.dumps({"messages": chat}) for chat in chats)


def test_a_column_of_chats_up_to_where_the_assistant_speaks(tmp_path):
    chats = [[user("a"), assistant("b"), user("c"), assistant("d")], [user("a")], [assistant("x")]]
    path = written(tmp_path / "a.jsonl", chat_lines(chats))
    split = load(path, tokenizer=chatty(), **AS_THEY_ARE)
    assert split.train == [chats[0][:3], chats[1]]
    assert split.left_out == {"answers that ended a chat": 1, "blank": 1}
    brief = load(path, tokenizer=chatty(), chat=True, system="be brief", **AS_THEY_ARE)
    assert brief.train == [
        [{"role": "system", "content": "be brief"}, *chat] for chat in (chats[0][:3], chats[1])
    ]


def test_chats_that_do_not_fit(tmp_path):
    path = written(tmp_path / "a.jsonl", chat_lines([[user("a")], [user("b")]]))
    with pytest.raises(ValueError, match=r"`data.cut_tokens` must be left out for chats"):
        load(path, tokenizer=chatty(), cut_tokens=(1, 2))
    with pytest.raises(ValueError, match=r"`data.prefixes` must be left out for chats"):
        load(path, tokenizer=chatty(), prefixes=("+",))
    wrong = [[user("a")], [{"from": "human", "value": "b"}]]
    path = written(tmp_path / "b.jsonl", chat_lines(wrong))
    with pytest.raises(TypeError, match=r"'role'.*'content'.*'human'.*line 2 of"):
        load(path, tokenizer=chatty())
    path = written(
        tmp_path / "c.jsonl", chat_lines([[{"role": "system", "content": "s"}, user("a")]])
    )
    with pytest.raises(ValueError, match=r"`data.system` must be None.*line 1 of.*got 'be brief'"):
        load(path, tokenizer=chatty(), chat=True, system="be brief")


# Prompts of the policy


def test_the_policy_writes_prompts():
    policy, tokenizer = tiny_gpt2(), byte_level()
    policy.transformer.resize_token_embeddings(len(tokenizer))
    policy.lm_head = torch.nn.Linear(32, len(tokenizer), bias=False)
    policy.config.vocab_size = len(tokenizer)
    how = {"model_prompts": 40, "model_prompt_tokens": (3, 6), "held_out": 8}
    split = load("model", tokenizer=tokenizer, policy=policy, **how)
    texts = split.train + split.held_out
    assert (len(split.train), len(split.held_out)) == (32, 8)
    assert len(set(texts)) == 40
    sizes = [len(tokens(text, tokenizer)) for text in texts]
    assert set(sizes) == {3, 4, 5, 6}
    assert not any("<" in text for text in texts)
    again = load("model", tokenizer=tokenizer, policy=policy, **how)
    other = load("model", tokenizer=tokenizer, policy=policy, seed=1, **how)
    assert (again.train, again.held_out) == (split.train, split.held_out)
    assert not set(other.train) & set(split.train)
    with pytest.raises(ValueError, match=r"`data.model_prompts` must be at most \d+, .*got 500"):
        load("model", tokenizer=tokenizer, policy=policy, model_prompts=500,
             model_prompt_tokens=(1, 1))  # fmt: skip
    with pytest.raises(ValueError, match="without a policy that writes them, from a BOS token"):
        load("model", tokenizer=tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="from a BOS token: .*tokenizer.bos_token"):
        load("model", tokenizer=tokenizer, policy=policy)


# The split

texts_of_any_kind = st.lists(st.text("ab \n", max_size=4), min_size=1, max_size=40)


@properties
@given(
    texts=texts_of_any_kind,
    held_out=st.integers(0, 8),
    limit=st.none() | st.integers(1, 30),
    prefixes=st.sampled_from([(), ("+",), ("[x] ", "[y] ")]),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_split_is_disjoint_complete_and_the_same_again(
    tmp_path_factory, texts, held_out, limit, prefixes, shuffle, seed
):
    path = written(
        tmp_path_factory.mktemp("x") / "a.jsonl", "\n".join(json.dumps(text) for text in texts)
    )
    how = {
        "held_out": held_out,
        "limit": limit,
        "prefixes": prefixes,
        "shuffle": shuffle,
        "seed": seed,
    }
    unique = list(dict.fromkeys(text for text in texts if text.strip()))
    used = min(len(unique), limit or len(unique))
    if used <= held_out:
        with pytest.raises(ValueError, match=r"`data\.prompts` must"):
            load(path, **how)
        return
    split = load(path, **how)
    combined = {(prefix + text) for prefix in prefixes or ("",) for text in unique}
    count = len(prefixes) or 1
    assert not set(split.train) & set(split.held_out)
    assert set(split.train) | set(split.held_out) <= combined
    assert len(split.held_out) == held_out * count
    assert len(split.train) == (used - held_out) * count
    assert len(set(split.train)) == len(split.train)
    assert used + sum(split.left_out.values()) == len(texts)
    for prompts in (split.train, split.held_out):
        bare = [prompt.removeprefix((prefixes or ("",))[0]) for prompt in prompts[::count]]
        assert prompts == [prefix + text for text in bare for prefix in prefixes or ("",)]
        if not shuffle:
            assert bare == [text for text in unique if text in bare]
    again = load(path, **how)
    assert (again.train, again.held_out) == (split.train, split.held_out)


def test_the_shuffle_follows_the_seed(tmp_path):
    path = lines_of(tmp_path, [f"w{n}" for n in range(100)])
    first, second, other = (load(path, held_out=10, seed=seed) for seed in (0, 0, 1))
    assert first.train == second.train
    assert first.held_out != other.held_out
    assert sorted(first.train + first.held_out) == sorted(other.train + other.held_out)
    assert load(path, held_out=10, shuffle=False).held_out == [f"w{n}" for n in range(90, 100)]


def test_equal_prompts_may_be_asked_for(tmp_path):
    path = lines_of(tmp_path, ["a", "a", "b"])
    assert load(path, deduplicate=False, **AS_THEY_ARE).train == ["a", "a", "b"]


def test_held_out_prompts_of_their_own(tmp_path):
    train = lines_of(tmp_path, ["a", "b", "c", "d"])
    own = lines_of(tmp_path, ["x", "b", "y", "z"], "own.txt")
    how = {"held_out_prompts": str(own), "held_out": 3}
    split = load(train, shuffle=False, prefixes=("+", "-"), **how)
    assert split.train == ["+a", "-a", "+c", "-c", "+d", "-d"]
    assert split.held_out == ["+x", "-x", "+b", "-b", "+y", "-y"]
    assert split.left_out == {"held out too": 1, "held-out prompts beyond data.held_out": 1}
    assert str(split) == (
        "6 prompts to train on, 6 held out; left out: 1 held-out prompts beyond data.held_out, "
        "1 held out too"
    )
    assert set(load(train, deduplicate=False, **how).train) == set("abcd")
    assert len(load(train, limit=2, **how).train) == 2
    assert len(load(held_out_prompts=str(own), held_out=4).train) == 4096
    with pytest.raises(ValueError, match=r"`data.held_out` must be at most 4, .*own.txt.*got 5"):
        load(train, held_out_prompts=str(own), held_out=5)
    same = r"`data.prompts` must have .* not held out, got '.*/own.txt', whose 4 prompts all .* "
    with pytest.raises(ValueError, match=same + "data.held_out_prompts, '.*/own.txt', too: give"):
        load(own, held_out_prompts=str(own), held_out=4)
    blank = written(tmp_path / "blank.jsonl", '" "\n""')
    with pytest.raises(ValueError, match=r"`data.held_out_prompts` .*left out: 2 blank\.$"):
        load(lines_of(tmp_path, ["a", "a"]), held_out_prompts=str(blank), held_out=1)
    with pytest.raises(FileNotFoundError, match="`data.held_out_prompts` must be a file"):
        load(train, held_out_prompts=str(tmp_path / "none.txt"))


# Messages

WRONG_FILES = [
    ("a.txt", " \n\r\n", ValueError, r"must have at least one text, .*empty"),
    ("a.csv", "text,n\n", ValueError, "at least one text"),
    ("a.csv", "", ValueError, "at least one text"),
    ("a.jsonl", "\ufeff", ValueError, "at least one text"),
    ("a.xyz", "a", ValueError, r"ends in one of \.jsonl, .*\.parquet.*, got .*a\.xyz.*convert"),
    ("a.gz", "a", ValueError, r"ends in one of"),
    ("a.txt.gz", "a", ValueError, "must be a whole .gz file.*a.txt.gz"),
    (
        "a.jsonl",
        '{"text": "a"}\n\n{"text": b}\n',
        ValueError,
        r"line 3, '{\"text\": b}': Expecting",
    ),
    ("a.jsonl", "7\n", ValueError, "line 1, 7, is neither an object nor a text"),
    ("a.csv", "text,n\na,1\nb,c,1\n", ValueError, "line 3: a row has 2 entries"),
    ("a.csv", "text,n\na,1\n\nb\n", ValueError, "line 4: a row has 2 entries"),
    ("a.csv", 'text,n\na,1\n"b,1\n', ValueError, "line 3: unexpected end.*between quotes"),
    ("a.csv", "text,text\na,1\n", ValueError, "names of columns must differ"),
    ("a.jsonl", '{"text": "a"}\n{"text": 7}', TypeError, r"column 'text'.*got 7 in line 2"),
    ("a.jsonl", '{"text": "a"}\n{"txt": ""}', TypeError, r"got None in line 2"),
    ("a.jsonl", '"a"\n"\\ud83d"', TypeError, "valid Unicode.*line 2"),
    ("a.csv", "a,b\n1,2\n", ValueError, r"column` must name a column.*a.csv are 'a', 'b'"),
]

WRONG_FOR_DATASETS = [
    ("a.parquet", "PAR1", ValueError, "must be a file or dataset that can be loaded"),
    ("a.json", '[{"text": "a"},\n{"text": }]', ValueError, "that can be loaded, .*a.json"),
    ("a.json", '["a", null]', TypeError, "got None in row 2"),
]


@pytest.mark.parametrize(("name", "content", "kind", "message"), WRONG_FOR_DATASETS)
def test_a_file_that_is_wrong_for_datasets(tmp_path, datasets, name, content, kind, message):
    test_a_file_that_is_wrong(tmp_path, name, content, kind, message)


@pytest.mark.parametrize(("name", "content", "kind", "message"), WRONG_FILES)
def test_a_file_that_is_wrong(tmp_path, name, content, kind, message):
    path = written(tmp_path / name, content)
    with pytest.raises(kind, match=f"(?s)`data.*{message}"):
        load(path)


@pytest.mark.parametrize(
    ("texts", "told"), [(["a", "b"], ""), (["a", ""], "1 of them empty"), (["", ""], "")]
)
def test_some_empty_messages_are_told(tmp_path, texts, told):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(path, tokenizer=chatty(), **AS_THEY_ARE, deduplicate=False).note == told


def test_a_held_out_file_is_taken_whole_unless_a_number_is_written(tmp_path):
    own, other = (
        lines_of(tmp_path, words, name) for words, name in (("abc", "a.txt"), ("xy", "b.txt"))
    )
    split = load(own, held_out_prompts=str(other), held_out=256)
    assert sorted(split.held_out) == ["x", "y"]
    with pytest.raises(ValueError, match=r"at most 2, .*got 3"):
        load(own, held_out_prompts=str(other), held_out=3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '[{"prompt": "x"}]', r"it is a list of JSON: name it \.json"),
        ("a.csv", "prompt;answer\n1;2\n", "'prompt;answer' are parted by semicolons: write commas"),
    ],
)
def test_files_of_a_common_other_kind(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_rows_without_a_column_that_others_have_are_told(tmp_path):
    rows = [{"prompt": f"p{n}", "answer": "x", "more": None} | {"level": n} for n in range(4)]
    del rows[1]["answer"], rows[2]["answer"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    note = load(path, **AS_THEY_ARE).note
    assert note == "2 of them without `answer` (None)"


def test_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("ok\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"its text in UTF-8, got .*a.txt.*0xe9.*iconv"):
        load(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(ValueError, match=r"line 2, .*: mend it\.$"):
        load(tmp_path / "a.jsonl")


def test_a_file_that_is_not_there(tmp_path):
    path = lines_of(tmp_path, ["a"], "reviews.txt")
    with pytest.raises(FileNotFoundError, match=r"`data.prompts`.*review.txt.*mean `reviews.txt`"):
        load(tmp_path / "review.txt")
    with pytest.raises(
        FileNotFoundError, match=r"must be a file that is there, got '.*/none/reviews.txt'"
    ):
        load(path.parent / "none" / "reviews.txt")


WRONG_SETTINGS = [
    ({"column": "txt"}, r"`data.column` must name a column, got 'txt': .* 'id', 'text'.*`text`"),
    ({"column": "Text"}, "mean `text`"),
    ({"template": "{txt}"}, r"`data.template` must name columns .*\{txt\}.*'text'.*`text`"),
    ({"template": "{text!r}"}, r"got \{text!r\}"),
    ({"template": "{text:>9}"}, r"got \{text:>9\}"),
    ({"template": "{}"}, r"got \{\}"),
    ({"template": "{text"}, r"`data.template` must be a template, with \{\{ .*expected '}'"),
    (
        {"template": "text"},
        r"`data.template` must name columns between braces .*, got \{\} in 'text'",
    ),
    ({"template": "{id}", "column": "text"}, r"`data.column` must be the column of data.template"),
    ({"template": "{list}"}, r"column 'list' .*got \['x'\] in line 1"),
    (
        {"held_out": 2},
        r"`data.prompts` must be more than those held out \(data.held_out: 2\), got 2",
    ),
    ({"held_out": 1, "limit": 1}, r"held_out: 1\), got 1 \(left out: 1 beyond data.limit"),
    ({"max_tokens": 1}, r"`data.prompts` must have prompts.*left out: 2 longer than data.max_tok"),
    ({"min_tokens": 99}, r"2 shorter than data.min_tokens"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS)
def test_settings_that_do_not_fit_the_data(tmp_path, settings, message):
    rows = [{"id": n, "text": f"film number {n}", "list": ["x"]} for n in range(2)]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises((ValueError, TypeError), match=message):
        load(path, **settings)


@pytest.mark.parametrize("name", ["someone/reviews", "a.parquet", "a.json"])
def test_a_package_that_is_missing(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.parquet", "PAR1")
    written(tmp_path / "a.json", "[]")
    with pytest.raises(ImportError, match=r"`data.prompts` needs .*pip install datasets\."):
        load(name)


# Text for a pretraining loss


def pretraining(tmp_path, texts=("a film", "", " ", "b", "the film was bad again"), **settings):
    path = written(tmp_path / "a.jsonl", json_lines(texts))
    seed = settings.pop("seed", 0)
    config = PretrainingConfig(text=str(path), **{"tokens": 3} | settings)
    return PretrainingText(config, TOKENIZER, seed=seed)


def test_rows_are_cut_from_the_texts_joined_by_eos_each_once_a_turn(tmp_path):
    ids = [
        token
        for text in ("a film", "b", "the film was bad again")
        for token in [*tokens(text), TOKENIZER.eos_token_id]
    ]
    expected = sorted(ids[at : at + 3] for at in range(0, len(ids) - 2, 3))
    rows = pretraining(tmp_path)
    assert len(rows) == len(expected) > 2
    for _ in range(3):
        turn = rows(1) + rows(len(rows) - 1)
        assert sorted(row.tolist() for row in turn) == expected
        assert all(row.dtype == torch.int64 for row in turn)
    assert len(rows(2 * len(rows) + 1)) == 2 * len(rows) + 1


@properties
@given(before=st.lists(st.integers(0, 30), max_size=4), seed=st.integers(0, 5))
def test_rows_go_on_where_they_stopped(tmp_path_factory, before, seed):
    folder = tmp_path_factory.mktemp("x")
    texts = ["one text"] * 5 + ["another film"] * 5
    rows, later = (pretraining(folder, texts, seed=seed) for _ in range(2))
    for n in before:
        rows(n)
    later.load_state_dict(json.loads(json.dumps(rows.state_dict())))
    assert torch.equal(torch.stack(rows(17)), torch.stack(later(17)))
    assert rows.state_dict() == later.state_dict()


def test_the_order_of_rows_follows_the_seed_and_the_turn(tmp_path):
    texts = [str(n) for n in range(100)]
    first, again, other = (pretraining(tmp_path, texts, seed=seed) for seed in (0, 0, 1))
    size = len(first)
    turns = [torch.stack(rows(size)) for rows in (first, again, other)]
    assert torch.equal(turns[0], turns[1])
    assert not torch.equal(turns[0], turns[2])
    assert not torch.equal(turns[0], torch.stack(first(size)))


def test_what_is_wrong_with_a_pretraining_text(tmp_path):
    with pytest.raises(ValueError, match=r"`pretraining.tokens` must be at most the 8 .*got 1000"):
        pretraining(tmp_path, texts=["b"] * 4 + [""], tokens=1000)
    with pytest.raises(ValueError, match=r"`pretraining.tokens` must be at most the 0 tokens"):
        pretraining(tmp_path, texts=[""])
    with pytest.raises(ValueError, match=r"`pretraining.column` must name a column, got 'm'"):
        pretraining(tmp_path, column="m")
    with pytest.raises(TypeError, match=r"column 'id' of each row, got 0 in line 1"):
        pretraining(tmp_path, column="id")
    with pytest.raises(ValueError, match="without an EOS token"):
        PretrainingText(PretrainingConfig(text="a.txt"), byte_level(eos_token=None), seed=0)
    state = pretraining(tmp_path).state_dict()
    with pytest.raises(ValueError, match=r"the saved state, whose seed is 0, got 1"):
        pretraining(tmp_path, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="whose checksum is"):
        pretraining(tmp_path, texts=["a film", "c", "the film was bad again"]).load_state_dict(
            state
        )


# Real reviews

IMDB = SHARED / "data" / "imdb" / "train.jsonl.gz"


@pytest.fixture
def reviews(shared):
    """The first lines of the reviews of IMDB."""
    with gzip.open(IMDB, "rt", encoding="utf-8") as lines:
        return list(itertools.islice(lines, 6_000))


def test_real_reviews_are_cut_as_in_2020(reviews, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(reviews).encode(), 1))
    split = load(path, cut_tokens=(2, 8), held_out=256)
    assert len(split.held_out) == 256
    assert len(split.train) > 5_000
    assert split.left_out["not the same tokens when encoded again"] < 6
    total = len(split.train) + 256 + sum(split.left_out.values())
    assert total == 6_000
    sizes = [len(row) for row in TOKENIZER(split.train, add_special_tokens=False)["input_ids"]]
    assert set(sizes) == set(range(2, 9))
    # Beginning to be equal at the first tokens is what short ones do.
    assert sizes.count(8) == pytest.approx(6_000 / 7, rel=0.05)
    beginnings = {json.loads(line)["text"][:200] for line in reviews}
    assert all(any(b.startswith(t) for b in beginnings) for t in split.held_out[:20])


def test_real_sentences_without_a_header(shared):
    path = SHARED / "data" / "sst2" / "dev.tsv"
    with pytest.raises(ValueError, match=r"`data.column` must name a column.*of cliches', '0'\."):
        load(path)


def test_rows_of_real_reviews(reviews, tmp_path):
    path = written(tmp_path / "some.jsonl", "".join(reviews[:300]))
    rows = PretrainingText(PretrainingConfig(text=str(path), tokens=64), TOKENIZER, seed=0)
    assert len(rows) > 1000
    text = TOKENIZER.decode(torch.cat(rows(50)))
    assert text.count("<|endoftext|>") > 3
