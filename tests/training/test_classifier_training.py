"""Training a classifier on made-up reviews whose words give their label away."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from tests.training.runs import stop_after
from trl import config as settings
from trl import starter
from trl.config import SettingsError
from trl.config.recipe import ClassifierRecipe
from trl.evaluation.classifier import ClassifierScorer
from trl.training import supervised
from trl.training.checkpoints import CheckpointError
from trl.training.classifier import _label_index, piece, train_classifier
from trl.training.resume import VERSIONS
from trl.training.supervised import Examples

GOOD = "great wonderful superb charming brilliant".split()
BAD = "awful boring terrible stupid dreadful".split()
OTHER = "the film has a story with actors in some town and music by an old man".split()


def reviews(count, seed, *, words=12, verdict_at="anywhere"):
    """Rows of a text and a label; two words of each text tell the label."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        text = [rng.choice(OTHER) for _ in range(words)]
        for word in rng.choices((BAD, GOOD)[number % 2], k=2):
            place = rng.randrange(len(text)) if verdict_at == "anywhere" else len(text)
            text.insert(place, word)
        rows.append({"text": " ".join(text), "label": number % 2})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny model, and texts to train and to measure on."""
    folder = tmp_path_factory.mktemp("files")
    tiny_bert(folder / "tiny")
    write(folder / "train.jsonl", reviews(400, 0))
    rows = reviews(60, 1)
    rows[1]["label"] = 0  # a mistake in the test: its words say 1
    write(folder / "test.jsonl", rows)
    return folder


def recipe_of(files, out):
    """A classifier that is trained in about a second."""
    return ClassifierRecipe(
        model=str(files / "tiny"),
        train=str(files / "train.jsonl"),
        test=str(files / "test.jsonl"),
        epochs=4,
        batch_size=32,
        learning_rate=1e-2,
        max_length=32,
        opening_words=8,
        log_every=10,
        precision="fp32",
        out=str(out),
        quiet=True,
    )


@pytest.fixture
def recipe(files, tmp_path):
    return recipe_of(files, tmp_path / "run")


@pytest.fixture(scope="module")
def trained(files):
    """A run that several tests look at: its recipe, its summary, and what it tells."""
    recipe = recipe_of(files, files / "run")
    return recipe, train_classifier(recipe)


def tiny_bert(folder, *, labels=2):
    """A BERT that is saved with the starter's tokenizer."""
    config = BertConfig(
        vocab_size=8192,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=labels,
        initializer_range=0.1,  # with 0.02 it may take too long to begin to learn
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(starter.CLASSIFIER).save_pretrained(folder)
    return str(folder)


def lines(recipe):
    with open(f"{recipe.out}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def weights(out):
    return AutoModelForSequenceClassification.from_pretrained(f"{out}/classifier").state_dict()


# -- the whole of it -----------------------------------------------------------------------------


def test_it_learns_words_that_tell_the_label(trained):
    _, summary = trained
    assert summary["accuracy"] == 59 / 60
    assert summary["confusion"] == [[30, 1], [0, 29]]
    assert summary["loss"] < 0.3
    # 14 words with two that tell: P(none of them is in the first 8) is about 1/6
    assert 0.75 < summary["opening_accuracy"] < 1
    assert sum(map(sum, summary["opening_confusion"])) == 60
    assert (summary["train_texts"], summary["test_texts"]) == (400, 60)
    assert summary["steps"] == 50
    assert 0 < summary["train_seconds"] < summary["seconds"]


def test_the_folder_holds_what_was_done(trained):
    recipe, summary = trained
    assert json.loads(Path(recipe.out, "summary.json").read_text()) == summary
    again = settings.build(ClassifierRecipe, settings.read_yaml(f"{recipe.out}/recipe.yaml"))
    assert again == recipe
    rows = lines(recipe)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    assert rows[-1]["epoch"] == 4
    assert rows[-1]["loss"] < 0.2 < 0.5 < rows[0]["loss"] < 1
    assert rows[-1]["accuracy"] > 0.95
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert summary["tokens"] == rows[-1]["tokens"]


def test_the_classifier_loads_as_a_scorer_and_in_transformers(trained):
    recipe, summary = trained
    folder = f"{recipe.out}/classifier"
    scorer = ClassifierScorer(folder, label="POSITIVE")
    good, bad = scorer(["a superb charming film", "a boring terrible film"])
    assert good > 1
    assert bad < -1
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    # What is measured is what the saved classifier answers.
    rows = [json.loads(line) for line in Path(recipe.test).read_text().splitlines()]
    right = 0
    for row in rows:
        ids = tokenizer(" ".join(row["text"].split()[:8]), return_tensors="pt")
        right += int(model(**ids).logits.argmax() == row["label"])
    assert right / len(rows) == summary["opening_accuracy"]


def test_the_same_seed_gives_the_same_classifier(recipe, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(runs))  # the caller's random numbers do not count
        out = str(tmp_path / name)
        part = replace(recipe, epochs=0.5, crop_words=(2, 8), dropout=0.1, seed=seed, out=out)
        before = torch.get_rng_state()
        train_classifier(part)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(weights(out))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_pieces_teach_it_to_judge_short_texts(recipe, tmp_path):
    """The verdict is at the end of each text, where openings do not have it: pieces do."""
    train = reviews(400, 0, words=24, verdict_at="end")
    test = [{"text": " ".join(row["text"].split()[-4:]), "label": row["label"]} for row in train]
    recipe = replace(
        recipe,
        train=write(tmp_path / "late.jsonl", train),
        test=write(tmp_path / "ends.jsonl", test),
        max_length=20,
    )
    whole = train_classifier(replace(recipe, out=str(tmp_path / "whole")))
    # Of 20 pieces one has a word of the verdict.
    recipe = replace(recipe, crop_words=(3, 12), epochs=10, learning_rate=6e-3)
    cut = train_classifier(replace(recipe, out=str(tmp_path / "cut")))
    assert whole["accuracy"] < 0.8  # its texts were cut before the verdict
    assert cut["accuracy"] > 0.95


def test_the_end_of_a_long_text_may_be_read_in_place_of_its_middle(recipe, tmp_path):
    """The verdict is at the end of each text, behind what 20 tokens read from its start."""
    recipe = replace(
        recipe,
        train=write(tmp_path / "late.jsonl", reviews(400, 0, words=24, verdict_at="end")),
        test=write(tmp_path / "others.jsonl", reviews(60, 1, words=24, verdict_at="end")),
        max_length=20,
        head_share=0.25,
        out=str(tmp_path / "ends"),
    )
    ends = train_classifier(recipe)
    whole = replace(recipe, head_share=1.0, epochs=0.1, out=str(tmp_path / "starts"))
    starts = train_classifier(whole)
    assert ends["accuracy"] > 0.95
    rows = [json.loads(line) for line in Path(recipe.test).read_text().splitlines()]
    texts, labels = [row["text"] for row in rows], torch.tensor([row["label"] for row in rows])
    for summary, folder in ((ends, tmp_path / "ends"), (starts, tmp_path / "starts")):
        # The saved classifier cuts texts in the same way.
        scorer = ClassifierScorer(folder / "classifier", output="log_odds")
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scorer(texts), labels.float())
        assert loss.item() == pytest.approx(summary["loss"], rel=1e-3)
    # Without the cut that training left on its tokenizer.
    saved = json.loads((tmp_path / "ends" / "classifier" / "tokenizer.json").read_text())
    assert saved["truncation"] is None
    # But a caller may have it read more, up to what the model can take.
    more = ClassifierScorer(folder / "classifier", output="log_odds", max_length=40)
    assert not torch.allclose(more(texts), scorer(texts))


def test_texts_in_both_files_are_not_trained_on(recipe, tmp_path):
    train, test = reviews(40, 0), reviews(10, 1)
    copies = [{**row, "text": row["text"].replace(" ", "<br />  ", 1)} for row in test[:4]]
    recipe = replace(
        recipe,
        train=write(tmp_path / "a.jsonl", train + copies),
        test=write(tmp_path / "b.jsonl", test),
        epochs=0.1,
    )
    summary = train_classifier(recipe)
    assert (summary["dropped_duplicates"], summary["train_texts"]) == (4, 40)


def test_limits_draw_texts_of_all_labels(recipe, tmp_path):
    by_label = sorted(reviews(200, 0), key=lambda row: row["label"])
    source = write(tmp_path / "sorted.jsonl", by_label)
    recipe = replace(recipe, train=source, limit=50, test_limit=20, epochs=0.1)
    summary = train_classifier(recipe)
    assert (summary["train_texts"], summary["test_texts"]) == (50, 20)


# -- other models, other labels ------------------------------------------------------------------


def test_a_model_with_another_head_gets_a_new_one(recipe, tmp_path):
    folder = tiny_bert(tmp_path / "bert", labels=5)
    old = BertForSequenceClassification.from_pretrained(folder)
    out = str(tmp_path / "out")
    train_classifier(replace(recipe, model=folder, epochs=0.1, learning_rate=1e-9, out=out))
    new = weights(out)
    assert new["classifier.weight"].shape == (2, 32)
    for name, weight in old.bert.state_dict().items():
        torch.testing.assert_close(new[f"bert.{name}"], weight, rtol=0, atol=1e-6)


def test_a_language_model_without_padding_can_become_one(recipe, tmp_path):
    config = GPT2Config(
        vocab_size=8192,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    train_classifier(replace(recipe, model=str(tmp_path / "gpt2"), epochs=0.1))
    scores = ClassifierScorer(f"{recipe.out}/classifier")(["a film", "a superb and long film"])
    assert scores.shape == (2,)


def test_three_labels_by_name(recipe, tmp_path):
    names = ["sad", "calm", "glad"]
    rows = [
        {
            "body": f"the film is {names[i % 3]} {random.Random(i).choice(OTHER)}",
            "mood": names[i % 3],
        }
        for i in range(300)
    ]
    recipe = replace(
        recipe,
        train=write(tmp_path / "a.jsonl", rows[:240]),
        test=write(tmp_path / "b.jsonl", [{**row, "mood": row["mood"].upper()} for row in rows]),
        text_column="body",
        label_column="mood",
        labels=("sad", "calm", "glad"),
        epochs=6,
    )
    with pytest.raises(ValueError, match="`train` must have texts that `test` does not have"):
        train_classifier(recipe)
    test = [{"body": row["body"] + " now", "mood": row["mood"].upper()} for row in rows[240:]]
    recipe = replace(
        recipe, test=write(tmp_path / "c.jsonl", test), out=str(tmp_path / "other run")
    )
    summary = train_classifier(recipe)
    assert summary["confusion"] == [[20, 0, 0], [0, 20, 0], [0, 0, 20]]
    scorer = ClassifierScorer(f"{recipe.out}/classifier", label="glad")
    assert scorer(["the film is glad"]) > scorer(["the film is sad"])


def test_bf16_trains_too_and_leaves_no_trace_of_how(recipe):
    summary = train_classifier(replace(recipe, precision="bf16"))
    assert summary["precision"] == "bf16"
    assert summary["accuracy"] > 0.95
    config = json.loads(Path(recipe.out, "classifier/config.json").read_text())
    assert config["dtype"] == "float32"
    assert not [name for name in config if "attn" in name]


def test_dropout_is_that_of_the_recipe(recipe, tmp_path, monkeypatch):
    seen = []
    compute_loss = supervised.Fit.compute_loss

    def look(self, model, *inputs, **how):
        drops = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        seen.append({(module.p, module.training) for module in drops})
        return compute_loss(self, model, *inputs, **how)

    monkeypatch.setattr(supervised.Fit, "compute_loss", look)
    train_classifier(replace(recipe, epochs=0.1, dropout=0.25))
    assert seen[0] == {(0.25, True)}
    assert seen[-1] == {(0.25, False)}  # where it is measured
    train_classifier(replace(recipe, epochs=0.1, out=str(tmp_path / "none")))
    assert seen[-1] == {(0.0, False)}


# -- parts ---------------------------------------------------------------------------------------


def test_pieces_are_runs_of_words_of_the_wanted_length():
    text = " ".join(map(str, range(100)))
    rng = random.Random(0)
    drawn = [piece(text, (4, 64), rng).split() for _ in range(2000)]
    assert all(p == [str(i) for i in range(int(p[0]), int(p[0]) + len(p))] for p in drawn)
    sizes = [len(one) for one in drawn]
    assert (min(sizes), max(sizes)) == (4, 64)
    # Log-uniform: as many between 4 and 16 as between 16 and 64.
    assert 900 < sum(size <= 16 for size in sizes) < 1100
    assert drawn[0] != drawn[1]
    assert {"0", "99"} <= {word for one in drawn for word in one}


def test_a_text_shorter_than_the_piece_is_its_own_piece():
    rng = random.Random(0)
    assert [piece(text, (5, 9), rng) for text in ("just two", "one")] == ["just two", "one"]
    assert piece("as  it is", None, rng) == "as  it is"


def lengths_and_labels(rows, rng):
    """Examples of a length and a random number, in place of texts."""
    return [{"input_ids": [0] * row, "labels": row, "drawn": rng.random()} for row in rows]


def test_a_pass_has_every_text_once_in_full_updates_of_like_length():
    recipe = ClassifierRecipe(epochs=1.6, batch_size=4)
    examples = Examples(range(1, 21), lengths_and_labels, recipe)
    assert (examples.steps, len(examples)) == (8, 32)
    made = [[examples[4 * step + i]["labels"] for i in range(4)] for step in range(8)]
    drawn = [label for lengths in made for label in lengths]
    counts = [drawn.count(label) for label in range(1, 21)]
    assert set(counts) == {1, 2}  # one pass, and 12 texts of the next
    assert all(lengths == sorted(lengths, reverse=True) for lengths in made)
    assert max(max(lengths) - min(lengths) for lengths in made) < 8  # of lengths from 1 to 20
    starts = [lengths[0] for lengths in made]
    assert starts != sorted(starts, reverse=True)


def test_any_example_is_made_without_those_before():
    recipe = ClassifierRecipe(epochs=30, batch_size=4)  # more than one pool
    rows = range(1, 21)
    examples = Examples(rows, lengths_and_labels, recipe)
    in_order = [examples[i] for i in range(len(examples))]
    last = Examples(rows, lengths_and_labels, recipe)[len(examples) - 1]
    assert last == in_order[-1]
    assert sorted(one["labels"] for one in in_order) == sorted([*rows] * 30)
    assert len({one["drawn"] for one in in_order}) == len(examples)  # each pass draws anew
    others = Examples(rows, lengths_and_labels, replace(recipe, seed=1))
    assert [others[i] for i in range(20)] != in_order[:20]


# -- what goes wrong -----------------------------------------------------------------------------


def change(recipe, tmp_path, row):
    rows = reviews(8, 0)
    rows[5] = {**rows[5], **row}
    return replace(recipe, train=write(tmp_path / "bad.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 2}, "`train` must have one of 0 to 1 .* 'label' .* got 2 in line 6 of .*bad"),
        ({"label": -1}, "got -1 in line 6"),
        ({"label": 0.5}, "got 0.5 in line 6"),
        ({"label": "POSITIV"}, "got 'POSITIV' in line 6"),
        ({"label": None}, "got None in line 6"),
        ({"text": " <br /> "}, "at least one word in column 'text' .* none in line 6"),
        ({"text": None}, "`train` must have a text .* in column 'text' .* None in line 6"),
    ],
)
def test_bad_rows_are_named(recipe, tmp_path, row, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train_classifier(change(recipe, tmp_path, row))
    assert not (tmp_path / "run/recipe.yaml").exists()


@pytest.mark.parametrize("label", [1, 1.0, "1", " positive ", True])
def test_labels_may_be_written_in_many_ways(label):
    assert _label_index(label, ClassifierRecipe()) == 1


def test_missing_columns_are_named_with_those_there(recipe):
    with pytest.raises(
        ValueError, match=r"`text_column` .* got 'texts'.*label.*Did you mean `text`"
    ):
        train_classifier(replace(recipe, text_column="texts"))
    with pytest.raises(ValueError, match=r"`label_column` must name a column, got .*train.jsonl"):
        train_classifier(replace(recipe, label_column="stars"))


def test_a_label_without_texts_is_an_error(recipe):
    with pytest.raises(ValueError, match=r"every label, .* has none of \['MIXED'\]"):
        train_classifier(replace(recipe, labels=("NEGATIVE", "POSITIVE", "MIXED")))


def test_missing_files_and_models_are_named(recipe, tmp_path):
    for field in ("train", "test"):
        with pytest.raises(OSError, match="gone.jsonl"):
            train_classifier(replace(recipe, **{field: str(tmp_path / "gone.jsonl")}))
    for model in (str(tmp_path / "no model"), "./no", "nobody/nothing"):
        with pytest.raises(OSError, match=f"`model` must be a folder .* got '{model}': it could"):
            train_classifier(replace(recipe, model=model))
    with pytest.raises(ValueError, match=r"`test` must name .* got None: add --test"):
        train_classifier(replace(recipe, test=None))


def test_the_folder_of_the_run_is_checked_first(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    gone = str(tmp_path / "gone.jsonl")
    with pytest.raises(OSError, match="`out` must be a folder that can be written"):
        train_classifier(replace(recipe, train=gone, out=str(tmp_path / "file/run")))
    train_classifier(replace(recipe, epochs=0.1))
    with pytest.raises(FileExistsError, match="`out` must be a folder without a run"):
        train_classifier(replace(recipe, train=gone))


def test_a_text_may_not_be_longer_than_the_model_reads(recipe, tmp_path):
    with pytest.raises(ValueError, match="`max_length` must be at most 40"):
        train_classifier(replace(recipe, model=tiny_bert(tmp_path / "bert"), max_length=64))


def test_a_loss_that_is_not_finite_ends_it(recipe):
    with pytest.raises(ArithmeticError, match="lower `learning_rate`"):
        train_classifier(replace(recipe, learning_rate=1e30))


def test_after_ctrl_c_it_goes_on_to_the_same_weights(recipe, tmp_path, monkeypatch, capsys):
    recipe = replace(recipe, crop_words=(2, 8), dropout=0.2)
    never_stopped = train_classifier(replace(recipe, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, 12, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_classifier(recipe)
    shown = " ".join(capsys.readouterr().err.split())
    assert f"Stopped after step 13 of 50. Go on with: trl train {recipe.out} --resume" in shown
    assert [row["step"] for row in lines(recipe)] == [10, 13]
    assert not Path(recipe.out, "classifier").exists()

    with pytest.raises(FileExistsError, match="add --resume"):
        train_classifier(recipe)
    again = r"`seed` must be as in the run so far .*, 0, .* got 1\. Set"
    with pytest.raises(ValueError, match=again):
        train_classifier(replace(recipe, seed=1), resume=True)
    summary = train_classifier(recipe, resume=True)
    first, second = weights(tmp_path / "whole"), weights(recipe.out)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = lines(recipe)
    assert [row["step"] for row in rows] == [10, 13, 20, 30, 40, 50]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    for name in ("loss", "accuracy", "opening_loss", "tokens", "steps"):
        assert summary[name] == never_stopped[name]
    assert not Path(recipe.out, "checkpoints").exists()
    with pytest.raises(FileExistsError, match="without a run: name another"):
        train_classifier(recipe, resume=True)  # it is complete


def test_after_a_kill_it_goes_on_from_the_last_whole_checkpoint(recipe, trained, monkeypatch):
    _, never_stopped = trained

    def die():
        raise MemoryError

    with monkeypatch.context() as patch:
        stop_after(patch, 33, die)
        with pytest.raises(MemoryError):
            train_classifier(recipe)
    assert [row["step"] for row in lines(recipe)] == [10, 20, 30]
    checkpoints = Path(recipe.out, "checkpoints")
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-30"]
    (checkpoints / "checkpoint-35").mkdir()  # was being written
    path = Path(recipe.out, "metrics.jsonl")
    path.write_text(path.read_text() + '{"step": 33, "seconds": 1e9}\n')
    summary = train_classifier(recipe, resume=True)
    assert [row["step"] for row in lines(recipe)] == [10, 20, 30, 40, 50]
    assert summary["loss"] == never_stopped["loss"]
    assert summary["train_seconds"] < 1e6


def other_weights(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "tiny")
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(1.1)
    model.save_pretrained(folder / "tiny")


def other_tokenizer(folder):
    file = folder / "tiny" / "tokenizer.json"
    file.write_text(file.read_text().replace('"lowercase":true', '"lowercase":false'))
    file.write_text(file.read_text().replace('"lowercase": true', '"lowercase": false'))


def other_text(folder):
    file = folder / "train.jsonl"
    file.write_text(file.read_text().replace("film", "play", 1))


def other_label(folder):
    file = folder / "test.jsonl"
    file.write_text(file.read_text().replace('"label": 0', '"label": 1', 1))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (other_weights, "with another model"),
        (other_tokenizer, "with another tokenizer"),
        (other_text, "with another text or label in `train` or `test`"),
        (other_label, "with another text or label in `train` or `test`"),
    ],
)
def test_another_fit_is_refused_by_name(files, tmp_path, monkeypatch, capsys, harm, words):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    recipe = replace(recipe_of(tmp_path, tmp_path / "run-1"), epochs=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_classifier(recipe)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        train_classifier(recipe, resume=True)
    assert "checkpoint-3 is of a fit" in str(caught.value)
    assert "Bring back what it was, or start another run" in str(caught.value)


def test_versions_of_a_fit_and_one_of_an_older_trl_are_told(recipe, monkeypatch, capsys):
    recipe = replace(recipe, epochs=1, quiet=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_classifier(recipe)
    monkeypatch.setitem(VERSIONS, "torch", "9.9")
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_classifier(recipe, resume=True)
    assert ", now 9.9: numbers may round otherwise" in " ".join(capsys.readouterr().out.split())
    (newest,) = Path(recipe.out, "checkpoints").iterdir()
    (newest / "made_of.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"made_of.json is damaged .* delete .*checkpoint-"):
        train_classifier(recipe, resume=True)
    (newest / "made_of.json").unlink()
    train_classifier(recipe, resume=True)
    assert "is of an older trl: what it is of" in " ".join(capsys.readouterr().out.split())


def test_resume_without_a_checkpoint_starts(recipe):
    Path(recipe.out).mkdir()
    Path(recipe.out, "metrics.jsonl").write_text('{"step": 3, "seconds": 1}\n')
    train_classifier(replace(recipe, epochs=1), resume=True)
    assert [row["step"] for row in lines(recipe)] == [10, 13]


def test_it_is_quiet_or_tells_what_it_does(recipe, tmp_path, capsys):
    train_classifier(replace(recipe, epochs=0.5))
    assert capsys.readouterr() == ("", "")
    train_classifier(replace(recipe, epochs=0.5, quiet=False, out=str(tmp_path / "loud")))
    shown = " ".join(capsys.readouterr().out.split())
    assert "0.3M parameters, precision fp32: 400 texts to train on, 7 steps" in shown
    assert "step 7/7 · loss" in shown
    assert " · accuracy 0." in shown
    assert "opening_accuracy 0." in shown
    assert "loud/classifier" in shown


def test_settings_that_cannot_be_are_all_named():
    with pytest.raises(SettingsError) as caught:
        ClassifierRecipe(labels=("A",), dropout=1.0, test_limit=0, log_every=0, subset="")
    assert len(caught.value.found) == 4
    with pytest.raises(SettingsError, match="at least two labels"):
        ClassifierRecipe(labels=("A",))
    with pytest.raises(SettingsError, match="differ"):
        ClassifierRecipe(labels=("good", "Good"))


# -- more than one process -----------------------------------------------------------------------


TWO = """
import os, sys
from trl import config as settings
from trl.config.recipe import ClassifierRecipe
from trl.training.classifier import train_classifier

recipe = settings.build(ClassifierRecipe, settings.read_yaml(sys.argv[1]))
second = os.fork()  # what takes seconds to import is there already
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if second else "1"
train_classifier(recipe)
if second:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_the_classifier_of_one(recipe, tmp_path, monkeypatch):
    small = replace(recipe, epochs=0.5, crop_words=(3, 12), learning_rate=1e-3)
    small = replace(small, out=str(tmp_path / "of 2"))
    (tmp_path / "recipe.yaml").write_text(settings.dump(small))
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    started = subprocess.Popen(
        [sys.executable, "-c", TWO, "recipe.yaml"],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(Path(supervised.__file__).parents[2]),
            "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    alone = replace(small, out=str(tmp_path / "of 1"))
    one, rows = train_classifier(alone), lines(alone)
    _, problem = started.communicate(timeout=300)
    assert started.returncode == 0, problem
    two, other_rows = json.loads(Path(small.out, "summary.json").read_text()), lines(small)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(rows) == len(other_rows) == 1
    assert rows[0]["loss"] == pytest.approx(other_rows[0]["loss"], rel=1e-4)
    assert rows[0]["accuracy"] == pytest.approx(other_rows[0]["accuracy"], abs=0.01)
    assert sum(map(sum, two["confusion"])) == 60
    for name in ("loss", "opening_loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-3)


def test_no_second_run_goes_into_the_folder_of_one(recipe, monkeypatch):
    seen = []

    def and_again(self):
        with pytest.raises(BlockingIOError, match="no process is at work, as one is now"):
            train_classifier(recipe, resume=True)
        seen.append(self)

    monkeypatch.setattr(supervised.Fit, "_learn", and_again)
    train_classifier(recipe)
    assert len(seen) == 1


# -- real reviews --------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_reviews_are_learnt_from(recipe, shared):
    folder = shared / "data/imdb"
    if not folder.is_dir():
        pytest.skip("the reviews are not here")
    recipe = replace(
        recipe,
        model="starter",
        train=str(folder / "train.jsonl.gz"),
        test=str(folder / "test.jsonl.gz"),
        limit=6000,
        test_limit=300,
        epochs=3,
        batch_size=32,
        learning_rate=1e-3,
        crop_words=(20, 60),
        max_length=64,
        opening_words=25,
    )
    summary = train_classifier(recipe)
    assert summary["dropped_duplicates"] == 123
    assert summary["accuracy"] > 0.6
