"""Score responses by a server that answers over HTTP."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from trl.batch import Rollout
from trl.config import Problems
from trl.evaluation.scores import (
    check_scores,
    described,
    failures_named,
    lay_out,
    pairs_of,
    read_entries,
    scoring_error,
    shorten,
)

__all__ = ["EndpointScorer"]

Pairs = Sequence[tuple[str, str]]

LONGEST_WAIT = 60.0
"""Seconds between two attempts, however many there were."""


def texts_request(pairs: Pairs) -> Any:
    """`{"texts": [query + response, ...]}`, what is asked unless `request` is given."""
    return {"texts": [query + response for query, response in pairs]}


def scores_in(answer: Any) -> Any:
    """`scores` of `{"scores": [number, ...]}`, what is read unless `parse` is given."""
    if not isinstance(answer, dict) or "scores" not in answer:
        raise ValueError('the answer must be {"scores": [number, ...]}')
    return answer["scores"]


class EndpointScorer:
    """Scores from a server: POST `{"texts": [...]}`, answered by `{"scores": [...]}`, as JSON.

    Timeouts, connections that fail or break, and answers of status 429 or 5xx are tried again,
    after `backoff`, 2·`backoff`, 4·`backoff` … seconds, at most 60. Any other answer that is not as
    many finite numbers as there were texts ends the scoring at once. Redirections are not followed:
    a POST does not survive one, and `headers` may hold a key that is for this server only.

    Args:
        url: http:// or https://.
        timeout: Seconds to wait for the connection, and for each part of the answer.
        retries: How often to try again.
        backoff: Seconds before the first new try.
        batch_size: Most texts in one request.
        concurrency: Most requests at the same time.
        headers: To send along, such as {"Authorization": "Bearer ..."}.
        request: Function of a list of (query, response), giving what to send as JSON.
        parse: Function of the JSON that was answered, giving one number for each pair, or one list
            of numbers, for its counted tokens.

    `request` and `parse` run in several threads.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 0.5,
        batch_size: int = 64,
        concurrency: int = 4,
        headers: Mapping[str, str] | None = None,
        request: Callable[[Pairs], Any] = texts_request,
        parse: Callable[[Any], Any] = scores_in,
    ) -> None:
        problems = Problems("EndpointScorer")
        if not url.startswith(("http://", "https://")):
            problems.found.append(f"`url` must begin with http:// or https://, got {url!r}.")
        problems.number("timeout", timeout, "> 0", lambda x: x > 0)
        problems.number("retries", retries, ">= 0", lambda x: x >= 0, whole=True)
        problems.number("backoff", backoff, ">= 0", lambda x: x >= 0)
        problems.number("batch_size", batch_size, ">= 1", lambda x: x >= 1, whole=True)
        problems.number("concurrency", concurrency, ">= 1", lambda x: x >= 1, whole=True)
        problems.report()
        self.url = url
        self.name = f"EndpointScorer({url.split('?')[0]})"  # what follows may be a key
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.batch_size = batch_size
        self.concurrency = concurrency
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.request = request
        self.parse = parse
        self._opener = urllib.request.build_opener(_NoRedirection)

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score each response of a rollout that has its texts.

        Returns:
            scores [B], or rewards [B, R] that are 0 outside the response mask; float32, CPU.
        Raises:
            ScoringError: naming the texts of the first request that failed for good.
        """
        pairs = pairs_of(rollout)
        every = range(len(rollout))
        batches = [every[start : start + self.batch_size] for start in every[:: self.batch_size]]
        stop = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = [pool.submit(self._ask, rollout, pairs, rows, stop) for rows in batches]
            try:
                ready = wait(asked, return_when=FIRST_EXCEPTION).done
                entries = [entry for one in asked if one in ready for entry in one.result()]
            finally:  # after a failure or Ctrl-C nothing more is asked
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return check_scores(lay_out(entries, rollout, self.name), rollout, self.name)

    def _ask(
        self, rollout: Rollout, pairs: Pairs, rows: range, stop: threading.Event
    ) -> list[float | list[float]]:
        """Ask for some rows until there is an answer; return one entry for each."""
        with failures_named(self.name, rollout, rows):
            question = self.request([pairs[row] for row in rows])
            body = json.dumps(question, allow_nan=False).encode()
        for attempt in range(1 + self.retries):
            if attempt and stop.wait(min(self.backoff * 2 ** (attempt - 1), LONGEST_WAIT)):
                break
            cause: Exception | None = None
            try:
                status, answer = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                cause, problem = error, described(error)
                continue
            if 200 <= status < 300:
                return self._read(answer, rollout, rows)
            problem = f"status {status} and {shorten(answer.decode(errors='replace'))}"
            if status < 500 and status != 429:
                break
        raise scoring_error(
            f"{self.name} gave no scores: attempt {attempt + 1} of at most {1 + self.retries}, "
            f"with a timeout of {self.timeout} s, ended with {problem}.",
            rollout,
            rows,
            suspects=False,
        ) from cause

    def _post(self, body: bytes) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url, data=body, headers=self.headers, method="POST")
        try:
            response = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            response = error  # an answer like others, with its status
        with response:
            return response.status, response.read()

    def _read(self, answer: bytes, rollout: Rollout, rows: range) -> list[float | list[float]]:
        try:
            found = self.parse(json.loads(answer))
        except Exception as error:  # JSONDecodeError, and whatever `parse` raises
            raise scoring_error(
                f"{self.name} gave an answer that cannot be read ({described(error)}): "
                f"{shorten(answer.decode(errors='replace'))}.",
                rollout,
                rows,
                suspects=False,
            ) from error
        return read_entries(found, rollout, rows, self.name)


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
