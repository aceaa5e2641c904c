"""Trains the starter reward model from scratch: a small BERT sentiment classifier on IMDB reviews.

    python train_classifier.py --data imdb --work runs/bert

1. Tokenizer: lower-case WordPiece of 8,192.
2. Teacher: logistic regression on words and word pairs (NB-SVM, Wang & Manning 2012) of whole
   labelled reviews. It labels the unlabelled reviews with probabilities.
3. Word embeddings from which words stand near each other (singular vectors of the positive
   pointwise mutual information, Levy & Goldberg 2014), with the naive Bayes log-ratio as one
   dimension: seconds, where masked language modelling would take the whole budget.
4. Training on crops of 6 to 254 tokens from anywhere in a review. The target is the label of the
   whole review, so the classifier learns how much a fragment says: it is meant to score fragments.

Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import POSITIVE, Review, Reviews, load_reviews
from tokenizers import Regex, Tokenizer, decoders, normalizers, processors, trainers
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP = 0, 2, 3
VOCAB_SIZE, LENGTH = 8192, 256
TOKENS_PER_BATCH = 4096
CROP_LENGTHS = [8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256]  # with [CLS] and [SEP]


# Text to tokens


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Lower-case WordPiece; `<br />` counts as a space."""
    wordpiece = Tokenizer(WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"<br ?/?>"), " "), normalizers.BertNormalizer(lowercase=True)]
    )
    wordpiece.pre_tokenizer = BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, show_progress=False
    )
    wordpiece.train_from_iterator(texts, trainer)
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LENGTH,
    )


# Teacher


def ngram_ids(text: str, buckets: int) -> np.ndarray:
    """Distinct words and neighbouring word pairs of a review, hashed."""
    words = re.findall(r"[a-z0-9']+|[!?]", text.replace("<br />", " ").lower())
    pairs = {f"{a} {b}" for a, b in pairwise(words)}
    return np.array([zlib.crc32(g.encode()) % buckets for g in pairs | set(words)], dtype=np.int64)


class Teacher:
    """NB-SVM with a logistic loss: each feature is scaled by its naive Bayes log-count ratio."""

    def __init__(self, reviews: list[Review], *, buckets: int = 2**21, epochs: int = 4):
        self.buckets = buckets
        features = [ngram_ids(review.text, buckets) for review in reviews]
        labels = torch.tensor([float(review.label) for review in reviews])
        counts = np.ones((2, buckets))
        for ids, review in zip(features, reviews, strict=True):
            counts[review.label, ids] += 1
        counts /= counts.sum(1, keepdims=True)
        ratio = torch.tensor(np.log(counts[POSITIVE] / counts[0]), dtype=torch.float32)
        self.ratio = ratio
        self.weight = torch.full((buckets,), 0.1)
        # Plain Adagrad on the weights of the features present, one batch of reviews at a time.
        squares = torch.full((buckets,), 1e-6)
        for epoch in range(epochs):
            order = list(range(len(features)))
            random.Random(epoch).shuffle(order)
            for i in range(0, len(order), 64):
                part = order[i : i + 64]
                ids, segment = flatten([features[j] for j in part])
                logits = self._logits(ids, segment, len(part))
                error = (logits.sigmoid() - labels[part]) / math.sqrt(len(part))
                gradient = error[segment] * ratio[ids] + 1e-4 * self.weight[ids]
                squares.index_add_(0, ids, gradient**2)
                self.weight.index_add_(0, ids, -0.02 * gradient / squares[ids].sqrt())
        self.temperature = 1.0

    def _logits(self, ids: Tensor, segment: Tensor, count: int) -> Tensor:
        return torch.zeros(count).index_add_(0, segment, self.weight[ids] * self.ratio[ids])

    def logits(self, reviews: list[Review]) -> Tensor:
        result = []
        for i in range(0, len(reviews), 256):
            part = [ngram_ids(review.text, self.buckets) for review in reviews[i : i + 256]]
            ids, segment = flatten(part)
            result.append(self._logits(ids, segment, len(part)))
        return torch.cat(result) / self.temperature

    def calibrate(self, reviews: list[Review]) -> float:
        """Picks the temperature of least log loss on held-out reviews; returns the accuracy."""
        logits = self.logits(reviews)
        labels = torch.tensor([float(review.label) for review in reviews])
        losses = {
            t: F.binary_cross_entropy_with_logits(logits / t, labels).item()
            for t in (0.25, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 11, 16)
        }
        self.temperature = min(losses, key=losses.get)
        return ((logits > 0) == labels.bool()).float().mean().item()


def flatten(features: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """All feature ids in a row, and the number of the review each belongs to."""
    segment = np.repeat(np.arange(len(features)), [len(ids) for ids in features])
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(segment)


# Batches


class Crops:
    """Random crops of tokenised reviews, cut before whole words."""

    def __init__(self, documents: list[np.ndarray], targets: np.ndarray, word_starts: np.ndarray):
        self.documents, self.targets, self.word_starts = documents, targets, word_starts

    def batch(self, length: int, count: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and attention mask [count, length], and the targets [count].

        One crop in three is the beginning of its review.
        """
        ids = np.full((count, length), PAD, dtype=np.int64)
        targets = np.empty(count, dtype=np.float32)
        for row in range(count):
            i = rng.randrange(len(self.documents))
            document = self.documents[i]
            start = 0
            if rng.random() > 1 / 3 and len(document) > length - 2:
                start = rng.randrange(len(document) - length + 3)
                while start > 0 and not self.word_starts[document[start]]:
                    start -= 1
            crop = document[start : start + length - 2]
            ids[row, : len(crop) + 2] = [CLS, *crop, SEP]
            targets[row] = self.targets[i]
        ids = torch.from_numpy(ids)
        return ids, (ids != PAD).long(), torch.from_numpy(targets)


# Embeddings


def word_embeddings(
    documents: list[np.ndarray], targets: np.ndarray, *, width: int, window: int = 5
) -> Tensor:
    """Embeddings [vocabulary, width] of root mean square 0.1 from co-occurrence and labels."""
    text = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    counts = torch.zeros(VOCAB_SIZE * VOCAB_SIZE)
    for distance in range(1, window + 1):
        pairs = text[:-distance] * VOCAB_SIZE + text[distance:]
        counts += torch.bincount(pairs, minlength=len(counts)).float() / distance
    counts = counts.view(VOCAB_SIZE, VOCAB_SIZE)
    counts += counts.T.clone()
    row = counts.sum(1, keepdim=True) + 1.0
    context = row.T**0.75
    ppmi = (counts * context.sum() / (row * context)).clamp(min=1.0).log()
    torch.manual_seed(0)
    u, s, _ = torch.svd_lowrank(ppmi, q=width - 1, niter=3)
    vectors = u * s.sqrt()
    vectors *= 0.1 / vectors.pow(2).mean().sqrt()

    seen = np.ones((2, VOCAB_SIZE))
    for document, target in zip(documents, targets, strict=True):
        tokens = np.unique(document)
        seen[1, tokens] += target
        seen[0, tokens] += 1 - target
    ratio = torch.tensor(np.log(seen[1] / seen[0]), dtype=torch.float32)
    return torch.cat([vectors, ratio[:, None]], dim=1)


# Training


def new_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
        problem_type="single_label_classification",
    )


def optimizers(model: nn.Module, *, muon_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the layers, AdamW on everything else."""
    matrices = [p for p in model.bert.encoder.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def run(
    model: nn.Module,
    optims: list[torch.optim.Optimizer],
    loss_of_batch: Callable[[], Tensor],
    checkpoint: Path,
    *,
    minutes: float,
    validate: Callable[[], str],
) -> None:
    """Trains for `minutes`, with a short linear warm-up and then linear decay to 0; resumable."""
    step, elapsed = 0, 0.0
    peaks = [optim.param_groups[0]["lr"] for optim in optims]
    if checkpoint.exists():
        state = torch.load(checkpoint)
        step, elapsed = state["step"], state["elapsed"]
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)

    def save() -> None:
        state = {"step": step, "elapsed": elapsed, "model": model.state_dict()}
        state["optims"] = [optim.state_dict() for optim in optims]
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)

    bar = tqdm(total=100, unit="%", mininterval=10, desc=checkpoint.stem)
    average = math.log(2)
    clock, saved = time.monotonic(), time.monotonic()
    model.train()
    while elapsed < 60 * minutes:
        progress = elapsed / (60 * minutes)
        scale = max(0.0, min(progress / 0.02, (1 - progress) / 0.98))
        for optim, peak in zip(optims, peaks, strict=True):
            optim.param_groups[0]["lr"] = peak * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        step += 1
        average += (loss.item() - average) / 100
        now = time.monotonic()
        elapsed, clock = elapsed + now - clock, now
        bar.n = round(100 * elapsed / (60 * minutes), 1)
        bar.set_postfix_str(f"step {step} loss {average:.3f}")
        if now - saved > 120 or elapsed >= 60 * minutes:
            saved = now
            save()
            tqdm.write(
                f"{checkpoint.stem} {elapsed / 60:.1f} min, step {step}, "
                f"loss {average:.4f} {validate()}"
            )
            model.train()
            clock = time.monotonic()
    bar.close()


def batch_size(length: int) -> int:
    return max(16, TOKENS_PER_BATCH // length)


def crop_lengths(rng: random.Random) -> Iterator[int]:
    while True:
        yield rng.choice(CROP_LENGTHS)


def train(
    crops: Crops, valid: Crops, embeddings: Tensor, work: Path, minutes: float
) -> BertForSequenceClassification:
    """Binary cross entropy on crops of all lengths."""
    torch.manual_seed(1)
    model = BertForSequenceClassification(new_config())
    model.bert.embeddings.word_embeddings.weight.data.copy_(embeddings)
    rng = random.Random()
    lengths = crop_lengths(rng)

    def loss_of_batch() -> Tensor:
        length = next(lengths)
        ids, attention_mask, targets = crops.batch(length, batch_size(length), rng)
        logits = model(ids, attention_mask=attention_mask).logits.float()
        return F.cross_entropy(logits, torch.stack([1 - targets, targets], dim=1))

    @torch.no_grad()
    def validate() -> str:
        model.eval()
        report = []
        for length in (24, 32, 256):
            ids, attention_mask, targets = valid.batch(length, 2000, random.Random(0))
            parts = zip(ids.split(100), attention_mask.split(100), strict=True)
            logits = torch.cat([model(i, attention_mask=m).logits for i, m in parts])
            report.append(f"{length}: {(logits.argmax(-1) == targets).float().mean():.3f}")
        return "validation " + ", ".join(report)

    optims = optimizers(model, muon_lr=0.02, lr=1e-3)
    run(model, optims, loss_of_batch, work / "checkpoint.pt", minutes=minutes, validate=validate)
    return model.eval()


def make_crops(
    tokenizer: PreTrainedTokenizerFast, reviews: list[Review], targets: np.ndarray
) -> Crops:
    encoded = tokenizer.backend_tokenizer.encode_batch(
        [review.text for review in reviews], add_special_tokens=False
    )
    documents = [np.array(e.ids, dtype=np.uint16) for e in encoded]
    tokens = tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE))
    word_starts = np.array([not token.startswith("##") for token in tokens])
    return Crops(documents, targets, word_starts)


def teacher_targets(reviews: Reviews, work: Path) -> np.ndarray:
    """P(positive) of each unlabelled review, kept in `work`."""
    file = work / "teacher.npy"
    if not file.exists():
        teacher = Teacher(reviews.train)
        accuracy = teacher.calibrate(reviews.valid)
        print(f"teacher: validation accuracy {accuracy:.3f}, temperature {teacher.temperature}")
        np.save(file, teacher.logits(reviews.unsup).sigmoid().numpy())
    return np.load(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="imdb", help="folder with *.jsonl.gz, or a hub name")
    parser.add_argument("--work", type=Path, default=Path("runs/bert"), help="checkpoints, model")
    parser.add_argument("--minutes", type=float, default=24, help="of training on crops")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)

    reviews = load_reviews(args.data)
    everything = reviews.train + reviews.unsup
    if (args.work / "model" / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "model")
    else:
        tokenizer = train_tokenizer([review.text for review in everything])
        tokenizer.save_pretrained(args.work / "model")
    soft = teacher_targets(reviews, args.work)
    hard = np.array([review.label for review in reviews.train], dtype=np.float32)
    crops = make_crops(tokenizer, everything, np.concatenate([hard, soft]))
    labels = np.array([review.label for review in reviews.valid], dtype=np.float32)
    valid = make_crops(tokenizer, reviews.valid, labels)

    width = new_config().hidden_size
    embeddings = word_embeddings(crops.documents, crops.targets, width=width)
    model = train(crops, valid, embeddings, args.work, args.minutes)
    model.save_pretrained(args.work / "model")
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
