"""Encoding a data set once: resumable, in shards, over any number of processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .cached import CACHE, COND, DATA, as_in_memory, is_index, teacher_identity
from .data import fingerprint, pair_settings
from .errors import InputError, reject
from .families import Family, family_of
from .provenance import provenance
from .shard_writer import ShardWriter, processes


@dataclass
class CacheConfig:
    """How a data set is encoded."""

    output_dir: str = "outputs/cache"
    """Folder of the cache. What an interrupted command left there is continued."""
    encode_images: bool = True
    """Store the latents of the images, where the data has any. Off: conditions alone, for training without images."""
    batch_size: int = 16
    """Samples that a process encodes at a time. The `train_batch_size` of the training gives the bits that it would encode itself;
    kernels round otherwise in batches of another size."""
    shard_size: int = 1000
    """Samples in a file, which is what an interruption loses at most in each process."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise reject(name, getattr(self, name), "at least 1")


def write_cache(
    pipe: Any,
    dataset: Dataset[Any],
    config: CacheConfig,
    *,
    teacher: str | None = None,
    resolution: int | None = None,
    num_workers: int = 0,
) -> Path:
    """Encode `dataset` with the encoders of the pipeline `pipe` into `config.output_dir`, and return that folder.

    Every process takes its share of the shards that are not there yet; a visible shard is complete.

    Args:
        dataset: items as `build_dataset` gives them; images and pairs are stored where items have them.
        teacher: what `cache.json` calls the teacher.
        resolution: pixels of the samples. None: the pipeline's own.
        num_workers: processes that load images.

    Raises:
        InputError: for a wrong setting, an image that cannot be read, and a folder that holds another cache.
    """
    state, family, total = processes(), family_of(pipe), len(dataset)  # type: ignore[arg-type]
    settings = {"samples": total, "shard_size": config.shard_size, "teacher": teacher_identity(pipe, family, resolution)}
    settings |= {"data": fingerprint(dataset), "pairs": pair_settings(dataset)}
    conditions = _conditions(dataset, total)
    pipe.to(state.device)
    encode = _Encoder(pipe, family, resolution, dataset, config.batch_size, num_workers)
    index = {"settings": settings, "made_with": {"teacher": teacher, "batch_size": config.batch_size, **provenance()}}
    writer = ShardWriter(CACHE, Path(config.output_dir), total, config.shard_size, is_index)
    return writer.write(state, index | {"conditions": conditions}, encode.rows)


def _conditions(dataset: Any, total: int) -> list[str | int]:
    conditions = dataset.conditions
    return [conditions[i % len(conditions)] for i in range(total)]


@dataclass
class _Encoder:
    """The encoders of a pipeline on a data set."""

    pipe: Any
    family: Family
    resolution: int | None
    dataset: Dataset[Any]
    batch_size: int
    num_workers: int

    @torch.no_grad()
    def rows(self, indices: range) -> dict[str, Tensor]:
        """What is stored of these samples, by name."""
        samples = Subset(_Handed(self.dataset), indices)
        loader: DataLoader[Any] = DataLoader(
            samples, self.batch_size, num_workers=self.num_workers, collate_fn=list, generator=torch.Generator()
        )
        parts = [self._encoded(items) for items in loader]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encoded(self, items: list[Any]) -> dict[str, Tensor]:
        for item in items:
            if isinstance(item, InputError):
                raise item
        samples = len(items)
        items = items + items[:1] * (self.batch_size - samples)  # every batch has the same size, and rounds alike
        cond = self.family.encode_conditions(self.pipe, [item["condition"] for item in items], self.resolution)
        found = {COND + name: value for name, value in cond.items()}
        found |= {name: torch.stack([item[name] for item in items]) for name in DATA if name in items[0]}
        if "image" in items[0]:
            found["x0"] = self.family.encode_images(self.pipe, torch.stack([item["image"] for item in items]).to(self.pipe.device))
        return dict(as_in_memory(name, value[:samples].cpu()) for name, value in found.items())


class _Handed(Dataset[Any]):
    """Samples, or the InputError of one that cannot be read: raised in a worker process, it would come with a traceback as its text."""

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except InputError as error:
            return error
