"""A notebook of one cell in JupyterLab, in a browser; skipped in words where that is not there."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).parents[1]
NAME = "judge.ipynb"
QUIET = ("--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")
"""Else a note about news lies over the notebook."""


@contextmanager
def lab(folder, cell):
    """Have JupyterLab serve a notebook with that cell, and give its address."""
    for name in ("jupyterlab", "ipywidgets", "nbformat"):
        if not find_spec(name):
            pytest.skip(f"{name} is not installed")
    import nbformat

    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(made, folder / NAME)
    places = {"HOME": str(folder), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    command += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=t", *QUIET]
    said = folder / "log"
    with said.open("w") as log:
        server = subprocess.Popen(
            command, env=os.environ | places | {"PYTHONPATH": str(ROOT)}, stderr=log, cwd=folder
        )
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", said.read_text())):
            assert server.poll() is None, said.read_text()
            time.sleep(0.2)
        _start_kernel(found.group(), {"path": NAME, "name": NAME, "type": "notebook"})
        yield f"{found.group()}lab/tree/{NAME}?token=t"
    finally:
        server.terminate()
        server.wait()


def _start_kernel(address, session):
    """Start it before the page is open, which on a slow machine asks for one, or does without."""
    body = json.dumps(session | {"kernel": {"name": "python3"}}).encode()
    headers = {"Authorization": "token t", "Content-Type": "application/json"}
    urlopen(Request(f"{address}api/sessions", body, headers), timeout=900).close()


def run_cell(page, address):
    """Open the notebook and run its cell."""
    page.goto(address)
    # Whoever runs a cell before the kernel is connected gets nothing: no error, no output.
    page.get_by_text("| Idle").wait_for()
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Control+Enter")
    page.get_by_text("[*]:").or_(page.get_by_text("[1]:")).first.wait_for()
