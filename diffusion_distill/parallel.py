"""Data parallelism over torch.distributed without wrapping a module.

Wrappers are built around one module with one forward and one backward pass. Distillation runs several networks several
times a turn, taps their features and stops half-way; averaging the finished gradients once a turn is exact for all of that.

Before ranks exchange anything they meet, so that one that does not come is known by its number.
"""

import os
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import LostRankError, reject

BUCKET_ELEMENTS = 32 * 2**20


def check_started(processes: int) -> None:
    """Compare what accelerate sees with what `accelerate launch` or `torchrun` started; without a GPU it may run each process alone.

    Raises:
        InputError: where they differ.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != started:
        raise reject("number of processes", started, f"accelerate sees {processes}; on CPUs, set ACCELERATE_USE_CPU=true")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


@cache
def _meeting_group(everyone: dist.ProcessGroup, seconds: float) -> dist.ProcessGroup:
    """`everyone` over gloo, which knows who is missing, whatever the backend that moves tensors.

    Only rank 0 sees who is missing. The others watch rank 0, and give it the time to say so.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=1.5 * seconds))


def meet(seconds: float) -> None:
    """Return when every rank is here; all ranks give the same `seconds`.

    Raises:
        LostRankError: on rank 0 after `seconds`, naming the ranks that did not come; on the others, once rank 0 is gone.
    """
    if world_size() == 1:
        return
    group = _meeting_group(dist.group.WORLD, seconds)
    try:
        dist.monitored_barrier(group, timedelta(seconds=seconds), wait_all_ranks=True)
    except RuntimeError as error:
        raise LostRankError(_who_is_missing(str(error), seconds)) from error


def _who_is_missing(reason: str, seconds: float) -> str:
    missing = re.search(r"Ranks? ([\d, ]+) failed to pass", reason)
    who = f"rank {missing[1].strip(' ,')}" if missing else "rank 0, or one that rank 0 waits for,"
    return f"rank {rank()}: {who} did not come within {seconds:g} s to where the others wait: it is stuck or has ended; see its log"


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks, in buckets; a parameter without gradient counts as zero."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS:
            _average(bucket)
            bucket = []
    _average(bucket)


def _average(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(mean.view_as(t))


def maximum(values: Sequence[int], device: torch.device) -> tuple[int, ...]:
    """The largest of each value over ranks."""
    if world_size() == 1:
        return tuple(values)
    found = torch.tensor(values, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return tuple(found.tolist())


def average_scalars(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Mean over ranks of named scalars."""
    if not scalars:
        return {}
    values = torch.stack([v.detach().double().reshape(()) for v in scalars.values()])
    if world_size() > 1:
        dist.all_reduce(values)
    return dict(zip(scalars, (values / world_size()).tolist(), strict=True))


def gather(values: Tensor) -> list[list[float]]:
    """The numbers (K,) of every rank, by rank."""
    if world_size() == 1:
        return [values.tolist()]
    rows = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(rows, values)
    return [row.tolist() for row in rows]
