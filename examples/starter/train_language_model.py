"""Trains the starter language model from scratch: a 5M-parameter GPT-2 on IMDB reviews.

    torchrun --nproc-per-node 2 train_language_model.py --data imdb --work runs/gpt2 --minutes 80

One process per CPU core, each with one thread. The processes share the work of a step piece by
piece and meet once (the sum of the gradients), so that none waits long for one that other
programs slow down. Compute is bfloat16 autocast with float32 weights. The hidden matrices are
trained by Muon, all other weights by AdamW. For the first part of the run the softmax is
estimated on a quarter of the vocabulary, which saves a quarter of the time. The learning rate
follows the share of `--minutes` that has passed, so the run ends in time on any machine. Run the
same command again to go on after an interruption; `export.py` reads `--work`.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from data import Review, load_reviews
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

EOS, EOS_ID = "<|endoftext|>", 0
BREAK = "<br /><br />"  # in most reviews: one token of its own instead of six
VOCAB_SIZE, LENGTH = 8192, 256
CHUNK = 512  # tokens whose logits are computed at a time


# Text to tokens


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<|endoftext|>` as token 0 and the paragraph break as the last token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text.replace(BREAK, "\n") for text in texts), trainer)
    bpe.add_tokens([AddedToken(BREAK, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=EOS,
        model_max_length=LENGTH,
    )


def encode(tokenizer: PreTrainedTokenizerFast, reviews: list[Review]) -> list[np.ndarray]:
    """Each review as uint16 tokens, behind the `<|endoftext|>` that starts it."""
    encoded = tokenizer.backend_tokenizer.encode_batch([review.text for review in reviews])
    return [np.array([EOS_ID, *e.ids], dtype=np.uint16) for e in encoded]


def pack(documents: list[np.ndarray], seed: int, length: int = LENGTH) -> np.ndarray:
    """Packs documents into rows of `length` inputs and as many targets: [rows, length + 1].

    A long document fills rows from its first token on; what is left of it starts a row of its
    own, which short documents then fill up, each behind its `<|endoftext|>`. So many rows look
    like what the model meets in use, a text from its beginning.
    """
    rng = random.Random(seed)
    rows, tails, short = [], [], []
    for document in documents:
        while len(document) > length:
            rows.append(document[: length + 1])
            document = document[length:]  # its first token was the last target
            if len(document) <= length:
                tails.append(document)
                break
        else:
            short.append(document)
    rng.shuffle(tails)
    rng.shuffle(short)
    while short:
        row = tails.pop() if tails else short.pop()
        while short and len(row) <= length:
            row = np.concatenate([row, short.pop()])
        if len(row) > length:
            rows.append(row[: length + 1])
            if len(row) > length + 32:
                tails.insert(0, row[length:])
    while len(tails) > 1:  # more tails than short documents: join them
        row = tails.pop()
        while tails and len(row) <= length:
            row = np.concatenate([row, [EOS_ID], tails.pop()])
        if len(row) > length:
            rows.append(row[: length + 1])
    rng.shuffle(rows)
    return np.stack(rows).astype(np.uint16)


# Model and loss


def causal_attention(module, query, key, value, attention_mask, **_):
    """Plain causal attention for full rows: twice as fast as the fused CPU kernel at this size."""
    b, h, t, d = query.shape
    future = torch.full((t, t), float("-inf"), dtype=query.dtype).triu(1)
    q, k, v = (x.reshape(b * h, t, d) for x in (query, key, value))
    scores = torch.baddbmm(future.expand(b * h, t, t), q, k.transpose(1, 2), alpha=d**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(b, h, t, d).transpose(1, 2), None


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T` in bfloat16 chunks that stay in the cache.

    The gradients are taken in the forward pass, so that no [tokens, vocabulary] array is kept.
    `offsets` [vocabulary] are added to the logits of all tokens but the target.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, offsets: Tensor) -> Tensor:
        hidden, weight16, offsets = hidden.bfloat16(), weight.bfloat16(), offsets.bfloat16()
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        total = torch.zeros(())
        for h, g, y in zip(
            hidden.split(CHUNK), grad_hidden.split(CHUNK), targets.split(CHUNK), strict=True
        ):
            y = y[:, None]
            logits = torch.addmm(offsets, h, weight16.T)
            logits.scatter_add_(1, y, -offsets[y])
            probs = logits.softmax(-1)
            total -= probs.gather(1, y).float().log().sum()
            probs.scatter_add_(1, y, torch.full_like(y, -1, dtype=probs.dtype))
            torch.mm(probs, weight16, out=g)
            grad_weight += probs.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.tokens = len(targets)
        return total / len(targets)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad / ctx.tokens
        return grad_hidden * scale, grad_weight * scale, None, None


class Candidates:
    """A random part of the vocabulary that estimates the softmax over all of it (sampled softmax).

    The frequent tokens always take part, the others if they are a target in the batch. The latter
    stand for those left out: with p = P(token is among n targets) = 1 - (1 - q)^n, their share of
    the softmax's denominator counts 1 / p times, which makes the denominator right on average.
    """

    def __init__(self, rows: np.ndarray, *, frequent: int):
        counts = torch.from_numpy(np.bincount(rows[:, 1:].ravel(), minlength=VOCAB_SIZE))
        self.frequent = counts.argsort(descending=True)[:frequent]
        self.frequency = (counts + 1).double() / (counts + 1).sum()

    def choose(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that take part, the targets as positions among them, the offsets -log p."""
        tokens, positions = torch.cat([self.frequent, targets]).unique(return_inverse=True)
        offsets = -(1 - (1 - self.frequency[tokens]) ** len(targets)).log()
        offsets[positions[: len(self.frequent)]] = 0.0
        return tokens, positions[len(self.frequent) :], offsets.float()


def row_loss(model: nn.Module, batch: Tensor, candidates: Candidates | None = None) -> Tensor:
    """Mean cross entropy of rows [rows, length + 1]; estimated on `candidates` if there are any."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer(batch[:, :-1]).last_hidden_state.flatten(0, 1)
    weight, targets = model.lm_head.weight, batch[:, 1:].flatten()
    offsets = torch.zeros(len(weight))
    if candidates:
        tokens, targets, offsets = candidates.choose(targets)
        weight = weight[tokens]
    return LinearCrossEntropy.apply(hidden, weight, targets, offsets)


def new_model() -> GPT2LMHeadModel:
    """A small GPT-2 whose blocks start as the identity (output projections are zero)."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=LENGTH,
        n_embd=256,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
    )
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        nn.init.zeros_(block.attn.c_proj.weight)
        nn.init.zeros_(block.mlp.c_proj.weight)
    return model


# Optimisers


class MuonBlocks:
    """Muon on the hidden matrices, shared among the processes.

    GPT-2 keeps its matrices as [in, out] and query, key and value in one: Muon sees a view of
    each part as [out, in]. Each process updates every n-th matrix and sends it to the others.
    """

    def __init__(self, model: GPT2LMHeadModel, *, lr: float, weight_decay: float):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.weights = [w for w in model.transformer.h.parameters() if w.ndim == 2]
        self.views: list[tuple[nn.Parameter, nn.Parameter, slice]] = []
        for weight in self.weights[self.rank :: self.world]:
            width, out = weight.shape
            parts = 3 if out == 3 * width else 1
            for i in range(parts):
                columns = slice(i * out // parts, (i + 1) * out // parts)
                self.views.append((nn.Parameter(weight.data[:, columns].T), weight, columns))
        self.optimizer = torch.optim.Muon(
            [view for view, _, _ in self.views], lr=lr, weight_decay=weight_decay
        )

    def step(self) -> None:
        for view, weight, columns in self.views:
            view.grad = weight.grad[:, columns].T
        self.optimizer.step()
        for i, weight in enumerate(self.weights):
            dist.broadcast(weight.data, src=i % self.world)


def learning_rate_share(progress: float, warmup: float, decay: float) -> float:
    """Linear warm-up over the first `warmup`, linear decay to 0 over the last `decay`."""
    return max(0.0, min(1.0, progress / warmup, (1.0 - progress) / decay))


# Training


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all processes, as one flat array."""
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


@torch.no_grad()
def validation_loss(model: nn.Module, rows: np.ndarray) -> float:
    """Nats per token on packed rows; the processes share the rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total, count = 0.0, 0
    for i in range(rank * 8, len(rows) - 8 * world + 1, 8 * world):
        batch = torch.from_numpy(rows[i : i + 8].astype(np.int64))
        total += row_loss(model, batch).item()
        count += 1
    sums = torch.tensor([total, count], dtype=torch.float64)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def prepare(args: argparse.Namespace) -> None:
    """Trains the tokenizer and packs the text; done once, kept in `--work`."""
    if (args.work / "valid.npy").exists():
        return
    args.work.mkdir(parents=True, exist_ok=True)
    reviews = load_reviews(args.data)
    train = reviews.train + reviews.unsup
    tokenizer = train_tokenizer([review.text for review in train])
    tokenizer.save_pretrained(args.work / "tokenizer")
    documents = encode(tokenizer, train)
    print(f"{len(documents):,} reviews, {sum(map(len, documents)):,} tokens")
    for epoch in range(args.epochs):
        np.save(args.work / f"train-{epoch}.npy", pack(documents, seed=epoch))
    np.save(args.work / "valid.npy", pack(encode(tokenizer, reviews.valid), seed=0))


def train(args: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.set_flush_denormal(True)
    if rank == 0:
        prepare(args)
    dist.barrier()
    rows = np.concatenate([np.load(args.work / f"train-{e}.npy") for e in range(args.epochs)])
    valid = np.load(args.work / "valid.npy")

    candidates = Candidates(rows, frequent=args.frequent)

    torch.manual_seed(0)
    model = new_model()
    AttentionInterface.register("causal", causal_attention)
    model.set_attn_implementation("causal")
    muon = MuonBlocks(model, lr=args.muon_lr, weight_decay=args.weight_decay)
    others = [p for p in model.parameters() if all(p is not w for w in muon.weights)]
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step, elapsed = 0, 0.0
    checkpoint = args.work / f"checkpoint-{rank}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        step, elapsed = state["step"], state["elapsed"]
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.optimizer.load_state_dict(state["muon"])
    model.transformer.compile(dynamic=False)

    def save() -> None:
        state = {
            "step": step,
            "elapsed": elapsed,
            "model": model.state_dict(),
            "adam": adam.state_dict(),
            "muon": muon.optimizer.state_dict(),
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        dist.barrier()
        checkpoint.with_suffix(".new").replace(checkpoint)

    pieces = args.batch_size // args.micro_batch
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port + 1, world, is_master=rank == 0)
    bar = tqdm(total=100, unit="%", disable=rank > 0, mininterval=10)
    compile_rows = torch.zeros(args.micro_batch, LENGTH + 1, dtype=torch.long)
    row_loss(model, compile_rows).backward()  # before the clock starts
    model.zero_grad(set_to_none=False)
    dist.barrier()
    average = validation_loss(model, valid[:64])
    clock = time.monotonic()
    while elapsed < 60 * args.minutes:
        progress = elapsed / (60 * args.minutes)
        scale = learning_rate_share(progress, args.warmup, args.decay)
        adam.param_groups[0]["lr"] = args.lr * scale
        muon.optimizer.param_groups[0]["lr"] = args.muon_lr * scale

        sampled = progress < 1 - args.full_softmax
        start = step * args.batch_size % (len(rows) - args.batch_size)
        while (piece := store.add(f"step {step}", 1) - 1) < pieces:  # whoever is free takes it
            first = start + piece * args.micro_batch
            batch = torch.from_numpy(rows[first : first + args.micro_batch].astype(np.int64))
            loss = row_loss(model, batch, candidates if sampled else None)
            (loss / pieces).backward()
            average += (loss.item() - average) / 100
        sum_gradients(model)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=False)

        step += 1
        seconds = torch.tensor(time.monotonic() - clock)
        dist.broadcast(seconds, src=0)  # all processes must see the same clock
        elapsed += seconds.item()
        clock = time.monotonic()
        tokens = step * args.batch_size * LENGTH
        bar.n = round(100 * elapsed / (60 * args.minutes), 1)
        bar.set_postfix_str(f"step {step} tokens {tokens / 1e6:.2f}M loss {average:.3f}")
        if step % args.validate_every == 0:
            val = validation_loss(model, valid)
            if rank == 0:
                line = f"step {step} tokens {tokens / 1e6:.2f}M minutes {elapsed / 60:.1f} "
                line += f"lr {scale:.2f} loss {average:.3f} validation {val:.4f}"
                tqdm.write(line)
                with (args.work / "log.txt").open("a") as log:
                    print(line, file=log)
            save()
    val = validation_loss(model, valid)
    save()
    if rank == 0:
        print(f"done: {step} steps, {tokens:,} tokens, validation {val:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="imdb", help="folder with *.jsonl.gz, or a hub name")
    parser.add_argument("--work", type=Path, default=Path("runs/gpt2"), help="checkpoints go here")
    parser.add_argument("--minutes", type=float, default=80, help="training time in all")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of 256 tokens per step")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows taken at a time")
    parser.add_argument("--epochs", type=int, default=4, help="how often the text is packed anew")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak, hidden matrices")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak, all other weights")
    parser.add_argument("--weight-decay", type=float, default=0.02, help="of the hidden matrices")
    parser.add_argument("--warmup", type=float, default=0.01, help="share of the run")
    parser.add_argument("--decay", type=float, default=0.7, help="share of the run")
    parser.add_argument("--frequent", type=int, default=2048, help="tokens always in the softmax")
    parser.add_argument("--full-softmax", type=float, default=0.4, help="last share of the run")
    parser.add_argument("--validate-every", type=int, default=500, help="steps; also saves")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
