"""`benchmarks/cost_curves.py`: its arithmetic, and a short run of all of it."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cost_curves.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are not here")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cost_curves", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost_curves"] = module  # where dataclasses look for its annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cost_curves"]


def test_the_slope_of_a_power_is_the_power(script):
    sizes = [2, 4, 8, 16]
    assert script.slope(sizes, [7.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert script.slope(sizes, [3.0] * 4) == pytest.approx(0)


def test_the_work_rises_with_batch_and_layers_and_faster_with_lengths(script):
    slopes = {
        axis: script.expected_slope(script.BASE, axis, sizes) for axis, sizes in script.AXES.items()
    }
    assert slopes["batch"] == pytest.approx(1)
    assert slopes["layers"] == pytest.approx(1)
    assert 1 < slopes["query"] < 2
    assert 1 < slopes["response"] < 2
    # Much attention, little else: all but the square.
    narrow = replace(script.BASE, width=1, query=1, vocabulary=1)
    assert script.expected_slope(narrow, "response", [1000, 2000, 4000]) > 1.9


def test_what_rises_faster_than_the_work_is_flagged(script):
    slopes = {"seconds": 1.14, "sampling": 1.16, "step": 2.0, "megabytes": 0.5}
    assert script.too_steep(slopes, 1.0, 0.15) == ["sampling", "step"]
    assert script.too_steep(slopes, 1.0, 0.3) == ["step"]
    part = {"expected": 1.0, "slopes": slopes}
    whole = {"batch": part | {"at_end": part, "flagged": ["step"], "flagged_at_end": []}}
    assert script.table(whole).splitlines()[2:] == [
        "| batch | 1.00 | 1.14 | 1.16 | 2.00 | 0.50 | TOO STEEP: step |",
        "| batch, last two | 1.00 | 1.14 | 1.16 | 2.00 | 0.50 |  |",
    ]


@pytest.mark.slow
def test_a_short_run(script, tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--repeats", "1", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "cost_curves.json").read_text())
    assert list(found["axes"]) == list(script.QUICK_AXES)
    for axis, curve in found["axes"].items():
        assert curve["sizes"] == list(script.QUICK_AXES[axis])
        assert all(result[cost] > 0 for result in curve["results"] for cost in script.COSTS)
        assert f"| {axis} | " in run.stdout
        assert curve["at_end"]["slopes"] == curve["slopes"]  # of two sizes
    assert (tmp_path / "cost_curves.png").read_bytes()[:4] == b"\x89PNG"
