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


@linux_only
def test_freed_memory_is_used_again():
    """16 tensors of 64 MiB, 16,384 pages each, after 8 that have settled where they go."""
    assert page_faults(keep=True) < 16 * 16_384 / 2 < page_faults(keep=False)


def test_settings_of_the_environment_stand(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
