"""Runs, resumes and classifiers that are killed again and again end as if they never were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "each"), [(3, 3), (200, 10)])
def test_whatever_is_killed_ends_bit_for_bit(kills, each, tmp_path):
    results = tmp_path / "kills.jsonl"
    command = [sys.executable, "-m", "tests.training.kills", "--out", str(results)]
    command += ["--folder", str(tmp_path / "runs"), "--kills", str(kills), "--each", str(each)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert sum(row["result"] == "killed" for row in rows) == kills
    assert any(row.get("same") for row in rows)


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_with_sharded_weights_that_are_killed_end_bit_for_bit(tmp_path):
    results = tmp_path / "kills.jsonl"
    command = [sys.executable, "benchmarks/kills.py", "--kills", "4", "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert sum("kill" in row for row in rows) == 4
    assert all(row["identical"] for row in rows if "identical" in row)
