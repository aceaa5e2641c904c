"""Two processes, each with a GPU, end with the weights of one that has the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.devices import DEVICE, only_on_cuda
from tests.test_distributed import OTHER_WAYS, SCRIPT

ROOT = Path(__file__).parents[2]


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
    (one, weights, stats), (two, other_weights, other_stats) = (
        launched(SCRIPT, tmp_path, processes) for processes in (1, 2)
    )
    assert (one, two) == (1, 2)
    torch.testing.assert_close(weights, other_weights, rtol=1e-4, atol=1e-5)
    for name in ("objective/kl", "ppo/loss/total", "ppo/returns/var", "objective/kl_coef"):
        assert stats[name] == pytest.approx(other_stats[name], rel=1e-3), name


@only_on_cuda("tests/test_distributed.py has two processes on the CPU")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.distributed
def test_one_gpu_equals_two_in_other_ways(tmp_path):
    (one, results), (two, others) = (
        launched(OTHER_WAYS, tmp_path, processes) for processes in (1, 2)
    )
    assert (one, two) == (1, 2)
    for way, (weights, _) in results.items():
        torch.testing.assert_close(weights, others[way][0], rtol=1e-4, atol=1e-5, msg=way)


@pytest.mark.distributed
def test_the_launcher_starts_one_process_here(tmp_path):
    world, weights, stats = launched(SCRIPT, tmp_path, 1)
    assert world == 1
    assert weights.isfinite().all()
    assert stats["ppo/updates"] > 0
