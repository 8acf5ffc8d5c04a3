"""Encoded conditions and images, stored so that a training step runs no text encoder and no VAE.

`cache.json` says what was encoded and by which teacher, lists the conditions, and gives the size and SHA-256 of every shard (shards.py).
A shard `samples-00000.safetensors` holds what `Family.encode_conditions` returns as `cond.NAME`, and `x0` of images or `x0` and `noise`
of pairs, in the dtypes in which they were computed. Latents with their channels last in memory are stored so, as `x0.channels_last`,
because convolutions round otherwise on another layout. Sample i is item i of the data set that was encoded.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .errors import reject
from .families import Family
from .shards import Kind, Shards, counts_fit, finished_index, weights_digest

CACHE = Kind("samples", "cache.json", "cache_dir", "train/make_cache.py")
COND, DATA, CHANNELS_LAST = "cond.", ("x0", "noise"), ".channels_last"


def is_index(index: dict[str, Any]) -> bool:
    """Whether every entry that is read later is there; other exceptions than KeyError mean no as well."""
    settings, conditions = index["settings"], index["conditions"]
    numbers = [settings["samples"], settings["shard_size"], len(conditions)]
    named = all(isinstance(part, Mapping) for part in (settings["teacher"], settings["data"], settings["pairs"] or {}, index["made_with"]))
    whole = all(type(number) is int and number > 0 for number in numbers) and len(conditions) == settings["samples"]
    return counts_fit(CACHE, index, settings["samples"]) and named and whole


def encoders(pipe: Any, family: Family) -> dict[str, nn.Module]:
    """The networks of a pipeline that make conditions and latents, by name: all but the one that denoises."""
    denoising = (family.component, *family.expert_components)
    return {name: part for name, part in sorted(pipe.components.items()) if isinstance(part, nn.Module) and name not in denoising}


def teacher_identity(pipe: Any, family: Family, resolution: int | None) -> dict[str, Any]:
    """Everything of a teacher that its encodings depend on, as JSON; the network that denoises is no part of it."""
    found: dict[str, Any] = {"pipeline": type(pipe).__name__, "family": family.name}
    found |= {"image_shape": list(family.image_shape(pipe, resolution)), "sample_shape": list(family.sample_shape(pipe, resolution))}
    for name, part in encoders(pipe, family).items():
        found[f"{name} SHA-256"] = weights_digest(part.state_dict())
    if "vae" in pipe.components:
        options = {name: value for name, value in sorted(pipe.vae.config.items()) if not name.startswith("_")}
        found["vae config"] = json.dumps(options, default=str)
    return found


class CachedDataset(Dataset[dict[str, Any]]):
    """Items {"condition", "cond"}, and "x0" and "noise" as asked for, read one at a time; the conditions alone are held in memory.

    Args:
        folder: that train/make_cache.py wrote.
        needs_images: whether items have the "x0" of images.
        needs_pairs: whether they have the "x0" and "noise" of pairs.

    Raises:
        InputError: a folder without a cache, an unfinished one, a shard that is missing or not as it was written, no images or pairs.
    """

    def __init__(self, folder: str | Path, *, needs_images: bool = False, needs_pairs: bool = False):
        self.folder = Path(folder)
        index = finished_index(CACHE, self.folder, is_index)
        self.settings: dict[str, Any] = index["settings"]
        self.made_with: dict[str, Any] = index["made_with"]
        self.conditions: Sequence[str | int] = index["conditions"]
        self._shards = Shards(CACHE, self.folder, index, self.settings["shard_size"])
        self.shards = self._shards.entries
        wanted = DATA if needs_pairs else DATA[: int(needs_images)]
        images = needs_images and not needs_pairs
        stored = {_plain(name): name for name in self._shards.shapes}
        if set(wanted) - stored.keys() or (images and self.settings["pairs"]):
            raise self._shards.error(f"it holds no {'images' if images else 'pairs'}; write one from a source that has them")
        self._names = [stored[name] for name in stored if name.startswith(COND) or name in wanted]

    def __len__(self) -> int:
        return int(self.settings["samples"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = dict(from_memory(name, value) for name, value in self._shards.row(index, self._names).items())
        cond = {name.removeprefix(COND): row.pop(name) for name in list(row) if name.startswith(COND)}
        return {"condition": self.conditions[index], "cond": cond, **row}

    def check_teacher(self, pipe: Any, family: Family, resolution: int | None) -> None:
        """Refuse a teacher whose encodings would be others.

        Raises:
            InputError: naming the teacher of the cache and what differs.
        """
        now, stored = teacher_identity(pipe, family, resolution), self.settings["teacher"]
        if changed := [name for name in dict.fromkeys([*stored, *now]) if stored.get(name) != now.get(name)]:
            differs = "; ".join(f"{name}: stored {_short(stored.get(name))}, now {_short(now.get(name))}" for name in changed)
            accepted = f"a cache of this teacher; this one was encoded by {self.made_with.get('teacher')!r} ({differs})"
            raise reject("cache_dir", str(self.folder), accepted)


def as_in_memory(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Name and contiguous tensor under which a batch (B, ...) is stored."""
    if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous():
        return name + CHANNELS_LAST, value.permute(0, 2, 3, 1).contiguous()
    return name, value.contiguous()


def from_memory(name: str, row: Tensor) -> tuple[str, Tensor]:
    """Undo `as_in_memory` for one row, without its batch dimension; batches of such rows have the layout that was stored."""
    return _plain(name), row.permute(2, 0, 1) if name.endswith(CHANNELS_LAST) else row


def _plain(name: str) -> str:
    return name.removesuffix(CHANNELS_LAST)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:12]}...{text[-2:]}"


def check_cache(dataset: object, pipe: Any, family: Family, resolution: int | None) -> None:
    """`CachedDataset.check_teacher` for a data set that is one. InputError: it is another teacher's."""
    if isinstance(dataset, CachedDataset):
        dataset.check_teacher(pipe, family, resolution)
