"""A supervised fit: a classifier, or a model of rewards, learns by the `Trainer` of transformers.

Here stands the folder of the run, figures now and then, the display, checkpoints, going on after
Ctrl-C or a kill, and the measurement at the end; what is learnt from is handed in.

The folder holds recipe.yaml, metrics.jsonl (a line every `log_every` updates), summary.json, the
model in a folder that plain transformers loads and, until all of that is there, checkpoints/. A fit
that is gone on with ends with the same weights, bit for bit, as one that was never stopped (on the
same machine and versions).
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from trl import config as settings
from trl.compute.precision import exit_after_gloo, make_accelerator
from trl.config.errors import refuse
from trl.config.recipe import SupervisedRecipe
from trl.kernels.memory import give_back_memory, keep_freed_memory
from trl.models.loading import quiet_transformers
from trl.training.checkpoints import CheckpointError, remove, replaced_folder
from trl.training.folder import RunFolder
from trl.training.interrupt import GracefulStop
from trl.training.resume import VERSIONS, check_same, other_versions
from trl.watch.display import Display

Example = dict[str, Any]
"""The `input_ids` of a text, a list, and its label, `labels`."""

POOL = 50
"""Updates whose examples are sorted by length together, unless a pass has fewer."""

MADE_OF = "made_of.json"
"""Beside a checkpoint: fingerprints of what the fit is made of, and versions."""


class Examples(Dataset[Example]):
    """All examples of a fit in the order in which they are learnt from, update after update.

    Each pass over the rows is shuffled anew, and examples of like length share an update. All
    updates are full: the last rows of a pass share theirs with the first of the next. The order
    follows from the seed, and any part of it is made without the parts before: a fit can go on
    anywhere.

    Args:
        rows: What the examples are made of.
        encode: Make the examples of some rows. It is called in each pass, and may take another
            piece of a row each time, by the random numbers that it is given.
        recipe: Its `epochs` are the passes, its `batch_size` the examples of an update; its `seed`.
        pool: See `POOL`.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        encode: Callable[[list[Any], random.Random], list[Example]],
        recipe: SupervisedRecipe,
        pool: int = POOL,
    ) -> None:
        self.rows, self.encode = rows, encode
        self.batch_size, self.seed = recipe.batch_size, recipe.seed
        self.steps = math.ceil(recipe.epochs * len(rows) / recipe.batch_size)
        self._size = max(1, min(pool, len(rows) // recipe.batch_size)) * recipe.batch_size
        self._pool: tuple[int, list[Example]] = (-1, [])

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, index: int) -> Example:
        number, place = divmod(index, self._size)
        if self._pool[0] != number:
            self._pool = number, self._make_pool(number)
        return self._pool[1][place]

    def _make_pool(self, number: int) -> list[Example]:
        start = number * self._size
        count = min(self._size, len(self) - start)
        passed, skipped = divmod(start, len(self.rows))
        rows = list[Any]()
        while len(rows) < skipped + count:
            rows += random.Random(f"{self.seed} pass {passed}").sample(self.rows, len(self.rows))
            passed += 1
        rng = random.Random(f"{self.seed} pool {number}")
        examples = by_length(self.encode(rows[skipped : skipped + count], rng))
        starts = list(range(0, count, self.batch_size))
        rng.shuffle(starts)
        return [one for start in starts for one in examples[start : start + self.batch_size]]


def by_length(examples: list[Example]) -> list[Example]:
    """Return the examples, the longest first: if memory is short it shows at once.

    One of several texts is as long as the `longest` of them, and stands beside others that have
    the same one.
    """

    def size(example: Example) -> tuple[Any, ...]:
        return example.get("longest", (len(example["input_ids"]),))

    return sorted(examples, key=size, reverse=True)


@contextmanager
def open_folder(recipe: SupervisedRecipe, *, resume: bool) -> Iterator[RunFolder]:
    """Keep the folder of the run, which can be written, with no checkpoints but its own.

    Args:
        recipe: Its `out` is the folder.
        resume: The run in it, if there is one, is to be gone on with; else there must be none.

    Raises:
        OSError: if the folder cannot be written, or is in use, or holds a run that is not to be
            gone on with.
        ValueError: if the settings are not those of the run so far.
    """
    folder = RunFolder(Path(recipe.out).expanduser())
    complete = (folder.path / "summary.json").exists()
    if complete or (not resume and (folder.has_run() or folder.checkpoints.exists())):
        how = "" if complete else "add --resume to go on with it, or "
        rule = f"`out` must be a folder without a run: {how}name another one with --out"
        raise FileExistsError(errno.EEXIST, rule, str(folder.path))
    first = os.environ.get("RANK", "0") == "0"  # of several processes, which share it
    with folder.in_use() if first else nullcontext():
        if last_checkpoint(folder) is not None:
            check_same(folder, recipe, may_change=("out", "quiet"))
        yield folder


def last_checkpoint(folder: RunFolder) -> tuple[int, str] | None:
    """Return the step and the path of the last whole checkpoint; None: there is none."""
    # The state is what the Trainer writes last.
    whole = [path.parent for path in folder.checkpoints.glob("checkpoint-*/trainer_state.json")]
    return max(((int(path.name.partition("-")[2]), str(path)) for path in whole), default=None)


class Fit(transformers.Trainer):
    """A classifier in training on the `Trainer` of transformers; called, it makes all of the run.

    What learns from other things than labels has its own `collate`, `compute_loss` and `measure`.

    Args:
        recipe: Of it, how to go about it: batch size, learning rate, precision and so on.
        folder: See `open_folder`. If there is a checkpoint in it, the fit goes on from that.
        model: In float32; it is trained in place.
        tokenizer: Pads the examples, and is saved beside the model.
        examples: To learn from.
        made_of: Fingerprints of what else the fit must be made of to go on, by its name in words.

    Raises:
        CheckpointError: if the checkpoint is of a fit that was made of something else.
    """

    kind, rows_called = "classifier", "texts"
    """What the trained model and its folder are called, and what it learns from."""

    def __init__(
        self,
        recipe: SupervisedRecipe,
        folder: RunFolder,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        examples: Examples,
        made_of: Mapping[str, Any],
    ) -> None:
        self.pad = transformers.DataCollatorWithPadding(tokenizer)
        arguments = _arguments(recipe, folder, model, examples.steps)
        super().__init__(model, arguments, data_collator=self.collate, train_dataset=examples)
        self.remove_callback(transformers.PrinterCallback)
        self.recipe, self.folder, self.tokenizer, self.examples = (
            recipe,
            folder,
            tokenizer,
            examples,
        )
        self.main = self.is_world_process_zero()
        self.first_step, self.checkpoint = last_checkpoint(folder) or (0, None)
        self.display = Display(
            examples.steps,
            first_step=self.first_step,
            quiet=recipe.quiet or not self.main,
            title="training",
        )
        self.made_of = {"versions": VERSIONS, **made_of}
        self._check_same()
        self.accuracies = list[Tensor]()
        """Of the updates since the last row."""
        self.seconds = 0.0
        """Of training, in all sessions."""
        self.again = folder.path
        """What to name to go on with it."""

    def _check_same(self) -> None:
        """Raise if the checkpoint is of another fit; tell of what is not known, or may differ."""
        if self.checkpoint is None:
            return
        file = Path(self.checkpoint, MADE_OF)
        if not file.exists():
            self.display.note(f"{self.checkpoint} is of an older trl: what it is of is not known.")
            return
        try:
            before = dict(json.loads(file.read_text()))
        except (TypeError, ValueError) as error:
            told = f"{file} is damaged ({error}): delete {self.checkpoint}, to go on from none."
            raise CheckpointError(told) from error
        for note in other_versions(self.checkpoint, before.pop("versions", {})):
            self.display.note(note)
        if others := [name for name, value in before.items() if value != self.made_of.get(name)]:
            raise CheckpointError(
                f"{self.checkpoint} is of a fit with another {', another '.join(others)}. Bring "
                "back what it was, or start another run in another folder."
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a checkpoint's weights, and before them what they are of."""
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        Path(output_dir, MADE_OF).write_text(json.dumps(self.made_of))
        super()._save(output_dir, state_dict)

    def __call__(
        self, tests: Mapping[str, Callable[[], list[Example]]], summary: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Train the model, measure it, save it, and write the other files of the run.

        Args:
            tests: What makes the examples to measure on; the keys stand before the figures' names.
            summary: What summary.json has besides.

        Returns:
            What stands in summary.json.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
            ArithmeticError: if the loss is not finite.
        """
        started, target = time.perf_counter(), self.folder.path / self.kind
        sizes = {
            "parameters": self.model.num_parameters(),
            "precision": self.args.mixed_precision.replace("no", "fp32"),
            "steps": self.examples.steps,
        }
        self.display.note(
            f"{type(self.model).__name__} of {sizes['parameters'] / 1e6:.1f}M parameters, "
            f"precision {sizes['precision']}: {len(self.examples.rows):,} {self.rows_called} to "
            f"train on, {self.examples.steps - self.first_step:,} steps."
        )
        figures = dict[str, Any]()
        with quiet_transformers():
            self._learn()
            for prefix, make_test in tests.items():
                test = by_length(make_test())
                self.display.note(f"Measuring on {len(test):,} {self.rows_called}.")
                figures |= {prefix + key: value for key, value in self.measure(test).items()}
            told = " · ".join(f"{k} {x:.3f}" for k, x in figures.items() if isinstance(x, float))
            figures |= summary | sizes
            figures |= {
                "tokens": self.state.num_input_tokens_seen,
                "threads": torch.get_num_threads(),
                "processes": self.args.world_size,
                "train_seconds": self.seconds,
                "seconds": time.perf_counter() - started,
            }
            if self.main:
                with replaced_folder(target) as partial:
                    self.model.save_pretrained(partial)
                    self.tokenizer.save_pretrained(partial)
                self.folder.write("summary.json", json.dumps(figures, indent=2) + "\n")
                remove(self.folder.checkpoints)
        self.display.note(f"{told}. The {self.kind.replace('_', ' ')} is in {target}.")
        return figures

    def _learn(self) -> None:
        """Train from the last checkpoint, or from the start, to the end or until Ctrl-C."""
        self.accelerator.wait_for_everyone()  # all have seen what is in the folder
        rows = self.folder.rows("metrics")  # those after the checkpoint are written again
        rows = [row for row in rows if row["step"] <= self.first_step]
        if self.main:
            self.folder.write("recipe.yaml", settings.dump(self.recipe))
            self.folder.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self._started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0)
        with GracefulStop() as interrupt, self.display:
            self.add_callback(_Stopping(self.accelerator, interrupt))
            self.train(resume_from_checkpoint=self.checkpoint)
        if self.state.global_step < self.examples.steps:
            Console(stderr=True, quiet=not self.main, soft_wrap=True).print(
                f"Stopped after step {self.state.global_step} of {self.examples.steps}. Go on "
                f"with: trl train {self.again} --resume"
            )
            raise KeyboardInterrupt

    def collate(self, examples: list[Example]) -> Any:
        """Return the examples of an update as tensors."""
        return self.pad(examples)

    def measure(self, test: list[Example]) -> dict[str, Any]:
        """Return how the trained model does on test examples."""
        found = self.predict(test)  # type: ignore[arg-type]  # a list has what it needs
        return metrics(torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        """Return the mean cross-entropy of a batch, and its logits [B, labels] if asked for."""
        labels = inputs["labels"]
        texts = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        logits = model(**texts).logits.float()
        if model.training:
            self.accuracies.append((logits.argmax(1) == labels).float().mean())
        loss = F.cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a row and show it. The Trainer's summary at the end is left out."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise ArithmeticError(
                f"The loss is {logs['loss']} at step {self.state.global_step}: lower "
                f"`learning_rate` (now {self.recipe.learning_rate}), or set `precision` to fp32."
            )
        none = torch.full((1,), math.nan, device=self.args.device)
        mean = torch.stack(self.accuracies or [none]).mean()
        self.accuracies.clear()
        self.seconds = time.perf_counter() - self._started
        row = {
            "step": self.state.global_step,
            "epoch": self.state.global_step * self.recipe.batch_size / len(self.examples.rows),
            **logs,
            "accuracy": self.accelerator.reduce(mean, "mean").item(),
            "tokens": self.state.num_input_tokens_seen,
            "seconds": self.seconds,
        }
        if self.main:
            self.folder.add("metrics", row)
        self.display.row(row)


def metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return how it did; `confusion` counts texts by label (rows) and answer (columns)."""
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(1)
    confusion = torch.bincount(cells, minlength=classes**2).view(classes, classes)
    return {
        "accuracy": confusion.diag().sum().item() / len(labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "confusion": confusion.tolist(),
    }


def _arguments(
    recipe: SupervisedRecipe, folder: RunFolder, model: transformers.PreTrainedModel, steps: int
) -> transformers.TrainingArguments:
    """Return how the Trainer is to go about it; several processes know each other then."""
    accelerator = make_accelerator(recipe.precision)
    exit_after_gloo()
    tenth = math.ceil(steps / 10)
    processes, on_cpu = accelerator.num_processes, accelerator.device.type == "cpu"
    low_precision = accelerator.mixed_precision
    if recipe.batch_size % processes:
        refuse("batch_size", f"be a multiple of {processes}, the processes", f"{recipe.batch_size}")
    if on_cpu:
        keep_freed_memory()
        if low_precision == "bf16":
            # The fused attention of torch is several times slower backwards there.
            model.set_attn_implementation("eager")
    arguments = transformers.TrainingArguments(
        str(folder.checkpoints),
        per_device_train_batch_size=recipe.batch_size // processes,
        per_device_eval_batch_size=recipe.batch_size // processes,
        num_train_epochs=1,  # `Examples` are all there is to learn
        train_sampling_strategy="sequential",  # and in their order
        learning_rate=recipe.learning_rate,
        warmup_steps=0.1,  # of the run; then down to 0
        weight_decay=recipe.weight_decay,
        **{low_precision: True} if low_precision in ("bf16", "fp16") else {},
        use_cpu=on_cpu,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        # With a row, of which no update is missing then when the fit is gone on with.
        save_steps=math.ceil(tenth / recipe.log_every) * recipe.log_every,
        save_total_limit=1,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process has one GPU, however many there are
    return arguments


class _Stopping(transformers.TrainerCallback):
    """Ends the training after an update, with a checkpoint, once Ctrl-C was pressed anywhere."""

    def __init__(self, accelerator: Any, interrupt: GracefulStop) -> None:
        self.accelerator, self.interrupt = accelerator, interrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look whether a process was asked to stop; the last update has its row in any case."""
        if self.interrupt.asked:
            self.accelerator.set_trigger()
        asked = self.accelerator.check_trigger()
        control.should_save |= asked
        control.should_training_stop |= asked
        control.should_log |= asked or state.global_step == state.max_steps
        give_back_memory()
