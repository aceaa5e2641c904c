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
def page_faults():
    for _ in range(8):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = page_faults()
assert keep_freed_memory()
print(page_faults(), without)
"""

linux_only = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way"
)


@linux_only
def test_freed_memory_is_used_again():
    """8 tensors of 64 MiB, 16,384 pages each, after 8 that have settled where they go."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    kept, without = map(int, done.stdout.split())
    assert kept < 8 * 16_384 / 2 < without


def test_settings_of_the_environment_stand(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
