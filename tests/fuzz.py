"""Inputs of all kinds that nobody would write, made from a seed: what trl makes of them.

    python -m tests.fuzz --inputs 10000 --first 0

Each input must be taken, or refused in words by an error of trl itself or of the system: no bare
traceback, no hang, no memory without end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch

from tests.evaluation.rollouts import make_rollout
from tests.training.run_folders import HOSTILE, make_run
from trl import EndpointScorer, cli
from trl import config as settings
from trl.batch import Rollout
from trl.config.folder import recipe_folder
from trl.config.recipe import ClassifierRecipe, Recipe
from trl.report import read_runs
from trl.training.checkpoints import write_manifest
from trl.training.folder import RunFolder
from trl.training.resume import KEYS, problem_of

LONGEST = 10
"""Seconds of work that one input may take."""
WAITED = 60
"""Seconds that it may take in all, on a machine with other work."""
MOST_MEMORY = 2**30
"""Bytes that all of them may add to what the process takes."""

ODD = [
    *("", " ", "null", "~", "true", "-1", "0", "1e999", "-.inf", ".nan", "1e-5", "9" * 400, "''"),
    *("[]", "{}", "[[[", "{a: b", "*a", "&a [*a]", "!!python/object:os.system x", "2026-01-01"),
    *(
        "0x1F",
        "1_000",
        "0o17",
        "- - -",
        "? :",
        "|",
        ">",
        "%TAG",
        "@",
        "`",
        "\t",
        "\u2028",
        "\ud83d",
    ),
    *("subprocess:call", "https://u:p@host/s?key=a", "C:\\models\\a", "/etc/passwd", "~root"),
    *HOSTILE,
]
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


class TooLong(BaseException):
    """An input took longer than it may."""


# -- how a text or some bytes are spoilt -----------------------------------------------------------


def spoilt_text(draw: random.Random, text: str) -> str:
    """Return a text of lines with a few of them changed."""
    lines = text.split("\n")
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(lines))
        line = lines[place]
        name, colon, _ = line.partition(":")
        value = draw.choice(ODD)
        lines[place : place + 1] = draw.choice(
            [
                [f"{name}{colon} {value}"],
                [f"{name}{colon} {value}"],
                [line, line],
                [],
                [line[: draw.randint(0, len(line))] + value],
                [" " * draw.randint(1, 5) + line],
                [f"{name}s{colon} 1"],
                ["[" * draw.choice([5, 40, 5000])],
                [BOMB],
                [f"x{n}: 1" for n in range(draw.choice([3, 3000]))],
            ]
        ) or [""]
    return "\n".join(lines)


def spoilt_bytes(draw: random.Random, data: bytes) -> bytes:
    """Return bytes that are cut, flipped, longer, or of something else."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        kind, place = draw.randrange(6), draw.randrange(max(1, len(changed)))
        if kind == 0:
            del changed[place:]
        elif kind == 1 and changed:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            changed[place:place] = draw.randbytes(draw.randint(1, 9))
        elif kind == 3 and changed:
            changed[:8] = draw.randbytes(8)
        elif kind == 4 and changed:  # in what a header says
            place = draw.randrange(min(len(changed), 600))
            changed[place : place + 1] = draw.choice(ODD).encode(errors="surrogatepass")[:20]
        elif kind == 5:
            changed = bytearray(draw.choice([b"", b"PK\x03\x04", b"\x80\x04.", changed * 2]))
    return bytes(changed)


# -- what is tried ---------------------------------------------------------------------------------


class Fuzz:
    """Tries inputs in a folder; each kind is a method that takes random numbers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipes = [path.read_text() for path in sorted(recipe_folder().glob("*.yaml"))]
        self.names = [each.path for each in settings.paths(Recipe)]
        make_rollout(("a", "b")).save(folder / "good")
        self.rollout = (folder / "good").read_bytes()
        make_run(folder / "run", steps=8, prompts=3, eval_every=4)
        (folder / "step-000001").mkdir()
        torch.save(dict.fromkeys(KEYS, 1), folder / "step-000001" / "state.pt")
        write_manifest(folder / "step-000001")
        self.answer = b""

    def config(self, draw: random.Random) -> None:
        """Settings as YAML."""
        file = self.folder / "config.yaml"
        text = spoilt_text(draw, draw.choice(self.recipes))
        file.write_bytes(text.encode(errors="surrogatepass"))
        cls: Any = draw.choice([Recipe, Recipe, ClassifierRecipe])
        settings.build(cls, settings.read_yaml(file), owner=str(file))

    def flags(self, draw: random.Random) -> None:
        """Settings as flags."""
        names = [draw.choice(self.names) for _ in range(draw.randint(1, 5))]
        names = [name if draw.random() < 0.8 else name[:-1] + "._0.x" for name in names]
        settings.build(Recipe, {}, flags=[(name, draw.choice(ODD)) for name in names])

    def recipe(self, draw: random.Random) -> None:
        """A recipe, as the command line reads it."""
        file = self.folder / "recipe.yaml"
        text = spoilt_text(draw, draw.choice(self.recipes))
        file.write_bytes(text.encode(errors="surrogatepass"))
        flags = [f"--{draw.choice(self.names)}", draw.choice(ODD)] if draw.random() < 0.5 else []
        with contextlib.suppress(SystemExit):
            cli.main(["train", str(file), "--print-config", *flags])

    def of_rollout(self, draw: random.Random) -> None:
        """A file of a rollout."""
        file = self.folder / "rollout"
        file.write_bytes(spoilt_bytes(draw, self.rollout))
        Rollout.load(file)

    def run_folder(self, draw: random.Random) -> None:
        """A folder of a run, which is read, and of which a run would go on."""
        folder = self.folder / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "run", folder)
        for file in draw.sample(sorted(folder.iterdir()), 2):
            data = file.read_bytes()
            text = spoilt_text(draw, data.decode()).encode(errors="surrogatepass")
            file.write_bytes(draw.choice([text, spoilt_bytes(draw, data)]))
        run = RunFolder(folder)
        with run.in_use():
            run.has_run()
            run.rows("metrics")
            run.cut(run.record(), draw.randint(0, 9))
        read_runs([folder])

    def checkpoint(self, draw: random.Random) -> None:
        """A checkpoint, which is whole or not."""
        folder = self.folder / "step-000002"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "step-000001", folder)
        for name in draw.choice([["state.pt"], ["manifest.json"], ["state.pt", "manifest.json"]]):
            file = folder / name
            file.write_bytes(spoilt_bytes(draw, file.read_bytes()))
        if draw.random() < 0.5:
            (folder / "manifest.json").unlink()
            write_manifest(folder)
        assert problem_of(folder) is None or isinstance(problem_of(folder), str)

    def endpoint(self, draw: random.Random) -> None:
        """What a server of scores answers."""
        good = b'{"scores": [0.5, 1.5]}'
        bodies = [*(x.encode(errors="surrogatepass") for x in ODD), b"[" * 10**5, b"9" * 10**5]
        bodies += [
            json.dumps({"scores": draw.choice([*ODD, 1, None, [1], [[1], []], {}])}).encode()
        ]
        body = draw.choice([spoilt_bytes(draw, good), draw.choice(bodies)])
        code = draw.choice([200, 200, 200, 204, 301, 404, 500, 999])
        head = f"HTTP/1.1 {code} x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        self.answer = draw.choice([head + body, head + body, spoilt_bytes(draw, head) + body])
        with self.server() as address:
            scorer = EndpointScorer(address, retries=0, timeout=1.0)
            scorer(make_rollout(("a", "b")))

    @contextlib.contextmanager
    def server(self) -> Iterator[str]:
        """Yield the address of a server that gives the answer, whatever it is asked."""
        fuzz = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.wfile.write(fuzz.answer)

            def log_message(self, *told: Any) -> None:
                pass

        made = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=made.handle_request)
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_port}"
        finally:
            made.server_close()
            thread.join()

    KINDS = (config, flags, recipe, of_rollout, run_folder, checkpoint, endpoint)


def _too_long(*_: Any) -> None:
    raise TooLong


def problem(work: Callable[[], Any]) -> str | None:
    """Do something with an input, and return what is wrong with how that ended."""
    shown = io.StringIO()
    clocks = {signal.ITIMER_PROF: LONGEST, signal.ITIMER_REAL: WAITED}
    for each in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(each, _too_long)
    for clock, seconds in clocks.items():
        signal.setitimer(clock, seconds)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            work()
    except TooLong:
        return "took longer than it may:\n" + traceback.format_exc()[-1500:]
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        on_purpose = isinstance(error, OSError) or line.startswith("raise ")
        if not cli.is_explained(error) or not on_purpose:
            return traceback.format_exc()[-1500:]
    finally:
        for clock in clocks:
            signal.setitimer(clock, 0)
    return f"told {shown.tell()} characters" if shown.tell() > 100_000 else None


def fuzz(inputs: int, first: int = 0, *, only: str = "", loud: bool = False) -> list[str]:
    """Try so many inputs, of one kind or all; return what went wrong, a text for each."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        tried = Fuzz(Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for number in range(first, first + inputs):
            kind = getattr(Fuzz, only) if only else Fuzz.KINDS[number % len(Fuzz.KINDS)]
            if told := problem(lambda: kind(tried, random.Random(number))):  # noqa: B023
                wrong.append(f"{kind.__name__} {number}: {told}")
                if loud:
                    print(wrong[-1], flush=True)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if taken > MOST_MEMORY:
        wrong.append(f"{taken / 2**20:.0f} MiB were taken")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="its number, which is its seed")
    parser.add_argument("--kind", default="", help="one kind alone: a method of Fuzz")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = fuzz(options.inputs, options.first, only=options.kind, loud=True)
    print(f"{options.inputs} inputs from {options.first}: {len(found)} went wrong")
    sys.exit(bool(found))
