"""Scoring one part of a batch while the next one is written: for scorers that wait for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.batch import Rollout
from trl.evaluation.scores import Scorer, ScoringError, score
from trl.evaluation.weighted_sum import means_of


class Judged(NamedTuple):
    """The scores of a rollout, and the means that the scorer keeps of it."""

    scores: Tensor
    """[B], or [B, R] for each response token."""
    means: dict[str, float]


def judge(scorer: Scorer, rollout: Rollout) -> Judged:
    """Score a rollout, all of it at once.

    Raises:
        ScoringError: see `score`.
    """
    return Judged(score(scorer, rollout), means_of(scorer))


class Overlap:
    """Judges the parts of a rollout one after the other, in a thread of its own.

        with Overlap(scorer) as overlap:
            for part in sampler.in_parts(policy, prompts, 4):
                overlap.add(part)
            rollout, judged = overlap.result()

    Args:
        scorer: Gets a part at a time: it must not compare the responses of a whole batch.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.parts: list[Rollout] = []
        self._futures: list[Future[tuple[Judged, dict[str, Tensor]]]] = []
        # One thread: parts come in order, and no scorer is called while it is at work.
        self._thread = ThreadPoolExecutor(1, "scorer")

    def __enter__(self) -> Overlap:
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, part: Rollout) -> None:
        """Let a part be judged; raise what an earlier one has raised meanwhile."""
        self.parts.append(part)
        self._futures.append(self._thread.submit(self._judge, part))
        for index, future in enumerate(self._futures):
            if future.done():
                self._found(index)

    def result(self) -> tuple[Rollout, Judged]:
        """Wait for the scorer; return the whole rollout and its scores.

        Raises:
            ScoringError: see `score`; its `rows` are those of the whole rollout.
        """
        found = [self._found(index) for index in range(len(self.parts))]
        rollout = Rollout.concat(self.parts)
        width = rollout.responses.shape[1]
        scores = torch.cat([_widened(judged.scores, width) for judged, _ in found])
        means = _joined_means(
            [judged.means for judged, _ in found],
            [rows for _, rows in found],
            [len(part) for part in self.parts],
        )
        return rollout, Judged(scores, means)

    def _judge(self, part: Rollout) -> tuple[Judged, dict[str, Tensor]]:
        judged = judge(self.scorer, part)
        columns = (getattr(self.scorer, name, None) for name in ("scores", "rows"))
        rows = {k: v for column in columns if isinstance(column, dict) for k, v in column.items()}
        return judged, rows

    def _found(self, index: int) -> tuple[Judged, dict[str, Tensor]]:
        try:
            return self._futures[index].result()
        except ScoringError as error:
            before = sum(len(part) for part in self.parts[:index])
            error.rows = tuple(before + row for row in error.rows)
            raise


def _widened(scores: Tensor, width: int) -> Tensor:
    """Return scores of single tokens [b, R] with as many columns as the whole rollout has."""
    return scores if scores.ndim == 1 else F.pad(scores, (0, width - scores.shape[1]))


def _joined_means(
    means: Sequence[Mapping[str, float]], rows: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]
) -> dict[str, float]:
    """Return the means over all parts, of the rows where a scorer keeps them.

    Args:
        means: Of each part.
        rows: Of each part [b], NaN where a figure does not count.
        sizes: Rows of each part, the weight of what has means alone.
    """
    joined: dict[str, float] = {}
    for name in dict.fromkeys(name for part in means for name in part):
        if all(name in part for part in rows):
            joined[name] = float(torch.cat([part[name] for part in rows]).double().nanmean())
        else:
            known = [pair for pair in zip(means, sizes, strict=True) if name in pair[0]]
            joined[name] = sum(m[name] * size for m, size in known) / sum(s for _, s in known)
    return joined
