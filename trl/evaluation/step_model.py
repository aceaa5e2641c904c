"""Score the steps of responses with a process reward model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl.batch import Rollout, check_unicode
from trl.config import check_values
from trl.config.errors import refuse
from trl.config.types import Text
from trl.evaluation.classifier import Output, label_index, label_scores
from trl.evaluation.reward_model import uses_template
from trl.evaluation.scores import Texts, by_hand, failures_named, pairs_of, rollout_of, texts_of
from trl.evaluation.sequence_model import SequenceModel, Source, load_classifier, loaded
from trl.evaluation.steps import SEPARATOR, of_steps, steps_of_rows
from trl.saved import CONFIG, check_weights
from trl.scored import Scored

__all__ = ["StepScorer"]

ONE_OUTPUT, TWO_LAYERS = "ForPrmModel", "ForProcessRewardModel"
"""Architectures of Skywork-o1-Open-PRM and of Qwen2.5-Math-PRM, whose heads are their own."""


class StepScorer(SequenceModel):
    r"""One score for each step of a response, from a process reward model.

        scorer = StepScorer("path/to/prm", separator="\n\n")
        scored = scorer(rollout)  # a Scored, [B, R]: see `trl.evaluation.steps.of_steps`
        scorer.scores_of_steps(["2 + 2 = 4\n\n4 · 2 = 9"])  # [[0.98, 0.03]]

    A response is cut where the separator stands; one without it is one step. The model reads the
    query, and each step with the marker behind it, the last one too; the score of a step is what it
    gives at the last token of that marker. Query, steps and markers are cut into tokens each by
    itself, as TRL's `PRMTrainer` does.

    The scores of a response are added up, as rewards are. A policy that is paid for each step will
    write more of them: with `output="log_odds"` a step that is more likely wrong than right costs.

    | model | how |
    |---|---|
    | a token classifier, as of TRL's `PRMTrainer` | `separator` as its `step_separator` |
    | Qwen2.5-Math-PRM | `separator="\n\n", marker="<extra_0>"` |
    | Skywork-o1-Open-PRM | `separator="\n"` |
    | Math-Shepherd, a language model | `separator="\n", marker=" ки", label_tokens=("-", "+")` |
    | a causal sequence classifier, such as a reward model | by what it was trained on |

    Args:
        model: A folder or a hub name, loaded in float32, or a loaded model.
        separator: What ends a step in the responses.
        tokenizer: See `ClassifierScorer`.
        marker: What the model reads in place of a separator. None: the separator.
        label: The class of right steps, by name or index. None: the last one.
        label_tokens: Of a language model: a token for each class, whose logits are those of the
            classes.
        output: "probability", "log_odds" or "logit", see `ClassifierScorer`.
        chat_template: See `RewardModelScorer`.
        batch_size: Texts per forward pass.
        max_length: Cut texts, at their beginning, to this many tokens; a step of which nothing is
            left has the score 0. Default: what the model can take.
        device: See `ClassifierScorer`.
        allow_pickle: Also load weights from pickles (pytorch_model.bin), which can run code.
    """

    def __init__(
        self,
        model: Source | PreTrainedModel,
        separator: str = SEPARATOR,
        tokenizer: Source | PreTrainedTokenizerBase | None = None,
        *,
        marker: str | None = None,
        label: str | int | None = None,
        label_tokens: Sequence[str] = (),
        output: Output = "probability",
        chat_template: bool | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        allow_pickle: bool = False,
    ) -> None:
        checks = {"separator": (Text, separator), "marker": (Text | None, marker)}
        check_values("StepScorer", checks | {"output": (Output, output)})
        self.separator, self.marker, self.output = separator, marker or separator, output
        self.label_tokens, self._columns = tuple(label_tokens), list[int]()
        super().__init__(model, tokenizer, batch_size, max_length, device, None, allow_pickle)
        for text in self.label_tokens:
            ids = self._ids_of([text])[0]
            if len(ids) != 1:
                refuse("label_tokens", "be single tokens of the model", f"{text!r}, {len(ids)}")
            self._columns += ids
        labels = len(self._columns) or self.model.config.num_labels
        self.label = labels - 1 if label is None else label_index(self.model, label)
        self.chat_template = uses_template(self.tokenizer, chat_template)

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score the steps of each response of a rollout that has its texts.

        Returns:
            Scores [B, R], or [B] of texts without tokens; the figure `steps`, how many there are;
            and as notes `steps` what each of them got.
        """
        with failures_named(type(self).__name__, rollout):
            found = self.scores_of_steps(rollout)
            scored = of_steps(found, rollout, steps_of_rows(rollout, self.separator))
            notes = {"steps": tuple(" ".join(f"{score:.2g}" for score in row) for row in found)}
            return Scored.of(Scored(scored.scores, figures=scored.figures, notes=notes), rollout)

    def scores_of_steps(self, rollout: Rollout | Texts) -> list[list[float]]:
        """Return the score of each step of each response: of a rollout, or of texts, as a call."""
        token_ids, read = self._read(rollout_of(rollout, {}))
        found = self._token_logits(token_ids, self.batch_size, unpadded=self._unpadded)
        scores = []
        for logits, places in zip(found, read, strict=True):
            every = label_scores(logits, self.label, self.output, self.model.config).tolist()
            scores.append([every[place] if place >= 0 else 0.0 for place in places])
        return scores

    def _read(self, rollout: Rollout) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens that the model reads of each row, and where it reads the scores."""
        steps = steps_of_rows(rollout, self.separator)
        (marker,) = self._ids_of([self.marker])
        bos = None if self.chat_template else self.tokenizer.bos_token_id
        rows, read = list[list[int]](), list[list[int]]()
        for before, own in zip(self._ids_of(self._before(rollout)), steps, strict=True):
            ids = before if bos is None or before[:1] == [bos] else [bos, *before]
            places = []
            for step in self._ids_of([step.text for step in own]):
                ids = [*ids, *step, *marker]
                places.append(len(ids) - 1)
            cut = max(0, len(ids) - (self.max_length or len(ids)))
            if not ids:
                refuse(f"texts[{len(rows)}]", "have at least one token", repr(own[0].text))
            rows.append(ids[cut:])
            read.append([place - cut for place in places])
        return rows, read

    def _before(self, rollout: Rollout) -> list[str]:
        """Return what the model reads of each row before the response."""
        if not self.chat_template:
            pairs = zip(texts_of(rollout), pairs_of(rollout), strict=True)
            return [text[: len(text) - len(response)] for text, (_, response) in pairs]
        chats: Sequence[Any] = rollout.query_messages or [
            [{"role": "user", "content": query}] for query, _ in pairs_of(rollout)
        ]
        render: Any = self.tokenizer.apply_chat_template
        on = [chat[-1]["role"] == "assistant" for chat in chats]
        how = [{"continue_final_message" if each else "add_generation_prompt": True} for each in on]
        return [render(chat, tokenize=False, **each) for chat, each in zip(chats, how, strict=True)]

    def _ids_of(self, texts: list[str]) -> list[list[int]]:
        check_unicode(texts, "texts")
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]

    def _run(
        self, token_ids: list[list[int]], size: int, *, unpadded: bool
    ) -> Iterator[tuple[list[int], Tensor]]:
        for rows, found in super()._run(token_ids, size, unpadded=unpadded):
            yield rows, found[..., self._columns] if self._columns else found

    def _logits_of(self, token_ids: list[list[int]], size: int, *, unpadded: bool) -> Tensor:
        """Return the logits at the last token of each text."""
        found = self._token_logits(token_ids, size, unpadded=unpadded)
        return torch.stack([logits[-1] for logits in found])

    def _load(self, source: Source, gguf_file: str | None, allow_pickle: bool) -> PreTrainedModel:
        config = loaded(AutoConfig, source, CONFIG)
        names = " ".join(config.architectures or ())
        if "ForSequenceClassification" in names:
            return load_classifier(source, gguf_file, allow_pickle)
        if os.path.isdir(source):
            check_weights(Path(source), allow_pickle=allow_pickle)
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        options["use_safetensors"] = None if allow_pickle else True
        kind: Any = AutoModelForCausalLM if self.label_tokens else AutoModelForTokenClassification
        if ONE_OUTPUT in names:
            options |= {"num_labels": 1, "key_mapping": {r"^v_head\.summary\.": "score."}}
        elif TWO_LAYERS in names:
            kind = _with_two_layers(config)
        model, info = loaded(kind, source, CONFIG, **options)
        if info["missing_keys"]:
            raise ValueError(
                f"{os.fspath(source)!r} is not a process reward model: it has no weights for "
                f"{', '.join(sorted(info['missing_keys']))}, so its scores would be random. Pass a "
                "token classifier, a causal sequence classifier, or a language model with "
                'label_tokens=("-", "+").'
            )
        return model  # type: ignore[no-any-return]


def _with_two_layers(config: PreTrainedConfig) -> type:
    """Return the token classifier of a family with a head of two layers, and two classes."""
    family: Any = AutoModelForTokenClassification._model_mapping[type(config)]

    class TwoLayers(family):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            width = config.hidden_size
            self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    return TwoLayers
