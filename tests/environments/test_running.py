"""Tools that raise, hang, draw, end their process; threads, the event loop and children."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import psutil
import pytest

from trl.environments import EpisodeError, Turn, World, tool
from trl.environments.calls import Call


class Base:
    def reset(self):
        pass


def world_of(*tools, rows=1, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The docstring of")
        world = World(tools=tools, **settings)
    world.reset([{}] * rows, seeds=range(rows))
    return world


def told(world, *names, **arguments):
    """Return what each row is told when it calls the tool of its name."""
    calls = [[Call(name, arguments)] for name in names]
    replies = world.respond(range(len(names)), [""] * len(names), calls)
    return [reply.messages[0]["content"] for reply in replies]


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]


def test_calls_of_a_batch_run_side_by_side_and_those_of_a_turn_in_order():
    together = threading.Barrier(4, timeout=20)
    seen = []

    def meet(x: int) -> int:
        seen.append(x)
        return together.wait() * 0 + x

    world = world_of(meet, rows=4)
    calls = [Call("meet", {"x": x}) for x in range(3)]
    replies = world.respond([3, 1, 0, 2], [""] * 4, [calls] * 4)
    assert [m["content"] for m in replies[0].messages] == ["0", "1", "2"]
    assert seen == [0] * 4 + [1] * 4 + [2] * 4


def test_more_calls_than_threads_at_a_time():
    at_work, most, lock = [0], [0], threading.Lock()

    def work() -> None:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.01)
        with lock:
            at_work[0] -= 1

    world = world_of(work, rows=100)
    assert told(world, *["work"] * 100) == ["null"] * 100
    assert 1 < most[0] <= 32


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyError("x"), MemoryError()])
@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_tool_raises_is_told(error, is_async):
    def bad() -> None:
        raise error

    async def bad_async() -> None:
        raise error

    bad_async.__name__ = "bad"
    world = world_of(bad_async if is_async else bad)
    assert told(world, "bad")[0].startswith(f"Error: {type(error).__name__}")
    assert world.hung == 0
    world.close()


def test_an_interrupt_goes_through():
    def stop() -> None:
        raise KeyboardInterrupt

    def wait() -> None:
        end.wait(60)

    end, main = threading.Event(), threading.main_thread().ident
    with pytest.raises(KeyboardInterrupt):
        told(world_of(stop), "stop")
    threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        told(world_of(wait, seconds=50), "wait")
    assert time.monotonic() - begun < 30
    end.set()


def test_a_thread_that_hangs_is_counted_and_its_environment_replaced():
    end = threading.Event()

    class Maze(Base):
        def wait(self) -> int:
            """Wait."""
            return end.wait(60) + 0

        def look(self) -> str:
            """Look."""
            return "a wall"

        def get_reward(self):
            raise ValueError

    world = World(Maze, seconds=0.5)
    world.reset([{}, {}], seeds=[0, 1])
    hung, other = world.instances([0, 1])
    wait, look = Call("wait", {}), Call("look", {})
    match = r"Maze.wait does not end: it took longer than 0.5 seconds. .* hangs, 1 of at most 8"
    with pytest.warns(UserWarning, match=match):
        replies = world.respond([0, 1], ["", ""], [[wait, look], [look]])
    assert [m["content"] for m in replies[0].messages] == [
        "Error: it took longer than 0.5 seconds.",
        "Error: an earlier call has not ended: nothing more can be called.",
    ]
    assert replies[0].failed == 2
    assert replies[1].messages[0]["content"] == "a wall"
    assert world.hung == 1
    assert world.rewards([0]) == [None]  # what hangs may hold what get_reward needs
    with pytest.raises(EpisodeError, match="get_reward"):
        world.rewards([1])
    world.reset([{}, {}], seeds=[0, 1], beside=True)  # while a reward may still read the others
    assert not {hung, other} & set(world.instances([0, 1]))
    world.reset([{}, {}], seeds=[0, 1])
    assert hung not in world.instances([0, 1])
    assert other in world.instances([0, 1])
    assert told(world, "look") == ["a wall"]
    end.set()
    for _ in range(100):
        time.sleep(0.05 if world.hung else 0)
    assert world.hung == 0


def test_too_many_threads_that_hang_are_an_error():
    end = threading.Event()

    def wait() -> None:
        end.wait(60)

    world = world_of(wait, rows=2, most_hung=1, seconds=0.1)
    with (
        pytest.warns(UserWarning, match="1 of at most 1"),
        pytest.raises(EpisodeError, match=r"`most_hung` must .* got 2 in tools.wait.*process=True"),
    ):
        told(world, "wait", "wait")
    end.set()


def test_a_step_that_raises_is_told_the_model_and_its_owner():
    class Game:
        def reset(self):
            """Begin."""

        def step(self, text: str) -> Turn:
            """Fail."""
            raise KeyError("oops")

    world = World(Game)
    world.reset([{}], seeds=[0])
    with pytest.warns(UserWarning, match=r"Game\.step raised KeyError: 'oops'.*Mend it"):
        (reply,) = world.respond([0], ["x"], [[]])
    assert "oops" in reply.messages[0]["content"]
    assert not reply.done
    world.respond([0], ["x"], [[]])  # is said once


def test_a_step_that_hangs_ends_its_episode():
    end = threading.Event()

    class Game(Base):
        def step(self, text: str) -> Turn:
            end.wait(60)
            return Turn("on")

        step.seconds = 0.1

    world = World(Game)
    world.reset([{}], seeds=[0])
    with pytest.warns(UserWarning, match="longer than 0.1 seconds"):
        (reply,) = world.respond([0], [""], [[]])
    assert reply.done
    assert reply.failed == 1
    assert "longer than 0.1 sec" in reply.messages[0]["content"]
    end.set()


# -- the event loop --------------------------------------------------------------------------------


def test_async_tools_share_one_loop_that_outlives_the_batch():
    loops, waiting = [], []

    async def meet() -> int:
        loops.append(asyncio.get_running_loop())
        waiting.append(None)
        while len(waiting) % 50:
            await asyncio.sleep(0.001)
        return 1

    world = world_of(meet, rows=50)
    for _ in range(2):
        assert told(world, *["meet"] * 50) == ["1"] * 50
    assert len(set(loops)) == 1
    world.close()
    assert loops[0].is_closed()


def test_an_async_environment():
    class Maze:
        async def reset(self, **row) -> str:
            self.lock = asyncio.Lock()
            return "Go."

        async def move(self) -> str:
            """Move."""
            async with self.lock:
                return "moved"

        async def close(self):
            closed.append(self)

    closed = []
    world = World(Maze)
    assert world.reset([{}, {}], seeds=[0, 1]) == ["Go.", "Go."]
    assert told(world, "move", "move") == ["moved", "moved"]
    world.close()
    assert len(closed) == 2


def test_an_async_tool_that_takes_too_long_is_cancelled_and_one_that_blocks_hangs():
    end, cancelled = threading.Event(), []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    async def block() -> None:
        end.wait(60)

    async def quick() -> int:
        return 1

    world = world_of(wait, block, quick, rows=2, seconds=0.5)
    late = "Error: it took longer than 0.5 seconds, and was ended."
    assert told(world, "wait", "quick") == [late, "1"]
    assert world.hung == 0
    with pytest.warns(UserWarning, match="tools.block does not end") as warned:
        late = "Error: it took longer than 0.5 seconds."
        assert told(world, "wait", "block") == [late, late]  # one holds up the other
    assert len(warned) == 1
    assert world.hung == 1
    assert cancelled == [1]  # the other could not be
    assert told(world, "quick") == ["1"]  # in another loop
    end.set()
    world.close()


# -- children --------------------------------------------------------------------------------------


def in_child(function):
    return tool(process=True, seconds=20)(function)


def test_a_child_answers_from_a_process_of_its_own():
    state = [0]

    @in_child
    def work(x: int) -> dict:
        state[0] = x
        return {"x": x, "pid": os.getpid()}

    @in_child
    async def later(x: int) -> list:
        return [x + 1, os.getpid()]

    world = world_of(work, later, rows=3)
    first, [five, second], third = map(json.loads, told(world, "work", "later", "work", x=4))
    assert (first["x"], five) == (4, 5)
    assert len({os.getpid(), first["pid"], second, third["pid"]}) == 4
    assert state == [0]


def test_what_goes_wrong_in_a_child_is_told_and_nothing_is_left_behind():
    @in_child
    def go(how: str) -> str:
        if how == "exit":
            os._exit(3)
        if how == "raise":
            raise ValueError("no")
        if how == "much":
            return "x" * 10**6
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(98.7)"])
        while True:
            pass

    before = {*psutil.Process().children()}
    world = world_of(go, most_characters=60)
    assert told(world, "go", how="exit") == ["Error: it ended without an answer."]
    assert told(world, "go", how="raise") == ["Error: ValueError: no"]
    assert len(told(world, "go", how="much")[0]) == 60
    go.seconds = 1
    begun = time.monotonic()
    assert told(world, "go", how="hang") == ["Error: it took longer than 1 seconds, and was ended."]
    assert time.monotonic() - begun < 15
    assert world.hung == 0
    left = [p for p in psutil.process_iter(["cmdline"]) if "time.sleep(98.7)" in str(p.info)]
    assert not left
    assert {*psutil.Process().children()} <= before


# -- what is drawn ---------------------------------------------------------------------------------


class Dice:
    def __init__(self):
        random.random(), np.random.rand()

    def reset(self, seed: int) -> str:
        return f"{seed} {random.random()} {np.random.rand()}"

    @tool(serial=True)
    def roll(self) -> str:
        """Roll."""
        return f"{random.random()} {np.random.rand()}"

    @tool(process=True, seconds=20)
    def roll_elsewhere(self) -> str:
        """Roll."""
        return f"{random.random()} {np.random.rand()}"

    @tool(serial=True)
    def get_reward(self) -> float:
        return random.random()


def test_global_random_states_are_swapped_in_and_out():
    before = states()
    world = World(Dice)
    prompts = world.reset([{}] * 4, seeds=[5, 5, 6, 2**40])
    assert prompts[0] == prompts[1] != prompts[2]
    assert prompts[0].startswith("5 ")
    numbers = random.Random(5), np.random.RandomState(5)
    assert prompts[1] == f"5 {numbers[0].random()} {numbers[1].rand()}"
    for names in ["roll"] * 3, ["roll_elsewhere", "roll", "roll"]:
        rolls = told(world, *names)
        expected = f"{numbers[0].random()} {numbers[1].rand()}"
        assert rolls[:2] == [expected, expected] != rolls[1:]
    assert world.rewards([0, 1]) == [numbers[0].random()] * 2
    assert states() == before
    again = World(Dice)
    assert again.reset([{}] * 4, seeds=[5, 5, 6, 2**40]) == prompts


def test_a_reset_that_raises_leaves_the_states_as_they_were():
    before = states()

    class Maze(Base):
        def reset(self):
            raise ValueError(random.random())

        def step(self, text: str) -> Turn: ...

    with pytest.raises(EpisodeError):
        World(Maze).reset([{}], seeds=[0])
    assert states() == before


def test_a_row_that_has_a_seed_keeps_it():
    assert World(Dice).reset([{"seed": 3}], seeds=[5])[0].startswith("3 ")


@pytest.mark.parametrize("random_number", [random.random, np.random.rand])
def test_tools_that_draw_side_by_side_are_named(random_number):
    def draw() -> float:
        return random_number()

    world = world_of(draw)
    with pytest.warns(UserWarning, match=r"changed while tools.draw ran.*tool\(serial=True\)"):
        told(world, "draw")
    told(world, "draw")  # told once


def test_serial_tools_are_one_at_a_time():
    at_work = []

    @tool(serial=True)
    def work() -> int:
        at_work.append(1)
        time.sleep(0.01)
        return len(at_work) - at_work.pop()

    assert told(world_of(work, rows=8), *["work"] * 8) == ["0"] * 8


def test_an_environment_that_cannot_close_does_not_hold_up_the_others():
    closed = []

    class Maze(Base):
        def step(self, text: str) -> Turn: ...

        def close(self):
            closed.append(self)
            raise ValueError

    world = World(Maze)
    world.reset([{}, {}], seeds=[0, 1])
    world.close()
    assert len(closed) == 2
