"""Two processes that share a batch end with the weights of one process that has it all."""

import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from trl.compute.precision import exit_after_gloo

SCRIPT = """
import sys
import torch
from tests.conftest import ragged, tiny_gpt2
from trl.ppo import PPOTrainer

model = tiny_gpt2(0)
trainer = PPOTrainer(
    model, tiny_gpt2(1), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), precision="fp32",
    batch_size=8, minibatch_size=8, ppo_epochs=2, forward_batch_size=2, max_grad_norm=0.5,
)
rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
# The longest response of one process has 7 tokens, of the other 8.
queries, responses = ragged([3, 1, 4, 1, 5, 9, 2, 6]), ragged([2, 7, 1, 3, 2, 8, 1, 8], seed=1)
scores = torch.linspace(-1, 2, 8)
mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
for _ in range(2):
    stats = trainer.step(queries[mine], responses[mine], scores[mine])
if rank == 0:
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    kept = {k: v for k, v in stats.items() if isinstance(v, float) and not k.startswith("time")}
    torch.save((world, weights, kept), sys.argv[1])
"""


# What else a trainer does, one after the other: no critic, groups, KL in the loss, sums over a
# response, whitening, a value warm-up, pretraining, a mixture of experts that is balanced.
OTHER_WAYS = """
import sys
from dataclasses import replace
import torch
from tests.conftest import ragged, tiny_gpt2
from tests.families import VOCABULARY, tiny_model
from trl.batch import Rollout
from trl.models.with_value_head import CausalLMWithValueHead
from trl.ppo import PPOTrainer


def experts(seed):
    model = tiny_model("mixtral", seed)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    return CausalLMWithValueHead(model)


WAYS = {
    "grpo": {"algorithm": "grpo"},
    "rloo": {"algorithm": "rloo", "scale_scores": True, "missing_eos_penalty": 1.0},
    "reinforce++": {"algorithm": "reinforce++"},
    "warmup": {"value_warmup_steps": 1, "vf_coef": 1.0},
    "pretraining": {"pretraining_coef": 0.5, "pretraining_rows": 4},
    "experts": {"forward_batch_size": 1},  # the same passes on one process and on two
}
results = {}
for name, settings in WAYS.items():
    make_model = experts if name == "experts" else tiny_gpt2
    model = make_model(0)
    # What is at rest must not decay either.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    trainer = PPOTrainer(
        model, make_model(1), optimizer=optimizer, precision="fp32", batch_size=8,
        minibatch_size=8, ppo_epochs=2, max_grad_norm=0.5, **{"forward_batch_size": 2} | settings,
    )
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    if "pretraining_coef" in settings:
        texts = ragged([2, 6, 3, 5])
        share = slice(rank * 4 // world, (rank + 1) * 4 // world)
        trainer.pretraining = lambda rows: texts[share]
    queries = [query for query in ragged([3, 1], vocabulary=VOCABULARY) for _ in range(4)]
    responses = ragged([2, 7, 1, 3, 2, 8, 1, 8], 1, VOCABULARY)
    rollout = Rollout.from_lists(
        queries[mine], responses[mine],
        group_ids=[index // 4 for index in range(8)][mine],
    )
    rollout = replace(rollout, ended=(torch.arange(8) % 3 > 0)[mine])
    scores = torch.tensor([-1.0, 2.0, 0.5, 0.0, 1.0, -2.0, 0.3, 1.1])[mine]
    for _ in range(2):
        stats = trainer.step(rollout, scores)
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    kept = {k: v for k, v in stats.items() if isinstance(v, float) and not k.startswith("time")}
    results[name] = (weights, kept)
if rank == 0:
    torch.save((world, results), sys.argv[1])
"""


# Every kind of policy, by SGD and Adam, on rows whose lengths differ from process to process.
KINDS = """
import sys
import torch
from tests.conftest import ragged
from tests.families import VOCABULARY, tiny_model
from tests.models.policies import lora_config
from trl.batch import Rollout
from trl.models.with_value_head import load_policy
from trl.ppo import PPOTrainer

KINDS = {
    "ppo": ({}, {}),
    "grpo": ({}, {"algorithm": "grpo"}),
    "rloo": ({}, {"algorithm": "rloo"}),
    "lora": ({"peft_config": lora_config()}, {}),
    "unfrozen": ({"unfrozen_layers": 1}, {}),
    "whitened rewards": ({}, {"whiten_rewards": True}),
    "early stop": ({}, {"max_approxkl": 1e-5}),
}
ADAM = lambda weights: torch.optim.Adam(weights, lr=5e-3, eps=1e-5)
WAYS = {
    "SGD": ("fp32", lambda weights: torch.optim.SGD(weights, lr=0.2)),
    "Adam": ("fp32", ADAM),
    "bf16": ("bf16", lambda weights: torch.optim.SGD(weights, lr=0.2)),
}
results = {}
for kind, (how, settings) in KINDS.items():
    for way, (precision, make_optimizer) in WAYS.items():
        torch.manual_seed(0)
        policy = load_policy(tiny_model("llama"), **how)
        torch.nn.init.normal_(policy.v_head.summary.weight, std=0.1)
        weights = [weight for weight in policy.parameters() if weight.requires_grad]
        before = torch.cat([weight.detach().flatten() for weight in weights])
        trainer = PPOTrainer(
            policy, optimizer=make_optimizer(weights), precision=precision, batch_size=12,
            minibatch_size=12, ppo_epochs=2, forward_batch_size=2, **settings,
        )
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
        queries = [q for q in ragged([3, 1, 5, 2, 4, 6], vocabulary=VOCABULARY) for _ in range(2)]
        responses = ragged([2, 3, 1, 2, 8, 5, 1, 7, 11, 1, 4, 12], 1, VOCABULARY)
        rollout = Rollout.from_lists(
            queries[mine], responses[mine], group_ids=[row // 2 for row in range(12)][mine]
        )
        scores = torch.tensor([-1.0, 2, 0.5, 0, 1, -2, 0.3, 1.1, 0.7, -0.2, 0.1, 0.9])[mine]
        for _ in range(2):
            stats = trainer.step(rollout, scores)
        after = torch.cat([weight.detach().flatten() for weight in weights])
        kept = {k: v for k, v in stats.items() if isinstance(v, float) and not k.startswith("time")}
        results[kind, way] = after, float((after - before).abs().max()), kept
if rank == 0:
    torch.save((world, results), sys.argv[1])
"""

# One of two processes fails in the third step.
FAILING = """
import os
import signal
import sys
import torch
from tests.conftest import ragged, tiny_gpt2
from trl.ppo import PPOTrainer

trainer = PPOTrainer(
    tiny_gpt2(0), tiny_gpt2(1), precision="fp32", batch_size=8, minibatch_size=8, ppo_epochs=1
)
for step in range(1000):
    scores = torch.linspace(-1, 2, 4)
    if trainer.accelerator.process_index == 1 and step == 2:
        if sys.argv[1] == "scorer":
            raise OverflowError("the reward is broken")
        if sys.argv[1] == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        if sys.argv[1] == "disk":
            raise OSError(28, "No space left on device", "/full")
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "NaN":
            scores[1] = float("nan")
    trainer.step(ragged([3, 1, 4, 1]), ragged([2, 7, 1, 8]), scores)
"""


def run(script, tmp_path, numbers=(1, 2)):
    """What the script writes in one process, and in two."""
    root = Path(__file__).parents[1]
    file = tmp_path / "share.py"
    file.write_text(textwrap.dedent(script))
    results = []
    for processes in numbers:
        out = tmp_path / f"{processes}.pt"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        result = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), str(file), str(out)],
            cwd=root,
            env={"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        results.append(torch.load(out))
    return results


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:nccl", "nccl", None])
def test_a_process_leaves_gloo_time_to_end(backend, monkeypatch):
    """Its threads abort a process that ends before they have let go of a tensor."""
    called, slept = [], []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: backend is not None)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: backend)
    monkeypatch.setattr("atexit.register", called.append)
    monkeypatch.setattr("time.sleep", slept.append)
    exit_after_gloo()
    assert len(called) == (backend is not None and "gloo" in backend)
    for function in called:
        function()
    assert slept == [0.5] * len(called)


@pytest.mark.distributed
def test_one_process_equals_two(tmp_path):
    (one, weights, stats), (two, other_weights, other_stats) = run(SCRIPT, tmp_path)
    assert (one, two) == (1, 2)
    torch.testing.assert_close(weights, other_weights, rtol=1e-5, atol=1e-6)
    for name in ("objective/kl", "ppo/loss/total", "ppo/returns/var", "objective/kl_coef"):
        assert stats[name] == pytest.approx(other_stats[name], rel=1e-4), name


@pytest.mark.distributed
def test_one_process_equals_two_in_other_ways(tmp_path):
    (one, results), (two, others) = run(OTHER_WAYS, tmp_path)
    assert (one, two) == (1, 2)
    for way, (weights, stats) in results.items():
        other_weights, other_stats = others[way]
        torch.testing.assert_close(
            weights, other_weights, rtol=1e-5, atol=1e-6, msg=lambda text, way=way: f"{way}: {text}"
        )
        assert stats.keys() == other_stats.keys()
        assert ("ppo/loss/router" in stats) == (way == "experts")
        for name in stats:
            expected = pytest.approx(stats[name], rel=1e-4, abs=1e-5)
            assert other_stats[name] == expected, (way, name)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_and_three_processes_equal_one_for_every_kind_of_policy(tmp_path):
    (_, expected), *others = run(KINDS, tmp_path, (1, 2, 3))
    most = {"SGD": 4e-7, "Adam": 5e-6, "bf16": 2e-2}
    for processes, results in others:
        for (kind, way), (weights, moved, stats) in expected.items():
            named = f"{processes} processes, {kind}, {way}"
            assert moved > 1e-2, named
            gap = float((results[kind, way][0] - weights).abs().max())
            assert gap <= most[way], f"{named}: {gap:.1e}"
            if way != "bf16":
                for name, value in stats.items():
                    near = pytest.approx(value, rel=1e-4, abs=1e-5)
                    assert results[kind, way][2][name] == near, f"{named}: {name}"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("scorer", "rank 1 failed: OverflowError: the reward is broken"),
        ("killed", "rank 1 ended without a word"),
        pytest.param("Ctrl-C", "rank 1 failed: KeyboardInterrupt", marks=pytest.mark.slow),
        pytest.param("disk", "rank 1 failed: OSError.*No space left", marks=pytest.mark.slow),
        pytest.param("NaN", "rank 1 was given bad input: .*nan", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_ends_the_others_with_its_reason(kind, reason, tmp_path):
    root, file = Path(__file__).parents[1], tmp_path / "failing.py"
    file.write_text(FAILING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(file), kind],
            cwd=root,
            env={
                "PYTHONPATH": str(root),
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        started[1].communicate(timeout=120)
        _, said = started[0].communicate(timeout=20)
    finally:
        for process in started:
            process.kill()
    assert started[0].returncode not in (0, None)
    assert re.search(reason, said), said


RUN = """
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
import torch
from tests.training.runs import assert_same_run, lines, make_parts, tiny_recipe
from trl.config.recipe import PretrainingConfig
from trl.training import loop, run

out = Path(sys.argv[1]).with_suffix("")
rank = int(os.environ.get("RANK", 0))
changes = {"ppo": {"pretraining_coef": 0.5}}
if rank == 0:
    out.mkdir()
    make_parts(out)
torch.distributed.is_torchelastic_launched() and torch.distributed.init_process_group("gloo")
torch.distributed.is_initialized() and torch.distributed.barrier()
changes["pretraining"] = PretrainingConfig(text=str(out / "prompts.txt"), tokens=4)
run.write_report = lambda runs, out: out
run.run_recipe(tiny_recipe(out, out / "whole", **changes))

calls, score = 0, loop.score
def score_and_stop(scorer, rollout):
    global calls
    calls += 1
    if calls == 3 and rank == 0:  # one process is asked, all of them stop
        os.kill(os.getpid(), signal.SIGINT)
    return score(scorer, rollout)

recipe = tiny_recipe(out, out / "stopped", **changes)
loop.score = score_and_stop
assert run.run_recipe(recipe).interrupted
loop.score = score
result = run.run_recipe(recipe, resume="auto")
assert result.steps == 6
if rank == 0:
    assert_same_run(out / "whole", out / "stopped")
    rows = lines(out / "whole" / "samples.jsonl")
    torch.save([(row["prompt"], row["response"]) for row in rows[:6]], sys.argv[1])
"""


@pytest.mark.distributed
def test_a_run_of_two_processes_stops_and_goes_on(tmp_path):
    one, two = run(RUN, tmp_path)
    assert one == two  # the held-out responses of the same weights do not depend on processes
