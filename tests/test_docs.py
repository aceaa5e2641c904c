"""What the README shows runs, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from trl import cli
from trl.recipe import Recipe
from trl.settings import paths

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
README = (ROOT / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
REPEATABLE = "import torch; torch.manual_seed(0)\n"


@pytest.fixture(scope="module")
def folder_with_gpt2(tmp_path_factory):
    """A folder that holds a model folder `gpt2`: tiny, with the tokenizer files of the real one.

    Without those files at hand, a byte-level BPE trained here takes their place.
    """
    folder = tmp_path_factory.mktemp("readme")
    model_folder = folder / "gpt2"
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, bos_token_id=50256, eos_token_id=50256)
    GPT2LMHeadModel(config).save_pretrained(model_folder)
    real = SHARED / "data/gpt2-bpe"
    if real.is_dir():
        (model_folder / "vocab.json").write_bytes((real / "encoder.json").read_bytes())
        (model_folder / "merges.txt").write_bytes((real / "vocab.bpe").read_bytes())
    else:
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([README], vocab_size=600, special_tokens=["<|endoftext|>"])
        bpe.save_model(str(model_folder))
    return folder


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.splitlines()[0])
def test_python_of_the_readme_runs_as_a_script(block, folder_with_gpt2):
    result = subprocess.run(
        [sys.executable, "-c", REPEATABLE + block],
        cwd=folder_with_gpt2,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr


def test_there_is_python_in_the_readme():
    assert len(PYTHON_BLOCKS) == 4


@pytest.mark.skipif(not SHARED.is_dir(), reason="the text of the example is not here")
def test_the_first_example_is_the_one_that_was_asked_for():
    text = (SHARED / "seed.txt").read_text()
    example = re.search(r"^# imports\n.*?^train_stats = [^\n]*\n", text, re.DOTALL | re.MULTILINE)
    assert PYTHON_BLOCKS[0] == example.group()


def test_commands_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= set(targets)
    commands = re.findall(r"^trl ([a-z]+)(.*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert {command for command, _ in commands} == {"train", "report", "compare", "sample"}
    settings = {f"--{path.path.replace('_', '-')}" for path in paths(Recipe)} | {"--reward"}
    options = {"--print-config", "--resume", "--help", "--prompt", "--n", "--version"}
    assert set(re.findall(r"(?<=[\s`(])--[a-z.-]+", README)) <= settings | options


def test_a_recipe_of_the_readme_prints(capsys):
    assert cli.main(["train", "sentiment", "--ppo.learning-rate", "1e-4", "--print-config"]) == 0
    assert "learning_rate: 0.0001" in capsys.readouterr().out


def test_links_of_the_texts_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"
