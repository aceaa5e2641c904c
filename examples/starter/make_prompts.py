"""Samples review openings from the starter language model, to use as prompts.

    python make_prompts.py --model imdb-gpt2 --classifier imdb-bert --out trl/starter

No IMDB text is shipped: the openings are what the model itself writes after `<|endoftext|>`.
Each is printable ASCII, stands on one line, re-tokenises to 3 to 8 tokens, has only words that
are one token each, and is in one of the files only. None has taken a side yet: the classifier
gives all of them a P(positive) from 0.3 to 0.7, which leaves out a quarter of what was sampled.
"""

from __future__ import annotations

import argparse
import random
from itertools import pairwise
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl import ClassifierScorer


def is_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `text` may go into a file as a line of its own.

    Words of more than one token are left out: many are words that the model has made up.
    """
    ids = tokenizer(text)["input_ids"]
    pieces = [tokenizer.decode([i]) for i in ids]
    return (
        text.isascii()
        and text.isprintable()
        and "<" not in text
        and text[:1].isalpha()
        and 3 <= len(ids) <= 8
        and not any(a[-1:].isalpha() and b[:1].isalpha() for a, b in pairwise(pieces))
    )


def is_word_end(following: str) -> bool:
    """Whether a word ends before the token `following`."""
    return not (following[:1].isalnum() or following[:1] == "'")


def sample_openings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    positive: ClassifierScorer,
    count: int,
    *,
    seed: int = 0,
) -> list[str]:
    """`count` different openings of 4 to 6 tokens, sampled at temperature 1, cut at whole words."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    openings: dict[str, None] = {}  # a set that keeps the order
    while len(openings) < count:
        start = torch.full((256, 1), tokenizer.eos_token_id)
        ids = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=7,
            do_sample=True,
            top_k=0,
            pad_token_id=tokenizer.eos_token_id,
        )[:, 1:].tolist()
        found = []
        for row in ids:
            ends = [end for end in (4, 5, 6) if is_word_end(tokenizer.decode(row[end : end + 1]))]
            if not ends or tokenizer.eos_token_id in row:
                continue
            text = tokenizer.decode(row[: rng.choice(ends)]).strip()
            if is_prompt(text, tokenizer):
                found.append(text)
        sides = positive(found).tolist()
        neutral = (text for text, p in zip(found, sides, strict=True) if 0.3 <= p <= 0.7)
        openings.update(dict.fromkeys(neutral))
    return list(openings)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="trl/starter/imdb-gpt2")
    parser.add_argument("--classifier", default="trl/starter/imdb-bert")
    parser.add_argument("--out", type=Path, default=Path("trl/starter"))
    parser.add_argument("--train", type=int, default=4096)
    parser.add_argument("--held-out", type=int, default=512)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    positive = ClassifierScorer(args.classifier, label="POSITIVE", output="probability")
    openings = sample_openings(model, tokenizer, positive, args.train + args.held_out)
    random.Random(0).shuffle(openings)  # early samples are the commoner ones
    files = {"train": openings[args.held_out :], "held-out": openings[: args.held_out]}
    for name, lines in files.items():
        (args.out / f"prompts-{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
