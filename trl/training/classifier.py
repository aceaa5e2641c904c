"""Train a text classifier of transformers, to score texts with.

    trl train recipes/imdb-classifier-starter.yaml --train reviews.jsonl --test others.jsonl

The classifier learns from whole texts, or from random pieces of them (`crop_words`): one that is
to judge what a language model writes has to know how much a few words say. It is measured on whole
test texts and on their openings. A text longer than `max_length` tokens keeps `head_share` of them
from its start and the others from its end, also when a `ClassifierScorer` scores it later.

A `<br />`, as reviews of IMDB have them, counts as a space; a tokenizer that has it in its
normalizer reads the same. Training texts that stand among the test texts too are left out.

How it is fitted, shown and saved, and what the folder of the run holds, is in `supervised`; the
classifier is in its folder classifier/, which `ClassifierScorer` and plain transformers load.
"""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from trl import starter
from trl.config import closest
from trl.config.errors import refuse
from trl.config.recipe import STARTER, ClassifierRecipe, SupervisedRecipe
from trl.data.sources import checked_texts, listed, only_a_path, read_table
from trl.evaluation.sequence_model import token_limit, tokenize
from trl.models.loading import quiet_transformers
from trl.saved import CONFIG, damage_told
from trl.training.fingerprints import checksum, of_model, of_tokenizer
from trl.training.folder import RunFolder
from trl.training.parts import seeded
from trl.training.supervised import Example, Examples, Fit, open_folder

__all__ = ["model_and_tokenizer", "train_classifier"]

LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)

Row = tuple[str, int]
"""A text of at least one word, and the index of its label."""


def train_classifier(recipe: ClassifierRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Train a classifier as the recipe says, measure it, and write the folder of the run.

    Args:
        recipe: The settings.
        resume: Go on with the run in `out`, from its last checkpoint if there is one.

    Returns:
        What stands in summary.json: `accuracy` and `loss` on the test texts, cut as in training
        (by `max_length` and `head_share`, which are `text_cut` in the saved config.json);
        `opening_accuracy` and `opening_loss` on the first `opening_words` words of each;
        `confusion` and `opening_confusion`, a row for each true label and a column for each
        answer; and the sizes and seconds of the run.

    Raises:
        OSError: if a file or a model is not there, or `out` cannot be written or holds a run.
        ImportError: if the texts need a package that is not installed.
        TypeError, ValueError: if the texts, the model and the recipe do not fit together.
        CheckpointError: if the checkpoint is of another model, tokenizer or other texts.
        ArithmeticError: if the loss is not finite.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    with open_folder(recipe, resume=resume) as folder:
        return _train(recipe, folder)


def _train(recipe: ClassifierRecipe, folder: RunFolder) -> dict[str, Any]:
    """Train in a folder that is this run's."""
    train, test, dropped = _train_and_test(recipe)
    with seeded(recipe.seed):
        names = dict(enumerate(recipe.labels))
        head = {
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": "single_label_classification",
        }
        new = recipe.max_length if recipe.model == STARTER else None
        model, tokenizer = model_and_tokenizer(recipe, head, new)
        limit = token_limit(model, tokenizer, recipe.max_length)
        model.config.text_cut = {"max_length": limit, "head_share": recipe.head_share}

        def encode(rows: list[Row]) -> list[Example]:
            texts = [text for text, _ in rows]
            token_ids = tokenize(tokenizer, texts, max_length=limit, head_share=recipe.head_share)
            labels = [label for _, label in rows]
            return [{"input_ids": i, "labels": x} for i, x in zip(token_ids, labels, strict=True)]

        def pieces(rows: list[Row], rng: random.Random) -> list[Example]:
            return encode([(piece(text, recipe.crop_words, rng), label) for text, label in rows])

        openings = [(" ".join(text.split()[: recipe.opening_words]), label) for text, label in test]
        made_of = {
            "model (its weights or its config.json)": of_model(model, model.named_parameters()),
            "tokenizer": of_tokenizer(tokenizer),
            "text or label in `train` or `test`": checksum([train, test]),
        }
        fit = Fit(recipe, folder, model, tokenizer, Examples(train, pieces, recipe), made_of)
        return fit(
            {"": lambda: encode(test), "opening_": lambda: encode(openings)},
            {
                "labels": list(recipe.labels),
                "opening_words": recipe.opening_words,
                "train_texts": len(train),
                "test_texts": len(test),
                "dropped_duplicates": dropped,
            },
        )


def piece(text: str, words: tuple[int, int] | None, rng: random.Random) -> str:
    """Return a random piece of a text, or the text itself if there is no number of words.

    The number is drawn between the two ends so that its logarithm is uniform: short pieces, which
    say little each, come up most. A shorter text is its own piece.
    """
    if words is None:
        return text
    whole = text.split()
    size = round(math.exp(rng.uniform(*map(math.log, words))))
    first = rng.randint(0, max(0, len(whole) - size))
    return " ".join(whole[first : first + size])


# What the recipe names


def model_and_tokenizer(
    recipe: SupervisedRecipe, head: dict[str, Any], new: int | None = None
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Return the classifier in float32, its head new unless it fits; and what it reads.

    Args:
        recipe: Names it.
        head: What its configuration is to say; what it does not know is left out.
        new: Make a new one of that configuration, which reads so many tokens.
    """
    by_name = str(Path(recipe.model).expanduser())
    source = str(starter.CLASSIFIER) if recipe.model == STARTER else by_name
    try:
        folder = Path(source) if Path(source).is_dir() else None
        plain = {"trust_remote_code": False}
        with quiet_transformers(), damage_told(folder, CONFIG):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **plain)
            config = transformers.AutoConfig.from_pretrained(source, **head | plain)
            if new is not None:
                config.max_position_embeddings = tokenizer.model_max_length = new
                model = transformers.AutoModelForSequenceClassification.from_config(config)
            else:
                model = transformers.AutoModelForSequenceClassification.from_pretrained(
                    source,
                    config=config,
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    use_safetensors=True,  # pickles can run code
                    **plain,
                )
    except (OSError, ValueError) as error:
        rule = "be a folder or a name of the hub that has a text model with its tokenizer"
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        fix = f"it could not be loaded ({reason}); without network take a folder, or {STARTER!r}"
        refuse("model", rule, repr(recipe.model), fix, error=OSError)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"  # where it moves no position
    model.config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules() if recipe.dropout is not None else ():
        if isinstance(module, nn.Dropout):
            module.p = recipe.dropout
    return model, tokenizer


def _train_and_test(recipe: ClassifierRecipe) -> tuple[list[Row], list[Row], int]:
    """Return what to train on, what to measure on, and how many are in both and not trained on."""
    test_source, path = recipe.test, Path(recipe.train).expanduser()
    if test_source is None:
        if path.is_file() or (not path.is_dir() and only_a_path(recipe.train)):
            rule = f"name other texts to measure on if `train` is a file ({recipe.train})"
            refuse("test", rule, "None", "add --test FILE")
        test_source = f"{recipe.train.partition(':')[0]}:test"
    everything, test = _rows(recipe, "train", recipe.train), _rows(recipe, "test", test_source)
    known = {" ".join(text.split()) for text, _ in test}
    train = [(text, label) for text, label in everything if " ".join(text.split()) not in known]
    dropped = len(everything) - len(train)
    if not train:
        rule = f"have texts that `test` does not have, but all {dropped} of {recipe.train} are in"
        refuse("train", f"{rule} both", fix="name another file")
    train = _sample(train, recipe.limit, recipe.seed)
    missing = set(range(len(recipe.labels))) - {label for _, label in train}
    if missing:
        rule = f"have texts of every label, but {recipe.train} has none of "
        fix = f"correct `labels`, or raise `limit` (now {recipe.limit})"
        refuse("train", rule + f"{[recipe.labels[index] for index in missing]}", fix=fix)
    return train, _sample(test, recipe.test_limit, recipe.seed), dropped


def _rows(recipe: ClassifierRecipe, part: str, source: str) -> list[Row]:
    """Return the labelled texts of a source; `part`, train or test, is what errors call it."""
    table = read_table(source, subset=recipe.subset, name=part)
    for name in ("text_column", "label_column"):
        if (wanted := getattr(recipe, name)) not in table.names:
            fix = f"{listed(table)}.{closest(wanted, table.names)}".rstrip(".")
            refuse(name, "name a column", repr(wanted), fix)
    texts = [LINE_BREAK.sub(" ", text) for text in checked_texts(table, recipe.text_column, part)]
    labels = [_label_index(label, recipe) for label in table.column(recipe.label_column)]
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not text.strip():
            rule = f"have at least one word in column {recipe.text_column!r} of each row"
            refuse(part, rule, f"none in {table.place(row)}", "leave that row out")
        if label is None:
            rule = (
                f"have one of 0 to {len(recipe.labels) - 1} or of {list(recipe.labels)} in column "
            )
            got = f"{table.column(recipe.label_column)[row]!r} in {table.place(row)}"
            fix = "leave that row out, or name all labels in `labels`"
            refuse(part, rule + f"{recipe.label_column!r} of each row", got, fix)
    return list(zip(texts, labels, strict=True))


def _label_index(value: object, recipe: ClassifierRecipe) -> int | None:
    """Return the index of a label that is written as a number or a name; None: there is none."""
    names = [name.lower() for name in recipe.labels]
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    text = str(value).strip().lower() if isinstance(value, int | str) else ""
    if text in names:
        return names.index(text)
    return int(text) if text.isdecimal() and int(text) < len(names) else None


def _sample(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """Return at most so many rows, drawn at random: files are often sorted by label."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
