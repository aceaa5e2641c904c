"""Where the time of a run goes: seconds of each phase, the share of the machine in use, a trace.

    trl demo --profile FOLDER        trl.train(..., profile="FOLDER")        Loop(..., profile=...)

FOLDER then holds

    profile.json             seconds and share of each phase, tokens per second, use of the machine
    profile.md               the same as a table
    trace-step-2.json.gz     what PyTorch did in a step, for ui.perfetto.dev or chrome://tracing

The first step warms up and the next two are traced, which slows them down; the figures are of all
later steps, and written after each. A run too short for that is told from what there is, and the
files say so. While a profile is on, a GPU is waited for at both ends of every phase.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from trl.anatomy import is_encoder_decoder, language_model, text_config
from trl.batch import Rollout
from trl.compute.precision import LOW_PRECISION
from trl.config.errors import refuse
from trl.models.trunk import decoder_layers
from trl.ppo import PPOTrainer
from trl.watch.markdown import markdown_table

PHASES = {
    "generation": "generation",
    "scorer": "scorer",
    "policy": "forward, policy, no gradient",
    "reference": "forward, reference",
    "forward": "forward, training",
    "backward": "backward",
    "optimizer": "optimiser",
    "other": "waiting and other",
}
"""What the parts of a step are called in the files, and in the table."""

FIRST_KINDS = {1: "warm-up", 2: "traced", 3: "traced"}
"""What the first steps are for; all others are timed."""
PEAK_SECONDS = 0.2
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


# -- the work of an iteration ----------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters that tokens are multiplied by, by what the gradient asks of them."""

    trained: int = 0
    """Of the body: the outputs, and the gradients of inputs and of weights."""
    passed: int = 0
    """Frozen above something trained: the outputs, and the gradients of inputs."""
    frozen: int = 0
    """Frozen with nothing trained below: the outputs alone."""
    head: int = 0
    """Of the language head, which runs where a response token is predicted and nowhere else."""
    head_trained: bool = True
    attention: int = 0
    """Sum of the layers' widths (heads × size of a head); without those of `frozen_attention`."""
    frozen_attention: int = 0
    """The same of layers that no gradient reaches."""

    def above_trunk(self) -> Weights:
        """Return those of a pass that starts from what the frozen lower layers gave before."""
        return replace(self, frozen=0, frozen_attention=0)

    def of_trunk(self) -> Weights:
        """Return those of the frozen lower layers alone."""
        return Weights(frozen=self.frozen, frozen_attention=self.frozen_attention)


@dataclass(frozen=True)
class Tokens:
    """What a pass over a rollout has to read at least; a query that rows share counts once."""

    read: int
    """Tokens that go through the body: all but the last of each row, which predicts nothing."""
    predicted: int
    """Response tokens."""
    pairs: int
    """Pairs of a token that is read and one that it attends to: itself, or one before it."""

    @classmethod
    def of(cls, rollout: Rollout) -> Tokens:
        """Count those of a rollout."""
        queries = rollout.query_mask.sum(1).tolist()
        responses = rollout.response_mask.sum(1).tolist()
        groups = range(len(queries)) if rollout.group_ids is None else rollout.group_ids.tolist()
        different = dict(zip(groups, queries, strict=True)).values()
        rows = [(query, response - 1) for query, response in zip(queries, responses, strict=True)]
        return cls(
            read=sum(different) + sum(more for _, more in rows),
            predicted=sum(responses),
            pairs=sum(query * (query + 1) // 2 for query in different)
            + sum(query * more + more * (more + 1) // 2 for query, more in rows),
        )


def forward_flops(weights: Weights, tokens: Tokens) -> int:
    """Return the additions and multiplications of a forward pass.

        2·(trained + passed + frozen)·read + 2·head·predicted + 4·(all attention)·pairs

    A product of a token with a weight is one of each; a pair takes two products of the layer's
    width, one for the logit and one for the mean. Softmax, norms and the like count nothing.
    """
    body = weights.trained + weights.passed + weights.frozen
    pairs = (weights.attention + weights.frozen_attention) * tokens.pairs
    return 2 * body * tokens.read + 2 * weights.head * tokens.predicted + 4 * pairs


def backward_flops(weights: Weights, tokens: Tokens) -> int:
    """Return the additions and multiplications of a backward pass.

        2·(trained + passed)·read + 2·head·predicted + 8·attention·pairs      gradients of inputs
        + 2·trained·read + [2·head·predicted if the head is trained]          gradients of weights

    With all trained that is twice the forward pass: 6 in all for each weight and token.
    """
    body = 2 * weights.trained + weights.passed
    # With nothing trained in the body no gradient goes through the head into it.
    through = bool(body or weights.head_trained)
    head = weights.head * (through + weights.head_trained) * tokens.predicted
    return 2 * body * tokens.read + 2 * head + 8 * weights.attention * tokens.pairs


def iteration_flops(
    policy: Weights,
    tokens: Tokens,
    *,
    reference: Weights | None = None,
    scored: bool = False,
    epochs: float = 1.0,
    shared_trunk: bool = False,
) -> dict[str, float]:
    """Return the work of one iteration by phase; that of the scorer is not known.

    Args:
        policy: What is trained.
        tokens: Those of the rollout.
        reference: What the KL is measured against; None: nothing is.
        scored: Whether the policy's log-probs are computed again after sampling.
        epochs: How often the rollout is trained on.
        shared_trunk: Whether the frozen lower layers run once after sampling, for all passes.
    """
    top = policy.above_trunk() if shared_trunk else policy
    trunk = forward_flops(policy.of_trunk(), tokens) if shared_trunk else 0
    forward = forward_flops(top, tokens)
    return {
        "generation": float(forward_flops(policy, tokens)),
        "policy": float(trunk + (forward if scored else 0)),
        "reference": 0.0 if reference is None else float(forward_flops(reference, tokens)),
        "forward": epochs * forward,
        "backward": epochs * backward_flops(top, tokens),
    }


def count_weights(model: nn.Module) -> Weights | None:
    """Count the weights of a causal language model; None for what cannot be counted so.

    That is an encoder-decoder, a mixture of experts, and a model whose layers are not found.
    """
    plain = language_model(model)
    config = text_config(plain)
    if is_encoder_decoder(plain) or any(getattr(config, name, None) for name in _EXPERTS):
        return None
    try:
        layers = list(decoder_layers(plain))
    except (TypeError, ValueError):
        return None
    embeddings = {m.weight for m in plain.modules() if isinstance(m, nn.Embedding)}
    head = getattr(plain.get_output_embeddings(), "weight", None)
    parts = [embeddings, *(list(layer.parameters()) for layer in layers)]
    trained = [any(weight.requires_grad for weight in part) for part in parts]
    # The layers below the first trained part; embeddings that are trained are below all of them.
    lowest = max(0, trained.index(True) - 1) if True in trained else len(layers)
    trunk = {weight for layer in layers[:lowest] for weight in layer.parameters()}
    counts: Counter[str] = Counter()
    for weight in plain.parameters():
        if weight.ndim > 1 and weight is not head and weight not in embeddings:
            kind = "frozen" if weight in trunk else "passed"
            counts["trained" if weight.requires_grad else kind] += weight.numel()
    head_dim = getattr(config, "head_dim", None)
    width = config.num_attention_heads * head_dim if head_dim else config.hidden_size
    return Weights(
        **counts,
        head=0 if head is None else head.numel(),
        head_trained=head is not None and head.requires_grad,
        attention=width * (len(layers) - lowest),
        frozen_attention=width * lowest,
    )


@torch.no_grad()
def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the most additions and multiplications per second of a large matrix product.

    The best of as many as fit into `PEAK_SECONDS`, after one that warms up.
    """
    size = 1024 if device.type == "cpu" else 8192  # smaller ones do not fill a GPU
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    _wait(device)
    best, ends = math.inf, time.perf_counter() + PEAK_SECONDS
    while best == math.inf or time.perf_counter() + best < ends:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# -- the profile -----------------------------------------------------------------------------------


@dataclass
class Measured:
    """Sums over the steps of one kind."""

    steps: int = 0
    total: float = 0.0
    tokens: int = 0
    """Response tokens."""
    seconds: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(PHASES, 0.0)))
    flops: Counter[str] = field(default_factory=Counter)

    def add(self, total: float, tokens: int, seconds: Mapping[str, float], flops: Any) -> None:
        """Add a step; what no phase has taken is `other`."""
        self.steps += 1
        self.total += total
        self.tokens += tokens
        self.seconds.update({**seconds, "other": total - sum(seconds.values())})
        self.flops.update(flops)


class Profile:
    """Measures the steps of a loop, and writes what it finds.

    Args:
        folder: Where the files go; it is made if need be.
        trainer: Its clock says which phase runs.

    Attributes:
        peak: The most that the machine does per second at the trainer's precision, measured here.

    Raises:
        TypeError: if `folder` is not the name of one.
        OSError: if it cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], trainer: PPOTrainer) -> None:
        if not isinstance(folder, str | os.PathLike):
            refuse("profile", "be the name of a folder or None", repr(folder), error=TypeError)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainer = trainer
        self.device = trainer.accelerator.device
        self.peak = measure_peak(self.device, LOW_PRECISION.get(trainer.precision, torch.float32))
        self.policy = count_weights(trainer.model)
        self.reference = self._reference_weights()
        self.steps = 0
        self.kind, self.measured = "", Measured()
        self._seconds: Counter[str] = Counter()
        self._flops: dict[str, float] = {}
        self._tokens = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure the step that runs inside; one that fails leaves no trace."""
        number = self.steps + 1
        kind = FIRST_KINDS.get(number, "timed")
        self._seconds, self._flops, self._tokens = Counter(), {}, 0
        self.trainer.clock.around = self.phase
        try:
            # Of the CPU, and of a GPU if there is one.
            traces = torch.profiler.profile() if kind == "traced" else nullcontext()
            with traces as tracer, self.phase("step"):
                yield
        finally:
            self.trainer.clock.around = nullcontext
        if kind != self.kind:  # the figures are of the best steps so far
            self.kind, self.measured = kind, Measured()
        self.steps = number
        self.measured.add(self._seconds.pop("step"), self._tokens, self._seconds, self._flops)
        if tracer is not None:
            tracer.export_chrome_trace(str(self.folder / f"trace-step-{number}.json.gz"))
        summary = self.summary()
        (self.folder / "profile.json").write_text(json.dumps(summary, indent=2) + "\n")
        (self.folder / "profile.md").write_text(profile_markdown(summary))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to a phase, and give them its name in the trace."""
        with record_function(f"trl: {PHASES.get(name, name)}"):
            _wait(self.device)
            started = time.perf_counter()
            yield
            _wait(self.device)
            self._seconds[name] += time.perf_counter() - started

    def count(self, rollout: Rollout, updates: float, seconds: float) -> dict[str, float]:
        """Count the work of the step that runs, and return `machine_share` if it can be counted.

        Args:
            rollout: As it was sampled.
            updates: Of the optimiser, those skipped included.
            seconds: Of the step.
        """
        self._tokens = int(rollout.response_mask.sum())
        if self.policy is None or self.reference is None:
            return {}
        trainer = self.trainer
        recorded = rollout.behaviour_logprobs is not None and rollout.values is not None
        rows = trainer.config.update_size // trainer.accelerator.num_processes
        self._flops = iteration_flops(
            self.policy,
            Tokens.of(rollout),
            reference=self.reference,
            scored=not (recorded and trainer.config.reuse_recorded),
            epochs=updates / math.ceil(len(rollout) / rows),
            shared_trunk=trainer.updater.responder.trunk is not None,
        )
        return self._machine_share(sum(self._flops.values()), seconds)

    def summary(self) -> dict[str, Any]:
        """Return what profile.json holds, of the best steps there are."""
        found = self.measured
        phases = {
            name: {"seconds": seconds, "share": seconds / found.total}
            | self._machine_share(found.flops[name], seconds)
            for name, seconds in found.seconds.items()
        }
        return {
            "steps": found.steps,
            "kind": self.kind,
            "seconds": found.total,
            "phases": phases,
            "tokens_per_second": found.tokens / found.total,
            "peak_flops_per_second": self.peak,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "precision": self.trainer.precision.replace("no", "fp32"),
            "torch": torch.__version__,
        } | self._machine_share(sum(found.flops.values()), found.total)

    def _machine_share(self, flops: float, seconds: float) -> dict[str, float]:
        """Return the share of the peak that was used, nothing where nothing was counted."""
        return {"machine_share": flops / seconds / self.peak} if flops and seconds else {}

    def _reference_weights(self) -> Weights | None:
        """Return those of the reference's pass, none of anything without a reference."""
        reference = self.trainer.reference
        if reference is None:
            return Weights()
        if reference.model is not None:
            return count_weights(reference.model)
        shared = reference.kind == "shared-trunk" and self.policy is not None
        return self.policy.above_trunk() if shared else self.policy


KINDS = {
    "timed": "",
    "traced": ", all slowed down by tracing: run four or more for better figures",
    "warm-up": ", the first of its run, which is slower: run four or more for better figures",
}


def profile_markdown(summary: Mapping[str, Any]) -> str:
    """Return the table of profile.md, given what profile.json holds."""
    steps = summary["steps"]
    rows = []
    for name, phase in {**summary["phases"], "all": {**summary, "share": 1.0}}.items():
        machine = f"{phase['machine_share']:.1%}" if "machine_share" in phase else ""
        seconds, share = f"{phase['seconds'] / steps:.4f}", f"{phase['share']:.1%}"
        rows.append([PHASES.get(name, "**all**"), seconds, share, machine])
    names = ["phase", "seconds per step", "share of the time", "share of the machine"]
    return f"""# Where the time went

{steps} step{"s" if steps > 1 else ""}, {summary["seconds"] / steps:.3f} s each\
{KINDS[summary["kind"]]}.
{summary["tokens_per_second"]:,.0f} response tokens per second; {summary["device"]}, \
{summary["precision"]}, {summary["threads"]} thread(s), at best \
{summary["peak_flops_per_second"] / 1e9:,.0f} GFLOP/s.

{markdown_table(names, rows, numbers=True)}"""
