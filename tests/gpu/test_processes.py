"""Several processes, each with a GPU: whole weights on each (DDP), and sharded ones (FSDP2).

make test-gpu                          on as many GPUs as there are: two, and four
TRL_GPU_TESTS_ON=cpu make test-gpu     the same code on gloo, two processes
"""

import inspect
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from tests.gpu.devices import DEVICE, trainers_on
from tests.gpu.policies import PAIRS, SCORES, batch, bytes_held, trainer_by_sgd, weights_of
from tests.gpu.runs import stopped_and_gone_on
from tests.ranks import ROOT, launch
from tests.training.runs import lines, make_parts
from trl.compute.precision import make_accelerator
from trl.config.recipe import ModelConfig
from trl.ppo import PPOTrainer

BACKEND = "nccl" if DEVICE.type == "cuda" else "gloo"
ROWS = 16
WAYS = [(pair, precision, {}) for pair in PAIRS for precision in ("fp32", "bf16")]
WAYS += [
    ("gpt2 and another", "fp32", {"algorithm": "grpo"}),
    ("gpt2 and another", "fp32", {"whiten_rewards": True, "max_grad_norm": 0.5}),
    ("llama and a copy", "fp32", {"value_warmup_steps": 1, "vf_coef": 1.0}),
]
FEW = [WAYS[0], WAYS[3], WAYS[-3]]
"""Those that are tried out on a CPU."""
MOST = {"fp32": 1e-3, "bf16": 3e-2}
"""By how much of its change a vector of weights may differ: see `tests.gpu.test_step`."""


def on_so_many(number):
    """A parameter of a test on so many processes, skipped with fewer GPUs."""
    here, what = torch.cuda.device_count(), "CUDA devices"
    if DEVICE.type == "cpu":
        here, what = 2, "processes, which are tried out on a CPU"
    few = pytest.mark.skipif(here < number, reason=f"fewer than {number} {what}")
    return pytest.param(number, marks=[few, pytest.mark.distributed], id=str(number))


def kinds(names):
    """Parameters of a test of whole, sharded and offloaded weights, where there are such."""
    for kind, settings in KINDS.items():
        no = pytest.mark.skipif(not settings <= names, reason=f"not {kind} in this release")
        yield pytest.param(dict.fromkeys(settings, True), id=kind, marks=no)


KINDS = {"whole": set(), "sharded": {"shard"}, "offloaded": {"shard", "offload"}}
of_trainers = list(kinds(set(inspect.signature(PPOTrainer).parameters)))
of_recipes = list(kinds({field.name for field in fields(ModelConfig)}))


def steps(pair, precision, settings, parts=None):
    """What two steps on this process's rows make: weights before, after; figures; bytes held."""
    torch.manual_seed(0)
    policy, reference, _ = PAIRS[pair]
    policy, reference = policy(), reference() if reference else None
    before = weights_of(policy)
    settings = {"batch_size": ROWS, "minibatch_size": ROWS, **settings, **(parts or {})}
    trainer = trainer_by_sgd(policy, reference, precision=precision, **settings)
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    rollout = batch(ROWS).select(list(range(ROWS))[mine])
    for _ in range(2):
        stats = trainer.step(rollout, (SCORES * 2)[mine])
    stats = {
        name: value
        for name, value in stats.items()
        if isinstance(value, float) and not name.startswith("time/")
    }
    if parts and "offload" in parts:  # nothing is left on the device but buffers
        assert {weight.device.type for weight in policy.parameters()} == {"cpu"}
    return before, weights_of(policy), stats, bytes_held(trainer)


def train(out, ways, parts):
    """The steps of a process; the first writes what came of them."""
    with trainers_on(DEVICE):
        found = [steps(*way, parts) for way in ways]
        assert torch.distributed.get_backend() == BACKEND
        if PartialState().is_main_process:
            torch.save(found, out)


@pytest.mark.parametrize("parts", of_trainers)
@pytest.mark.parametrize("processes", [on_so_many(2), on_so_many(4)])
def test_several_processes_train_as_one_does(processes, parts, tmp_path):
    ways = WAYS if DEVICE.type == "cuda" else FEW
    codes, said = launch(train, processes, tmp_path, str(tmp_path / "out.pt"), ways, parts)
    assert codes == [0] * processes, said
    for way, (_, weights, stats, held) in zip(ways, torch.load(tmp_path / "out.pt"), strict=True):
        before, expected, expected_stats, held_by_one = steps(*way)
        change = (expected - before).norm()
        assert change > 0
        assert (weights - expected).norm() <= MOST[way[1]] * change, way
        assert stats.keys() == expected_stats.keys()
        if way[1] == "fp32":
            assert stats == pytest.approx(expected_stats, rel=1e-3, abs=1e-4), way
        if parts:  # and of what has fewer rows than there are processes, all of them
            assert held <= held_by_one / processes * 1.2, way


def stop_and_go_on(folder, parts):
    """A run of several processes, another that is stopped in its third step and goes on."""
    torch.use_deterministic_algorithms(True)
    with trainers_on(DEVICE):
        accelerator = make_accelerator("bf16")
        if accelerator.is_main_process:
            make_parts(Path(folder))
        accelerator.wait_for_everyone()
        model = {"name": f"{folder}/model"} | parts
        stopped_and_gone_on(Path(folder), model=ModelConfig(**model), ppo={"precision": "bf16"})


@pytest.mark.parametrize("parts", of_recipes)
@pytest.mark.parametrize("processes", [on_so_many(2)])
def test_a_run_of_several_stops_and_goes_on_bit_for_bit(processes, parts, tmp_path):
    codes, said = launch(stop_and_go_on, processes, tmp_path, str(tmp_path), parts)
    assert codes == [0] * processes, said


@pytest.mark.parametrize("processes", [pytest.param(1, id="1"), on_so_many(2)])
def test_torchrun_starts_a_recipe_on_each_device(processes, tmp_path):
    few = "--steps 1 --eval-every 1 --data.held-out 4 --ppo.batch-size 8 --ppo.minibatch-size 4"
    run = ["-m", "trl", "train", "toy-token", *few.split(), "--quiet", "--out", tmp_path / "run"]
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if DEVICE.type == "cpu" else {}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [sys.executable, *launcher, *run],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | on_cpu,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
