"""Memory that the process keeps."""

import platform
import subprocess
import sys
from typing import NamedTuple

import psutil
import pytest

from tests.families import tiny_model
from trl import PPOTrainer
from trl.compute import budget
from trl.compute.budget import tokens_that_fit
from trl.kernels.memory import keep_freed_memory
from trl.training import undo
from trl.training.parts import load_policy

COUNT = """
import resource, torch
from trl.kernels.memory import keep_freed_memory
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


HOLES = """
import ctypes
c = ctypes.CDLL(None)
c.malloc.restype = c.realloc.restype = ctypes.c_void_p
c.malloc.argtypes, c.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
c.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def hole(size):
    for _ in range(16):
        c.malloc(56)                  # none of this size is left over from before
    large = c.malloc(size + 64)
    c.realloc(large, size)            # its end is cut off,
    fixed = c.malloc(56) > large      # and stays: so the hole does not grow
    c.memset(large, 1, size)
    c.free(large)
    return fixed
def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
"""
GROW = """
from trl.kernels.memory import give_back_memory, keep_freed_memory
assert keep_freed_memory()
def grown(after, first):
    most = 0
    for step in range(40):
        assert hole(first + step * 2**18)  # fits into none that is there
        after()
        start = held() if step == 0 else start
        most = max(most, held() - start)
    return most // 1024
print(grown(give_back_memory, 2**22), grown(lambda: None, 2**24))
"""


@linux_only
def test_what_is_kept_does_not_grow_without_end():
    """40 blocks of 4 to 14 MiB, of which one is there at a time; then as many larger ones."""
    done = subprocess.run(
        [sys.executable, "-c", HOLES + GROW], capture_output=True, text=True, check=True
    )
    bounded, without = map(int, done.stdout.split())
    assert bounded < 250 < 500 < without


@linux_only
def test_freed_memory_is_used_again():
    """8 tensors of 64 MiB, 16,384 pages each, after 8 that have settled where they go."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    kept, without = map(int, done.stdout.split())
    assert kept < 8 * 16_384 / 2 < without


GATHER = """
import sys
from trl.kernels.memory import give_back_at_once
if sys.argv[1] == "mended":
    assert give_back_at_once()
c.free(c.malloc(2**25 - 2**14))  # from now on glibc by itself keeps what is smaller
before = held()
for layer in range(20):
    assert hole(2**24 + layer * 2**18) or sys.argv[1] == "mended"
print((held() - before) // 1024)
"""


@pytest.mark.slow
@linux_only
def test_layers_that_are_let_go_of_leave_no_holes():
    """20 of 16 to 21 MiB, one there at a time, each with something small after it that stays."""
    command = [sys.executable, "-c", HOLES + GATHER]
    mended, without = (
        int(subprocess.run([*command, way], capture_output=True, text=True, check=True).stdout)
        for way in ("mended", "without")
    )
    assert mended < 10 < 100 < without


def test_settings_of_the_environment_stand(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()


def test_a_pass_has_the_tokens_that_a_quarter_of_the_memory_holds(monkeypatch):
    """By hand: of the tiny Llama each matrix with what goes in and out, and the logits."""
    model = load_policy(tiny_model("llama"))
    trainer = PPOTrainer(model, batch_size=2, precision="fp32")
    assert trainer.config.token_budget == 16_384  # the most
    assert PPOTrainer(model, batch_size=2, token_budget=7).config.token_budget == 7
    sizes = model.config.get_text_config()
    d, inner = sizes.hidden_size, sizes.intermediate_size
    keys = sizes.num_key_value_heads * sizes.head_dim
    of_layer = 2 * (2 * d) + 2 * (d + keys) + 3 * (d + inner)
    kept = 4 * (sizes.num_hidden_layers * of_layer + sizes.vocab_size)
    for memory, tokens in ((4 * kept * 100, 64), (4 * kept * 128, 128), (4 * kept * 127, 64)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: Memory(memory))
        assert tokens_that_fit(trainer.updater) == tokens
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert tokens_that_fit(trainer.updater) == tokens // 2
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(budget, "limits", lambda: iter([4 * kept * 33]))  # of a container
    assert tokens_that_fit(trainer.updater) == 32


@pytest.mark.parametrize(
    ("groups", "files", "found"),
    [
        ("0::/\n", {"memory.max": "1000"}, [1000]),
        ("0::/\n", {"memory.max": "max"}, []),
        ("0::/jobs/17\n", {"jobs/17/memory.max": "max", "jobs/memory.max": "2000"}, [2000]),
        ("0::/jobs/17\n", {"jobs/18/memory.max": "5"}, []),
        (
            "12:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n",
            {"memory/memory.limit_in_bytes": "3000", "cpu/docker/ab/memory.max": "5"},
            [3000],
        ),
        (None, {}, []),
    ],
)
def test_what_a_container_or_a_job_may_have(tmp_path, groups, files, found):
    """As Docker, Kubernetes and Slurm lay it out, in control groups of both versions."""
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert list(budget.limits(tmp_path)) == found


def test_what_is_free_is_that_of_the_container(monkeypatch):
    machine, used = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    monkeypatch.setattr(budget, "limits", lambda: iter([used + machine * 8]))
    assert budget.free_memory() <= machine * 1.5  # the machine's, which others use too
    monkeypatch.setattr(budget, "limits", lambda: iter([used * 9, used * 3]))
    assert budget.free_memory() <= used * 2.5
    trainer = PPOTrainer(load_policy(tiny_model("llama")), batch_size=2, precision="fp32")
    assert undo.has_room(trainer)
    monkeypatch.setattr(budget, "limits", lambda: iter([used]))
    assert not undo.has_room(trainer)


class Memory(NamedTuple):
    """What psutil tells."""

    total: int
