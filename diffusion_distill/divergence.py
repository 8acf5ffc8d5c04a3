"""Stopping before a step whose loss or gradient is no number, and keeping what led there."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import parallel
from .errors import NonFiniteError
from .methods import Batch


def all_finite(losses: Sequence[Tensor], norms: Mapping[str, Tensor]) -> bool:
    """Whether the losses of this turn are finite on every rank, and the norms of its averaged gradients."""
    values = [value.detach().double() for value in (*losses, *norms.values())]
    bad = not bool(torch.stack([value.to(values[0].device) for value in values]).isfinite().all())
    (anywhere,) = parallel.maximum((int(bad),), values[0].device)
    return not anywhere


def non_finite(
    folder: Path, step: int, roles: Sequence[str], norms: Mapping[str, Tensor], logs: Mapping[str, Tensor], batches: Sequence[Batch]
) -> NonFiniteError:
    """The error for this turn; every rank calls it and keeps the batch that it had in hand in `folder`.

    Args:
        roles: what trains in the turn.
        norms: gradient norms by role.
        logs: means over the micro-batches of this step so far, by the same names on every rank.
    """
    path = folder / f"nonfinite-step-{step}-rank-{parallel.rank()}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{i}/{name}": value.contiguous() for i, batch in enumerate(batches) for name, value in batch.tensors().items()}
    save_file(tensors, path, metadata={name: str(value.item()) for name, value in logs.items()})
    gradients = [f"the gradient of {role!r} is {norm.item()}" for role, norm in norms.items() if not norm.isfinite()]
    what = " and ".join(gradients) or f"the gradient of {' and '.join(map(repr, roles))} is finite, its loss is not"
    return NonFiniteError(
        f"step {step}: {what} ({_bad_terms(logs)}); nothing was stepped, the last checkpoint is sound, the batch "
        f"is kept in {path}. Lower the learning rate, or raise the precision."
    )


def _bad_terms(logs: Mapping[str, Tensor]) -> str:
    ranks = parallel.gather(torch.stack([value.detach().double().reshape(()) for value in logs.values()]))
    found = {name: [rank for rank, row in enumerate(ranks) if not math.isfinite(row[i])] for i, name in enumerate(logs)}  # ranks by term
    bad = [name + (f" on rank {', '.join(map(str, at))}" if len(ranks) > 1 else "") for name, at in found.items() if at]
    return f"terms that are no number: {', '.join(bad)}" if bad else "every logged term is finite"
