"""Score responses with a reward model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl.batch import Rollout
from trl.config.errors import refuse, shown
from trl.evaluation.scores import pairs_of, texts_of
from trl.evaluation.sequence_model import SequenceModel, tokenize
from trl.scored import Scored

__all__ = ["OFFSET", "RewardModelScorer"]

OFFSET = "score_offset"
"""What config.json calls a number that is added to the output of a head without a bias."""

Chat = Sequence[Mapping[str, Any]]


class RewardModelScorer(SequenceModel):
    """The one number of an `AutoModelForSequenceClassification` with one output.

    The reward model reads plain text with its own tokenizer, so it need not share a vocabulary
    with the language model.

        scorer = RewardModelScorer("path/to/reward-model")
        scored = scorer(rollout)  # a Scored
        scores = scorer([("What is 2 + 2?", "4"), ("What is 2 + 2?", "5")])  # a tensor [2]

    With a chat template the response becomes the assistant's message, after the messages of the
    query if that was a chat, or else after its text as the user's message. Without one the model
    reads query and response as one text.

    Too long a text loses its beginning, since the response, and where most models read the score,
    is at the end.

    Args:
        model: A folder or a hub name, loaded in float32, or a loaded model of any precision.
        tokenizer: A folder, a hub name, or a loaded tokenizer. Default: the one that lies beside
            the model; a loaded model needs it.
        chat_template: Whether to use the chat template of the tokenizer. None: if it has one.
        batch_size: Texts per forward pass; texts of similar length share one.
        max_length: Cut texts to this many tokens. Default: what the model can take.
        device: Where to compute. Default: a loaded model stays where it is; another goes to the
            GPU if there is one.
        gguf_file: Read the model from this file of the folder or repository; `model` may also be
            the path of the file.
        allow_pickle: Also load weights from pickles (pytorch_model.bin), which can run code.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        *,
        chat_template: bool | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        gguf_file: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, batch_size, max_length, device, gguf_file, allow_pickle)
        if self.model.config.num_labels != 1:
            got = f"{self.model.config.num_labels} labels"
            fix = "use ClassifierScorer(model, label=...)"
            refuse("model", "be a reward model, with one output", got, fix)
        has_template = self.tokenizer.chat_template is not None
        if chat_template and not has_template:
            rule = "be None or False for a tokenizer without a chat template"
            fix = "set tokenizer.chat_template, or leave the setting out"
            refuse("chat_template", rule, repr(chat_template), fix)
        self.chat_template = has_template if chat_template is None else chat_template

    def __call__(self, pairs: Sequence[tuple[str, str]] | Rollout) -> Tensor | Scored:
        """Score pairs of query and response, or the rows of a rollout that has its texts.

        Args:
            pairs: Any number of them (B); the order and the batch size do not change the scores.

        Returns:
            [B] scores, float32, on the CPU; of a rollout as a `Scored`.
        """
        if isinstance(pairs, Rollout):
            return self._scored(pairs, self._texts_of)
        for row, pair in enumerate(pairs):
            if isinstance(pair, str) or [type(text) for text in pair] != [str, str]:
                rule = "be a (query, response) pair of strings"
                fix = "scorer([(query, response)]); the query may be empty"
                refuse(f"pairs[{row}]", rule, shown(pair), fix, error=TypeError)
        return self._scores(self._logits(self._texts_of_pairs(pairs)))

    @property
    def add_special_tokens(self) -> bool:
        """Not where a template writes them itself."""
        return not self.chat_template

    def token_ids(
        self, pairs: Sequence[tuple[str, str]], chats: Sequence[Chat] | None = None
    ) -> list[list[int]]:
        """Return what the model reads of each query and response; a fit of it reads the same.

        Args:
            pairs: B of them.
            chats: The messages before each response, for a chat template. None: the query as the
                user's.
        """
        return tokenize(
            self.tokenizer,
            self._texts_of_pairs(pairs, chats),
            max_length=self.max_length,
            add_special_tokens=self.add_special_tokens,
            head_share=0.0,
        )

    def scores_of(self, token_ids: list[list[int]]) -> Tensor:
        """Return scores [B], float32, on the CPU, of what `token_ids` returned."""
        return self._scores(self._logits_of(token_ids, self.batch_size, unpadded=self._unpadded))

    def _scores(self, logits: Tensor) -> Tensor:
        return logits[:, 0] + getattr(self.model.config, OFFSET, 0.0)

    def _texts_of(self, rollout: Rollout) -> list[str]:
        """Return what the model reads of each row."""
        if not self.chat_template:
            return texts_of(rollout)
        return self._texts_of_pairs(pairs_of(rollout), rollout.query_messages)

    def _texts_of_pairs(
        self, pairs: Sequence[tuple[str, str]], chats: Sequence[Chat] | None = None
    ) -> list[str]:
        """Return what the model reads of each pair; of chats, rather than queries, if given."""
        if not self.chat_template:
            return ["".join(pair) for pair in pairs]
        chats = chats or [[{"role": "user", "content": query}] for query, _ in pairs]
        answers = [{"role": "assistant", "content": response} for _, response in pairs]
        whole = [[*chat, answer] for chat, answer in zip(chats, answers, strict=True)]
        return [self.tokenizer.apply_chat_template(chat, tokenize=False) for chat in whole]
