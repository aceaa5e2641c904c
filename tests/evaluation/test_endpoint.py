import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.evaluation.rollouts import make_rollout, without_texts
from trl.evaluation import EndpointScorer, ScoringError, score

ROLLOUT = make_rollout(*[("say ", "x" * n) for n in range(1, 6)])  # texts of 5 … 9 characters
LENGTHS = [5.0, 6.0, 7.0, 8.0, 9.0]


def lengths(texts):
    return 200, {"scores": [len(text) for text in texts]}


class Server(ThreadingHTTPServer):
    """Answers the n-th request by `answers[n]`, and all further ones by the last of them."""

    # a connection that the client has given up is closed without waiting for its thread
    daemon_threads = True
    block_on_close = False

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.questions = []
        self.headers = []
        self.times = []
        self.lock = threading.Lock()
        self.released = threading.Event()  # ends the answers that hang
        self.active = self.most_active = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/score?key=secret"

    def handle_error(self, request, client_address):
        pass  # a client that no longer waits for the answer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.questions)
            server.questions.append(question)
            server.headers.append(self.headers)
            server.times.append(time.monotonic())
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            answer = server.answers[min(number, len(server.answers) - 1)]
            if getattr(answer, "__qualname__", "").startswith("dripping"):
                answer(self)
                answer = "hang up"
            elif callable(answer):
                answer = answer(question.get("texts", question))
            if answer == "hang":
                server.released.wait(10)
            elif answer != "hang up":
                self.reply(*answer)
        finally:
            with server.lock:
                server.active -= 1

    def reply(self, status, answer, headers=None):
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(*answers):
    server = Server(answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def scorer_of(server, **settings):
    return EndpointScorer(server.url, **{"timeout": 5.0, "backoff": 0.01} | settings)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_scores_come_in_order_whatever_the_batches(batch_size):
    with serving(lengths) as server:
        scores = score(scorer_of(server, batch_size=batch_size), ROLLOUT).scores
    assert scores.tolist() == LENGTHS
    asked = sorted(len(question["texts"]) for question in server.questions)
    assert asked == {1: [1] * 5, 2: [1, 2, 2], 5: [5], 64: [5]}[batch_size]


def test_as_many_requests_at_a_time_as_asked_for():
    for concurrency in (1, 3):

        def after_the_others(texts, expected=concurrency):
            deadline = time.monotonic() + 5
            while server.most_active < expected and time.monotonic() < deadline:
                time.sleep(0.001)
            return lengths(texts)

        with serving(after_the_others) as server:
            scorer_of(server, batch_size=1, concurrency=concurrency)(ROLLOUT)
        assert server.most_active == concurrency


def test_headers_and_content_type():
    with serving(lengths) as server:
        scorer_of(server, headers={"Authorization": "Bearer token"})(ROLLOUT)
    assert server.headers[0]["Authorization"] == "Bearer token"
    assert server.headers[0]["Content-Type"] == "application/json"


def test_another_form_of_question_and_answer():
    def answer(question):
        return 200, [{"reward": len(item["output"])} for item in question["items"]]

    with serving(answer) as server:
        scores = scorer_of(
            server,
            request=lambda pairs: {"items": [{"input": q, "output": r} for q, r in pairs]},
            parse=lambda answer: [item["reward"] for item in answer],
        )(ROLLOUT).scores
    assert scores.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_rewards_for_each_token():
    rollout = make_rollout(("a", "b"), ("c", "d"))
    with serving((200, {"scores": [[1.0], [2.0, 3.0]]})) as server:
        assert scorer_of(server)(rollout).scores.tolist() == [[1.0, 0.0], [2.0, 3.0]]


@pytest.mark.parametrize("failure", [(500, {}), (503, b"busy"), (429, {}), "hang up", "hang"])
def test_what_may_pass_is_tried_again(failure):
    with serving(failure, failure, lengths) as server:
        scorer = scorer_of(server, retries=2, timeout=0.25 if failure == "hang" else 5.0)
        assert scorer(ROLLOUT).scores.tolist() == LENGTHS
    assert len(server.questions) == 3


def test_a_server_that_breaks_off_its_answer_is_asked_again():
    class Short(bytes):
        def __len__(self):  # announces more than it sends
            return 100

    with serving((200, Short(b'{"scores": [')), lengths) as server:
        assert scorer_of(server)(ROLLOUT).scores.tolist() == LENGTHS
    assert len(server.questions) == 2


def test_each_wait_is_twice_as_long_as_the_one_before():
    with serving((500, {})) as server, pytest.raises(ScoringError):
        scorer_of(server, retries=3, backoff=0.1)(ROLLOUT)
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    for wait, expected in zip(waits, [0.1, 0.2, 0.4], strict=True):
        assert wait >= expected


@pytest.mark.parametrize(
    ("failure", "attempts", "message"),
    [
        (
            (500, b"out of memory"),
            3,
            "attempt 3 of at most 3, .* ended with status 500 and 'out of memory'",
        ),
        (
            "hang",
            3,
            "attempt 3 of at most 3, .* ended with TimeoutError: no whole answer in 0.25 s",
        ),
        ("hang up", 3, "attempt 3 of at most 3, .* RemoteProtocolError"),
        ((400, b"no such model"), 1, "attempt 1 of at most 3, .* status 400 and 'no such model'"),
        ((404, b""), 1, "attempt 1 of at most 3, .* status 404"),
        ((302, b""), 1, "attempt 1 of at most 3, .* status 302"),
    ],
)
def test_what_does_not_pass_ends_the_scoring(failure, attempts, message):
    with serving(failure) as server:
        scorer = scorer_of(server, retries=2, timeout=0.25 if failure == "hang" else 5.0)
        with pytest.raises(ScoringError, match=message) as caught:
            score(scorer, ROLLOUT)
    assert len(server.questions) == attempts
    assert f"EndpointScorer(http://127.0.0.1:{server.server_port}/score) gave" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "row 0: 'say x', row 1: 'say xx', row 2: 'say xxx', and 2 more" in str(caught.value)


def dripping(part, pause, headers=b"Content-Type: text/plain"):
    """An answer that never ends: a part of it again and again, after a pause each time."""

    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n")
        while not handler.server.released.wait(pause):
            handler.wfile.write(part)

    return answer


ENDLESS = b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            dripping(b"1\r\n1\r\n", 0.05, ENDLESS),
            "no whole answer in 0.4 s; [1-9] bytes of its text",
        ),
        (dripping(b"X", 0.05), "no whole answer in 0.4 s; 0 bytes of its text"),
        (
            dripping(b"100000\r\n" + b"1" * 2**20 + b"\r\n", 0, ENDLESS),
            "an answer of more than 8,388,608 bytes, for at most 64 texts",
        ),
        (
            dripping(b"1\r\n1\r\n", 0, ENDLESS + b"Content-Encoding: gzip, gzip\r\n"),
            "an answer in the encoding 'gzip, gzip', not gzip",
        ),
    ],
    ids=["slow text", "slow headers", "endless text", "packed twice"],
)
def test_an_answer_without_end_is_given_up(answer, message):
    with serving(answer) as server:
        started = time.monotonic()
        timeout = 0.4 if "no whole" in message else 30
        with pytest.raises(ScoringError, match=message):
            scorer_of(server, timeout=timeout, retries=0)(ROLLOUT)
        assert time.monotonic() - started < 10


def test_a_server_that_is_not_there():
    with serving(lengths) as server:
        pass
    with pytest.raises(ScoringError, match="attempt 2 of at most 2.*ConnectionRefusedError"):
        scorer_of(server, retries=1)(ROLLOUT)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>hello</html>", "cannot be read .JSONDecodeError: .*: '<html>hello</html>'"),
        (b"\xff\xfe\x00", "cannot be read .UnicodeDecodeError"),
        ([1, 2, 3, 4, 5], r'the answer must be {"scores": .*: .\[1, 2, 3, 4, 5\]'),
        ({"score": [1, 2, 3, 4, 5]}, r'the answer must be {"scores": .*"score"'),
        ({"scores": [1, 2, 3, 4]}, "one number for each of the 5 responses, got a list of 4"),
        ({"scores": 1}, "one number for each of the 5 responses, got the number 1, not a list"),
        ({"scores": None}, "one number for each of the 5 responses, got None"),
        (
            {"scores": [1, 2, "3", 4, 5]},
            "got '3': return numbers, as of .*. At fault: row 2: 'say xxx'",
        ),
        ({"scores": [1, 2, 3, None, 5]}, "responses, got None. At fault: row 3: 'say xxxx'"),
        (b'{"scores": [1, NaN, 3, 4, 5]}', "got nan for 1 of 5 responses. At fault: row 1:"),
    ],
)
def test_a_malformed_answer_ends_the_scoring_at_once(answer, message):
    with serving((200, answer)) as server, pytest.raises(ScoringError, match=message):
        score(scorer_of(server), ROLLOUT)
    assert len(server.questions) == 1


def test_the_rows_of_the_request_that_failed_are_named_and_others_are_given_up():
    def answer(texts):
        if "say xxx" not in texts:
            return "hang"
        while len(server.questions) < 3:  # until all are on their way
            time.sleep(0.001)
        return 400, {}

    with serving(answer) as server:
        scorer = scorer_of(server, batch_size=2, concurrency=3, timeout=0.5, retries=50)
        started = time.monotonic()
        with pytest.raises(ScoringError, match="status 400") as caught:
            score(scorer, ROLLOUT)
    assert caught.value.rows == (2, 3)
    assert time.monotonic() - started < 5  # not 50 timeouts
    assert len(server.questions) == 3


def test_a_request_function_that_raises_is_named():
    with serving(lengths) as server, pytest.raises(ScoringError, match="raised KeyError: 'model'"):
        scorer_of(server, request=lambda pairs: {}["model"])(ROLLOUT)
    assert server.questions == []


def test_a_rollout_without_texts():
    with pytest.raises(ScoringError, match="the rollout must have texts"):
        EndpointScorer("http://127.0.0.1:9")(without_texts(ROLLOUT))


def test_bad_settings_are_reported_together():
    with pytest.raises(ValueError, match="`timeout` must be a finite number > 0 and <= 86400"):
        EndpointScorer("http://host", timeout=1e300)
    with pytest.raises(ValueError, match=r"`url` must be a URL .*`timeout`.*> 0.*`retries`"):
        EndpointScorer("localhost:8000", timeout=0, retries=-1)
    with pytest.raises(ValueError, match=r"`backoff`.*`batch_size`.*`concurrency`"):
        EndpointScorer("http://localhost", backoff=-1, batch_size=0, concurrency=0)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_for_a_pause_gets_it(status, monkeypatch):
    pauses = []
    monkeypatch.setattr(
        EndpointScorer,
        "_pause",
        lambda self, attempt, asked_for, own=EndpointScorer._pause: (
            pauses.append(own(self, attempt, asked_for)) or 0.0
        ),
    )
    answers = [(status, {}, {"Retry-After": text}) for text in ("2", "3600", "-1", "Fri, 31 Dec")]
    with serving(*answers, lengths) as server:
        assert scorer_of(server, retries=4)(ROLLOUT).scores.tolist() == LENGTHS
    assert pauses == [2.0, 60.0, 0.04, 0.08]


def test_a_pause_is_for_those_statuses_only():
    scorer = EndpointScorer("http://host", backoff=0.5)
    assert [scorer._pause(attempt, 0.0) for attempt in (1, 2, 3, 9, 9999)] == [0.5, 1, 2, 60, 60]
    with serving((500, {}, {"Retry-After": "9"}), lengths) as server:
        started = time.monotonic()
        assert scorer_of(server)(ROLLOUT).scores.tolist() == LENGTHS
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"headers": {"Name": "ключ"}}, "attempt 1 of at most 4, .* UnicodeEncodeError"),
        (
            {"headers": {"Name": "a\nb"}},
            "attempt 1 of at most 4, .* LocalProtocolError: Illegal header",
        ),
    ],
)
def test_what_cannot_be_sent_is_named_and_not_tried_again(settings, message):
    with serving(lengths) as server, pytest.raises(ScoringError, match=message):
        scorer_of(server, **settings)(ROLLOUT)


@pytest.mark.parametrize(
    "url",
    [
        None,
        "http://",
        "ftp://host",
        "http://:80/score",
        "http://host:99999",
        "http://host:port",
        "http://[::1",
    ],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match=r"`url` must be a URL such as .*, got (None|'[a-z]+://)"):
        EndpointScorer(url)


@pytest.mark.parametrize(
    "settings", [{"headers": "Name"}, {"headers": {"Name": 1}}, {"request": 1}, {"parse": None}]
)
def test_settings_of_another_type(settings):
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(settings))}` must be a"):
        EndpointScorer("http://host", **settings)


def test_texts_that_stand_apart_are_sent_with_a_space():
    with serving((200, {"scores": [1.0]})) as server:
        scorer_of(server)(replace(make_rollout(("w3", "w4")), texts_apart=True))
    assert server.questions == [{"texts": ["w3 w4"]}]
