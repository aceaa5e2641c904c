"""Score responses by a server that answers over HTTP."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import problem
from trl.config.types import Count, NotNegative, Whole
from trl.evaluation.scores import (
    check_scores,
    described,
    failures_named,
    lay_out,
    pairs_of,
    read_entries,
    scoring_error,
    shorten,
    texts_of,
)

__all__ = ["EndpointScorer"]

Pairs = Sequence[tuple[str, str]]

LONGEST_WAIT = 60.0
"""Seconds between two attempts, however many there were."""

A_DAY = 86_400
"""Seconds; the system's clocks cannot wait for any number of them."""


def scores_in(answer: Any) -> Any:
    """`scores` of `{"scores": [number, ...]}`, what is read unless `parse` is given."""
    if not isinstance(answer, dict) or "scores" not in answer:
        raise ValueError('the answer must be {"scores": [number, ...]}')
    return answer["scores"]


class EndpointScorer:
    """Scores from a server: POST `{"texts": [...]}`, answered by `{"scores": [...]}`, as JSON.

    Timeouts, connections that fail or break, and answers of status 429 or 5xx are tried again,
    after `backoff`, 2·`backoff`, 4·`backoff` … seconds, or after as many as a status 429 or 503
    asks for (Retry-After) if that is longer, at most 60. Any other answer that is not as many
    finite numbers as there were texts ends the scoring at once. Redirections are not followed: a
    POST does not survive one, and `headers` may hold a key that is for this server only.

    Args:
        url: http:// or https://.
        timeout: Seconds to wait for the connection, and for each part of the answer.
        retries: How often to try again.
        backoff: Seconds before the first new try.
        batch_size: Most texts in one request.
        concurrency: Most requests at the same time.
        headers: To send along, such as {"Authorization": "Bearer ..."}.
        request: Function of a list of (query, response), giving what to send as JSON. None:
            `{"texts": [...]}`, query and response as one text.
        parse: Function of the JSON that was answered, giving one number for each pair, or one list
            of numbers, for its counted tokens.

    `request` and `parse` run in several threads.

    Raises:
        TypeError, ValueError: for settings that cannot work.
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
        request: Callable[[Pairs], Any] | None = None,
        parse: Callable[[Any], Any] = scores_in,
    ) -> None:
        _check_kinds(url, headers, request, parse)
        checks = {
            "timeout": (Annotated[float, Field(gt=0, le=A_DAY)], timeout),
            "retries": (Whole, retries),
            "backoff": (NotNegative, backoff),
            "batch_size": (Count, batch_size),
            "concurrency": (Count, concurrency),
        }
        rule = _problem_of(url)
        check_values("EndpointScorer", checks, [problem("url", rule, repr(url))] if rule else [])
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
        questions = texts_of(rollout) if self.request is None else pairs_of(rollout)
        every = range(len(rollout))
        batches = [every[start : start + self.batch_size] for start in every[:: self.batch_size]]
        stop = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = [pool.submit(self._ask, rollout, questions, rows, stop) for rows in batches]
            try:
                ready = wait(asked, return_when=FIRST_EXCEPTION).done
                entries = [entry for one in asked if one in ready for entry in one.result()]
            finally:  # after a failure or Ctrl-C nothing more is asked
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return check_scores(lay_out(entries, rollout, self.name), rollout, self.name)

    def _ask(
        self, rollout: Rollout, questions: Sequence[Any], rows: range, stop: threading.Event
    ) -> list[float | list[float]]:
        """Ask for some rows until there is an answer; return one entry for each."""
        with failures_named(self.name, rollout, rows):
            part = [questions[row] for row in rows]
            question = {"texts": part} if self.request is None else self.request(part)
            body = json.dumps(question, allow_nan=False).encode()
        asked_for = 0.0
        for attempt in range(1 + self.retries):
            if attempt and stop.wait(self._pause(attempt, asked_for)):
                break
            cause: Exception | None = None
            asked_for = 0.0
            try:
                status, answer, asked_for = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                cause, problem = error, described(error)
                continue
            except Exception as error:  # a header that HTTP cannot send: no new try mends it
                cause, problem = error, described(error)
                break
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

    def _pause(self, attempt: int, asked_for: float) -> float:
        """Return the seconds to wait before a new attempt, the first of which is 1."""
        own = self.backoff * 2.0 ** min(attempt - 1, 99)
        return min(max(own, asked_for), LONGEST_WAIT)

    def _post(self, body: bytes) -> tuple[int, bytes, float]:
        """Return the status, the answer, and the seconds to wait that it asks for."""
        request = urllib.request.Request(self.url, data=body, headers=self.headers, method="POST")
        try:
            response = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            response = error  # an answer like others, with its status
        with response:
            return response.status, response.read(), _seconds_asked_for(response)

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


def _check_kinds(url: Any, headers: Any, request: Any, parse: Any) -> None:
    """Raise a TypeError for what is not even of the right kind."""
    if not isinstance(url, str):
        raise TypeError(f"`url` must be a text such as 'http://host:8000/score', got {url!r}.")
    pairs = headers.items() if isinstance(headers, Mapping) else ()
    texts = all(isinstance(text, str) for pair in pairs for text in pair)
    if headers is not None and not (isinstance(headers, Mapping) and texts):
        # Its values may be keys: not shown.
        raise TypeError("`headers` must be a dict of texts, {name: value}, or None.")
    for name, function in (("request", request), ("parse", parse)):
        if not callable(function) and not (name == "request" and function is None):
            raise TypeError(f"`{name}` must be a function, got {function!r}.")


def _problem_of(url: str) -> str | None:
    """Return what the URL must do and does not."""
    if not url.startswith(("http://", "https://")):
        return "begin with http:// or https://"
    if any(character.isspace() or not character.isprintable() for character in url):
        return "have no white space"
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # read here, since it is only then looked at
    except ValueError as error:
        return f"be a URL with a port from 0 to 65535, if any ({error})"
    return None if parts.hostname else "name a host"


def _seconds_asked_for(response: Any) -> float:
    """Return the Retry-After of a refusal in seconds; 0 for none, or for a date."""
    if response.status not in (429, 503):
        return 0.0
    try:
        seconds = float(response.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0
    return seconds if seconds > 0 else 0.0  # a NaN is not


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
