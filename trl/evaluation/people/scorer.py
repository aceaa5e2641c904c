"""People as a scorer: a training asks them, and waits."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from time import localtime, strftime, time
from typing import Any, Literal

import torch
from torch import distributed

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse
from trl.config.types import Count, Positive
from trl.evaluation.function import as_scorer
from trl.evaluation.people.asking import Look, ask, wait, wait_for_other
from trl.evaluation.people.items import QUESTIONS, TIE, Answer, Item
from trl.evaluation.people.store import Store
from trl.evaluation.scores import Scorer, by_hand, has_tokens, pairs_of, score, words_of
from trl.evaluation.weighted_sum import WeightedSum
from trl.scored import Scored

__all__ = ["HumanScorer", "for_held_out"]

PACKAGES = ("starlette", "uvicorn", "markdown_it", "nh3")
"""Of the page."""


class HumanScorer:
    """People judge the responses, on a page, and the training waits for what they say.

        scorer = HumanScorer("votes.sqlite", question="thumbs", timeout=600)

    The page is served by this process, in a thread; where to open it is printed. What they answer
    is a score:

        thumbs   good 1, bad −1
        rating   1 to 5 as −1 to 1
        pair     of the two responses to a prompt, the better one 1, the other 0; a tie 1/2 each
        best     likewise of up to four; all bad: 0 each

    Answers of several people are averaged: of a pair and of the best it is the share of wins.
    Responses to one prompt that are the same text count as one; where all are, there is nothing to
    ask. Texts that were judged are not judged again: the answers are in the store. A run that was
    killed and is gone on with takes for each batch what it took before, unanswered ones too.

    On several processes the first one asks for all, and the others wait by looking into the store,
    which they must be able to open.

    Args:
        store: The file of items and answers; it is made if it is not there.
        question: thumbs, rating, pair or best.
        per_item: People who judge each.
        timeout: Seconds after which a batch goes on without those who did not answer; None: it
            waits. So it does when somebody says on the page that it is enough for now.
        fallback: A scorer, or a function of texts, of the responses that nobody judged in time.
            None: no score; no step learns from them.
        annotators: Who judges: a link for each is printed.
        page: Serve the page. False: `trl label --store FILE` does, or a panel in a notebook.
        host: The address to listen on.
        port: If it is taken, any that is free.
        guidelines: How to judge, in Markdown; shown on the page.
        held_out: Let people judge the responses to held-out prompts, too. Otherwise those have the
            scores of the fallback, if there is one.
        name: For messages and metrics.

    Raises:
        ImportError: if the page needs packages that are not installed.
        TypeError, ValueError: for settings that cannot work.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        question: Literal["thumbs", "rating", "pair", "best"] = "thumbs",
        per_item: int = 1,
        timeout: float | None = None,
        fallback: Scorer | Callable[[list[str]], Any] | None = None,
        annotators: Sequence[str] = ("me",),
        page: bool = True,
        host: str = "127.0.0.1",
        port: int = 8321,
        guidelines: str | None = None,
        held_out: bool = False,
        name: str = "human",
    ) -> None:
        given = {
            "question": (Literal["thumbs", "rating", "pair", "best"], question),
            "per_item": (Count, per_item),
            "timeout": (Positive | None, timeout),
        }
        check_values("HumanScorer", given)
        names = [annotators] if isinstance(annotators, str) else list(annotators)
        if page and per_item > len(names):
            refuse("per_item", f"be at most the {len(names)} annotators", str(per_item))
        if page and (missing := [each for each in PACKAGES if find_spec(each) is None]):
            told = f"The page of HumanScorer needs {', '.join(missing)}"
            raise ImportError(f"{told}: install trl with the extra people, '.[people]'.")
        self.path, self.question, self.per_item = Path(store).expanduser(), question, per_item
        self.timeout, self.annotators, self.page = timeout, names, page
        self.fallback = None if fallback is None else as_scorer(fallback)
        self.host, self.port, self.guidelines = host, port, guidelines
        self.held_out, self.name = held_out, name
        self.stopping = threading.Event()
        self._asks = self.tells = True
        self._live: dict[str, Any] = {}  # the store and the page, once they are needed

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Ask people, and wait.

        Returns:
            Their scores, and as the figure `judged` whether anybody judged a response.
        Raises:
            Stopped: a KeyboardInterrupt, if the waiting is ended: by Ctrl-C, or by `stop`.
            StoreError, ValueError: if the store cannot be used, or is of another question; or if
                there are not two responses to a prompt for a pair, two to four for the best.
            ScoringError: if the fallback fails.
        """
        items, places = self._items(rollout)
        # A batch by hand is asked once more; that of a training that is gone on with is not.
        answers = self._answers(items, again=not has_tokens(rollout))
        found = [
            None if item is None else _score(self.question, answers[item], response)
            for item, response in places
        ]
        judged = torch.tensor([float(each is not None) for each in found], device="cpu")
        if self.fallback is not None and None in found:
            instead = score(self.fallback, rollout).totals.tolist()
            pairs = zip(found, instead, strict=True)
            found = [other if each is None else each for each, other in pairs]
            found = [None if each != each else each for each in found]
        scored: Any = Scored(found, figures={f"{self.name}/judged": judged})  # type: ignore[arg-type]
        return Scored.of(scored, rollout)

    def fall_back_on(self, name: str | None, scorers: Sequence[Any]) -> None:
        """Take the scorer of that name, if there is to be one, as the fallback.

        Raises:
            ValueError: if it is not among the others.
        """
        others = {each.name: each for each in scorers if each is not self}
        if name is not None and name not in others:
            rule = f"be the title of another reward, one of {list(others)}"
            refuse("fallback", rule, repr(name), "add it with weight 0")
        self.fallback = others.get(name, self.fallback)

    def stop(self) -> None:
        """End the waiting, from another thread; `stopping.clear()` lets it wait again."""
        self.stopping.set()

    def unasking(self) -> HumanScorer:
        """Return a scorer that asks nobody: it has the scores of the fallback."""
        other = copy.copy(self)
        other._asks = False
        return other

    def close(self) -> None:
        """Close the store and end the page; the next batch opens them again."""
        for each in self._live.values():
            each.close()
        self._live.clear()

    # -- what is asked ---------------------------------------------------------------------------

    def _items(self, rollout: Rollout) -> tuple[list[Item], list[tuple[int | None, int]]]:
        """Return what is to be judged, and where each row is in it: the item, the response."""
        queries, responses = zip(*pairs_of(rollout), strict=True)
        prompts: list[Any] = list(queries)
        if rollout.query_messages is not None:
            prompts = [
                [{"role": each["role"], "content": words_of(each)} for each in chat]
                for chat in rollout.query_messages
            ]
        rows = range(len(rollout))
        if QUESTIONS[self.question].most == 1:
            items = [Item(prompts[row], (responses[row],)) for row in rows]
            return items, [(row, 0) for row in rows]
        ids = rollout.group_ids
        keys = queries if ids is None else ids.tolist()
        texts: dict[Any, set[str]] = {}
        for row in rows:
            texts.setdefault(keys[row], set()).add(responses[row])
        items, numbers, groups = [], dict[Any, int](), dict[Any, list[str]]()
        for row in rows:
            key = keys[row]
            if key not in groups:
                self._check_group(sum(each == key for each in keys))
                groups[key] = sorted(texts[key])
                if len(groups[key]) > 1:
                    numbers[key] = len(items)
                    items.append(Item(prompts[row], tuple(groups[key])))
        places = [(numbers.get(key), groups[key].index(responses[row]))
                  for row, key in enumerate(keys)]  # fmt: skip
        return items, places

    def _check_group(self, size: int) -> None:
        asked = QUESTIONS[self.question]
        if not asked.fewest <= size <= asked.most:
            rule = f"be {asked.fewest} to {asked.most} for the question {self.question!r}"
            fix = "set sampling.group_size, or sampler_kwargs={'group_size': …}"
            refuse("responses to each prompt", rule, str(size), fix)

    def _answers(self, items: list[Item], *, again: bool) -> list[list[Answer]]:
        """Return what people answered to each item."""
        if not self._asks:
            return [[] for _ in items]
        every, start, first = items, 0, True
        if distributed.is_available() and distributed.is_initialized():
            if threading.current_thread() is not threading.main_thread():
                rule = "be 1 for HumanScorer on several processes"
                refuse("parts", rule, "more", "set sampling.parts: 1")
            # All are here now; while people are waited for, no process may wait in a collective.
            of_each: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(of_each, items)
            rank, again = distributed.get_rank(), False
            every = [item for own in of_each for item in own]
            start, first = sum(map(len, of_each[:rank])), rank == 0
        if not every:
            return []
        asking = ask(self._store(), every, again=again)
        if first:
            more = {"timeout": self.timeout, "seen": self._teller(), "stop": self.stopping.is_set}
            answers = wait(asking, **more)
        else:
            answers = wait_for_other(asking, self.stopping.is_set)
        return answers[start : start + len(items)]

    def _store(self) -> Store:
        if "store" not in self._live:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            store = Store(self.path, make=True)
            store.ask(self.question, per_item=self.per_item, guidelines=self.guidelines)
            self._live["store"] = store
        return self._live["store"]  # type: ignore[no-any-return]

    def _teller(self) -> Callable[[Look], None]:
        """Return what says who is wanted where, once somebody is."""
        told = False

        def tell(found: Look) -> None:
            nonlocal told
            if told or not found.left or not self.tells:
                return
            told = True
            until = f" until {strftime('%H:%M:%S', localtime(time() + self.timeout))}" \
                if self.timeout else ""  # fmt: skip
            words = "response waits" if found.left == 1 else "responses wait"
            who, where = ", ".join(self.annotators), self._where()
            print(f"trl: {found.left} {words}{until} for {who}{where}", file=sys.stderr, flush=True)

        return tell

    def _where(self) -> str:
        """Return where people are wanted; the page is opened first, and its links are told once."""
        if not self.page:
            return f": trl label --store {self.path}"
        if "page" in self._live:
            return f" at {self._live['page'].address}"
        from trl.evaluation.people.server import Page

        page = Page(self.path, self.annotators, host=self.host, port=self.port)
        self._live["page"] = page
        links = "".join(f"\n  {name}: {link}" for name, link in page.links.items())
        return f"; each link is good once:{links}"


def _score(question: str, answers: list[Answer], response: int) -> float | None:
    """Return the score of a response by the answers to its item; None: there are none."""
    if not answers:
        return None
    if question == "thumbs":
        return fmean(1.0 if good else -1.0 for good in answers)
    if question == "rating":
        return fmean((float(rating) - 3) / 2 for rating in answers)
    return fmean(0.5 if each == TIE else float(each == response) for each in answers)


def for_held_out(judge: WeightedSum) -> WeightedSum:
    """Return a sum in which people who are not to judge held-out prompts are not asked."""
    quiet = {
        name: (scorer.unasking(), weight)
        for name, (scorer, weight) in judge.parts.items()
        if isinstance(scorer, HumanScorer) and not scorer.held_out
    }
    return WeightedSum(list((judge.parts | quiet).values())) if quiet else judge
