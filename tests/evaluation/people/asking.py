"""A browser without a screen, for tests of the server."""

import asyncio

import httpx

from trl.evaluation.people.server import make_app
from trl.evaluation.people.store import Store

ORIGIN = "http://127.0.0.1:8321"


class Browser:
    """Keeps cookies and the token of the page, and asks the application itself."""

    def __init__(self, app, origin=ORIGIN):
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=origin)
        self.origin, self.csrf = origin, ""

    def get(self, path, **more):
        return asyncio.run(self.client.get(path, **more))

    def post(self, path, body, **headers):
        headers = {"Origin": self.origin, "X-CSRF-Token": self.csrf} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return asyncio.run(self.client.post(path, json=body, headers=headers))

    def join(self, token):
        assert self.post("/api/join", {"token": token}).status_code == 200
        return self

    def state(self):
        state = self.get("/api/state").json()
        self.csrf = state["csrf"]
        return state

    def vote(self, answer, **more):
        body = {"item": self.state()["item"]["id"], "client": "a", "answer": answer}
        return self.post("/api/vote", body | more)


def make_store(path, items, question="pair", **more):
    store = Store(path, make=True)
    store.ask(question, **more)
    store.add(items)
    return store


def signed_in(store, name="ann"):
    return Browser(make_app(store)).join(store.link(name))
