"""The GRPO of `trl==1.12.0`, for `trl_1_12.py --grpo`: as it is used, and at its best.

Its loop samples a batch of prompts, several responses to each, and makes all updates of it. The KL
is measured (β > 0), as ours is. At its best: no gradient checkpointing (it is on by default), and
all rows of an update in one pass. No token ends a response, since random weights would draw one.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from datasets import Dataset
from side import build_language_model, make_batch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl_1_12 import MANY, Iterations

from trl import GRPOConfig, GRPOTrainer


class Rounds(Iterations):
    """An iteration is all updates on a batch; the trainer tells of each."""

    def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Wait for the first line."""
        self.optimizer = optimizer
        super().on_train_begin()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Report after the last of its updates."""
        if state.global_step % self.workload.updates == 0:
            super().on_step_end()


def build_grpo_trainer(arguments: argparse.Namespace, rounds: Rounds) -> GRPOTrainer:
    """Return the trainer for the workload."""
    workload, folder = arguments.workload, tempfile.mkdtemp()
    tokenizer = build_words(workload.vocabulary)
    build_language_model(workload).save_pretrained(folder)  # the reference is loaded by its name
    tokenizer.save_pretrained(folder)
    response = workload.response_length[1]
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=arguments.device == "cpu",
        bf16=arguments.precision == "bf16",
        gradient_checkpointing=False,
        per_device_train_batch_size=workload.minibatch_size,
        gradient_accumulation_steps=1,
        steps_per_generation=workload.batch_size // workload.minibatch_size,
        num_iterations=workload.ppo_epochs,
        num_generations=workload.group_size,
        max_completion_length=response,
        generation_kwargs={"min_new_tokens": response},
        beta=0.04,
        learning_rate=1e-6,
        max_grad_norm=0.0,  # as our side: none is clipped
        model_init_kwargs={"dtype": "float32"},
        max_steps=MANY,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    queries = make_batch(workload, 0).queries[:: workload.group_size]
    texts = [" ".join(str(int(token)) for token in query) for query in queries]
    trainer = GRPOTrainer(
        folder,
        reward_funcs=lambda completion_ids, **_: [
            len(set(ids)) / response for ids in completion_ids
        ],
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[rounds],
    )
    trainer.remove_callback(PrinterCallback)
    rounds.watch(trainer.model)
    return trainer


def build_words(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of which each number is a word, so that a query is its tokens."""
    words = models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="0", eos_token="0", padding_side="left"
    )
