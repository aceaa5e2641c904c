"""Classes of the forms that TRL documents, the plain form, and what is told of those that are not.

The clients of the Echo and Wordle environments have the names and answers of OpenEnv's; the
servers that they talk to are here, so that nothing but the address differs.
"""

import json
import random
import sys
import threading
import types
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Literal

import httpx
import numpy as np
import pytest

from trl.environments import EpisodeError, Turn, World, tool
from trl.environments.calls import BadCall, Call


def called(world, name, slot=0, **arguments):
    """Make one call; return the text that the model is told."""
    (reply,) = world.respond([slot], [""], [[Call(name, arguments)]])
    return reply.messages[0]["content"]


class IncrementEnv:
    """The task is made up in `reset`: there are no prompts."""

    def reset(self, **kwargs) -> str | None:
        self.counter = 0
        self.target = random.randint(1, 6)
        return f"Increment the counter by {self.target}."

    def get_reward(self) -> float:
        return float(self.counter == self.target)

    def increment(self, step: int) -> int:
        """
        Add to the counter.

        Args:
            step: How much to add.

        Returns:
            The new value.
        """
        self.counter += step
        return self.counter


class IncrementToTarget:
    """The task is in the rows; the tool has no docstring."""

    def reset(self, target, **kwargs) -> None:
        self.counter = 0
        self.target = target

    def get_reward(self) -> float:
        return float(self.counter == self.target)

    def increment(self, step: int) -> int:
        self.counter += step
        return self.counter


def test_tasks_that_reset_makes_up():
    world = World(IncrementEnv)
    assert world.gives_rewards
    assert world.schemas({}) == [
        {
            "type": "function",
            "function": {
                "name": "increment",
                "description": "Add to the counter.",
                "parameters": {
                    "type": "object",
                    "properties": {"step": {"type": "integer", "description": "How much to add."}},
                    "required": ["step"],
                },
                "return": {"type": "integer", "description": "The new value."},
            },
        }
    ]
    prompts = world.reset([{}, {}, {}], seeds=[7, 7, 8])
    assert prompts[0] == prompts[1]
    assert prompts[0].startswith("Increment the counter by ")
    target = int(prompts[0].removesuffix(".").rpartition(" ")[2])
    replies = world.respond([0, 1], ["", ""], [[Call("increment", {"step": target})], []])
    assert replies[0].messages == ({"role": "tool", "name": "increment", "content": str(target)},)
    assert (replies[0].calls, replies[0].failed, replies[0].done) == (1, 0, False)
    assert replies[1].messages == ()
    assert replies[1].calls == 0
    assert world.rewards([0, 1]) == [1.0, 0.0]
    assert world.instances([1])[0].counter == 0


def test_tasks_that_are_in_the_rows_and_a_tool_without_a_docstring():
    with pytest.warns(UserWarning, match=r"docstring of IncrementToTarget.increment does not tell"):
        world = World(IncrementToTarget)
    (schema,) = world.schemas({})
    assert schema["function"]["description"] == "increment"
    step = {"type": "integer", "description": "step"}
    assert schema["function"]["parameters"]["properties"] == {"step": step}
    rows = [{"prompt": "to 1", "target": 1}, {"prompt": "to 2", "target": 2}]
    assert world.reset(rows, seeds=[0, 1]) == [None, None]
    one = [Call("increment", {"step": 1})]
    world.respond([0, 1], ["", ""], [one, [*one, *one]])
    assert world.rewards([0, 1]) == [1.0, 1.0]
    world.reset(rows, seeds=[0, 1])  # the same environments, begun again
    assert world.rewards([0, 1]) == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"`row 1` must have the columns .*reset.* \['target'\]"):
        world.reset([{"target": 1}, {"prompt": "to 2"}], seeds=[0, 1])


@pytest.fixture
def address():
    """A server that echoes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["message"]
            answer = {"echoed_message": message, "reward": len(message) / 10}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"observation": answer}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_environment_behind_a_client_by_its_address(address, monkeypatch):
    class EchoAction:
        def __init__(self, message):
            self.message = message

    class EchoEnv:
        def __init__(self, base_url):
            self.client = httpx.Client(base_url=base_url)

        def step(self, action):
            answer = self.client.post("/step", json={"message": action.message}).json()
            return SimpleNamespace(observation=SimpleNamespace(**answer["observation"]))

    package = types.ModuleType("echo_env")
    package.EchoEnv, package.EchoAction = EchoEnv, EchoAction
    monkeypatch.setitem(sys.modules, "echo_env", package)

    class MyEchoEnv:
        def __init__(self):
            from echo_env import EchoEnv

            self.env = EchoEnv(base_url=address)

        def reset(self) -> None:
            self._reward = None

        def step(self, message: str) -> str:  # a tool, since it returns no Turn
            """
            Let the environment say a message.

            Args:
                message: What it is to say.
            """
            from echo_env import EchoAction

            observation = self.env.step(EchoAction(message=message))
            self._reward = observation.observation.reward
            return observation.observation.echoed_message

        def get_reward(self) -> float:
            return self._reward

    world = World(MyEchoEnv)
    assert [each["function"]["name"] for each in world.schemas({})] == ["step"]
    assert world.reset([{"prompt": "Echo!"}] * 3, seeds=[0, 0, 0]) == [None] * 3
    texts = "Hello", "🙂 half"
    replies = world.respond([0, 2], ["", ""], [[Call("step", {"message": x})] for x in texts])
    assert [each.messages[0]["content"] for each in replies] == list(texts)
    assert world.rewards([0, 1, 2]) == [0.5, None, 0.6]  # None: nothing was called
    for each in world.instances([0, 1, 2]):
        each.env.client.close()


class TextArenaEnv:
    """Wordle as the client of OpenEnv's TextArena tells it: the whole game in each answer."""

    def __init__(self, base_url):
        self.base_url = base_url

    def reset(self):
        self.told = "Guess the word."
        return self._result(0.0, False)

    def step(self, action):
        word = action.message.strip("[]")
        marks = [
            "G" if a == b else "Y" if a in "crane" else "X"
            for a, b in zip(word, "crane", strict=False)
        ]
        self.told += f"\n{' '.join(word)}\n{' '.join(marks)}"
        return self._result(float(word == "crane"), word == "crane")

    def _result(self, reward, done):
        message = SimpleNamespace(content=self.told)
        observation = SimpleNamespace(messages=[message])
        return SimpleNamespace(observation=observation, reward=reward, done=done)


@dataclass
class TextArenaAction:
    message: str


class WordleEnv:
    def __init__(self):
        self.client = TextArenaEnv(base_url="http://127.0.0.1:8000")

    def reset(self, **kwargs) -> str | None:
        result = self.client.reset()
        self._before = result.observation.messages[0].content
        self.reward = 0.0
        self.done = False
        return self._before

    def guess(self, guess: str) -> str:
        """
        Guess a word.

        Args:
            guess: The word, as '[abcde]'
        """
        if self.done:
            raise ValueError("Game over.")
        result = self.client.step(TextArenaAction(message=guess))
        everything = result.observation.messages[0].content
        told, self._before = everything[len(self._before) :], everything
        self.reward = result.reward
        self.done = result.done
        return told


def test_a_game_that_ends_by_an_error():
    world = World(WordleEnv)
    assert world.reset([{"prompt": "Play."}], seeds=[0]) == ["Guess the word."]
    assert called(world, "guess", guess="[crisp]") == "\nc r i s p\nG G X X X"
    assert called(world, "guess", guess="[crane]") == "\nc r a n e\nG G G G G"
    (reply,) = world.respond([0], [""], [[Call("guess", {"guess": "[crane]"})]])
    assert reply.messages[0]["content"] == "Error: ValueError: Game over."
    assert reply.failed == 1
    assert not world.gives_rewards
    assert world.rewards([0]) == [None]  # it has no get_reward,
    assert world.instances([0])[0].reward == 1.0  # a function of the environments does


def multiply(a: int, b: int) -> int:
    """Multiply two integers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


async def async_add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def test_tools_without_a_class():
    world = World(tools=[multiply, async_add])
    assert not world.gives_rewards
    assert [each["function"]["name"] for each in world.schemas({})] == ["multiply", "async_add"]
    assert world.reset([{"prompt": "6 · 7?"}], seeds=[0]) == [None]
    calls = [Call("multiply", {"a": 6, "b": 7}), Call("async_add", {"a": "6", "b": 7})]
    (reply,) = world.respond([0], [""], [calls])
    assert [each["content"] for each in reply.messages] == ["42", "13"]  # "6" is a number as well
    assert world.rewards([0]) == [None]
    assert world.instances([0]) == [None]
    world.close()


class Guess:
    """The plain form."""

    def reset(self, most: int = 9, seed: int = 0) -> str:
        self.number = random.Random(seed).randint(1, most)
        return f"Guess a number up to {most}."

    def step(self, text: str) -> "Turn":
        right = int(text) == self.number
        return Turn("Right." if right else "No.", reward=float(right) - 0.1, done=right)

    def helper(self, untyped):
        raise AssertionError("no tool")


def test_the_plain_form():
    world = World(Guess)
    assert world.schemas({}) == []
    assert world.gives_rewards
    rows = [{"most": 5, "other": 1}, {}]
    assert world.reset(rows, seeds=[3, 4]) == ["Guess a number up to 5.", "Guess a number up to 9."]
    number = random.Random(3).randint(1, 5)
    with pytest.warns(UserWarning, match=r"Guess\.step raised ValueError"):
        replies = world.respond([0, 1], [str(number), "nine"], [[BadCall("", "not looked at")], []])
    assert replies[0].messages == ({"role": "user", "content": "Right."},)
    assert (replies[0].reward, replies[0].done, replies[0].failed) == (0.9, True, 0)
    assert replies[1].messages[0]["content"].startswith("Error: ValueError: invalid literal")
    assert (replies[1].reward, replies[1].done, replies[1].failed) == (0.0, False, 1)
    assert world.rewards([0, 1]) == [None, None]


@pytest.mark.parametrize("annotation", [Turn, "Turn", "trl.environments.Turn", "'Turn'"])
def test_a_step_is_known_by_what_it_returns(annotation):
    def step(self, text: str):
        """Say something.

        Args:
            text: What.
        """
        return Turn(text)

    step.__annotations__["return"] = annotation
    kind = type("Parrot", (), {"step": step, "reset": lambda self: None})
    assert World(kind).schemas({}) == []
    step.__annotations__["return"] = str
    assert len(World(kind).schemas({})) == 1


def test_rows_name_their_environment():
    world = World({"count": IncrementEnv, "words": WordleEnv})
    rows = [{"environment": "words"}, {"environment": "count"}, {"environment": "words"}]
    names = [world.schemas(row)[0]["function"]["name"] for row in rows]
    assert names == ["guess", "increment", "guess"]
    prompts = world.reset(rows, seeds=[0, 1, 2])
    assert prompts[0] == prompts[2] == "Guess the word."
    assert called(world, "increment", slot=0, step=1).startswith("Error: there is no tool")
    first, _, third = world.instances([0, 1, 2])
    assert first is not third
    made = iter(range(3))
    counted = World({"a": lambda: next(made) is None or IncrementEnv()})
    counted.reset([{"environment": "a"}] * 2, seeds=[0, 1])
    counted.reset([{"environment": "a"}] * 2, seeds=[0, 1])
    assert next(made) == 2  # made once each
    match = r"`row 1, environment` must be one of \['count', 'words'\], got 'word' Did you mean"
    with pytest.raises(ValueError, match=match):
        world.reset([rows[0], {"environment": "word"}], seeds=[0, 1])
    assert world.instances([0])[0] is first  # nothing was begun
    with pytest.raises(ValueError, match="got None"):
        world.check([{}])


def test_the_column_that_routes_is_not_handed_on():
    class Asks:
        def reset(self, *args, **row) -> str:
            return str(row)

        def step(self, text: str) -> Turn:
            return Turn()

    row = {"environment": "a", "x": 1}
    assert World({"a": Asks}).reset([row], seeds=[0]) == ["{'x': 1}"]
    assert World(Asks).reset([row], seeds=[0]) == [str(row)]


# -- what is told ----------------------------------------------------------------------------------


class NoReset:
    def move(self, to: str) -> str:
        """Move."""


class NoTools:
    def reset(self):
        pass


class Untyped:
    def reset(self):
        pass

    def move(self, to):
        """Move."""


class UnsaidStep(Untyped):
    move = None

    def step(self, text):
        """Play."""


class Odd:
    def reset(self):
        pass

    def move(self, to: httpx.Client) -> str:
        """Move.

        Args:
            to: Where.
        """


class Lost:
    def reset(self):
        pass

    def move(self, to: "Nowhere") -> str:  # noqa: F821
        """Move."""


class Greedy:
    def reset(self):
        pass

    def step(self, text: str, more: int) -> Turn:
        """Play."""


class Yields(IncrementEnv):
    def more(self) -> str:
        """Say more, bit by bit."""
        yield "more"


class Away(IncrementEnv):
    def __init__(self):
        raise ConnectionError("nobody answers")


class Needs(IncrementEnv):
    def __init__(self, size):
        pass


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"environment": IncrementEnv()}, r"`environment` must be a class.*pass the class itself"),
        ({"environment": NoReset}, r"`environment` must have a method `reset`, got NoReset"),
        ({"environment": NoTools}, r"must have tools .public methods., or .*-> Turn, got NoTools"),
        ({"environment": {"a": NoTools}}, r"`environment\['a'\]` must have tools"),
        ({"environment": {}}, r"must name at least one"),
        (
            {"environment": Untyped},
            r"`Untyped.move` must have .*types, got to: write such as to: s",
        ),
        ({"environment": UnsaidStep}, r"plain form def step.self, text: str. -> Turn"),
        ({"environment": Odd}, r"`Odd.move` must have types that JSON has"),
        ({"environment": Lost}, r"`Lost.move` must have types that are there, got name 'Nowhere'"),
        ({"environment": Greedy}, r"`Greedy.step` must take the text of the policy and no more"),
        ({"environment": Needs}, r"without arguments, got Needs.*functools.partial.Needs"),
        ({"environment": Yields}, r"`Yields.more` must return what .* got a function that yields"),
        ({"environment": Away}, r"make Away.., got ConnectionError: nobody answers"),
        ({"environment": IncrementEnv, "tools": [3]}, r"`tools` must be functions, got 3"),
        ({"tools": multiply}, r"`tools` must be a list of functions.*write \[...\] around it"),
        ({"environment": Guess, "tools": [multiply]}, r"`tools` must be empty beside Guess.step"),
        ({"tools": [multiply, multiply]}, r"names of their own, got \['multiply'\] twice"),
        ({"tools": [multiply], "seconds": 0}, r"`seconds` must be"),
        (
            {"tools": [multiply], "on_bad_call": "raise"},
            r"`on_bad_call` must be one of answer, end",
        ),
        ({}, r"must have tools"),
    ],
)
def test_what_is_not_of_the_contract_is_told(given, match):
    with pytest.raises((TypeError, ValueError, EpisodeError), match=match):
        World(**given)


def make_world(**methods):
    methods = {"reset": lambda self: None, **methods}
    return World(type("Maze", (), methods))


NO_PROMPTS = [3, {"role": "user"}, [{"role": "user"}], [1], [{"role": "user", "content": None}]]


@pytest.mark.parametrize("value", NO_PROMPTS)
def test_reset_returns_a_prompt_or_nothing(value):
    def step(self, text: str) -> Turn:
        return Turn()

    world = make_world(reset=lambda self: value, step=step)
    with pytest.raises(EpisodeError, match=r"`Maze.reset` must return a text, messages .* got"):
        world.reset([{}], seeds=[0])
    messages = [{"role": "user", "content": "Go."}]
    assert make_world(reset=lambda self: messages, step=step).reset([{}], [0]) == [messages]
    half = [{"role": "user", "content": "half \ud83d"}]
    (said,) = make_world(reset=lambda self: half, step=step).reset([{}], [0])
    assert said[0]["content"] == "half ?"  # it would have no tokens


def test_what_an_environment_changes_is_its_own():
    def reset(self, board):
        self.board = board
        board.append(len(board))

    world = make_world(reset=reset, step=Guess.step)
    row = {"board": [0]}
    world.reset([row, row], seeds=[0, 0])
    assert row == {"board": [0]}
    assert [each.board for each in world.instances([0, 1])] == [[0, 1]] * 2


def test_a_reset_that_raises_is_named_with_its_row():
    world = make_world(reset=lambda self, x=1: 1 / x and None, step=Guess.step)
    with pytest.raises(EpisodeError, match=r"`Maze.reset` must .* ZeroDivisionError.*\(row 1\)"):
        world.reset([{}, {"x": 0}], seeds=[0, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", [1], {}])
def test_rewards_are_finite_numbers(value):
    def step(self, text: str) -> Turn:
        return Turn("on", reward=value)

    world = make_world(step=step, get_reward=lambda self: value)
    world.reset([{}], seeds=[0])
    with pytest.raises(EpisodeError, match=r"`Maze.get_reward` must be a finite number, got"):
        world.rewards([0])
    with pytest.raises(EpisodeError, match=r"`reward of Maze.step` must be a finite number, got"):
        world.respond([0], [""], [[]])


def test_a_reward_may_be_any_number_or_come_from_a_coroutine():
    async def later(self):
        return np.float32(0.5)

    for method, expected in [(later, 0.5), (lambda self: True, 1.0), (lambda self: None, None)]:
        world = make_world(step=Guess.step, get_reward=method)
        world.reset([{}], seeds=[0])
        assert world.rewards([0]) == [expected]
        world.close()


def test_a_get_reward_that_raises_and_a_step_without_a_turn_are_errors():
    def step(self, text: str) -> Turn:
        return "on"

    world = make_world(step=step, get_reward=lambda self: 1 / 0)
    world.reset([{}], seeds=[0])
    with pytest.raises(EpisodeError, match=r"`Maze.get_reward` must return .*ZeroDivisionError"):
        world.rewards([0])
    with pytest.raises(EpisodeError, match=r"`Maze.step` must return a Turn, got 'on'"):
        world.respond([0], [""], [[]])


# -- words for the model ---------------------------------------------------------------------------


class Side(Enum):
    LEFT = "left"
    RIGHT = "right"


def choose(
    side: Literal["left", "right"], times: int = 1, other: Side | None = None, *, say: str = ""
) -> dict:
    """Choose.

    Args:
        side: Which.
        times: How often.
        other: Another.
        say: Something.
    """
    return {"side": side, "times": times, "other": other, "say": say}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"side": "left"}, '{"side": "left", "times": 1, "other": null, "say": ""}'),
        ({"side": "left", "times": "3"}, '{"side": "left", "times": 3, "other": null, "say": ""}'),
        ({"side": "left", "say": 5}, '{"side": "left", "times": 1, "other": null, "say": "5"}'),
        ({"side": "left", "other": "right"}, '"other": "Side.RIGHT"'),
        ({}, "choose(side: Literal['left', 'right'], times: int = 1, "),
        ({}, "side is missing."),
        ({"side": "up"}, "side should be 'left' or 'right', got 'up'"),
        ({"side": "left", "times": "x"}, "times should be a valid integer, got 'x'"),
        ({"side": "left", "far": 1}, "there is no far."),
        ({"x": 1, "times": []}, "side is missing; there is no x; times should be a valid integer"),
    ],
)
def test_arguments_are_read_as_their_types_or_the_model_is_told(arguments, told):
    world = World(tools=[choose])
    world.reset([{}], seeds=[0])
    answer = called(world, "choose", **arguments)
    assert told in answer
    assert answer.startswith("{") or answer.startswith("Error: choose(side: ")


def test_calls_that_cannot_be_made_are_answered():
    world = World(tools=[multiply])
    world.reset([{}], seeds=[0])
    calls = [Call("divide", {}), BadCall("{", "The JSON ends too early."), Call("multiply", {})]
    (reply,) = world.respond([0], [""], [[*calls, Call("multiply", {"a": 2, "b": 3})]])
    told = [each["content"] for each in reply.messages]
    assert told[:2] == [
        "Error: there is no tool 'divide', there is multiply.",
        "Error: The JSON ends too early.",
    ]
    assert told[3] == "6"
    assert (reply.calls, reply.failed, reply.done) == (4, 3, False)
    assert [each["name"] for each in reply.messages] == ["divide", "error", "multiply", "multiply"]
    assert {each["role"] for each in reply.messages} == {"tool"}


class Speechless(Exception):
    def __str__(self):
        raise ValueError


def test_calls_that_cannot_even_be_told_of_are_answered():
    def fail() -> None:
        """Fail."""
        raise Speechless

    deep = []
    for _ in range(10**4):
        deep = [deep]
    world = World(tools=[fail, choose])
    world.reset([{}], seeds=[0])
    calls = Call("fail", {}), Call("choose", {"side": deep}), Call("\ud83d", {})
    (reply,) = world.respond([0], [""], [calls])
    told = [each["content"] for each in reply.messages]
    assert told[0] == "Error: Speechless"
    assert told[1].startswith("Error: RecursionError")
    assert reply.messages[2]["name"] == "?"
    "".join(told).encode()


def test_a_call_that_cannot_be_read_may_end_the_episode():
    def boom(x: int = 0) -> int:
        """Never called."""
        raise AssertionError

    with pytest.warns(UserWarning, match="does not tell"):
        world = World(tools=[boom], on_bad_call="end")
    world.reset([{}], seeds=[0])
    (reply,) = world.respond([0], [""], [[Call("boom", {}), BadCall("{", "Bad.")]])
    assert reply.done
    assert reply.messages == ()
    assert (reply.calls, reply.failed) == (2, 1)
    (reply,) = world.respond([0], [""], [[Call("boom", {})]])
    assert not reply.done
    assert "AssertionError" in reply.messages[0]["content"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "3"),
        (0.5, "0.5"),
        (None, "null"),
        (True, "true"),
        ("as it is\n", "as it is\n"),
        ({"ä": [1, (2,)]}, '{"ä": [1, [2]]}'),
        (np.arange(3), "[0, 1, 2]"),
        ({"x": np.float32(0.5), "y": {1}}, '{"x": 0.5, "y": "{1}"}'),
        ("half \ud83d", "half ?"),
        ({(1, 2): 3}, "Error: TypeError: keys must be str"),
    ],
)
def test_what_a_tool_returns_becomes_a_text(value, told):
    def answer() -> str:
        """Answer."""
        return value

    world = World(tools=[answer])
    world.reset([{}], seeds=[0])
    assert called(world, "answer").startswith(told)


def test_long_answers_are_cut():
    def answer(kind: str) -> str:
        """Answer.

        Args:
            kind: Of what.
        """
        if kind == "error":
            raise ValueError("x" * 10**6)
        return "x" * 10**6 if kind == "text" else ["x"] * 10**5

    world = World(tools=[answer], most_characters=100)
    world.reset([{}], seeds=[0])
    for kind in "text", "json", "error":
        told = called(world, "answer", kind=kind)
        assert len(told) == 100
        assert "… (cut: " in told
    assert called(World(tools=[answer]) and world, "answer", kind="text").startswith("xxx")

    def step(self, text: str) -> Turn:
        return Turn("x" * 10**6)

    game = World(type("Maze", (), {"reset": lambda self: None, "step": step}))
    game.reset([{}], seeds=[0])
    assert len(game.respond([0], [""], [[]])[0].messages[0]["content"]) == 4000


def test_a_tool_is_marked_by_a_decorator_or_by_attributes():
    marked = tool(process=True, seconds=2)(lambda: 0)
    assert (marked.process, marked.serial, marked.seconds) == (True, False, 2)
    assert tool(multiply) is multiply
    with pytest.raises(ValueError, match=r"`seconds` must be > 0, got 0"):
        tool(seconds=0)
