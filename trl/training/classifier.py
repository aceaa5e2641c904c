"""Train a text classifier of transformers, to score texts with.

    trl train recipes/imdb-classifier-starter.yaml --train reviews.jsonl --test others.jsonl

The classifier learns from whole texts, or from random pieces of them (`crop_words`): one that is
to judge what a language model writes has to know how much a few words say. It is measured on whole
test texts and on their openings.

A `<br />`, as reviews of IMDB have them, counts as a space; a tokenizer that has it in its
normalizer reads the same. Training texts that stand among the test texts too are left out.

The folder of the run holds recipe.yaml, metrics.jsonl (a line now and then), summary.json
(accuracies, confusion, seconds) and classifier/, which `ClassifierScorer` and plain transformers
load.
"""

from __future__ import annotations

import errno
import json
import math
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from trl import config as settings
from trl import starter
from trl.anatomy import accepts
from trl.compute.memory import keep_freed_memory
from trl.compute.precision import exit_after_gloo, make_accelerator
from trl.config import closest
from trl.config.recipe import STARTER, ClassifierRecipe
from trl.data.sources import checked_texts, only_a_path, read_table
from trl.evaluation.sequence_model import logits_of, token_limit, tokenize
from trl.training.checkpoints import replaced_folder
from trl.training.folder import RunFolder
from trl.training.parts import quiet_transformers, seeded

__all__ = ["train_classifier"]

LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
WARMUP = 0.1
"""Share of the run over which the learning rate rises."""
MAX_GRAD_NORM = 1.0
POOL = 50
"""Batches that are sorted by length together."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of at least one word each, and the index of the label of each."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, rows: Iterable[int]) -> Texts:
        """Return those of the given rows, in their order."""
        rows = list(rows)
        return Texts([self.texts[row] for row in rows], [self.labels[row] for row in rows])


def train_classifier(recipe: ClassifierRecipe) -> dict[str, Any]:
    """Train a classifier as the recipe says, measure it, and write the folder of the run.

    Returns:
        What stands in summary.json: `accuracy` and `loss` on the test texts, cut to `max_length`
        tokens; `opening_accuracy` and `opening_loss` on the first `opening_words` words of each;
        `confusion` and `opening_confusion`, a row for each true label and a column for each
        answer; and the sizes and seconds of the run.

    Raises:
        OSError: if a file or a model is not there, or `out` cannot be written or holds a run.
        ImportError: if the texts need a package that is not installed.
        TypeError, ValueError: if the texts, the model and the recipe do not fit together.
        ArithmeticError: if the loss is not finite.
    """
    started = time.perf_counter()
    accelerator = make_accelerator(recipe.precision)
    exit_after_gloo()
    main = accelerator.is_main_process
    console = _console(quiet=recipe.quiet or not main)
    local_batch = _local_batch(recipe, accelerator)
    folder = _folder(recipe)
    with _few_words():
        tokenizer = _tokenizer(recipe)
    train, test, dropped = _train_and_test(recipe)
    with seeded(recipe.seed):
        with _few_words():
            model = _model(recipe, tokenizer)
        limit = token_limit(model, tokenizer, recipe.max_length)
        accelerator.wait_for_everyone()  # all have seen that the folder holds no other run
        if main:
            folder.write("recipe.yaml", settings.dump(recipe))
        fit = Fit(recipe, accelerator, model, tokenizer, limit, len(train), local_batch)
        console.print(
            f"{type(model).__name__} of {model.num_parameters() / 1e6:.1f}M parameters, precision "
            f"{fit.precision}: {len(train):,} texts to train on ({dropped} left out that are in "
            f"the test too), {len(test):,} to test on, {fit.steps:,} steps."
        )
        try:
            with _progress(console, fit.steps) as show:
                for row in fit(train):
                    if main:
                        folder.add("metrics", row)
                    show(row)
            console.print(f"Measuring on {len(test):,} test texts.")
            full = fit.measure(test.texts, test.labels)
            openings = [" ".join(text.split()[: recipe.opening_words]) for text in test.texts]
            opening = fit.measure(openings, test.labels)
        except KeyboardInterrupt:
            if main:
                _console(stderr=True).print(
                    f"Stopped after step {fit.step} of {fit.steps}. The classifier is not saved, "
                    "and the run cannot be gone on with: start again, with another --out. The "
                    f"figures so far are in {folder.file('metrics')}."
                )
            raise
    summary = {
        **full.figures(),
        **{f"opening_{name}": figure for name, figure in opening.figures().items()},
        "labels": list(recipe.labels),
        "opening_words": recipe.opening_words,
        "train_texts": len(train),
        "test_texts": len(test),
        "dropped_duplicates": dropped,
        "parameters": model.num_parameters(),
        "precision": fit.precision,
        "steps": fit.steps,
        "tokens": fit.tokens,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "train_seconds": fit.seconds,
        "seconds": time.perf_counter() - started,
    }
    if main:
        with replaced_folder(folder.path / "classifier") as classifier, _few_words():
            model.save_pretrained(classifier)
            tokenizer.save_pretrained(classifier)
        folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(
        f"Accuracy {100 * full.accuracy:.1f} % on the test texts, {100 * opening.accuracy:.1f} % "
        f"on their first {recipe.opening_words} words; {summary['seconds'] / 60:.1f} minutes. The "
        f"classifier is in {folder.path / 'classifier'}."
    )
    return summary


# Texts


def pieces(
    texts: Sequence[str], crop_words: tuple[int, int] | None, rng: random.Random
) -> list[str]:
    """Return a random piece of each text, or the texts themselves if there is no `crop_words`.

    The number of words is drawn between the two ends so that its logarithm is uniform: short
    pieces, which say little each, come up most. A shorter text is its own piece.
    """
    if crop_words is None:
        return list(texts)
    least, most = crop_words
    cut = []
    for text in texts:
        words = text.split()
        size = round(math.exp(rng.uniform(math.log(least), math.log(most))))
        first = rng.randint(0, max(0, len(words) - size))
        cut.append(" ".join(words[first : first + size]))
    return cut


def batches(
    train: Texts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    steps: int,
    max_length: int | None,
    crop_words: tuple[int, int] | None,
    seed: int,
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Yield the token ids and labels of `steps` batches, each of texts of like length.

    All batches are full: the last texts of one pass over the data share theirs with the first of
    the next. Each pass shuffles anew; the pieces that `crop_words` asks for are new every time.
    """
    rng = random.Random(seed)

    def endless() -> Iterator[int]:
        while True:
            yield from rng.sample(range(len(train)), len(train))

    rows = endless()
    while steps:
        pool = train.only(islice(rows, min(POOL, steps) * batch_size))
        token_ids = tokenize(tokenizer, pieces(pool.texts, crop_words, rng), max_length=max_length)
        by_length = sorted(range(len(pool)), key=lambda row: len(token_ids[row]))
        starts = list(range(0, len(pool), batch_size))
        rng.shuffle(starts)
        for start in starts:
            batch = by_length[start : start + batch_size]
            yield [token_ids[row] for row in batch], [pool.labels[row] for row in batch]
        steps -= len(starts)


# Training


@dataclass(frozen=True, slots=True)
class Measured:
    """How a classifier did: texts by true label (rows) and answer (columns), and the mean loss."""

    confusion: list[list[int]]
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        right = sum(row[index] for index, row in enumerate(self.confusion))
        return right / sum(map(sum, self.confusion))

    def figures(self) -> dict[str, Any]:
        """Return what goes into the summary."""
        return {"accuracy": self.accuracy, "loss": self.loss, "confusion": self.confusion}


class Fit:
    """A model in training, and its measurement."""

    def __init__(
        self,
        recipe: ClassifierRecipe,
        accelerator: Accelerator,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        texts: int,
        local_batch: int,
    ) -> None:
        self.recipe, self.accelerator, self.tokenizer = recipe, accelerator, tokenizer
        self.max_length, self.local_batch = max_length, local_batch
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.steps = math.ceil(recipe.epochs * texts / recipe.batch_size)
        self.precision = accelerator.mixed_precision.replace("no", "fp32")
        if accelerator.device.type == "cpu":
            keep_freed_memory()
            if self.precision == "bf16":
                # The fused attention of torch is several times slower backwards there.
                model.set_attn_implementation("eager")
        self.own = model
        self.model = accelerator.prepare_model(model)
        matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
        others = [weight for weight in model.parameters() if weight.ndim < 2]
        self.optimizer = accelerator.prepare_optimizer(
            torch.optim.AdamW(
                [
                    {"params": matrices, "weight_decay": recipe.weight_decay},
                    {"params": others, "weight_decay": 0.0},
                ],
                lr=recipe.learning_rate,
                fused=True,
            )
        )

    def __call__(self, train: Texts) -> Iterator[dict[str, float]]:
        """Train; yield the mean figures of every `log_every` steps, and of the last few."""
        recipe, accelerator = self.recipe, self.accelerator
        data = batches(
            train,
            self.tokenizer,
            batch_size=recipe.batch_size,
            steps=self.steps,
            max_length=self.max_length,
            crop_words=recipe.crop_words,
            seed=recipe.seed,
        )
        self.own.train()
        sums, rows = torch.zeros(2, device=accelerator.device), 0  # loss, right answers
        started = time.perf_counter()
        for step, (token_ids, labels) in enumerate(data, start=1):
            rate = learning_rate(step, self.steps, recipe.learning_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            sums += self._update(token_ids, labels)
            rows += len(labels)
            self.step, self.tokens = step, self.tokens + sum(map(len, token_ids))
            self.seconds = time.perf_counter() - started
            if step % recipe.log_every == 0 or step == self.steps:
                loss, right = (accelerator.reduce(sums) / rows).tolist()
                if not math.isfinite(loss):
                    raise ArithmeticError(
                        f"The loss is {loss} at step {step}: lower `learning_rate` (now "
                        f"{recipe.learning_rate}), or set `precision` to fp32."
                    )
                yield {
                    "step": step,
                    "epoch": step * recipe.batch_size / len(train),
                    "loss": loss,
                    "accuracy": right,
                    "learning_rate": rate,
                    "tokens": self.tokens,
                    "seconds": self.seconds,
                }
                sums, rows = torch.zeros_like(sums), 0
        self.own.eval()

    def _update(self, token_ids: list[list[int]], labels: list[int]) -> Tensor:
        """Make one step on this process's share; return its summed loss and right answers."""
        accelerator = self.accelerator
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        inputs = self._inputs(token_ids[share])
        targets = torch.tensor(labels[share], device=accelerator.device)
        logits = self.model(**inputs).logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        # The mean over processes is what DDP makes of the gradient, and every share is equal.
        accelerator.backward(loss / len(targets))
        accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            return torch.stack([loss, (logits.argmax(1) == targets).sum()])

    def _inputs(self, token_ids: list[list[int]]) -> dict[str, Tensor]:
        """Pad on the right, where it moves no position."""
        rows = [torch.tensor(ids) for ids in token_ids]
        pad = self.own.config.get_text_config().pad_token_id
        inputs = {"input_ids": pad_sequence(rows, batch_first=True, padding_value=pad)}
        if accepts(self.own, "attention_mask"):
            inputs["attention_mask"] = pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True
            )
        return {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}

    def measure(self, texts: list[str], labels: list[int]) -> Measured:
        """Classify every text once, shared out among the processes."""
        accelerator = self.accelerator
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        classes = len(self.recipe.labels)
        confusion = torch.zeros(classes, classes)
        loss = torch.zeros(())
        if texts[share]:
            token_ids = tokenize(self.tokenizer, texts[share], max_length=self.max_length)
            logits = logits_of(self.own, token_ids, self.local_batch)
            targets = torch.tensor(labels[share])
            cells = targets * classes + logits.argmax(1)
            confusion = torch.bincount(cells, minlength=classes**2).view(classes, classes)
            loss = F.cross_entropy(logits, targets, reduction="sum")
        confusion = accelerator.reduce(confusion.long().to(accelerator.device))
        loss = accelerator.reduce(loss.to(accelerator.device))
        return Measured(confusion.tolist(), loss.item() / len(texts))


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Return the rate of step 1, 2, …: up in a line for a tenth of the run, then down to 0."""
    warmup = math.ceil(WARMUP * steps)
    return highest * min(step / warmup, (steps + 1 - step) / (steps + 1 - warmup))


# What the recipe names


def _local_batch(recipe: ClassifierRecipe, accelerator: Accelerator) -> int:
    """Return how many texts of a batch one process gets."""
    local, rest = divmod(recipe.batch_size, accelerator.num_processes)
    if rest or not local:
        raise ValueError(
            f"`batch_size` must be a multiple of the processes ({accelerator.num_processes}), got "
            f"{recipe.batch_size}."
        )
    return local


def _folder(recipe: ClassifierRecipe) -> RunFolder:
    """Return the folder of the run, which can be written and holds no other run."""
    folder = RunFolder(Path(recipe.out).expanduser())
    if folder.has_run():
        raise FileExistsError(
            errno.EEXIST,
            "`out` must be a folder without a run: name another one with --out",
            str(folder.path),
        )
    folder.start()
    return folder


def _tokenizer(recipe: ClassifierRecipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside the model, with a padding token."""
    if recipe.model == STARTER:
        return AutoTokenizer.from_pretrained(starter.CLASSIFIER, model_max_length=recipe.max_length)
    source = _checked_model(recipe.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _unloadable(recipe.model, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"`model` must have a tokenizer with a padding token or an EOS token, got "
                f"{recipe.model!r}, whose tokenizer has neither: set its pad_token and save it."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(recipe: ClassifierRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the classifier to train, in float32; its head is new unless it has these labels."""
    names = dict(enumerate(recipe.labels))
    head = {
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "problem_type": "single_label_classification",
        "pad_token_id": tokenizer.pad_token_id,
    }
    if recipe.model == STARTER:
        config = AutoConfig.from_pretrained(
            starter.CLASSIFIER, max_position_embeddings=recipe.max_length, **head
        )
        model = BertForSequenceClassification(config)
    else:
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                _checked_model(recipe.model),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                **head,
            )
        except (OSError, ValueError) as error:
            raise _unloadable(recipe.model, "model", error) from error
    if recipe.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = recipe.dropout
    return model


def _checked_model(name: str) -> str:
    """Return the folder or hub name that is written in the recipe, with ~ spelled out."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~"))):
        raise FileNotFoundError(
            f"`model` must be a folder, a name of the hub or {STARTER!r}, but the folder {name!r} "
            "does not exist."
        )
    return str(folder)


def _unloadable(name: str, what: str, error: Exception) -> OSError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return OSError(
        "`model` must be a folder or a name of the hub that has a text model with its tokenizer, "
        f"but the {what} of {name!r} could not be loaded: {reason}. Without network: a folder, or "
        f"{STARTER!r}."
    )


def _test_source(recipe: ClassifierRecipe) -> str:
    """Return what to measure on: by default the split test of what is trained on."""
    if recipe.test is not None:
        return recipe.test
    path = Path(recipe.train).expanduser()
    if path.is_file() or (not path.is_dir() and only_a_path(recipe.train)):
        raise ValueError(
            f"`test` must name other texts to measure on if `train` is a file ({recipe.train}), "
            "got None: add --test FILE."
        )
    return f"{recipe.train.partition(':')[0]}:test"


def _texts(recipe: ClassifierRecipe, part: str, source: str) -> Texts:
    """Return the labelled texts of a source; `part`, train or test, is what errors call it."""
    table = read_table(source, subset=recipe.subset, name=part)
    for name in ("text_column", "label_column"):
        wanted = getattr(recipe, name)
        if wanted not in table.names:
            raise ValueError(
                f"`{name}` must be a column of {table.source}, got {wanted!r}: it has "
                f"{', '.join(map(repr, table.names))}.{closest(wanted, table.names)}"
            )
    texts = [LINE_BREAK.sub(" ", text) for text in checked_texts(table, recipe.text_column, part)]
    names = [name.lower() for name in recipe.labels]
    labels = []
    for row, (text, label) in enumerate(zip(texts, table.column(recipe.label_column), strict=True)):
        if not text.strip():
            raise ValueError(
                f"`{part}` must have at least one word in column {recipe.text_column!r} of each "
                f"row, got none in {table.place(row)}: leave that row out."
            )
        index = _label_index(label, names)
        if index is None:
            raise ValueError(
                f"`{part}` must have one of 0 to {len(names) - 1} or of {list(recipe.labels)} in "
                f"column {recipe.label_column!r} of each row, got {label!r} in "
                f"{table.place(row)}: leave that row out, or name all labels in `labels`."
            )
        labels.append(index)
    return Texts(texts, labels)


def _label_index(value: object, names: list[str]) -> int | None:
    """Return the index of a label that is written as a number or a name; None: there is none."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in names:
            return names.index(text)
        value = int(text) if text.isdecimal() else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return int(value) if isinstance(value, int) and 0 <= value < len(names) else None


def _train_and_test(recipe: ClassifierRecipe) -> tuple[Texts, Texts, int]:
    """Return what to train on, what to measure on, and how many are in both and not trained on."""
    test_source = _test_source(recipe)
    train, test = _texts(recipe, "train", recipe.train), _texts(recipe, "test", test_source)
    known = {" ".join(text.split()) for text in test.texts}
    new = [row for row, text in enumerate(train.texts) if " ".join(text.split()) not in known]
    dropped = len(train) - len(new)
    if not new:
        raise ValueError(
            f"`train` must have texts that `test` does not have, but all {dropped} texts of "
            f"{recipe.train} are in both: name another file."
        )
    train = _sample(train.only(new), recipe.limit, recipe.seed)
    missing = [name for index, name in enumerate(recipe.labels) if index not in train.labels]
    if missing:
        raise ValueError(
            f"`train` must have texts of every label of {list(recipe.labels)}, but {recipe.train} "
            f"has none of {missing}: correct `labels`, or raise `limit` (now {recipe.limit})."
        )
    return train, _sample(test, recipe.test_limit, recipe.seed), dropped


def _sample(texts: Texts, limit: int | None, seed: int) -> Texts:
    """Return at most so many texts, drawn at random: files are often sorted by label."""
    if limit is None or limit >= len(texts):
        return texts
    return texts.only(sorted(random.Random(seed).sample(range(len(texts)), limit)))


# What is shown and written


def _console(*, quiet: bool = False, stderr: bool = False) -> Console:
    console = Console(quiet=quiet, stderr=stderr)
    if not console.is_terminal:
        console.width = 120
    return console


@contextmanager
def _few_words() -> Iterator[None]:
    """Keep the bars of transformers, and its list of new weights, off the screen."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with quiet_transformers():
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Any]:
    """Yield a function that shows a row of metrics: a live bar, or a line now and then in a log."""
    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=steps, figures="")
    shown = 0

    def show(row: dict[str, float]) -> None:
        nonlocal shown
        step = int(row["step"])
        figures = f"loss {row['loss']:.3f} · accuracy {100 * row['accuracy']:.1f} %"
        bar.update(task, completed=step, figures=figures)
        if not console.is_terminal and (step - shown >= steps / 15 or step == steps):
            shown = step
            left = row["seconds"] / step * (steps - step)
            console.print(f"step {step}/{steps} · {figures} · {left:.0f} s left")

    with bar:
        yield show
