"""Take the pictures of the docs: what people see who judge, and what comes of it.

    python -m tests.pictures                              those of which everything is here
    python -m tests.pictures page --to elsewhere          only these, to look at

    page     the page of questions, for a desktop and a phone, light and dark
    panel    the panel in JupyterLab, beside a training of the starter model
    loop     the report of a loop of choices, and that of its last reward model, in --loop

The pictures have few colours, which makes them small.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser import CHROMIUM
from tests.jupyterlab import lab, run_cell
from trl.evaluation.people.asking import ask
from trl.evaluation.people.items import Item
from trl.evaluation.people.server import Page
from trl.evaluation.people.store import Store

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
SIZES = {"desktop": {"width": 1000, "height": 600}, "phone": {"width": 390, "height": 844}}
LARGEST = 60_000
"""Bytes of a picture."""
WAIT = 900_000
"""Milliseconds; a busy machine takes its time."""
ITEMS = (
    Item(
        "This film is a",
        (
            " wonderful story of two brothers, and the music stays with you for days.",
            " waste of two hours. The plot is thin and the acting is worse.",
            " little slow at first, but the last half hour makes up for it.",
            " great great great film, great actors, great fun.",
        ),
    ),
    Item("I saw it", (" twice, and would again.", " and left.", " by chance.", " with friends.")),
)
CELL = """\
from trl import HumanScorer, starter
from trl.training.beside import Beside

prompts = ["This film is a", "I saw it with", "The best of it is", "The actors are"] * 8
scorer = HumanScorer("votes.sqlite", question="best", page=False)
four = {"group_size": 4}
run = Beside(starter.LANGUAGE_MODEL, prompts, scorer, steps=9, batch_size=16, out="mine",
             sampler_kwargs=four)
run"""


def page(browser: Any, folder: Path) -> Iterator[tuple[str, bytes]]:
    """The page with a question of four, while a training waits."""
    with closing(Store(folder / "votes.sqlite", make=True)) as store:
        store.ask("best")
        with closing(Page(store.path, [], port=0)) as served:
            for size, scheme in product(SIZES, ("light", "dark")):
                ask(store, ITEMS, again=True)  # as if just now: the page shows who waits
                context = browser.new_context(viewport=SIZES[size], color_scheme=scheme)
                context.set_default_timeout(WAIT)
                opened = context.new_page()
                opened.goto(f"{served.address}#join={store.link('me')}")
                opened.wait_for_selector("#answers button")
                yield f"page-{size}-{scheme}", opened.screenshot()
                context.close()


def panel(browser: Any, folder: Path) -> Iterator[tuple[str, bytes]]:
    """The cell that trains, and below it what is to be judged."""
    opened = browser.new_page(viewport={"width": 1280, "height": 1000})
    opened.set_default_timeout(WAIT)
    with lab(folder, CELL) as address:
        run_cell(opened, address)
        opened.get_by_text("The training waits for").wait_for()
        cell = opened.locator(".jp-CodeCell").first
        yield "panel", cell.screenshot()
        opened.get_by_role("button", name="B is best").click()
        opened.get_by_text("Stored.").wait_for()
        opened.get_by_role("button").get_by_text("Stop", exact=True).click()
        opened.get_by_text("It was stopped.").wait_for()
        yield "panel-stopped", cell.screenshot()
        opened.close()


def loop(browser: Any, run: Path) -> Iterator[tuple[str, bytes]]:
    """The reports in the folder of a loop."""
    last = max(run.glob("round-*"), key=lambda place: int(place.name.partition("-")[2]))
    opened = browser.new_page(viewport={"width": 1200, "height": 720})
    opened.set_default_timeout(WAIT)
    opened.goto((run / "run" / "report.html").resolve().as_uri())
    yield "loop", opened.screenshot()
    opened.get_by_role("heading", name="Charts").evaluate("each => each.scrollIntoView()")
    opened.wait_for_timeout(500)
    yield "loop-charts", opened.screenshot()
    opened.close()
    yield "calibration", (last / "reward-1" / "report" / "calibration.png").read_bytes()


def small(picture: bytes) -> bytes:
    """Return it with a palette, of as many colours as make it small enough."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    for colours in (64, 32, 16):
        found = io.BytesIO()
        image.quantize(colours).save(found, "PNG", optimize=True)
        if found.tell() <= LARGEST:
            return found.getvalue()
    raise ValueError(f"it has {found.tell():,} bytes, more than {LARGEST:,}")


def main() -> None:
    """Take what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="page, panel, loop; none: all")
    parser.add_argument("--to", type=Path, default=FOLDER)
    parser.add_argument("--loop", type=Path, default=ROOT / "runs" / "human-preferences")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for take, place in ((page, Path(scratch)), (panel, Path(scratch)), (loop, options.loop)):
            if options.names and take.__name__ not in options.names:
                continue
            try:
                for name, picture in take(browser, place):
                    (options.to / f"{name}.png").write_bytes(small(picture))
                    print(f"{name}.png: {(options.to / f'{name}.png').stat().st_size:,} bytes")
            except (OSError, ValueError, pytest.skip.Exception) as error:
                print(f"{take.__name__}: {error}")
        browser.close()


if __name__ == "__main__":
    main()
