"""Time and memory of a PPO step on paper: models and numbers of GPUs that are not here.

    python benchmarks/scale.py             the tables of docs/scale.md
    python benchmarks/scale.py --check     beside what is measured on this CPU; results/scale.json

What a step does, in turn, and what is counted of it:

    sampling      all weights are read for each token of all rows of a GPU, and the keys and values
    reference     a pass over the rollout; the policy's log-probs were recorded while sampling
    updates       forward, again where layers are recomputed, backward; gradients exchanged; Adam

Whatever else it does (advantages, statistics, scores of a cheap function) is not. N is the number
of weights, P that of GPUs, F the operations and B the bytes a second that a GPU really does.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trl.watch.profile import Tokens, Weights, backward_flops, forward_flops

GB = 1e9
RESULTS = Path(__file__).parent / "results" / "scale.json"


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family; `gated=False` and `positions` make it a GPT-2."""

    layers: int
    width: int
    inner: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool = True
    gated: bool = True
    positions: int = 0

    @property
    def matrices(self) -> int:
        """Weights of the layers: L·(2·d·H·k + 2·d·G·k + 3·d·m), 2 instead of 3 without a gate.

        H and G are the heads of queries and of keys, k their size, m the inner width. Norms and
        biases, under a thousandth of them, are not counted.
        """
        attention = 2 * self.width * self.head_size * (self.heads + self.key_value_heads)
        return self.layers * (attention + (2 + self.gated) * self.width * self.inner)

    @property
    def head(self) -> int:
        """Weights of the language head: V·d."""
        return self.vocabulary * self.width

    @property
    def embeddings(self) -> int:
        """Weights of the embeddings and the head: V·d, twice if they are not one, and positions."""
        return self.head * (1 if self.tied else 2) + self.positions * self.width

    @property
    def weights(self) -> int:
        """All weights, N."""
        return self.matrices + self.embeddings

    @property
    def gathered(self) -> int:
        """Bytes of all weights as passes need them whole: 2·matrices + 4·embeddings.

        Layers are gathered in bfloat16; embeddings and heads, the root, in float32.
        """
        return 2 * self.matrices + 4 * self.embeddings

    @property
    def pieces(self) -> int:
        """In how many parts they are gathered: attention and MLP of each layer, and the root."""
        return 2 * self.layers + 1

    @property
    def cache(self) -> int:
        """Bytes of keys and values of a token, in two bytes each: 4·L·G·k."""
        return 4 * self.layers * self.key_value_heads * self.head_size

    @property
    def multiplied(self) -> Weights:
        """What tokens are multiplied by."""
        attention = self.layers * self.heads * self.head_size
        return Weights(trained=self.matrices, head=self.head, attention=attention)


MODELS = {
    "1B": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "8B": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "70B": Shape(80, 8192, 28672, 64, 8, 128, 128256, tied=False),
}
"""From the config.json of Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B."""


@dataclass(frozen=True)
class Work:
    """The batch of a step, over all GPUs."""

    rows: int = 1024
    query: int = 512
    response: int = 512
    minibatch: int = 512
    epochs: int = 2
    pass_rows: int = 4
    """Most rows of a GPU that go through the model at once."""
    recomputed: bool = True
    """Whether layers keep their input alone, and are computed again going backward."""

    @property
    def updates(self) -> int:
        """Updates of a step."""
        return self.epochs * math.ceil(self.rows / self.minibatch)

    def tokens(self, rows: float) -> Tokens:
        """What a pass over so many rows has to read: all tokens but the last of each."""
        read = self.query + self.response - 1
        pairs = rows * read * (read + 1) / 2
        return Tokens(round(rows * read), round(rows * self.response), round(pairs))


@dataclass(frozen=True)
class Machine:
    """What one processor does, and what lies between several."""

    peak: float
    """Operations a second of a large matrix product in bfloat16."""
    use: float
    """Share of it that passes over a batch reach."""
    bandwidth: float
    """Bytes a second of its memory."""
    bandwidth_use: float
    """Share of it that writing tokens reaches."""
    call: float
    """Seconds that Python takes to ask for a layer, whatever its size."""
    asks_ahead: bool = True
    """Whether that runs beside the work itself, as on a GPU: then the longer of the two counts."""
    memory: float = math.inf
    """Bytes."""
    link: float = math.inf
    """Bytes a second between those of a node, in each direction."""
    network: float = math.inf
    """Bytes a second of each to other nodes, in each direction."""
    link_use: float = 1.0
    """Share of the two that collectives reach."""
    hop: float = 0.0
    """Seconds from one to the next in a ring, whatever is sent."""
    node: int = 8

    @property
    def products(self) -> float:
        """F: operations a second of passes."""
        return self.peak * self.use

    @property
    def reads(self) -> float:
        """B: bytes a second of writing tokens."""
        return self.bandwidth * self.bandwidth_use

    def both(self, work: float, calls: float) -> float:
        """Seconds of some work and of asking for it."""
        return max(work, calls) if self.asks_ahead else work + calls


H100 = Machine(
    peak=989e12,  # NVIDIA's data sheet of the H100 SXM, dense
    use=0.40,  # Llama 3 (arXiv:2407.21783), table 4: 38 to 43 % on 8,192 and 16,384 of them
    bandwidth=3.35e12,  # the same data sheet
    bandwidth_use=0.72,  # PyTorch's gpt-fast: 107 tokens a second of 13.5 GB on 2.0 TB/s (A100)
    call=0.6e-3,  # assumed: published are 0.26 ms (H100) and 1.2 ms (A100); see the page
    memory=80e9,  # the data sheet
    link=450e9,  # NVLink: 900 GB/s in both directions
    network=50e9,  # a card of 400 Gb/s for each GPU, as in NVIDIA's DGX H100
    link_use=0.8,  # assumed
    hop=3e-6,  # assumed
    node=8,
)


# -- time ------------------------------------------------------------------------------------------


def sampling_seconds(shape: Shape, work: Work, machine: Machine, gpus: int = 1) -> float:
    """Seconds to write the responses of a GPU's b rows, its weights whole on it.

        queries:    2·N·b·Q / F                                      a pass
        each token: max(2·N·b / F, (2·N + b·κ·t) / B), L·call        with t tokens before it

    κ are the bytes of keys and values of a token. N are the weights multiplied: layers and head.
    On average t = Q + (R−1)/2.
    """
    rows = math.ceil(work.rows / gpus)
    used, calls = shape.matrices + shape.head, shape.layers * machine.call
    pairs = rows * work.query * (work.query + 1) // 2
    queries = forward_flops(shape.multiplied, Tokens(rows * work.query, rows, pairs))
    read = 2 * used + rows * shape.cache * (work.query + (work.response - 1) / 2)
    token = max(2 * used * rows / machine.products, read / machine.reads)
    first = machine.both(queries / machine.products, calls)
    return first + work.response * machine.both(token, calls)


def ring_rate(machine: Machine, gpus: int) -> float:
    """Bytes a second that go round P GPUs: link·use in a node, min(link, node·network)·use beyond.

    A ring enters a node once for each of its cards, so that all of them carry a part.
    """
    across = machine.node * machine.network if gpus > machine.node else math.inf
    return min(machine.link, across) * machine.link_use


def collective_seconds(size: float, machine: Machine, gpus: int, pieces: int = 1) -> float:
    """Seconds to gather so many bytes on every GPU from all, or to add them up and scatter them.

        S·(P−1)/P / rate + pieces·(P−1)·hop

    S are all bytes, of all pieces.
    """
    if gpus == 1:
        return 0.0
    rate = ring_rate(machine, gpus)
    return size * (gpus - 1) / gpus / rate + pieces * (gpus - 1) * machine.hop


def passes_of(rows: float, work: Work) -> int:
    """Passes over so many rows of a GPU."""
    return math.ceil(rows / work.pass_rows)


def reference_seconds(
    shape: Shape, work: Work, machine: Machine, gpus: int = 1, *, sharded: bool = False
) -> float:
    """Seconds of the reference's log-probs: 2·N·tokens / F, or as long as gathering N takes."""
    rows = math.ceil(work.rows / gpus)
    passes = passes_of(rows, work)
    products = forward_flops(shape.multiplied, work.tokens(rows)) / machine.products
    gathered = 0.0
    if sharded:
        gathered = collective_seconds(shape.gathered, machine, gpus, shape.pieces)
    asked = passes * shape.layers * machine.call
    return max(machine.both(products, asked), passes * gathered)


def update_seconds(
    shape: Shape, work: Work, machine: Machine, gpus: int = 1, *, sharded: bool = False
) -> dict[str, float]:
    """Seconds of an update on P GPUs: of its products, calls, exchange and Adam, and the whole.

        products: (forward + backward [+ forward, recomputed]) / F         6·N or 8·N a token
        calls:    3 or 4 (forward, [again,] backward for two) · L · call for each pass
        exchange: sharded  gathered twice, and scatter(4·N), for each pass
                  else     2·scatter(4·N): a sum for all in the last pass
        Adam:     28·N/P / B: reads weight, gradient, two moments, writes all but the gradient
        whole:    max(products, calls, exchange) + Adam

    Gradients are added up in float32. The exchange runs beside the rest.
    """
    rows = math.ceil(work.minibatch / gpus)
    passes = passes_of(rows, work)
    tokens, again = work.tokens(rows), work.recomputed
    forward = forward_flops(shape.multiplied, tokens)
    products = forward * (1 + again) + backward_flops(shape.multiplied, tokens)
    calls = passes * (3 + again) * shape.layers * machine.call
    scatter = collective_seconds(4 * shape.weights, machine, gpus, shape.pieces if sharded else 1)
    exchange = 2 * scatter
    if sharded:
        gather = collective_seconds(shape.gathered, machine, gpus, shape.pieces)
        exchange = passes * (2 * gather + scatter)
    adam = 28 * shape.weights / (gpus if sharded else 1) / machine.reads
    parts = {"products": products / machine.products, "calls": calls, "exchange": exchange}
    computed = machine.both(parts["products"], calls)
    return parts | {"adam": adam, "whole": max(computed, exchange) + adam}


def step_seconds(
    shape: Shape, work: Work, machine: Machine, gpus: int = 1, *, sharded: bool = False
) -> dict[str, float]:
    """Seconds of the phases of a step, and of the whole."""
    parts = {
        "gather": collective_seconds(shape.gathered, machine, gpus, shape.pieces) * sharded,
        "sampling": sampling_seconds(shape, work, machine, gpus),
        "reference": reference_seconds(shape, work, machine, gpus, sharded=sharded),
        "updates": work.updates
        * update_seconds(shape, work, machine, gpus, sharded=sharded)["whole"],
    }
    return parts | {"step": sum(parts.values())}


def tokens_to_hide(machine: Machine, gpus: int) -> float:
    """Tokens that a pass of a GPU must have for its products to take as long as its exchange.

        6·N·t / F = (2·2·N + 4·N) / rate   ⇒   t = 4·F / (3·rate)

    The size of the model falls out: it is a matter of the machine alone.
    """
    return 4 * machine.products / (3 * ring_rate(machine, gpus))


# -- memory ----------------------------------------------------------------------------------------


def held_bytes(shape: Shape, gpus: int = 1, *, sharded: bool = False) -> float:
    """Bytes between two steps: (4·N + 8·N + reference) / P if sharded.

    Weights, Adam's moments, and the frozen copy, whose matrices are in bfloat16, its embeddings
    not: 2·matrices + 4·embeddings.
    """
    return (12 * shape.weights + shape.gathered) / (gpus if sharded else 1)


def kept_bytes(shape: Shape, work: Work, rows: float) -> float:
    """Bytes that a pass over so many rows keeps for going backward.

        a layer: 20·d + 4·(H + G)·k + 8·m for each token,  or 4·d if it is recomputed, and one whole

    The residual stream is float32, with it the inputs of two norms and what they give (16·d), cast
    (4·d); queries, keys, values and what attention gives, in two bytes; four of the inner width.
    """
    tokens = rows * (work.query + work.response - 1)
    heads = (shape.heads + shape.key_value_heads) * shape.head_size
    layer = 20 * shape.width + 4 * heads + 8 * shape.inner
    if work.recomputed:
        return tokens * (4 * shape.width * shape.layers + layer)
    return tokens * layer * shape.layers


LOGIT_BYTES = 2**26
"""Of the logits that exist at a time: `trl.models.head._LOGIT_BYTES`. Their gradient takes their
place, and statistics are worked out in float32, twice as large."""


def step_bytes(
    shape: Shape, work: Work, gpus: int = 1, *, sharded: bool = False, low_gradients: bool = False
) -> dict[str, float]:
    """Bytes at the most: between steps, while sampling, in an update.

        sampling: held + weights whole + κ·b·(Q + R)
        update:   held + gradients + weights in two bytes + what a pass keeps + logits
          one process:  gradients 4·N (matrices 2 with `low_gradients`), copies 2·(matrices + head)
          several:      gradients and the buckets of their exchange 8·N, copies as before
          sharded:      gradients 4·N/P; two layers, the embeddings, a copy of the head

    While sampling, weights whole are the copies, or what is gathered and a copy of the head.
    """
    held = held_bytes(shape, gpus, sharded=sharded)
    cache = math.ceil(work.rows / gpus) * shape.cache * (work.query + work.response)
    kept = kept_bytes(shape, work, min(math.ceil(work.minibatch / gpus), work.pass_rows))
    copies = 2 * (shape.matrices + shape.head)
    whole = shape.gathered + 2 * shape.head if sharded else copies
    if sharded:
        gradients = 4 * shape.weights / gpus
        copies = 4 * shape.matrices / shape.layers + 4 * shape.embeddings + 2 * shape.head
    elif gpus > 1:
        gradients = 8 * shape.weights
    else:
        gradients = 4 * shape.embeddings + (2 if low_gradients else 4) * shape.matrices
    return {
        "held": held,
        "sampling": held + whole + cache,
        "update": held + gradients + copies + kept + 3 * LOGIT_BYTES,
    }


# -- tables ----------------------------------------------------------------------------------------


def time_table(gpus: Sequence[int] = (8, 64, 512), work: Work = Work()) -> str:
    """Seconds of each model on each number of GPUs, sharded, and the share of sampling in them."""
    lines = [
        "| model | GPUs | rows of each | gather | sampling | reference | updates | step, s "
        "| sampling | an update waits for |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in MODELS.items():
        for number in gpus:
            seconds = step_seconds(shape, work, H100, number, sharded=True)
            parts = update_seconds(shape, work, H100, number, sharded=True)
            slowest = max(("products", "calls", "exchange"), key=parts.__getitem__)
            cells = " | ".join(f"{value:.3g}" for value in seconds.values())
            share = seconds["sampling"] / seconds["step"]
            rows = math.ceil(work.rows / number)
            lines.append(f"| {name} | {number} | {rows} | {cells} | {share:.0%} | {slowest} |")
    return "\n".join(lines)


def memory_table(gpus: Sequence[int] = (8, 64, 512), work: Work = Work()) -> str:
    """GB of each model on each number of GPUs; what does not fit is bold."""
    lines = [
        "| model | GPUs | whole: between steps | sampling | in an update "
        "| sharded: between steps | sampling | in an update |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in MODELS.items():
        for number in gpus:
            values = [
                value
                for sharded in (False, True)
                for value in step_bytes(shape, work, number, sharded=sharded).values()
            ]
            cells = " | ".join(
                f"{value / GB:.3g}" if value <= H100.memory else f"**{value / GB:.0f}**"
                for value in values
            )
            lines.append(f"| {name} | {number} | {cells} |")
    return "\n".join(lines)


def check_table(found: dict[str, Any]) -> str:
    """What was predicted beside what was measured."""
    lines = ["| model | what | predicted | measured | error |", "|---|---|---|---|---|"]
    for name, model in found["models"].items():
        for what, (predicted, measured) in model.items():
            error = f"{predicted / measured - 1:+.0%}"
            unit = "s" if what.endswith(" s") else "GB"
            scale = 1 if unit == "s" else GB
            numbers = f"{predicted / scale:.3g} {unit} | {measured / scale:.3g} {unit}"
            lines.append(f"| {name} | {what.removesuffix(' s')} | {numbers} | {error} |")
    return "\n".join(lines)


# -- what is measured here -------------------------------------------------------------------------

SMOLLM2 = Path("~/.cache/trl/models/smollm2").expanduser()
HERE = {
    "GPT-2 124M": Shape(12, 768, 3072, 12, 12, 64, 50257, gated=False, positions=1024),
    "the starter": Shape(4, 256, 1024, 4, 4, 64, 8192, gated=False, positions=256),
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 64, 49152),
}
"""The first, with random weights, tells the shares of the machine that the others are said by."""
WORK_HERE = Work(32, 8, 24, minibatch=8, epochs=1, pass_rows=8, recomputed=False)


def measured(name: str, work: Work) -> dict[str, float]:
    """Steps of a model in this process, of one thread: seconds of it, and bytes."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config
    from variants import Peak

    from trl import CausalLMWithValueHead, PPOTrainer, Sampler, starter

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()  # what torch itself takes
    peak = Peak()
    folders = {"the starter": starter.LANGUAGE_MODEL, "SmolLM2-135M": SMOLLM2}
    if name in folders:
        plain = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    else:
        plain = AutoModelForCausalLM.from_config(GPT2Config())
    trainer = PPOTrainer(
        CausalLMWithValueHead(plain.eval()),
        batch_size=work.rows,
        minibatch_size=work.minibatch,
        forward_batch_size=work.pass_rows,
        ppo_epochs=work.epochs,
        precision="bf16",
        learning_rate=1e-6,
    )
    sampler = Sampler(max_new_tokens=work.response)
    queries = torch.randint(5, 1000, (work.rows, work.query))
    sampling, step = [], []
    for _ in range(2):  # the first makes the optimiser's state, and is not counted
        started = time.process_time()
        with trainer.sampling():
            rollout = sampler(trainer.model, queries)
        sampled = time.process_time()
        trainer.step(rollout, torch.randn(work.rows))
        sampling.append(sampled - started)
        step.append(time.process_time() - sampled)
    gc.collect()
    moments = [x for state in trainer.optimizer.state.values() for x in state.values()]
    tensors = [*trainer.model.parameters(), *trainer.ref_model.parameters(), *moments]
    held = sum(x.nbytes for x in {id(x): x for x in tensors}.values())
    return {
        "sampling s": sampling[-1],
        "step s": step[-1],
        "held": float(held),
        "peak": peak.megabytes() * 2**20,
    }


def machine_here() -> Machine:
    """This CPU at one thread: its products, its memory, and Python. The shares are not known."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl.rollout.sampling import sample

    torch.set_num_threads(1)

    def seconds(function: Callable[[], Any]) -> float:
        """The best of some; of this process, whatever else is running."""
        found = []
        for _ in range(6):
            started = time.process_time()
            function()
            found.append(time.process_time() - started)
        return min(found)

    square = torch.randn(1024, 1024).bfloat16()
    large = torch.ones(2**28, dtype=torch.uint8).view(torch.int64)
    calls = {}
    for layers in (2, 12):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32}
        config = LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=1)
        model, query = LlamaForCausalLM(config).eval(), torch.ones(1, 4, dtype=torch.long)
        write = partial(sample, model, query, max_new_tokens=40)
        calls[layers] = seconds(write) / 40
    return Machine(
        peak=2 * 1024**3 / seconds(lambda: square @ square),
        use=1.0,
        bandwidth=large.nbytes / seconds(large.sum),
        bandwidth_use=1.0,
        call=(calls[12] - calls[2]) / 10,
        asks_ahead=False,
    )


def predicted(shape: Shape, work: Work, sampling: Machine, step: Machine) -> dict[str, float]:
    """What `measured` measures; sampling and step have shares of their own."""
    seconds = step_seconds(shape, work, step)
    memory = step_bytes(shape, work, low_gradients=True)
    return {
        "sampling s": sampling_seconds(shape, work, sampling),
        "step s": seconds["reference"] + seconds["updates"],
        "held": memory["held"],
        "peak": max(memory["sampling"], memory["update"]),
    }


def share(name: str, target: float, shape: Shape, work: Work, machine: Machine) -> Machine:
    """The machine with the shares at which one model takes the seconds that it was seen to take."""
    low, high = 1e-3, 10.0
    for _ in range(60):  # fewer seconds with a larger share
        middle = math.sqrt(low * high)
        tried = replace(machine, use=middle, bandwidth_use=middle)
        longer = predicted(shape, work, tried, tried)[name] > target
        low, high = (middle, high) if longer else (low, middle)
    return replace(machine, use=low, bandwidth_use=low)


def check() -> dict[str, Any]:
    """Measure each model in a process of its own, and predict all but the first from it."""
    found = {}
    for name in HERE:
        command = [sys.executable, __file__, "--measure", name]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(lines.splitlines()[-1])
        print(name, found[name], flush=True)
    machine = machine_here()
    first, shape = next(iter(HERE.items()))
    of = {w: share(w, found[first][w], shape, WORK_HERE, machine) for w in ("sampling s", "step s")}
    models = {}
    for name, shape in HERE.items():
        expected = predicted(shape, WORK_HERE, of["sampling s"], of["step s"])
        models[name] = {w: [expected[w], found[name][w]] for w in expected}
    shares = {what: machine.use for what, machine in of.items()}
    return {"machine": asdict(replace(machine, memory=0, link=0, network=0)), "shares": shares} | {
        "work": asdict(WORK_HERE),
        "models": models,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="beside what is measured here")
    parser.add_argument("--measure", choices=HERE, help="measure one model in this process")
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measured(chosen.measure, WORK_HERE)))
    elif chosen.check:
        found = check()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(check_table(found))
    else:
        print(f"{time_table()}\n\n{memory_table()}")


if __name__ == "__main__":
    main()
