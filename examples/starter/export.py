"""Writes the starter models as small package data: float16 weights, tokenizer, model card.

    python export.py --language-model runs/gpt2 --classifier runs/bert --out trl/starter

The weights are stored in float16 and load as float32 (`"dtype": "float32"` in config.json).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from train_language_model import new_model
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

CARDS = Path(__file__).parent / "cards"


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Saves in float16 with a config that asks for float32."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"dtype": "float32"}
    file.write_text(json.dumps(config, indent=2) + "\n")


def export_language_model(work: Path, folder: Path) -> None:
    model = new_model()
    model.load_state_dict(torch.load(work / "checkpoint-0.pt", map_location="cpu")["model"])
    eos = model.config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos)
    save_half(model, folder)
    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(folder)
    shutil.copy(CARDS / "imdb-gpt2.md", folder / "README.md")


def export_classifier(work: Path, folder: Path) -> None:
    save_half(BertForSequenceClassification.from_pretrained(work / "model"), folder)
    AutoTokenizer.from_pretrained(work / "model").save_pretrained(folder)
    shutil.copy(CARDS / "imdb-bert.md", folder / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="--work of train_language_model.py")
    parser.add_argument("--classifier", type=Path, help="--work of train_classifier.py")
    parser.add_argument("--out", type=Path, default=Path("trl/starter"))
    args = parser.parse_args()
    if args.language_model:
        export_language_model(args.language_model, args.out / "imdb-gpt2")
    if args.classifier:
        export_classifier(args.classifier, args.out / "imdb-bert")


if __name__ == "__main__":
    main()
