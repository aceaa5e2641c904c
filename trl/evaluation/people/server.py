"""The page to judge on, and what it asks of the server.

    GET  /             the page, with label.js and label.css; with the guidelines once signed in
    POST /api/join     {token} → a cookie; a token is good once
    GET  /api/state    what is to be judged now
    POST /api/vote     {item, client, answer, seconds, flag, comment} → the next state
    POST /api/undo     {vote} → the state with its item
    POST /api/enough   {}: what is waited for goes on with the answers that there are → the state
    GET  /api/history  one's own answers

Whoever has the cookie is somebody of the store, also after a restart: it is signed with the secret
of the store. A request that writes must bring the token of `state` in its header X-CSRF-Token. The
host must be a number, localhost or a name that is allowed (no other name can be turned into the
address of this machine), the origin this page. No path is made of anything that a request says, and
a text of a model only ever leaves as JSON.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import re
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trl.config.errors import refuse
from trl.evaluation.people.asking import enough, waits
from trl.evaluation.people.store import Refused, Store, StoreError

__all__ = ["Page", "make_app", "markdown", "serve"]

MOST_BYTES = 64 * 1024
"""Of a request."""
STATUS = {"gone": 404, "answered": 409, "leased": 409, "bad": 400, "link": 403}
COOKIE_SECONDS = 400 * 24 * 3600
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
TAGS = {
    *("a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li"),
    *("ol", "p", "pre", "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}
"""Of guidelines: nothing that fetches, runs or styles."""


def make_app(store: Store, *, hosts: Iterable[str] = ()) -> ASGIApp:
    """Return the application of a store.

    Args:
        store: Whose question is set.
        hosts: Names besides localhost under which it may be asked.
    """
    page = {name: resources.files(__package__).joinpath("page", name).read_text("utf-8")
            for name in ("index.html", "label.js", "label.css")}  # fmt: skip
    server = _Server(store, page["index.html"])
    routes = [
        Route("/", server.page),
        Route("/label.js", _file(page["label.js"], "text/javascript")),
        Route("/label.css", _file(page["label.css"], "text/css")),
        Route("/api/state", server.state),
        Route("/api/history", server.history),
        Route("/api/join", server.join, methods=["POST"]),
        Route("/api/vote", server.vote, methods=["POST"]),
        Route("/api/undo", server.undo, methods=["POST"]),
        Route("/api/enough", server.enough, methods=["POST"]),
    ]
    handlers = {Refused: _refused, StoreError: _failed, HTTPException: _failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), hosts)  # type: ignore[arg-type]


def markdown(text: str) -> str:
    """Return Markdown as HTML with nothing in it that runs, loads or styles."""
    import nh3
    from markdown_it import MarkdownIt

    html = MarkdownIt("js-default").render(text)
    return nh3.clean(html, tags=TAGS, attributes={"a": {"href"}}, url_schemes={"http", "https"})


def serve(
    store: Store, host: str, port: int, *, started: Callable[[str], None] = lambda address: None
) -> None:
    """Answer until Ctrl-C.

    Args:
        store: See `make_app`.
        host: The address to listen on.
        port: 0: any that is free.
        started: Called with the address of the page, once it may be opened.
    """
    server, listener, address = _listening(store, host, port)
    with listener:
        started(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


class Page:
    """The page beside a program that goes on; in a thread, until it is closed or the program ends.

    Args:
        path: Of a store that is there, whose question is set.
        names: Who judges.
        host: The address to listen on.
        port: If it is taken, any that is free.

    Attributes:
        address: Of the page.
        links: What each of the names is to open, once.
    """

    def __init__(
        self, path: str | Path, names: Iterable[str], *, host: str = "127.0.0.1", port: int = 8321
    ) -> None:
        store = Store(path)  # of this thread alone
        try:
            self._server, listener, self.address = _listening(store, host, port)
        except ValueError:
            self._server, listener, self.address = _listening(store, host, 0)
        self.links = {name: f"{self.address}#join={store.link(name)}" for name in names}

        def run() -> None:
            with listener, contextlib.closing(store):
                self._server.run(sockets=[listener])

        self._thread = threading.Thread(target=run, name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.should_exit = True
        self._thread.join()


def _listening(store: Store, host: str, port: int) -> tuple[Any, socket.socket, str]:
    """Return a server that may be run, what it listens at already, and the address of its page."""
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its name, else asyncio does not see that it is TCP and each answer waits 40 ms (Nagle).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # who is told the address may ask at once, and waits for an answer
    except (OSError, OverflowError) as error:
        listener.close()
        rule = "be an address of this machine, with --port one that is free"
        refuse("--host", rule, f"{host}:{port} ({error})", "take another --port, or 0 for any")
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    app = make_app(store, hosts=(name,))
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    shown = f"[{name}]" if ":" in name else name
    return uvicorn.Server(config), listener, f"http://{shown}:{listener.getsockname()[1]}/"


class _Server:
    """Answers the requests of one store."""

    def __init__(self, store: Store, page: str) -> None:
        self.store = store
        self.cookie = f"trl_label_{store.fact('name')}"  # cookies know no ports
        self.empty = page.replace("{guidelines}", "")
        self.full = page.replace("{guidelines}", markdown(store.fact("guidelines") or ""))

    def _sign(self, text: str) -> str:
        return hmac.digest(self.store.secret, text.encode(), "sha256").hex()

    def _me(self, request: Request) -> int | None:
        """Return who asks, or None."""
        number, _, sign = request.cookies.get(self.cookie, "").partition(".")
        good = re.fullmatch("[0-9]{1,18}", number) and hmac.compare_digest(
            sign.encode(), self._sign(f"cookie {number}").encode()
        )
        return int(number) if good and self.store.name(int(number)) else None

    def _known(self, request: Request) -> int:
        me = self._me(request)
        if me is None:
            raise HTTPException(401, "Open the link that you were given.")
        return me

    async def _written(self, request: Request) -> tuple[int, dict[str, Any]]:
        """Return who writes and what."""
        me = self._known(request)
        sent = request.headers.get("x-csrf-token", "").encode()
        if not hmac.compare_digest(sent, self._sign(f"csrf {me}").encode()):
            raise HTTPException(403, "This page is out of date: load it again.")
        return me, await _body(request)

    def _state(self, me: int, **more: Any) -> JSONResponse:
        store, item, waiting = self.store, self.store.next(me), waits(self.store)
        state = {
            "name": store.name(me),
            "store": store.fact("name"),
            "csrf": self._sign(f"csrf {me}"),
            "question": store.fact("question"),
            "item": item and asdict(item),
            "progress": store.progress(me),
            "last": store.last(me),
            "waiting": waiting and {"left": waiting.left, "of": len(waiting.answers)},
        }
        return JSONResponse(state | more)

    async def page(self, request: Request) -> Response:
        html = self.empty if self._me(request) is None else self.full
        return Response(html, media_type="text/html")

    async def join(self, request: Request) -> Response:
        token = (await _body(request)).get("token")
        me = self.store.join(token if isinstance(token, str) else "")
        name = self.store.name(me) or ""
        link = f"{request.base_url}#join={self.store.link(name)}"
        print(f"trl: {name} is here; for another browser: {link}", file=sys.stderr, flush=True)
        response = JSONResponse({"name": name})
        value = f"{me}.{self._sign(f'cookie {me}')}"
        more: dict[str, Any] = {"httponly": True, "samesite": "strict", "max_age": COOKIE_SECONDS}
        response.set_cookie(self.cookie, value, **more)
        return response

    async def state(self, request: Request) -> Response:
        return self._state(self._known(request))

    async def history(self, request: Request) -> Response:
        return JSONResponse({"votes": self.store.history(self._known(request))})

    async def vote(self, request: Request) -> Response:
        me, body = await self._written(request)
        item, client = body.get("item"), body.get("client")
        seconds, flag, comment = body.get("seconds"), body.get("flag"), body.get("comment")
        _need(type(item) is int and 0 <= item < 2**63, "item")
        _need(isinstance(client, str) and 0 < len(client) <= 64 and client.isascii(), "client")
        plain = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        _need(seconds is None or (plain and 0 <= seconds < 1e9), "seconds")
        _need(isinstance(flag, bool | None), "flag")
        _need(comment is None or (isinstance(comment, str) and _whole(comment)), "comment")
        _need(isinstance(body.get("answer"), int | str), "answer")
        more = {"seconds": seconds, "flag": bool(flag), "comment": comment or ""}
        vote = self.store.vote(me, item, client, body["answer"], **more)
        return self._state(me, vote=vote)

    async def undo(self, request: Request) -> Response:
        me, body = await self._written(request)
        _need(type(body.get("vote")) is int and 0 <= body["vote"] < 2**63, "vote")
        return self._state(me, undone=self.store.undo(me, body["vote"]))

    async def enough(self, request: Request) -> Response:
        me, _ = await self._written(request)
        enough(self.store)
        return self._state(me)


class _Guard:
    """Turns away other hosts and origins, and adds the headers that keep a page to itself."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self.app, self.hosts = app, {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        app: Callable[..., Awaitable[None]] = self.app
        headers = Request(scope).headers
        host, origin = headers.get("host", ""), headers.get("origin")
        foreign = origin is not None and origin not in (f"http://{host}", f"https://{host}")
        if len(headers.getlist("host")) != 1 or not self._is_own(host):
            app = JSONResponse({"error": "This host is not known here."}, 421)
        elif foreign or (origin is None and scope["method"] not in ("GET", "HEAD")):
            app = JSONResponse({"error": "Another page may not ask this."}, 403)
        await app(scope, receive, with_headers)

    def _is_own(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return name in self.hosts


async def _body(request: Request) -> dict[str, Any]:
    """Return the object of a request."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "The request must be JSON.")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise HTTPException(413, f"A request must have at most {MOST_BYTES // 1024} KB.")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    _need(isinstance(body, dict), "request")
    return dict(body)


def _need(good: object, name: str) -> None:
    if not good:
        raise HTTPException(400, f"The {name} is missing or of the wrong form.")


def _whole(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def _file(text: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(text, media_type=kind)

    return answer


async def _refused(request: Request, error: Refused) -> Response:
    return JSONResponse({"error": str(error), "code": error.code}, STATUS[error.code])


async def _failed(request: Request, error: HTTPException | StoreError) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": "The answer could not be stored: " + str(error)}, 503)
