"""The first README's example runs as it was written, as a script, beside a folder named gpt2."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel


@pytest.fixture
def gpt2_folder(tmp_path: Path, shared: Path) -> Path:
    """A small GPT-2 with random weights and the real tokenizer files."""
    folder = tmp_path / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4)).save_pretrained(folder)
    files = shared / "data" / "gpt2-bpe"
    (folder / "vocab.json").write_bytes((files / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((files / "vocab.bpe").read_bytes())
    assert AutoTokenizer.from_pretrained(folder).vocab_size == 50257
    return folder


def test_the_seeds_example_runs_unchanged(gpt2_folder, shared):
    text = (shared / "seed.txt").read_text()
    start = text.index("# imports")
    last = "train_stats = ppo_trainer.step(query_tensor, response_tensor, reward)"
    code = text[start : text.index(last) + len(last)]
    script = gpt2_folder.parent / "example.py"
    script.write_text(
        code + "\nassert len(train_stats) >= 30\nprint('KL', train_stats['objective/kl'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("KL 0.0")
