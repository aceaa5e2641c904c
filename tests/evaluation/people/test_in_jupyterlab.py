"""The panel in JupyterLab, where a browser clicks while the training runs beside it."""

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

from tests.browser import browser  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("jupyterlab"), reason="jupyterlab is not installed"),
]
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


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab with a notebook of one cell."""
    cells = [nbformat.v4.new_code_cell(CELL)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "judge.ipynb")
    root = str(Path(__file__).parents[3])
    places = {"HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    command += [f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token=t"]
    said = tmp_path / "log"
    with said.open("w") as log:
        server = subprocess.Popen(
            command, env=os.environ | places | {"PYTHONPATH": root}, stderr=log, cwd=tmp_path
        )
    while not (found := re.search(r"http://127\.0\.0\.1:\d+/", said.read_text())):
        assert server.poll() is None, said.read_text()
        time.sleep(0.2)
    yield f"{found.group()}lab/tree/judge.ipynb?token=t"
    server.terminate()
    server.wait()


def test_clicks_arrive_while_it_trains_and_it_is_stopped_and_goes_on(browser, lab, tmp_path):  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(WAIT)
    page.goto(lab)
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Control+Enter")
    good, button = page.get_by_role("button", name="👍 Good"), page.get_by_role("button")

    def until(text):
        page.get_by_text(text).wait_for()

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
