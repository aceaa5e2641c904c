"""Measures the starter models on IMDB test reviews.

    python evaluate.py --data imdb --language-model trl/starter/imdb-gpt2
    python evaluate.py --data imdb --classifier trl/starter/imdb-bert

Language model: bits per byte of the raw text (`<br />` kept), each review behind
`<|endoftext|>`. Every token of the review counts, the end-of-text token after it does not. Long
reviews are read in windows of 256: with stride 128 each token sees at least 128 tokens before it
(where there are so many); with stride 256 windows do not overlap.

Classifier: accuracy on 256 tokens, on the first 25 words, and on 20 words from the middle.
"""

from __future__ import annotations

import argparse
import math
import random

import torch
from data import Review, load_split
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def windows(ids: list[int], length: int, stride: int) -> list[tuple[list[int], int]]:
    """Windows over `ids` and how many of the last predictions in each are new.

    Together the windows predict every token of `ids` but the first exactly once.
    """
    result = []
    predicted = 0  # ids[1 : predicted + 1] are done
    start = 0
    while predicted < len(ids) - 1:
        end = min(start + length + 1, len(ids))  # `length` inputs, shifted by one: as many targets
        result.append((ids[start:end], end - 1 - predicted))
        predicted = end - 1
        start += stride
    return result


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    stride: int,
    batch_size: int = 4,
) -> dict[str, float]:
    """Bits per UTF-8 byte and nats per token of `texts`."""
    jobs = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        jobs += windows([tokenizer.eos_token_id, *ids], model.config.n_positions, stride)
    jobs.sort(key=lambda job: len(job[0]), reverse=True)
    nats, tokens = 0.0, 0
    for i in tqdm(range(0, len(jobs), batch_size), mininterval=10):
        batch = jobs[i : i + batch_size]
        width = max(len(ids) for ids, _ in batch)
        padding = [tokenizer.eos_token_id] * width
        ids = torch.tensor([(ids + padding)[:width] for ids, _ in batch])
        # Causal: padding on the right changes nothing to the left of it, so no mask is needed.
        logits = model(ids[:, :-1], use_cache=False).logits
        chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        for row, (window, new) in zip(chosen, batch, strict=True):
            end = len(window) - 1
            nats -= row[end - new : end].sum().item()
            tokens += new
    size = sum(len(text.encode()) for text in texts)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / tokens,
        "bytes_per_token": size / tokens,
    }


@torch.no_grad()
def positive_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    batch_size: int = 64,
) -> Tensor:
    """Logits [texts, 2] of the first 256 tokens, in order; computed sorted by length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    logits = torch.empty(len(texts), 2)
    for i in range(0, len(order), batch_size):
        part = order[i : i + batch_size]
        batch = tokenizer(
            [texts[j] for j in part],
            truncation=True,
            max_length=256,
            padding=True,
            return_tensors="pt",
        )
        logits[part] = model(**batch).logits.float()
    return logits


def first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def middle_words(text: str, count: int, rng: random.Random) -> str:
    """`count` words from a random place that is not the beginning, if the text is long enough."""
    words = text.split()
    start = rng.randint(min(1, max(0, len(words) - count)), max(0, len(words) - count))
    return " ".join(words[start : start + count])


def classifier_report(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reviews: list[Review]
) -> dict[str, float]:
    """Accuracy on reviews and two kinds of fragments; calibration and spread of the logits."""
    rng = random.Random(0)
    plain = [review.text.replace("<br />", " ") for review in reviews]
    kinds = {
        "256_tokens": [review.text for review in reviews],
        "first_25_words": [first_words(text, 25) for text in plain],
        "middle_20_words": [middle_words(text, 20, rng) for text in plain],
    }
    labels = torch.tensor([review.label for review in reviews])
    report = {}
    for kind, texts in kinds.items():
        logits = positive_logits(model, tokenizer, texts)
        probs = logits.softmax(-1)
        confidence, predicted = probs.max(-1)
        correct = predicted == labels
        report[f"{kind}/accuracy"] = correct.float().mean().item()
        report[f"{kind}/calibration_gap"] = (confidence.mean() - correct.float().mean()).item()
        report[f"{kind}/log_loss"] = -probs[range(len(labels)), labels].log().mean().item()
        low, high = logits[:, 1].quantile(torch.tensor([0.01, 0.99])).tolist()
        report[f"{kind}/positive_logit_1%"], report[f"{kind}/positive_logit_99%"] = low, high
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="imdb", help="folder with *.jsonl.gz, or a hub name")
    parser.add_argument("--language-model", help="folder or hub name")
    parser.add_argument("--classifier", help="folder or hub name")
    parser.add_argument("--reviews", type=int, default=25000, help="size of the test sample")
    parser.add_argument("--stride", type=int, nargs="*", default=[128, 256])
    parser.add_argument(
        "--no-breaks", action="store_true", help="bits per byte of the text with <br /> as a space"
    )
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    reviews = load_split(args.data, "test")
    reviews = random.Random(1).sample(reviews, min(args.reviews, len(reviews)))
    if args.language_model:
        model = AutoModelForCausalLM.from_pretrained(args.language_model).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.language_model)
        texts = [review.text for review in reviews]
        if args.no_breaks:
            texts = [text.replace("<br />", " ") for text in texts]
        for stride in args.stride:
            print(f"stride {stride}", bits_per_byte(model, tokenizer, texts, stride=stride))
    if args.classifier:
        model = AutoModelForSequenceClassification.from_pretrained(args.classifier).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.classifier)
        for name, value in classifier_report(model, tokenizer, reviews).items():
            print(f"{name:34} {value:8.4f}")


if __name__ == "__main__":
    main()
