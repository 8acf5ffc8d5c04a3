"""Which sample stands where in which batch.

The order is a function of (seed, step) alone: a resumed run needs no stored position, and the same global batch holds the
same samples in the same slots whether it is one batch, several accumulated ones, or spread over ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data import Condition, Item
from .errors import InputError, reject
from .random import derive_seed


class MicroBatch(TypedDict):
    """b samples; `slots` are their positions in the global batch of the optimizer step."""

    slots: list[int]
    condition: list[Condition]
    image: Tensor | None  # (b, C, H, W) float32 in [-1, 1]
    noise: Tensor | None  # (b, ...) of stored pairs
    x0: Tensor | None  # (b, ...) of stored pairs or encoded images
    cond: dict[str, Tensor] | None  # (b, ...) each, of stored conditions


class GlobalBatchSampler:
    """The endless sequence of epochs, each a permutation of its own, cut into global batches.

    Batches run across the ends of epochs, so that a data set may be smaller than a batch and every epoch is complete.
    """

    def __init__(self, dataset_size: int, global_batch_size: int, seed: int):
        for name, value in (("dataset_size", dataset_size), ("global_batch_size", global_batch_size)):
            if value < 1:
                raise reject(name, value, "1 or more")
        self.dataset_size, self.global_batch_size, self.seed = dataset_size, global_batch_size, seed
        self._permutations: dict[int, list[int]] = {}  # of the epochs that the last batch met

    def indices(self, step: int) -> list[int]:
        """The samples of optimizer step `step`, in the order of their slots; steps may be asked in any order."""
        first = step * self.global_batch_size
        positions = range(first, first + self.global_batch_size)
        epochs = range(first // self.dataset_size, positions[-1] // self.dataset_size + 1)
        self._permutations = {epoch: self._permutations.get(epoch) or self._permutation(epoch) for epoch in epochs}
        return [self._permutations[p // self.dataset_size][p % self.dataset_size] for p in positions]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order: list[int] = torch.randperm(self.dataset_size, generator=generator).tolist()
        return order


def micro_batches(indices: Sequence[int], rank: int, world_size: int, accumulation: int) -> list[list[tuple[int, int]]]:
    """This rank's share of a global batch: `accumulation` lists of (slot, index).

    Sample j of micro-batch m on rank r has slot (m * world_size + r) * b + j, b being the size of a micro-batch.
    """
    size = _micro_batch_size(len(indices), world_size, accumulation)
    starts = [(m * world_size + rank) * size for m in range(accumulation)]
    return [[(slot, indices[slot]) for slot in range(start, start + size)] for start in starts]


def _micro_batch_size(global_batch_size: int, world_size: int, accumulation: int) -> int:
    parts = world_size * accumulation
    if global_batch_size % parts:
        raise reject("global batch size", global_batch_size, f"a multiple of {world_size} processes x {accumulation} micro-batches")
    return global_batch_size // parts


def batches(
    dataset: Dataset[Any],
    sampler: GlobalBatchSampler,
    *,
    rank: int,
    world_size: int,
    accumulation: int,
    start_step: int,
    stop_step: int,
    num_workers: int,
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each optimizer step from `start_step` to before `stop_step`.

    InputError: a global batch that does not divide, and whatever a sample raises as such, also from a worker process.
    """
    _micro_batch_size(sampler.global_batch_size, world_size, accumulation)
    steps = range(start_step, stop_step)
    plan = (micro for step in steps for micro in micro_batches(sampler.indices(step), rank, world_size, accumulation))
    loader: DataLoader[Any] = DataLoader(
        _SlottedDataset(dataset),
        batch_sampler=plan,
        collate_fn=_collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(sampler.seed),  # else the loader draws from the global one
    )
    return _steps(loader, len(steps), accumulation)


def _steps(loader: DataLoader[Any], steps: int, accumulation: int) -> Iterator[list[MicroBatch]]:
    loaded = iter(loader)
    for _ in range(steps):
        step = [next(loaded) for _ in range(accumulation)]
        for micro in step:
            if isinstance(micro, InputError):
                raise micro
        yield step


class _SlottedDataset(Dataset[Any]):
    """Samples by (slot, index). An InputError is handed over: raised in a worker process, it would come with a traceback as its text."""

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Item | InputError]:
        slot, index = key
        try:
            return slot, self.dataset[index]
        except InputError as error:
            return slot, error


def _collate(samples: Sequence[tuple[int, Any]]) -> MicroBatch | InputError:
    for _, item in samples:
        if isinstance(item, InputError):
            return item
    return {
        "slots": [slot for slot, _ in samples],
        "condition": [item["condition"] for _, item in samples],
        "image": _stacked("image", samples),
        "noise": _stacked("noise", samples),
        "x0": _stacked("x0", samples),
        "cond": _stacked_cond([item["cond"] for _, item in samples if "cond" in item]),
    }


def _stacked(key: str, samples: Sequence[tuple[int, Any]]) -> Tensor | None:
    tensors = [item[key] for _, item in samples if key in item]
    if not tensors:
        return None
    last = tensors[0].ndim == 3 and not tensors[0].is_contiguous() and tensors[0].permute(1, 2, 0).is_contiguous()
    return torch.stack(tensors).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _stacked_cond(conds: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    return {name: torch.stack([cond[name] for cond in conds]) for name in conds[0]} if conds else None
