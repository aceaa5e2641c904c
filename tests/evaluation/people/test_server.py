"""Who may ask what of the page, and what is answered."""

import asyncio
import json
import re
import socket

import pytest

from tests.evaluation.people.asking import ORIGIN, Browser, make_store, signed_in
from tests.evaluation.people.payloads import PAYLOADS
from trl.evaluation.people.items import Item
from trl.evaluation.people.server import MOST_BYTES, TAGS, make_app, markdown, serve
from trl.evaluation.people.store import Store

ITEMS = [Item(f"p {i}", (f"a {i}", f"b {i}"), ("one", "two")) for i in range(3)]


@pytest.fixture
def store(tmp_path):
    store = make_store(tmp_path / "s", ITEMS, guidelines="Be *fair*.")
    yield store
    store.close()


@pytest.fixture
def ann(store):
    return signed_in(store)


def votes_of(store):
    return [vote for item in store.items() for vote in item.votes]


def test_an_answer_brings_the_next_item_and_can_be_undone(ann, store):
    first = ann.state()
    assert first["item"]["prompt"] == "p 0"
    assert set(first["item"]) == {"id", "prompt", "responses"}  # who wrote it is not told
    second = ann.vote(0, seconds=2.5, flag=True, comment="so so").json()
    assert second["item"]["prompt"] == "p 1"
    assert second["progress"] == {"own": 1, "items": 3, "votes": 1, "asked": 3}
    assert [vote["vote"] for vote in ann.get("/api/history").json()["votes"]] == [second["vote"]]
    undone = ann.post("/api/undo", {"vote": second["vote"]}).json()
    assert undone["item"]["id"] == first["item"]["id"]
    assert undone["undone"] == {
        "item": first["item"]["id"], "answer": 0, "flag": True, "comment": "so so"
    }  # fmt: skip
    assert votes_of(store) == []


def test_the_cookie_is_for_this_site_alone_and_survives_a_restart(ann, store):
    token = store.link("ann")
    told = ann.post("/api/join", {"token": token}).headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(told.split("; "))
    again = Browser(make_app(Store(store.path)))
    again.client.cookies = ann.client.cookies
    assert again.state()["name"] == "ann"
    assert ann.post("/api/join", {"token": token}).status_code == 403
    assert "a new one" in ann.post("/api/join", {"token": "x"}).json()["error"]


def test_a_link_for_another_browser_is_printed_when_one_is_used(store, capsys):
    Browser(make_app(store)).join(store.link("ann"))
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("trl: ann is here; for another browser: http://")
    other = Browser(make_app(store)).join(told.partition("#join=")[2])
    assert other.state()["name"] == "ann"


@pytest.mark.parametrize(
    "cookie", ["", "1", "1.", "1.00", "2.{sign}", "01.{sign}", "1.é", "x" * 999]
)
def test_no_other_cookie_is_good(cookie, ann, store):
    (name, value), *_ = ann.client.cookies.items()
    stranger = Browser(make_app(store))
    written = cookie.format(sign=value.partition(".")[2]).encode()
    answer = stranger.get("/api/state", headers={"Cookie": name.encode() + b"=" + written})
    assert answer.status_code == 401
    assert "link" in answer.json()["error"]
    assert store.name(1) == "ann"


def test_writing_needs_the_token_of_the_page(ann, store):
    ann.state()
    ann.csrf = ""
    body = {"item": 1, "client": "a", "answer": 0}
    for path, sent in (("/api/vote", body), ("/api/undo", {"vote": 1})):
        told = ann.post(path, sent)
        assert (told.status_code, "load it again" in told.json()["error"]) == (403, True)
    assert votes_of(store) == []


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1:8321.evil.example"],
)
def test_another_page_may_not_ask(origin, ann, store):
    assert ann.vote(0).status_code == 200
    told = ann.post("/api/undo", {"vote": 1}, Origin=origin)
    assert told.status_code == 403
    assert ann.get("/api/state", headers={"Origin": origin}).status_code == 403
    assert len(votes_of(store)) == 1
    without = ann.client.build_request("POST", "/api/undo", json={"vote": 1})
    assert asyncio.run(ann.client.send(without)).status_code == 403


@pytest.mark.parametrize(
    ("host", "good"),
    [
        *(("127.0.0.1:8321", True), ("localhost", True), ("[::1]:99", True), ("10.0.0.7", True)),
        *(("evil.example", False), ("evil.example:8321", False), ("", False), ("a@b", False)),
        *(("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("me.lan", True)),
        ("ME.lan:80", True),
    ],
)
def test_only_names_of_this_machine_are_answered(host, good, store):
    browser = Browser(make_app(store, hosts=["me.lan"]))
    status = browser.get("/", headers={"Host": host}).status_code
    assert status == (200 if good else 421)


def test_every_answer_has_the_headers_that_keep_the_page_to_itself(ann):
    paths = ["/", "/label.js", "/label.css", "/api/state", "/api/history", "/nothing"]
    for answer in [*map(ann.get, paths), ann.post("/api/vote", {}, Origin="http://evil.example")]:
        policy = dict(
            each.strip().partition(" ")[::2]
            for each in answer.headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        *("/../store.py", "/label.js/../../items.py", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd"),
        *("/page/index.html", "/label.js%00", "/votes.sqlite"),
    ],
)
def test_no_path_of_a_request_is_opened(path, ann):
    assert ann.get(path).status_code == 404


def test_the_page_asks_for_nothing_outside_and_has_no_script_in_it(ann):
    page = ann.get("/").text
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,", "/label.css", "/label.js"]
    assert not re.search(r"<script(?! src=)|style=|\son\w+=", page)
    assert "<em>fair</em>" in page
    assert "fair" not in Browser(ann.client._transport.app).get("/").text  # who is not signed in
    for name in ("/label.js", "/label.css"):
        assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacent|eval\(|@import",
                             ann.get(name).text)  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        *({}, {"item": "1"}, {"item": True}, {"item": -1}, {"item": 2**63}, {"client": ""}),
        *({"client": "x" * 65}, {"client": 5}, {"answer": None}, {"answer": [0]}, {"answer": {}}),
        *({"seconds": -1}, {"seconds": "1"}, {"seconds": float("inf")}, {"seconds": 10**300}),
        *({"flag": 1}, {"comment": 3}, {"comment": "\ud800"}, {"answer": 10**60}, {"client": "é"}),
    ],
)
def test_what_is_no_vote_is_told_and_changes_nothing(body, ann, store):
    whole = {"item": ann.state()["item"]["id"], "client": "a", "answer": 0} if body else {}
    ann.state()
    headers = {"Origin": ORIGIN, "X-CSRF-Token": ann.csrf, "Content-Type": "application/json"}
    sent = json.dumps(whole | body).encode()
    answer = asyncio.run(ann.client.post("/api/vote", content=sent, headers=headers))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]
    assert votes_of(store) == []


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [
        (b"x" * (MOST_BYTES + 1), "application/json", 413),
        (b'{"item": 1', "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"[" * 50000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"item=1", "application/x-www-form-urlencoded", 415),
        (b'{"item": 1}', "text/plain", 415),
    ],
)
def test_what_is_no_json_is_told(data, kind, status, ann, store):
    ann.state()
    headers = {"Origin": ORIGIN, "X-CSRF-Token": ann.csrf, "Content-Type": kind}
    answer = asyncio.run(ann.client.post("/api/vote", content=data, headers=headers))
    assert answer.status_code == status
    assert votes_of(store) == []


def test_clashes_are_told_in_words(ann, store):
    ben = signed_in(store, "ben")
    item = ann.state()["item"]["id"]
    ben.state()
    told = ben.post("/api/vote", {"item": item, "client": "b", "answer": 0})
    assert (told.status_code, told.json()["code"]) == (409, "leased")
    first = ann.vote(0)
    again = ann.post("/api/vote", {"item": item, "client": "a", "answer": 0})
    assert again.json()["vote"] == first.json()["vote"]
    told = ann.post("/api/vote", {"item": item, "client": "c", "answer": 0})
    assert (told.status_code, told.json()["code"]) == (409, "answered")
    told = ann.post("/api/vote", {"item": 99, "client": "d", "answer": 0})
    assert (told.status_code, told.json()["code"]) == (404, "gone")
    assert len(votes_of(store)) == 1


def test_a_full_disk_is_told_to_who_votes(ann, store):
    ann.state()
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages}")
    told = ann.vote(0, comment="c" * 9000)
    assert told.status_code == 503
    assert "the disk is full" in told.json()["error"]
    store.db.execute("PRAGMA max_page_count = 100000")
    assert ann.vote(0, comment="c" * 9000).status_code == 200


@pytest.mark.parametrize("payload", PAYLOADS)
def test_guidelines_are_text_with_marks_and_no_more(payload):
    html = markdown(f"# Rules\n\n{payload}\n\n* one\n* {payload}\n\n[x]({payload})")
    assert set(re.findall(r"</?([a-zA-Z][\w-]*)", html)) <= TAGS
    attributes = re.findall(r"<\w+((?:\s+[\w-]+(?:=\"[^\"]*\")?)*)\s*/?>", html)
    names = {name for each in attributes for name in re.findall(r"([\w-]+)=\"", each)}
    assert names <= {"href", "rel"}
    targets = re.findall(r'href="([^"]*)"', html)
    assert all(re.match(r"https?://|(?![a-zA-Z][\w+.-]*:)", each) for each in targets), targets


def test_no_answer_waits_for_another_packet(store, monkeypatch):
    import uvicorn

    seen = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: seen.extend(s.proto for s in sockets)
    )
    addresses = []
    serve(store, "127.0.0.1", 0, started=addresses.append)
    assert seen == [socket.IPPROTO_TCP]  # asyncio sets TCP_NODELAY of those only
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", addresses[0])
