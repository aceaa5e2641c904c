"""The page that teaches PPO runs and learns; so do the programs of environments.

The other examples: test_docs_site.py.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "examples/ppo_in_one_page.py"
STEP = re.compile(
    r"step \d+/\d+ .* P\(POSITIVE\) (?P<positive>[\d.]+) · KL (?P<kl>[-\d.]+) · "
    r"β (?P<beta>[\d.]+) · first ratio (?P<ratio>[\d.]+) "
)


def run(*arguments):
    """What the page prints, in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    told = subprocess.run(
        [sys.executable, str(PAGE), *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def figures(told):
    """What the page says of each step."""
    return [
        {name: float(figure) for name, figure in step.groupdict().items()}
        for step in STEP.finditer(told)
    ]


def test_it_is_one_page_on_the_formulas_alone():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 235
    imported = set(re.findall(r"^from (trl\S*) import", text, re.MULTILINE))
    assert {name.partition(".")[2].split(".")[0] for name in imported} == {
        "",
        "core",
        "optimization",
    }
    assert re.findall(r"^from trl import (.*)", text, re.MULTILINE) == ["starter"]
    assert not re.search(r"^ *class ", text, re.MULTILINE)


def test_it_starts_at_the_reference_and_moves(monkeypatch, capsys):
    sizes = ["--batch-size", "8", "--minibatch-size", "4", "--new-tokens", "6", "--held-out", "8"]
    monkeypatch.setattr(sys, "argv", [str(PAGE), "--steps", "2", *sizes])
    runpy.run_path(str(PAGE), run_name="__main__")
    told = capsys.readouterr().out
    steps = figures(told)
    assert len(steps) == 2
    assert steps[0]["kl"] == 0
    assert steps[1]["kl"] != 0
    assert [step["ratio"] for step in steps] == [1, 1]
    assert steps[1]["beta"] < steps[0]["beta"]  # the KL is below its target
    samples = re.findall(r"^    \d\.\d\d  (.*)$", told, re.MULTILINE)
    assert len(samples) == 12


@pytest.mark.slow
def test_it_learns():
    told = run("--seed", "1")
    steps = figures(told)
    before, after = map(float, re.findall(r"P\(POSITIVE\) ([\d.]+) on", told))
    assert 0.4 < before < 0.6
    assert after > 0.8
    assert 6 < steps[-1]["kl"] < 14  # about the target, 10
    assert {step["ratio"] for step in steps} == {1}


ENVIRONMENTS = ROOT / "examples/environments"
STEPS = {"functions": 25, "game": 25, "own_loop": 4, "tools_class": 25}


def test_there_is_a_short_program_for_each_way_into_environments():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in ENVIRONMENTS.glob("*.py")}
    assert texts.keys() == {*STEPS, "tiny"}
    for name, text in texts.items():
        assert len(text.splitlines()) < 80
        assert name == "tiny" or re.search(r"^ +assert ", text, re.MULTILINE)
    page = (ROOT / "docs/howto/environments.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in page for name in STEPS)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what a run of few steps is told
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n != "own_loop" else []) for n in STEPS],
)
def test_a_program_of_environments_checks_its_own_result(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ENVIRONMENTS)  # as Python does for a program
    monkeypatch.setattr(sys, "argv", [name, "--steps", str(STEPS[name])])
    runpy.run_path(str(ENVIRONMENTS / f"{name}.py"), run_name="__main__")
    assert f"step {STEPS[name]}: " in capsys.readouterr().out
