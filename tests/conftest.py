"""Tiny models made from configs; no network; one thread, which is fastest for such sizes.

What takes seconds to import is imported where it is used: the process that hands out the tests to
others needs none of it.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from trl.gpt2 import GPT2HeadWithValueModel
    from trl.report.charts import Chart

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCABULARY = 97

# As in a terminal, also where the tests run in the background and these are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure() -> None:
    """What is imported stays: to look for what does not, again and again, takes seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> Iterator[None]:
    """A checkpoint waits for the disk, dozens of times in a run: only a power cut would tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and "127.0.0.1" not in str(address):
            raise OSError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def tiny_gpt2(
    seed: int = 0, *, scale: float = 0.15, dropout: float = 0.0
) -> GPT2HeadWithValueModel:
    """A 2-layer GPT-2 with a value head that is not zero and logits that are far from uniform."""
    import torch
    from transformers import GPT2Config

    from trl.gpt2 import GPT2HeadWithValueModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=scale,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        summary_first_dropout=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = GPT2HeadWithValueModel(config).eval()
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.3)
    torch.set_rng_state(generator_state)
    return model


@pytest.fixture
def make_model() -> Callable[..., GPT2HeadWithValueModel]:
    return tiny_gpt2


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not here")
    return SHARED


def undrawn(chart: Chart, png: Path) -> tuple[str, list[dict[str, float]]]:
    """A chart that is not drawn."""
    return "<svg></svg>", [{} for _ in chart.panels]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their charts, which take seconds, and have tests of their own."""
    for module in ("trl.report.page", "trl.training.reward_report"):
        monkeypatch.setattr(f"{module}.draw", undrawn)


def ragged(lengths: list[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[torch.Tensor]:
    """Random token rows of the given lengths, without token 0 (the EOS)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Every test begins without the accelerator of another."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


REAL_MODELS = Path(os.environ.get("TRL_MODELS", "~/.cache/trl/models")).expanduser()
"""As examples/real_models/get.py has it."""


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """The folder of a real model by its name; a test is skipped where it is not."""

    def folder(name: str) -> Path:
        if not (REAL_MODELS / name).is_dir():
            pytest.skip(f"no {REAL_MODELS / name}: examples/real_models/get.py gets it")
        return REAL_MODELS / name

    return folder
