"""Memory that the process keeps."""

import platform
import subprocess
import sys

import pytest

from trl.compute.memory import keep_freed_memory

COUNT = """
import resource, torch
from trl.compute.memory import keep_freed_memory
torch.set_num_threads(1)
if {keep}:
    assert keep_freed_memory()
for _ in range(8):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

linux_only = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way"
)


def page_faults(keep):
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


GROW = """
import torch
from trl.compute.memory import give_back_memory, keep_freed_memory
assert keep_freed_memory()
kept, most = [], 0
for step in range(60):
    large = torch.ones(2**20 + step * 2**16)  # fits into no hole that is there
    kept.append(torch.ones(2**10))            # and this keeps its own from growing
    del large
    {after}
    with open("/proc/self/status") as lines:
        held = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    first = held if step == 0 else first
    most = max(most, held - first)
print(most // 1024)
"""


def growth(after):
    done = subprocess.run(
        [sys.executable, "-c", GROW.format(after=after)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@linux_only
def test_what_is_kept_does_not_grow_without_end():
    """60 tensors of 4 to 19 MiB, of which one is there at a time."""
    assert growth("give_back_memory()") < 350 < 500 < growth("pass")


@linux_only
def test_freed_memory_is_used_again():
    """16 tensors of 64 MiB, 16,384 pages each, after 8 that have settled where they go."""
    assert page_faults(keep=True) < 16 * 16_384 / 2 < page_faults(keep=False)


def test_settings_of_the_environment_stand(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
