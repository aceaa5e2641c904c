"""Score responses by a server that answers over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from threading import Event
from typing import Annotated, Any, NamedTuple

import httpx
from anyio import fail_after
from anyio.from_thread import start_blocking_portal
from pydantic import Field, HttpUrl

from trl.batch import Rollout, check_unicode
from trl.config import SettingsError, check_values
from trl.config.errors import hidden, refuse, shown, tokens_in
from trl.config.secrets import filled, masked
from trl.config.types import Count, NotNegative, Whole
from trl.evaluation.scores import (
    ScoringError,
    by_hand,
    described,
    failures_named,
    pairs_of,
    scoring_error,
    texts_of,
)
from trl.scored import Scored, number_entries

__all__ = ["EndpointScorer"]

Pairs = Sequence[tuple[str, str]]
Url = Annotated[HttpUrl, "a URL such as http://host:8000/score"]
Function = Annotated[Callable[..., Any], "a function"]

LONGEST_WAIT = 60.0
"""Seconds between two attempts, however many there were."""

LARGEST_ANSWER = 2**23
"""Bytes; a number for each of 4,000 tokens of 64 texts fits."""

ENCODINGS = ("", "identity", "gzip", "deflate")
"""Of an answer: 64 KiB of others, or of several in a chain, may unpack to any size."""

MAY_PASS = (httpx.NetworkError, TimeoutError, httpx.RemoteProtocolError)
"""What is tried again: of what cannot even be sent, no new try mends anything."""

A_DAY = 86_400
"""Seconds; the system's clocks cannot wait for any number of them."""


def scores_in(answer: Any) -> Any:
    """`scores` of `{"scores": [number, ...]}`, what is read unless `parse` is given."""
    if not isinstance(answer, dict) or "scores" not in answer:
        raise ValueError('the answer must be {"scores": [number, ...]}')
    return answer["scores"]


class _Answer(NamedTuple):
    status: int
    headers: httpx.Headers
    body: bytes

    def __str__(self) -> str:
        return shown(self.body.decode("utf-8", "replace"))


class EndpointScorer:
    """Scores from a server: POST `{"texts": [...]}`, answered by `{"scores": [...]}`, as JSON.

    Timeouts, connections that fail or break, and answers of status 429 or 5xx are tried again,
    after `backoff`, 2·`backoff`, 4·`backoff` … seconds, or after as many as a status 429 or 503
    asks for (Retry-After) if that is longer, at most 60. Any other answer that is not as many
    finite numbers as there were texts ends the scoring at once, and so does one of more than 8 MiB,
    before all of it is read. Redirections are not followed: a
    POST does not survive one, and `headers` may hold a key that is for this server only.

    Args:
        url: http:// or https://. A secret in it, or in `headers`, is written as ${NAME} and comes
            from the environment; it is shown nowhere.
        timeout: Seconds for a request, from the connection to the last byte of the answer.
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
        address = filled(url, "url") if isinstance(url, str) else url
        if isinstance(address, str) and re.search(r"//[^/?#]*@", address):
            fix = "send them in `headers`, as {'Authorization': 'Basic …'}"
            refuse("url", "hold no user and no password", fix=fix)
        checks = {
            "url": (Url, address),
            "request": (Function | None, request),
            "parse": (Function, parse),
            "timeout": (Annotated[float, Field(gt=0, le=A_DAY)], timeout),
            "retries": (Whole, retries),
            "backoff": (NotNegative, backoff),
            "batch_size": (Count, batch_size),
            "concurrency": (Count, concurrency),
        }
        try:
            check_values("EndpointScorer", checks)
        except SettingsError as error:
            found = [masked(problem, [str(url)]) for problem in error.found]
            raise SettingsError(error.owner, found) from None
        headers = {} if headers is None else headers
        if not isinstance(headers, Mapping) or not all(
            isinstance(text, str) for text in (*headers, *headers.values())
        ):  # not shown: its values may be keys
            refuse("headers", "be a dict of texts, {name: value}, or None", error=TypeError)
        self.url, self.given = address, url
        self.name = f"EndpointScorer({hidden(url.split('?')[0])})"  # what follows may be a key
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.batch_size, self.concurrency = batch_size, concurrency
        own = {name: filled(text, f"headers[{name!r}]") for name, text in headers.items()}
        self.headers = {"Content-Type": "application/json", **own}
        self._secrets = [*own.values(), *tokens_in(url)]
        self.request, self.parse = request, parse

    @by_hand
    def __call__(self, rollout: Rollout) -> Scored:
        """Score each response of a rollout that has its texts.

        Raises:
            ScoringError: naming the texts of the first request that failed for good.
        """
        questions = texts_of(rollout) if self.request is None else pairs_of(rollout)
        every, size = range(len(rollout)), self.batch_size
        batches = [(every[i : i + size], questions[i : i + size]) for i in every[::size]]
        stop, limits = Event(), httpx.Limits(max_connections=None)
        client = httpx.AsyncClient(timeout=None, limits=limits)
        with (
            ThreadPoolExecutor(self.concurrency) as pool,
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(client),
        ):
            post = partial(portal.call, self._post, client)
            asked = [pool.submit(self._ask, post, stop, rollout, *pair) for pair in batches]
            try:
                ready = wait(asked, return_when=FIRST_EXCEPTION).done
                entries = [entry for one in asked if one in ready for entry in one.result()]
            finally:  # after a failure or Ctrl-C nothing more is asked
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        with failures_named(self.name, rollout):
            return Scored.of(entries, rollout)

    def _ask(
        self,
        post: Callable[[bytes], _Answer],
        stop: Event,
        rollout: Rollout,
        rows: range,
        asked: list[Any],
    ) -> list[float | list[float]]:
        """Ask for some rows until there is an answer; return one entry for each."""
        with failures_named(self.name, rollout, rows):
            if self.request is None:
                check_unicode(asked, "texts")
            question = {"texts": asked} if self.request is None else self.request(asked)
            body = json.dumps(question, allow_nan=False).encode()
        asked_for = 0.0
        for attempt in range(1 + self.retries):
            if attempt and stop.wait(self._pause(attempt, asked_for)):
                break
            asked_for, cause = 0.0, None
            try:
                answer = post(body)
            except Exception as error:
                cause, problem, may_pass = error, _with_root(error), isinstance(error, MAY_PASS)
            else:
                if 200 <= answer.status < 300:
                    return self._read(answer, rollout, rows)
                problem = f"status {answer.status} and {answer}"
                may_pass = answer.status >= 500 or answer.status == 429
                asked_for = _seconds_asked_for(answer)
            if not may_pass:
                break
        tries = f"attempt {attempt + 1} of at most {1 + self.retries}"
        ended = f"with a timeout of {self.timeout} s, ended with {problem}"
        raise self._error(f"no scores: {tries}, {ended}", rollout, rows) from cause

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> _Answer:
        """Send a request and return the whole answer.

        Raises:
            TimeoutError: if it is not there in time, however steadily it comes.
            ValueError: if it is too large, or packed so that it might be.
        """
        found = bytearray()
        try:
            with fail_after(self.timeout):
                request = client.stream("POST", self.url, content=body, headers=self.headers)
                async with request as answer:
                    packed = answer.headers.get("Content-Encoding", "").lower()
                    if packed not in ENCODINGS:
                        raise ValueError(f"an answer in the encoding {shown(packed)}, not gzip")
                    async for chunk in answer.aiter_bytes():
                        found += chunk
                        if len(found) > LARGEST_ANSWER:
                            most = f"more than {LARGEST_ANSWER:,} bytes, for at most"
                            raise ValueError(f"an answer of {most} {self.batch_size} texts")
        except TimeoutError:
            came = f"{len(found):,} bytes of its text had come"
            raise TimeoutError(f"no whole answer in {self.timeout} s; {came}") from None
        return _Answer(answer.status_code, answer.headers, bytes(found))

    def _pause(self, attempt: int, asked_for: float) -> float:
        """Return the seconds to wait before a new attempt, the first of which is 1."""
        own = self.backoff * 2.0 ** min(attempt - 1, 99)
        return min(max(own, asked_for), LONGEST_WAIT)

    def _read(self, answer: _Answer, rollout: Rollout, rows: range) -> list[Any]:
        try:
            found = self.parse(json.loads(answer.body))
        except Exception as error:  # JSONDecodeError, and whatever `parse` raises
            problem = f"an answer that cannot be read ({described(error)}): {answer}"
            raise self._error(problem, rollout, rows) from error
        with failures_named(self.name, rollout, rows):
            return number_entries(found, len(rows))

    def _error(self, problem: str, rollout: Rollout, rows: range) -> ScoringError:
        told = masked(f"{self.name} gave {problem}.", [self.given], self._secrets)
        return scoring_error(told, rollout, rows, suspects=False)


def _with_root(error: BaseException) -> str:
    """Return an exception and what it all began with, as that a connection was refused."""
    root = error
    while isinstance(error, httpx.ConnectError) and (before := root.__cause__ or root.__context__):
        root = before
    return described(error) + ("" if str(root) in str(error) else f" ({described(root)})")


def _seconds_asked_for(answer: _Answer) -> float:
    """Return the Retry-After of a refusal in seconds; 0 for none, or for a date."""
    try:
        seconds = float(answer.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0
    return seconds if seconds > 0 and answer.status in (429, 503) else 0.0  # a NaN is not
