"""Environments of OpenEnv: the client of its package, of which only the address differs."""

import json
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import httpx
import pytest

from trl.environments import EpisodeError, OpenEnv, World


@pytest.fixture
def address():
    """A server of games of guessing a number, a session for each client."""
    sessions = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            told, game = json.loads(self.rfile.read(length)), self.headers["Session"]
            answer = {"observation": {"text": "Guess.", "round": 0}, "reward": None, "done": False}
            if self.path == "/reset":
                sessions[game] = told["seed"] % 10 + told.get("more", 0)
            else:
                right = told["guess"].strip() == str(sessions[game])
                answer["observation"]["text"] = "Right." if right else f"Not {told['guess']}."
                answer |= {"reward": float(right), "done": right}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class GenericEnvClient:
    """The interface of the client of OpenEnv 0.2 to 0.10, in asynchronous code."""

    def __init__(self, base_url):
        headers = {"Session": str(id(self))}
        self.client = httpx.AsyncClient(base_url=base_url, headers=headers, trust_env=False)

    async def reset(self, **told):
        return await self._post("/reset", told)

    async def step(self, action):
        return await self._post("/step", action)

    async def close(self):
        await self.client.aclose()

    async def _post(self, path, told):
        return SimpleNamespace(**(await self.client.post(path, json=told)).json())


@pytest.fixture
def package(monkeypatch):
    package = ModuleType("openenv")
    package.GenericEnvClient = GenericEnvClient
    monkeypatch.setitem(sys.modules, "openenv", package)


def test_a_game_of_a_server_is_played_by_its_address(address, package):
    world = World(partial(OpenEnv, address, action="guess", told="text", columns=["more"]))
    assert world.gives_rewards
    assert world.schemas({}) == []  # a game, without tools
    assert world.reset([{"more": 0}, {"more": 1}], seeds=[3, 3]) == ["Guess."] * 2
    wrong, right = world.respond([0, 1], ["4", "4"], [[], []])
    assert (wrong.messages[0]["content"], wrong.reward, wrong.done) == ("Not 4.", 0, False)
    assert (right.messages[0]["content"], right.reward, right.done) == ("Right.", 1, True)
    with pytest.raises(EpisodeError, match=r"OpenEnv.reset.*`columns` must.*\['more'\].*row 0"):
        world.reset([{"prompt": "Play."}], seeds=[0])
    world.close()
    whole = World(partial(OpenEnv, address, action="guess"))
    assert json.loads(*whole.reset([{}], seeds=[0])) == {"text": "Guess.", "round": 0}
    whole.close()
    with pytest.raises(
        EpisodeError, match=r"`told` must be a field .* got txt: one of \['text', 'r"
    ):
        World(partial(OpenEnv, address, told="txt")).reset([{}], seeds=[0])


def test_what_is_not_there_is_told(package, monkeypatch):
    with pytest.raises(EpisodeError, match=r"OpenEnv.reset.*ConnectError.*\(row 0\)"):
        World(partial(OpenEnv, "http://127.0.0.1:9")).reset([{}], seeds=[0])
    monkeypatch.setitem(sys.modules, "openenv", None)
    with pytest.raises(EpisodeError, match="OpenEnv needs the package openenv: pip install"):
        World(partial(OpenEnv, "http://127.0.0.1:9"))
