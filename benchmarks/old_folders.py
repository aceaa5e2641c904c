"""Writes the folders of older releases that the tests load: tests/data/old-folders.

    python old_folders.py OUT        in an environment with trl==0.0.3 (transformers 4.30), and
                                     again in one with trl==0.11.4, transformers 4.46.3, peft 0.13.2

Each folder is a tiny random model with a value head, saved by the release itself; beside them lies
what the release computes with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

TOKENS = torch.arange(10).view(2, 5)
GPT2 = GPT2Config(
    vocab_size=61,
    n_positions=16,
    n_embd=8,
    n_layer=1,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
    initializer_range=0.2,
)
T5 = T5Config(
    vocab_size=61,
    d_model=8,
    d_kv=4,
    d_ff=16,
    num_layers=1,
    num_heads=2,
    decoder_start_token_id=0,
    initializer_factor=2.0,
)


def random_head(model: torch.nn.Module) -> torch.nn.Module:
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.5)
    torch.nn.init.normal_(model.v_head.summary.bias)
    return model.eval()


@torch.no_grad()
def keep(model: torch.nn.Module, out: Path, name: str, **inputs: torch.Tensor) -> None:
    """Save the model, and its logits and values."""
    (out / name).mkdir(parents=True)  # 0.11 does not make it for an adapter
    model.save_pretrained(str(out / name))
    output = model(TOKENS, **inputs)
    (out / "expected").mkdir(exist_ok=True)
    save_file(
        {"logits": output[0].contiguous(), "value": output[-1].contiguous()},
        out / "expected" / f"{name}.safetensors",
    )


def release_0_0_3(out: Path) -> None:
    from trl.gpt2 import GPT2HeadWithValueModel

    keep(random_head(GPT2HeadWithValueModel(GPT2)), out, "trl-0.0.3")


def release_0_11(out: Path) -> None:
    from peft import LoraConfig

    from trl import AutoModelForCausalLMWithValueHead as Causal
    from trl import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq

    base = str(out / "base")
    GPT2LMHeadModel(GPT2).save_pretrained(base)
    keep(random_head(Causal.from_pretrained(base)), out, "trl-0.11-safetensors")
    pickled = random_head(Causal.from_pretrained(base))
    save = pickled.save_pretrained
    pickled.save_pretrained = lambda folder: save(folder, safe_serialization=False)
    keep(pickled, out, "trl-0.11-pickle")
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    # Afterwards the name of the base was shortened to "base" in its adapter_config.json.
    keep(random_head(Causal.from_pretrained(base, peft_config=lora)), out, "trl-0.11-lora")
    T5ForConditionalGeneration(T5).save_pretrained(str(out / "t5"))
    t5 = random_head(Seq2Seq.from_pretrained(str(out / "t5")))
    keep(t5, out, "trl-0.11-t5", decoder_input_ids=TOKENS.flip(0))


def main() -> None:
    torch.manual_seed(0)
    out = Path(sys.argv[1])
    try:
        import trl.gpt2  # noqa: F401
    except ImportError:
        release_0_11(out)
    else:
        release_0_0_3(out)


if __name__ == "__main__":
    main()
