"""Two processes, each with a GPU, end with the weights of one that has the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.devices import DEVICE, only_on_cuda

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from tests.test_distributed import train_all
train_all(sys.argv[1])
"""


def launched(script, tmp_path, processes):
    file, out = tmp_path / "share.py", tmp_path / f"{processes}.pt"
    file.write_text(script)
    launcher = ["-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", f"--num_processes={processes}"]
    launcher += ["--multi_gpu"] if processes > 1 else []
    launcher += ["--cpu"] if DEVICE.type == "cpu" else []
    result = subprocess.run(
        [sys.executable, *launcher, str(file), str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(out, map_location="cpu")


@only_on_cuda("tests/test_distributed.py has two processes on the CPU")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.distributed
def test_one_gpu_equals_two(tmp_path):
    one, two = (launched(SCRIPT, tmp_path, processes) for processes in (1, 2))
    for (kind, way), (weights, _, stats) in one.items():
        other_weights, _, other_stats = two[kind, way]
        most = 5e-3 if way == "bf16" else 1e-4
        torch.testing.assert_close(
            weights, other_weights, rtol=most, atol=most, msg=f"{kind}, {way}"
        )
        assert stats.keys() == other_stats.keys()


@pytest.mark.distributed
def test_the_launcher_starts_one_process_here(tmp_path):
    script = SCRIPT.replace("sys.argv[1]", "sys.argv[1], [('ppo', 'SGD')]")
    ((weights, moved, stats),) = launched(script, tmp_path, 1).values()
    assert weights.isfinite().all()
    assert moved > 0
    assert stats["ppo/updates"] > 0
