"""Data parallelism over torch.distributed without wrapping a module.

Wrappers are built around one module with one forward and one backward pass. Distillation runs several networks several
times a turn, taps their features and stops half-way; averaging the finished gradients once a turn is exact for all of that.
"""

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import reject

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
