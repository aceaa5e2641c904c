"""Several hosts: a run finishes, and who is left of one that loses some ends, and says which."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from tests.hosts import cut, two_hosts
from tests.ranks import launch
from trl.compute.starting import processes_told
from trl.ppo import PPOTrainer

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PATIENCE = 10
"""Seconds that a process waits for the others here."""
IN_TIME = PATIENCE + 15
LOST = {
    "a worker": [2],
    "a worker beside others": [1],
    "host b": [2],
    "host a": [0, 1],
    "the link": [],
}
"""What is lost, and the ranks that are killed; 0 and 1 are on host a, 2 is on host b."""


@pytest.fixture(scope="module")
def hosts():
    try:
        with two_hosts() as (a, b):
            yield [a, a, b]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here (root on Linux can): {error}")


def train(folder, lost):
    """Steps of three processes, of which some are lost in the third."""
    trainer = PPOTrainer(
        tiny_gpt2(0),
        tiny_gpt2(1),
        precision="fp32",
        batch_size=12,
        minibatch_size=12,
        collective_timeout=PATIENCE,
    )
    rank = trainer.accelerator.process_index
    told = processes_told(trainer.accelerator)
    if rank == 0:
        (Path(folder) / "told").write_text(told)
    for step in range(4 if lost is None else 1000):
        if lost is not None and step == 2:
            (Path(folder) / f"at-{rank}").write_text(str(time.time()))
            if rank == max(LOST[lost], default=2) and lost.startswith(("host", "the link")):
                cut()
            if rank in LOST[lost]:
                time.sleep(0.2)  # none of them says more over the link
                os.kill(os.getpid(), signal.SIGKILL)
        trainer.step(ragged([3, 1, 4, 1]), ragged([2, 7, 1, 8]), torch.linspace(-1, 2, 4))


def test_a_run_of_two_hosts_finishes(hosts, tmp_path):
    codes, said = launch(train, 3, tmp_path, str(tmp_path), None, hosts=hosts)
    assert codes == [0, 0, 0], said
    told = (tmp_path / "told").read_text()
    assert told == "3 processes on the CPU of host-a, host-b, joined by gloo."


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("a worker", {0: "rank 2 on host-b", 1: "rank 2 on host-b"}),
        ("a worker beside others", {0: "rank 1 on host-a", 2: "rank 1 on host-a"}),
        ("host b", {0: "rank 2 on host-b", 1: "rank 2 on host-b"}),
        ("host a", {2: "rank 0 on host-a,? .*keeps the store"}),
        (
            "the link",
            {0: "rank 2 on host-b", 1: "rank 2 on host-b", 2: "rank 0 on host-a,? .*keeps"},
        ),
    ],
)
def test_who_is_left_ends_in_time_and_names_who_is_lost(lost, named, hosts, tmp_path):
    for host in hosts:
        host.join()
    codes, said = launch(train, 3, tmp_path, str(tmp_path), lost, hosts=hosts, timeout=180)
    ended = time.time()
    lost_at = max(float(file.read_text()) for file in tmp_path.glob("at-*"))
    for rank, who in named.items():
        assert codes[rank] == 1, said
        assert re.search(f"rank {rank} stops, since {who}", said[rank]), said[rank]
    assert ended - lost_at < IN_TIME, said
