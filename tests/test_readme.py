"""README.md is what notebooks/index.ipynb makes, and its Python is what runs there."""

import hashlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

nbformat = pytest.importorskip("nbformat")
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
INDEX = nbformat.read(FOLDER / "index.ipynb", as_version=4)
HIDDEN = {"tags": ["hidden"]}
EXAMPLE_OF_2020 = "600be922ed2cafae7889989dbecd20dc9f120b7bcdb8243a73800d5d425031bc"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The generator."""
    spec = importlib.util.spec_from_file_location("notebooks_readme", FOLDER / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def readme(maker, tmp_path, monkeypatch) -> Path:
    """A README in a folder of its own, which the generator writes and checks."""
    monkeypatch.setattr(maker, "README", tmp_path / "README.md")
    assert maker.main([]) == 0
    return maker.README


# -- the README that is here -----------------------------------------------------------------------


def test_the_readme_is_what_the_notebook_makes(maker, capsys):
    assert maker.main(["--check"]) == 0, capsys.readouterr().err


def test_it_is_written_the_same_again(maker, readme):
    before = readme.read_bytes()
    assert maker.main(["--check"]) == maker.main([]) == 0
    assert readme.read_bytes() == before
    assert before.endswith(b".\n")
    assert b"\r" not in before


def shown(kind):
    """The cells of a kind whose source the README shows."""
    cells = [cell for cell in INDEX.cells if not cell.metadata.get("tags", [])]
    return [cell.source for cell in cells if cell.cell_type == kind]


def test_the_first_example_is_the_one_of_2020(maker):
    blocks = re.findall(r"^```python\n(.*?)^```$", maker.README.read_text(), re.DOTALL | re.M)
    assert len(blocks) == len(shown("code")) == 4
    assert hashlib.sha256(blocks[0].encode()).hexdigest() == EXAMPLE_OF_2020


def test_the_reader_sees_what_every_block_prints(maker):
    """Below each block of Python stands what it prints; for the first a cell of its own prints."""
    text = maker.README.read_text()
    pairs = re.findall(r"^```python\n(.*?)^```\n\n(?:```text\n(.*?)^```$)?", text, re.DOTALL | re.M)
    assert [len(printed) > 20 for _, printed in pairs] == [True] * 4
    assert "response: " in pairs[0][1]
    printing = [cell for cell in INDEX.cells if cell.get("outputs")]
    assert len(printing) == 4
    assert "output" in printing[0].metadata.tags


def test_all_python_of_the_readme_stands_in_cells_that_run():
    assert not any(re.search(r"```\s*py", source) for source in shown("markdown"))


def test_each_block_has_what_it_needs(tmp_path):
    """In the notebook it may lean on a cell above; whoever copies it has only the block."""
    pytest.importorskip("ruff")
    for number, source in enumerate(shown("code")):
        (tmp_path / f"block{number}.py").write_text(source)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_what_is_hidden_is_the_set_up_and_its_end(maker):
    hidden = [cell for cell in INDEX.cells if "hidden" in cell.metadata.get("tags", [])]
    assert [cell.cell_type for cell in hidden] == ["markdown", "code", "code"]
    assert INDEX.cells[-1] is hidden[-1]
    assert "scratch.cleanup()" in hidden[-1].source
    assert not re.search("tempfile|noqa|fmt: off", maker.README.read_text())


# -- a README or a notebook that was changed -------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("# trl\n", "# TRL\n", "-# TRL\n+# trl\n"),
        ("(LICENSE).\n", "(LICENSE).", "+\n"),
        ("(LICENSE).\n", "(LICENSE).\n\nMore.\n", "-More.\n"),
        ("# imports\nimport torch\n", "import torch\n", "+# imports\n"),
        ("<!-- Written", "<!-- written", "-<!-- written"),
    ],
)
def test_a_readme_that_was_edited_is_found_and_mended(old, new, told, maker, readme, capsys):
    right = readme.read_text()
    assert right.count(old) == 1
    readme.write_text(right.replace(old, new))
    assert maker.main(["--check"]) == 1
    message = capsys.readouterr().err
    assert told in message
    assert "run `make readme`" in message
    assert readme.read_text() == right.replace(old, new)
    assert maker.main([]) == 0
    assert readme.read_text() == right


def test_a_readme_that_is_missing_is_found(maker, readme, capsys):
    readme.unlink()
    assert maker.main(["--check"]) == 1
    message = capsys.readouterr().err
    assert "more lines" in message
    assert len(message.splitlines()) < 25


def swapped(cells):
    cells[1], cells[4] = cells[4], cells[1]


def shown_after_all(cells):
    cells[2].metadata = {}


def prints_something_else(cells):
    cells[4].outputs[0].text = "no such thing\n"


def hidden_after_all(cells):
    cells[3].metadata = HIDDEN


@pytest.mark.parametrize(
    "change", [swapped, shown_after_all, hidden_after_all, prints_something_else]
)
def test_a_notebook_that_was_changed_is_found(change, maker, readme, monkeypatch, capsys):
    notebook = nbformat.from_dict(INDEX)
    change(notebook.cells)
    monkeypatch.setattr(maker, "NOTEBOOK", readme.with_name("index.ipynb"))
    nbformat.write(notebook, maker.NOTEBOOK)
    assert maker.main(["--check"]) == 1
    assert "make readme" in capsys.readouterr().err


# -- the rules -------------------------------------------------------------------------------------


def test_cells_follow_each_other_with_what_they_print_and_without_what_is_hidden(maker):
    output = new_output("stream", name="stdout", text="4\n")
    value = new_output("execute_result", data={"text/plain": "5"}, execution_count=1)
    cells = [
        new_markdown_cell("# A\n\ntext\n"),
        new_markdown_cell("only here", metadata=HIDDEN),
        new_code_cell("import os", metadata=HIDDEN, outputs=[output]),
        new_code_cell("print(2 + 2)  ", metadata={"tags": ["other"]}, outputs=[output, value]),
        new_code_cell("print(4)", metadata={"tags": ["output"]}, outputs=[output]),
        new_code_cell(""),
        new_markdown_cell("\nend"),
    ]
    assert maker.readme(new_notebook(cells=cells)) == (
        "<!-- Written from notebooks/index.ipynb by `make readme`: change it there. -->\n\n"
        "# A\n\ntext\n\n```python\nprint(2 + 2)  \n```\n\n"
        "```text\n4\n```\n\n```text\n4\n```\n\nend\n"
    )


@pytest.mark.parametrize(
    ("source", "block"),
    [
        ("x = 1", "```python\nx = 1\n```"),
        ("x = '`'", "```python\nx = '`'\n```"),
        ('x = """\n```\n"""', '````python\nx = """\n```\n"""\n````'),
        ("x = '`````'", "``````python\nx = '`````'\n``````"),
        ("# fmt: off\nx = 'a'", "```python\nx = 'a'\n```"),
        ("x = 'a'\n# fmt: off", "```python\nx = 'a'\n# fmt: off\n```"),
    ],
)
def test_code_stands_in_a_fence_that_holds_it(source, block, maker):
    assert maker.readme(new_notebook(cells=[new_code_cell(source)])).endswith(f"-->\n\n{block}\n")


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("[a](../docs/a.md)", "[a](docs/a.md)"),
        ("[a](../docs/a.md#b-c) ([`d`](../LICENSE))", "[a](docs/a.md#b-c) ([`d`](LICENSE))"),
        ("![a](../docs/demo.png)", "![a](docs/demo.png)"),
        ('[a](../a.md "title")', '[a](a.md "title")'),
        ("[a](00-core.ipynb)", "[a](notebooks/00-core.ipynb)"),
        ("[a](../notebooks/run.py)", "[a](notebooks/run.py)"),
    ],
)
def test_relative_links_start_from_the_root(here, there, maker):
    assert maker.relinked(f"x {here} y") == f"x {there} y"


@pytest.mark.parametrize(
    "text",
    [
        "[a](#speed) [b](https://x.org/../y) [c](mailto:a@x.org) ../docs/a.md (../docs)",
        "`[a](../b)` and ``[a](../b) ` c`` and `a`",
        "```sh\n[a](../b)\n```",
        "````\n```\n[a](../b)\n```\n````",
    ],
)
def test_other_links_and_code_are_left_alone(text, maker):
    assert maker.relinked(text) == text
    assert maker.relinked(f"{text}\n[a](../b)") == f"{text}\n[a](b)"


def test_a_link_out_of_the_repository_is_refused(maker):
    with pytest.raises(ValueError, match=r"\.\./\.\./b leads out of the repository"):
        maker.relinked("[a](../../b)")
