"""What is wrong with a run, in words: what is seen, why that usually is, and what to set.

    diagnosis = Diagnosis(config.ppo, precision=trainer.precision)
    for finding in diagnosis.look_at_start(policy, tokenizer):
        print(finding)
    for ...:
        row = {"step": step} | loop.step()
        for finding in diagnosis.look(row):
            print(finding)

Each finding is said once in a run. trl/watch/symptoms.py has what is looked for, with thresholds
and where they come from; docs/metrics.md explains the figures themselves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from trl.anatomy import language_model
from trl.batch import Rollout
from trl.config import PPOConfig
from trl.scored import totals
from trl.watch.history import History, correlation, is_constant
from trl.watch.symptoms import SYMPTOMS

__all__ = ["Diagnosis", "Finding"]

Row = Mapping[str, Any]

WATCHED = ("reward/", "objective/", "ppo/", "response/", "episode/", "stop/", "held_out/distinct_2")
"""How the names of the figures begin that are watched, or that may turn out not to be numbers."""
SAME_TOKENS, SAME_ROWS = 5, 8
"""One response may make up most of a batch if it is shorter (yes, no), or the batch smaller."""
ROWS_READ = 256
"""Responses of a batch that are compared with each other, at most."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a run that its owner should know."""

    name: str
    """What it is, in one word: `negative_kl`, ...."""
    step: int
    """When it was seen; 0: before the first step."""
    seen: str
    """What is seen, with the numbers."""
    causes: tuple[str, ...]
    """Why that usually is, the most frequent cause first."""
    fix: str
    """What to set or to look at."""

    def row(self) -> dict[str, Any]:
        """Return it as plain values, a line of a JSON file."""
        return asdict(self) | {"causes": list(self.causes)}

    def __str__(self) -> str:
        causes = "".join(f"\n  {place}. {cause}" for place, cause in enumerate(self.causes, 1))
        return f"{self.seen}\nUsual causes:{causes}\nWhat to do: {self.fix}"


class Diagnosis:
    """Watches the figures of a run.

    Args:
        config: The settings of PPO.
        precision: That of the trainer, as `PPOTrainer.precision` has it.
    """

    def __init__(self, config: PPOConfig, *, precision: str = "no") -> None:
        self.history = History(config, precision)
        self.found: list[str] = []

    def look(
        self,
        row: Row,
        rollout: Rollout | None = None,
        scores: Tensor | None = None,
        parts: Mapping[str, Tensor] | None = None,
    ) -> list[Finding]:
        """Take in the figures of a step, and return what is new.

        Args:
            row: Figures by name, as `Loop.step` gives them, and `step`. Some may be missing.
            rollout: The responses of the step, for what only the texts show.
            scores: [B] or [B, R] their scores; NaN where nothing has a say.
            parts: [B] those of each of several scorers, by its name, likewise.

        Returns:
            Findings that were not returned before.
        """
        figures = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, (int, float)) and name.startswith(WATCHED)
        }
        if rollout is not None:
            figures |= _of_texts(rollout) | _of_parts(parts or {})
            if scores is not None:
                figures |= _of_scores(rollout, scores)
        self.history.add(figures)
        return self._new(int(row.get("step", self.history.steps)))

    def look_at_start(
        self, policy: nn.Module, tokenizer: Any = None, *, sampler: Any = None
    ) -> list[Finding]:
        """Return what can be known before the first step.

        A padding token that is the EOS is none of it: padding is told by masks, never by its token,
        and the EOS that ends a response is inside of its mask.

        Args:
            policy: The model that is trained.
            tokenizer: Its tokenizer.
            sampler: The `Sampler` that writes the responses.
        """
        history = self.history
        history.generation_config = getattr(language_model(policy), "generation_config", None)
        history.tokenizer, history.sampler = tokenizer, sampler
        return self._new(0, at_start=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain values."""
        return {"found": list(self.found), **self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.found = list(state["found"])
        self.history.load_state_dict(state)

    def _new(self, step: int, *, at_start: bool = False) -> list[Finding]:
        """Check for what was not found before."""
        seen = [
            (each, figures)
            for each in SYMPTOMS
            if each.at_start == at_start and each.name not in self.found
            if (figures := each.check(self.history)) is not None
        ]
        names = {*self.found, *(each.name for each, _ in seen)}
        new = [
            Finding(each.name, step, each.seen.format(**figures), each.causes, each.fix)
            for each, figures in seen
            if names.isdisjoint(each.explained_by)
        ]
        self.found += [finding.name for finding in new]
        return new


# --- figures of one step ------------------------------------------------------------------------


def _of_texts(rollout: Rollout) -> dict[str, float]:
    """Return distinct-2 of responses, shares of the most frequent and of JSON; whether chats."""
    mask, tokens = (x[:ROWS_READ].cpu() for x in (rollout.response_mask, rollout.responses))
    both = mask[:, 1:] & mask[:, :-1]
    pairs = (tokens[:, :-1].long() << 32 | tokens[:, 1:].long())[both]
    figures = {"batch/chats": float(rollout.query_messages is not None)}
    figures["batch/tools"] = float(any("tools" in each for each in rollout.episodes or ()))
    figures |= {"batch/distinct_2": pairs.unique().numel() / pairs.numel()} if len(pairs) else {}
    if texts_read := (rollout.response_texts or ())[:ROWS_READ]:
        figures["batch/json"] = sum(map(_is_json, texts_read)) / len(texts_read)
    if len(mask) >= SAME_ROWS:
        texts = [tuple(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]
        ((text, times),) = Counter(texts).most_common(1)
        figures["batch/same_response"] = times / len(texts) * (len(text) >= SAME_TOKENS)
    return figures


def _is_json(text: str) -> bool:
    """Tell whether a text is an object or a list in JSON, fenced as Markdown or not."""
    try:
        return isinstance(json.loads(text.strip(" `\n").removeprefix("json")), dict | list)
    except (ValueError, RecursionError):
        return False


def _of_parts(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean and the spread of each of several parts of the score that has a say."""
    there = {name: x[~x.isnan()].double() for name, x in parts.items() if len(parts) > 1}
    means = {f"part/{name}": x.mean().item() for name, x in there.items() if len(x)}
    spreads = {f"spread/{name}": (x.max() - x.min()).item() for name, x in there.items() if len(x)}
    return means | spreads


def _of_scores(rollout: Rollout, scores: Tensor) -> dict[str, float]:
    """Return the correlation of score and length, and the share of groups with equal scores.

    Nothing if the scores are those of all processes, and the rollout is that of one.
    """
    scores = totals(scores.detach().cpu().double())
    there = ~scores.isnan()  # those on which a scorer has a say
    if len(scores) != len(rollout) or not there.any():
        return {}
    if not there.all():
        rollout, scores = rollout.select(there), scores[there]
    lengths = rollout.response_mask.sum(1).cpu().double()
    paid = correlation(scores.tolist(), lengths.tolist())
    figures = {} if paid is None else {"batch/score_length": paid}
    if rollout.group_ids is not None:
        groups = [scores[rollout.group_ids.cpu() == group] for group in rollout.group_ids.unique()]
        equal = [is_constant(float(group.std(correction=0)), group) for group in groups]
        figures["batch/equal_groups"] = sum(equal) / len(equal)
    return figures
