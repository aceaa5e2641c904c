"""Several hosts: a run finishes, and who is left of one that loses some ends, and says which."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from tests.hosts import cut, two_hosts
from tests.ranks import launch
from tests.training.runs import assert_same_run, lines, make_parts, tiny_recipe, without_time
from trl.compute.starting import processes_told
from trl.config.recipe import ModelConfig
from trl.ppo import PPOTrainer
from trl.training import loop, run
from trl.training.checkpoints import Checkpoints

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


# -- going on, on the host that is left ------------------------------------------------------------


def run_a_recipe(folder, name, shard, lost_in_step=None):
    """A run, or the rest of it; in a step host b may be lost."""
    score, calls = loop.score, 0

    def score_or_be_lost(scorer, rollout):
        nonlocal calls
        calls += 1
        if calls == lost_in_step and os.environ["RANK"] == "1":
            cut()
            os.kill(os.getpid(), signal.SIGKILL)
        return score(scorer, rollout)

    loop.score, run.write_report = score_or_be_lost, lambda runs, out: out
    out = Path(folder)
    model = ModelConfig(name=str(out / "model"), shard=shard)
    recipe = tiny_recipe(out, out / name, model=model, ppo={"collective_timeout": PATIENCE})
    assert run.run_recipe(recipe, resume="auto").steps == 6


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_that_loses_a_host_goes_on_on_the_other_alone(shard, hosts, tmp_path):
    a, _, b = hosts
    for host in hosts:
        host.join()
    make_parts(tmp_path)
    codes, said = launch(run_a_recipe, 2, tmp_path, str(tmp_path), "whole", shard, hosts=[a, b])
    assert codes == [0, 0], said
    lost = str(tmp_path), "lost", shard, 4
    codes, said = launch(run_a_recipe, 2, tmp_path, *lost, hosts=[a, b], timeout=180)
    assert codes == [1, -signal.SIGKILL], said
    assert "rank 0 stops, since rank 1 on host-b" in said[0]
    there = Checkpoints(tmp_path / "lost" / "checkpoints")
    assert [path.name for path in there.all()] == ["step-000002"]
    for processes in (2, 1):  # while the link is still cut
        name = f"on {processes}"
        shutil.copytree(tmp_path / "lost", tmp_path / name)
        codes, said = launch(
            run_a_recipe, processes, tmp_path, str(tmp_path), name, shard, hosts=[a] * processes
        )
        assert codes == [0] * processes, said
    assert_same_run(tmp_path / "whole", tmp_path / "on 2")
    assert "of a run on 2 processes, and these are 1" in said[0]
    ours, whole = (
        without_time(lines(tmp_path / name / "metrics.jsonl")) for name in ("on 1", "whole")
    )
    assert [row["step"] for row in ours] == list(range(7))
    assert ours[:3] == whole[:3]
    assert ours[3:] != whole[3:]
