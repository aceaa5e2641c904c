"""Two processes that share a batch end with the weights of one process that has it all."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

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
queries, responses = ragged([3, 1, 4, 1, 5, 9, 2, 6]), ragged([2, 7, 1, 8, 2, 8, 1, 8], seed=1)
scores = torch.linspace(-1, 2, 8)
mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
for _ in range(2):
    stats = trainer.step(queries[mine], responses[mine], scores[mine])
if rank == 0:
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    kept = {k: v for k, v in stats.items() if isinstance(v, float) and not k.startswith("time")}
    torch.save((world, weights, kept), sys.argv[1])
"""


@pytest.mark.distributed
def test_one_process_equals_two(tmp_path):
    root = Path(__file__).parents[1]
    script = tmp_path / "share.py"
    script.write_text(textwrap.dedent(SCRIPT))
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        result = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), str(script), str(out)],
            cwd=root,
            env={"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        results.append(torch.load(out))
    (one, weights, stats), (two, other_weights, other_stats) = results
    assert (one, two) == (1, 2)
    torch.testing.assert_close(weights, other_weights, rtol=1e-5, atol=1e-6)
    for name in ("objective/kl", "ppo/loss/total", "ppo/returns/var", "objective/kl_coef"):
        assert stats[name] == pytest.approx(other_stats[name], rel=1e-4), name
