"""What all tests of this folder have in common: the marker `gpu`, the device, exact products."""

import os

# Read when cuBLAS starts; without it, it is not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Processes are forked from one that may have asked for CUDA, but must not have started it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.devices import ASKED, DEVICE, trainers_on


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ASKED not in ("cpu", "cuda"):
        raise pytest.UsageError(f"TRL_GPU_TESTS_ON must be cpu or cuda, got {ASKED!r}.")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")  # in one place, so that one line tells it for all


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    """Trainers run there, and multiply float32 as such: TF32 has ten bits."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with trainers_on(DEVICE):
        yield
    torch.set_float32_matmul_precision(precision)
