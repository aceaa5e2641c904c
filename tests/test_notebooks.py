"""The notebooks run, and what is stored in them is whole, small and says nothing of a machine."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

of_each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small() -> object:
    """A notebook without a fault."""
    output = nbformat.v4.new_output("stream", name="stdout", text="4\n")
    cell = nbformat.v4.new_code_cell("2 + 2", execution_count=1, outputs=[output])
    return nbformat.v4.new_notebook(cells=[cell])


def test_there_are_notebooks():
    known = {"index", "00-core", "01-gpt2-with-value-head", "02-ppo"}
    assert known <= {path.stem for path in NOTEBOOKS}


def slow_or_not(path):
    """The README's tests run the blocks of the index; of the others, one is enough each time."""
    is_slow = path.stem != "00-core"
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("path", [slow_or_not(path) for path in NOTEBOOKS])
def test_it_runs(path):
    """In a process and a kernel of its own, with small settings; no model stays in the folder."""
    found = subprocess.run(
        [sys.executable, FOLDER / "run.py", "--fast", "--check", path.stem],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert list(FOLDER.rglob("*.safetensors")) == []


@of_each
def test_what_is_stored_is_whole_and_tidy(path, runner):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert runner.problems(notebook) == []
    assert runner.tidy(notebook).metadata == notebook.metadata
    assert path.stat().st_size < 300_000


@of_each
def test_it_begins_with_what_it_shows_and_has_its_settings_in_one_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    settings = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(settings) == (path.stem != "index")  # the README's code, which is small as it is
    assert all("TRL_NOTEBOOK_FAST" in cell.source for cell in settings)


@of_each
def test_it_needs_nothing_but_the_package(path):
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    for word in ("from tests", "import tests", "shared/", "/home/", "/root/"):
        assert not any(word in source for source in code)


def test_the_runner_finds_what_must_not_be_stored(runner, small):
    assert runner.problems(small) == []
    output = small.cells[0].outputs[0]
    for text in ("/root/models/gpt2", "in /home/me/x.py", "<object at 0x7f56b34dba50>"):
        output.text = text
        assert len(runner.problems(small)) == 1
    output.text, output.name = "UserWarning: no", "stderr"
    assert "stderr" in runner.problems(small)[0]
    small.cells[0].outputs = []
    assert "no outputs" in runner.problems(small)[0]
    small.cells[0].execution_count = 3
    assert len(runner.problems(small)) == 2


def test_the_runner_takes_out_what_differs_from_run_to_run(runner, small):
    widget = nbformat.v4.new_output(
        "display_data", {runner.WIDGET: {}, "text/plain": "3/4 [00:01]"}
    )
    cell = small.cells[0]
    cell.outputs.append(widget)
    cell.metadata = nbformat.from_dict({"tags": ["parameters"], "execution": {"started": "now"}})
    small.metadata["language_info"] = nbformat.from_dict({"name": "python", "version": "3.11.7"})
    tidy = runner.tidy(small)
    assert len(tidy.cells[0].outputs) == 1
    assert tidy.cells[0].metadata == {"tags": ["parameters"]}
    assert tidy.metadata == runner.KERNEL
    assert len(cell.outputs) == 2  # the one that was given is left as it is


def test_an_unknown_name_is_told_with_the_known_ones(runner):
    with pytest.raises(SystemExit, match="02-ppo"):
        runner.main(["nonsense"])
