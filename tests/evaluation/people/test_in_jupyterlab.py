"""The panel in JupyterLab, where a browser clicks while the training runs beside it."""

import time

import pytest

from tests.browser import browser  # noqa: F401
from tests.jupyterlab import lab, run_cell

pytestmark = pytest.mark.slow
CELL = """\
from tests.evaluation.people.test_scorer import SMALL, asking, run as of_runs
from tests.families import tiny_model
from tests.training.test_loop import tokenizer
from trl import HumanScorer
from trl.training.beside import Beside

of_runs.write_report = lambda runs, out: out / "report.html"
asking.GRACE = 0.2
settings = SMALL | {"steps": 3}
run = Beside(tiny_model("llama"), reward=HumanScorer("votes", page=False), out="run",
             tokenizer=tokenizer(), **settings)
run"""
WAIT = 900_000
"""Milliseconds; a kernel that imports torch takes its time."""


def test_clicks_arrive_while_it_trains_and_it_is_stopped_and_goes_on(browser, tmp_path):  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(WAIT)
    good, button = page.get_by_role("button", name="👍 Good"), page.get_by_role("button")

    def until(text):
        page.get_by_text(text).wait_for()

    with lab(tmp_path, CELL) as address:
        run_cell(page, address)
        good.wait_for()
        until("The training waits for")
        good.click()
        until("Stored.")
        button.get_by_text("Stop", exact=True).click()
        until("It was stopped.")
        button.get_by_text("Go on", exact=True).click()
        end = time.monotonic() + WAIT / 1000
        while not page.get_by_text("It is at its end.").is_visible():
            assert time.monotonic() < end
            if good.is_visible():
                good.click()
            page.wait_for_timeout(200)
        page.close()
    assert (tmp_path / "run/summary.json").is_file()
