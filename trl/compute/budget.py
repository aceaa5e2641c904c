"""How many tokens a pass may have, by the model and the memory of the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from trl.compute.precision import LOW_PRECISION
from trl.compute.updater import Updater
from trl.config import PPOConfig

MOST_TOKENS = 16_384
"""Of a pass: more make it no quicker."""
SHARE = 0.25
"""Of the memory of a device, for what a pass keeps to go backward."""


def with_token_budget(config: PPOConfig, updater: Updater) -> PPOConfig:
    """Return the settings with the tokens of a pass, if they say none."""
    if config.token_budget is not None:
        return config
    return replace(config, token_budget=tokens_that_fit(updater))


def tokens_that_fit(updater: Updater) -> int:
    """Return how many tokens a pass may have, so that what it keeps fits a quarter of the memory.

        n · b <= ¼ M / p        b = s · (Σ_W (inputs + outputs of W) + V)

    A layer keeps what goes into its matrices W, and what comes out is kept by what reads it; V
    logits stand for the head. SmolLM2-135M keeps 1.4 MB for each token in float32 so, GPT-2 0.9.
    Largest power of two for that, so that like machines have like passes; at most `MOST_TOKENS`.

    M is the memory of the device, the one of a CPU shared by the p processes of a host, or what a
    container or a job may have of it; s the bytes of a number. A critic of its own goes forward and
    backward with the policy, and counts too.
    """
    device, numbers = updater.accelerator.device, 0
    for model in (reader.plain for reader in updater.responder.readers):
        apart = {model.get_input_embeddings(), model.get_output_embeddings()}
        places = {id(weight) for part in apart if part is not None for weight in part.parameters()}
        matrices = [w for w in model.parameters() if w.ndim == 2 and id(w) not in places]
        numbers += sum(sum(weight.shape) for weight in matrices)
        numbers += getattr(model.config.get_text_config(), "vocab_size", 0)
    memory = min([psutil.virtual_memory().total, *limits()])
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        memory, sharing = torch.cuda.get_device_properties(device).total_memory, 1
    itemsize = LOW_PRECISION.get(updater.precision, torch.float32).itemsize
    fitting = SHARE * memory / sharing / max(numbers * itemsize, 1)
    return min(MOST_TOKENS, 2 ** int(math.log2(max(fitting, 1))))


def free_memory() -> int:
    """Return how many bytes this process may still have: of the machine, and of its limits."""
    used = psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *(limit - used for limit in limits())])


def limits(root: Path = Path("/")) -> Iterator[int]:
    """Yield how many bytes this process may have, in each control group of Linux that it is in.

    Docker, Kubernetes and Slurm set these; version 1 and 2 lay them out differently (cgroups(7)).
    """
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / kinds
        name = "memory.limit_in_bytes" if kinds else "memory.max"
        group = top / path.strip("/")  # a container may see its own as the top
        for folder in (group, *group.parents):
            with suppress(OSError):  # not there, or not for us to read
                limit = (folder / name).read_text().strip() if folder.is_relative_to(top) else ""
                if limit.isdigit():  # else "max"
                    yield int(limit)
