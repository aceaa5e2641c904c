"""A run has as many processes as were asked for, or says what to type."""

import re
from types import SimpleNamespace

import pytest
import torch

from trl.compute.precision import check_accelerator, make_accelerator
from trl.compute.starting import joins_on_cpu, processes_told

TYPED = "-m trl train 'my recipe.yaml'"
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}  # by accelerate
RANKED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def typed(monkeypatch):
    for name in [*LAUNCHED, *RANKED, "ACCELERATE_USE_CPU"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["/lib/trl/__main__.py", "train", "my recipe.yaml"])


def on_gpus(monkeypatch, devices):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)


@pytest.mark.parametrize(
    ("environment", "devices", "said"),
    [
        (
            {"WORLD_SIZE": "2"},
            0,
            f"`WORLD_SIZE` .* got 2: type torchrun --nproc-per-node 2 {TYPED}",
        ),
        (LAUNCHED, 0, f"`--num_processes` .* type torchrun --nproc-per-node NUMBER {TYPED}"),
        (RANKED, 1, "`--nproc-per-node` must be at most 1, .* got 2: or type ACCELERATE_USE_CPU=1"),
    ],
)
def test_fewer_processes_than_asked_for_are_refused(environment, devices, said, monkeypatch):
    on_gpus(monkeypatch, devices)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        make_accelerator("fp32")


@pytest.mark.parametrize(
    ("environment", "devices", "joins"),
    [
        ({}, 0, False),
        (RANKED | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, 0, False),
        (RANKED, 0, True),
        (RANKED, 2, False),  # accelerate joins GPUs by itself
        (RANKED | {"ACCELERATE_USE_CPU": "1"}, 1, True),
        (RANKED | LAUNCHED, 0, True),
        ({"MASTER_ADDR": "127.0.0.1"}, 0, False),  # of a cluster that sets it for every job
    ],
)
def test_processes_on_cpus_are_joined(environment, devices, joins, monkeypatch):
    on_gpus(monkeypatch, devices)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert joins_on_cpu() is joins


def test_an_accelerator_that_knows_of_one_process_is_refused(monkeypatch):
    """`Accelerator()` takes each process on a CPU for a run of its own."""
    for name, value in RANKED.items():
        monkeypatch.setenv(name, value)
    theirs = SimpleNamespace(num_processes=1)
    said = "`accelerator` must have all 2 processes of WORLD_SIZE, got 1: on a CPU make it with "
    with pytest.raises(ValueError, match=re.escape(said + "Accelerator(cpu=True)")):
        check_accelerator(theirs, "auto")


def test_a_run_says_on_what_it_is():
    assert processes_told(make_accelerator("fp32")) == "1 process on the CPU."
