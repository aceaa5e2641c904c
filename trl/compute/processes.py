"""What the processes of a run share out, and what they have to agree upon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional

from trl.batch import Rollout
from trl.compute.peers import meet
from trl.config.errors import refuse
from trl.core import masked_whiten
from trl.optimization.advantages import leave_one_out

Checked = TypeVar("Checked", bound=tuple[Any, ...])


def share_of(accelerator: Accelerator, name: str, rows: int) -> int:
    """Return the rows of each process, or raise if they cannot share them evenly."""
    processes = accelerator.num_processes
    if rows % processes:
        refuse(name, "be a multiple of the number of processes", f"{rows} for {processes}")
    return rows // processes


def check_same_everywhere(accelerator: Accelerator, name: str, rule: str, value: str) -> None:
    """Raise a ValueError on every process if a value is not the same on all of them."""
    values = [value] if accelerator.num_processes == 1 else gather_object([value])
    if len(set(values)) > 1:
        refuse(name, rule, f"{', '.join(values)} on processes 0 to {len(values) - 1}")


def gathered(accelerator: Accelerator, tensor: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """Return the rows of all processes, padded with 0 to the widest.

    accelerate's own padding makes integers of a mask.

    Args:
        accelerator: Of this process.
        tensor: Its rows.
        counted: [B] bool, leave the others out; None on all processes: keep all.
    """
    if accelerator.num_processes == 1:
        return tensor
    if tensor.ndim > 1:
        width = torch.tensor([tensor.shape[1]], device=tensor.device)
        missing = int(accelerator.gather(width).max()) - tensor.shape[1]
        tensor = functional.pad(tensor, (0, missing))
    of_all: Tensor = accelerator.gather(tensor)
    return of_all if counted is None else of_all[accelerator.gather(counted)]


def scores_differ(
    accelerator: Accelerator, scores: Tensor, group_ids: Tensor | None, counted: Tensor
) -> bool:
    """Return whether any response has another score than one that it is compared with.

    One alone is compared with what its value foretold, so that it says something in any case.

    Args:
        accelerator: Of this process.
        scores: [B] of this process.
        group_ids: [B] equal for responses that are compared; None: all are, over all processes.
        counted: [B] bool, leave the others out; of all processes there is one.
    """
    if group_ids is None:
        of_all = gathered(accelerator, scores, counted=counted)
        return len(of_all) == 1 or bool((of_all != of_all[0]).any())
    scores, group_ids = scores[counted], group_ids[counted]
    differ = leave_one_out(scores, group_ids).any() if len(scores) else scores.new_zeros(())
    return bool(accelerator.reduce(differ.float()) > 0)


def rows_that_count(
    accelerator: Accelerator, rollout: Rollout, scores: Tensor, counted: Tensor | None
) -> tuple[Rollout, Tensor, Tensor | None] | None:
    """Return the rows that count and their scores; None if there are none on any process.

    Processes make the same number of updates, so that one with fewer such rows than another fills
    them up with some that do not count. What the last value, [b] bool, says; None: all count.
    """
    if counted is None and accelerator.num_processes == 1:
        return rollout, scores, None
    if counted is None:
        counted = torch.ones(len(rollout), dtype=torch.bool, device="cpu")
    own = torch.tensor([int(counted.sum())], device=accelerator.device)
    of_all = gathered(accelerator, own).tolist()
    most = max(of_all)
    if most == 0:
        return None
    if most < len(rollout) or not counted.all():
        order = (~counted).int().argsort(stable=True)[:most]  # those that count come first
        rows = order.to(scores.device)
        rollout, scores, counted = rollout.select(rows), scores[rows], counted[order]
        scores = scores[:, : rollout.responses.shape[1]] if scores.ndim == 2 else scores
    return rollout, scores, None if min(of_all) == most else counted.to(scores.device)


def whitened(
    accelerator: Accelerator, values: Tensor, mask: Tensor, *, shift_mean: bool = True
) -> Tensor:
    """Return the values [B, R] of this process, whitened over the batch of all processes."""
    values_of_all, mask_of_all = gathered(accelerator, values), gathered(accelerator, mask)
    first = accelerator.process_index * len(values)
    of_all = masked_whiten(values_of_all, mask_of_all, shift_mean)
    return of_all[first : first + len(values), : values.shape[1]]


def checked_everywhere(
    accelerator: Accelerator, check: Callable[[], Checked], *, groups: bool = False
) -> Checked:
    """Return what `check` does, a tuple that begins with a rollout; or raise on every process.

    Args:
        accelerator: Of this process.
        check: Looks at what this process was given.
        groups: Whether the responses to a query are compared, so that one process needs them all.

    Raises:
        TypeError, ValueError: what `check` raises; a ValueError where it raises elsewhere, or
            where the processes have different numbers of rows, or parts of a group.
    """
    meet()  # scores may have come from people or servers
    checked, problem = None, None
    try:
        checked = check()
    except (TypeError, ValueError) as error:
        problem = error
    rows = torch.tensor([0 if checked is None else len(checked[0])], device=accelerator.device)
    of_all = gathered(accelerator, rows)
    if not of_all.all():
        problems = gather_object([None if problem is None else str(problem)])
        if problem is not None:
            raise problem
        rank, said = next((rank, said) for rank, said in enumerate(problems) if said is not None)
        raise ValueError(f"rank {rank} was given bad input: {said}")
    if of_all.unique().numel() > 1:
        raise ValueError(
            f"every process must pass the same number of rows, got {of_all.tolist()}: "
            "split the batch evenly."
        )
    if groups and accelerator.num_processes > 1:
        _check_groups(checked[0])
    return checked


def _check_groups(rollout: Rollout) -> None:
    """Raise if a group is spread over processes: the same number, and the same query.

    A sampler counts its groups anew on every process, and two may be given the same query. So what
    it recorded passes if all groups have one size: then none has lost a part.
    """
    names, sizes = rollout.group_ids.unique(return_counts=True)
    query_of = dict(zip(rollout.group_ids.tolist(), rollout.query_lists(), strict=True))
    mine = [(name, *query_of[name]) for name in names.tolist()]
    of_all = gather_object([(mine, sizes.tolist(), rollout.behaviour_logprobs is not None)])
    ranks = Counter(group for groups, _, _ in of_all for group in groups)
    ((name, *query), most) = ranks.most_common(1)[0]
    whole = len({size for _, each, _ in of_all for size in each}) == 1
    if most > 1 and not (whole and all(recorded for _, _, recorded in of_all)):
        got = f"group {name} (query {query[:8]}) on {most} of {len(of_all)}"
        fix = "pass all responses to a query on one, and give groups different numbers"
        refuse("group_ids", "keep each group on one process", got, fix)
