"""Scoring one part of a batch while the next one is written: for scorers that wait for others."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trl.batch import Rollout
from trl.evaluation.people.asking import OVER
from trl.evaluation.scores import Scorer, ScoringError, score
from trl.scored import Scored


class Overlap:
    """Scores the parts of a rollout one after the other, in a thread of its own.

        with Overlap(scorer) as overlap:
            for part in sampler.in_parts(policy, prompts, 4):
                overlap.add(part)
            rollout, scored = overlap.result()

    Args:
        scorer: Gets a part at a time: it must not compare the responses of a whole batch.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.parts: list[Rollout] = []
        self._futures: list[Future[Scored]] = []
        # One thread: parts come in order, and no scorer is called while it is at work.
        self._thread = ThreadPoolExecutor(1, "scorer")

    def __enter__(self) -> Overlap:
        OVER.clear()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:  # who waits for people there sees no Ctrl-C
            OVER.set()
        self._thread.shutdown(cancel_futures=True)

    def add(self, part: Rollout) -> None:
        """Let a part be scored; raise what an earlier one has raised meanwhile."""
        self.parts.append(part)
        self._futures.append(self._thread.submit(score, self.scorer, part))
        for index, future in enumerate(self._futures):
            if future.done():
                self._found(index)

    def result(self) -> tuple[Rollout, Scored]:
        """Wait for the scorer; return the whole rollout and its scores.

        Raises:
            ScoringError: see `score`; its `rows` are those of the whole rollout.
        """
        scored = [self._found(index) for index in range(len(self.parts))]
        return Rollout.concat(self.parts), Scored.concat(scored)

    def _found(self, index: int) -> Scored:
        try:
            return self._futures[index].result()
        except ScoringError as error:
            before = sum(len(part) for part in self.parts[:index])
            error.rows = tuple(before + row for row in error.rows)
            raise
