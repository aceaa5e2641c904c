"""What the README names exists. Its Python is that of notebooks/index.ipynb, and runs there."""

import re
from pathlib import Path

import pytest

from trl import cli
from trl.config import paths
from trl.config.recipe import Recipe

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_there_is_python_in_the_readme():
    assert len(PYTHON_BLOCKS) == 4


@pytest.mark.skipif(not SHARED.is_dir(), reason="the text of the example is not here")
def test_the_first_example_is_the_one_that_was_asked_for():
    text = (SHARED / "seed.txt").read_text()
    example = re.search(r"^# imports\n.*?^train_stats = [^\n]*\n", text, re.DOTALL | re.MULTILINE)
    assert PYTHON_BLOCKS[0] == example.group()


def test_commands_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= set(targets)
    commands = re.findall(r"^trl ([a-z]+)(.*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert {command for command, _ in commands} == {"train", "report", "compare", "sample", "score"}
    settings = {f"--{path.path.replace('_', '-')}" for path in paths(Recipe)} | {"--reward"}
    options = {"--print-config", "--resume", "--help", "--prompt", "--n", "--recipe", "--version"}
    options |= {"--trust"}
    assert set(re.findall(r"(?<=[\s`(])--[a-z.-]+", README)) <= settings | options


def test_make_alone_names_every_target():
    text = (ROOT / "Makefile").read_text()
    first, *others = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    assert first == "help"
    assert set(re.findall(r'^\t@echo "make ([a-z-]+) ', text, re.MULTILINE)) == set(others)


def test_a_recipe_of_the_readme_prints(capsys):
    assert cli.main(["train", "sentiment", "--ppo.learning-rate", "1e-4", "--print-config"]) == 0
    assert "learning_rate: 0.0001" in capsys.readouterr().out


def test_links_of_the_texts_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"


def test_every_table_has_a_head():
    """Rows behind a blank line are shown as one line of text."""
    for page in (ROOT / "docs").rglob("*.md"):
        lines = ["", *page.read_text().splitlines(), ""]
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
            if line.startswith("| ") and not before.strip():
                assert re.fullmatch(r"[|:\- ]+", after), f"{page.name}: {line[:60]}"
