"""Stored pairs of noise and the deterministic sample that a teacher draws from it, and the folder that holds them.

`pairs.json` says how the pairs were drawn, lists the conditions, and gives the size and SHA-256 of every shard (shards.py). A shard
`pairs-00000.safetensors` holds `noise` and `x0`, each (pairs, ...) float32. Pair i has condition i modulo their number, so every
condition appears equally often.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .shards import Kind, Shards, counts_fit, finished_index

PAIRS = Kind("pairs", "pairs.json", "pairs_dir", "train/make_pairs.py")
TENSORS = ("noise", "x0")


def is_index(index: dict[str, Any]) -> bool:
    """Whether every entry that is read later is there; other exceptions than KeyError mean no as well."""
    settings = index["settings"]
    numbers = [settings["num_pairs"], settings["shard_size"], *settings["sample_shape"], len(index["conditions"])]
    return counts_fit(PAIRS, index, settings["num_pairs"]) and all(type(number) is int and number > 0 for number in numbers)


class PairDataset(Dataset[dict[str, Any]]):
    """Items {"condition", "noise", "x0"}, read one at a time; nothing but the list of conditions is held in memory.

    InputError: a folder without pairs, an unfinished set, a shard that is missing or not as it was written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = finished_index(PAIRS, self.folder, is_index)
        self.settings: dict[str, Any] = index["settings"]
        self.conditions: Sequence[str | int] = index["conditions"]
        shapes = dict.fromkeys(TENSORS, self.settings["sample_shape"])
        self._shards = Shards(PAIRS, self.folder, index, self.settings["shard_size"], shapes)
        self.shards = self._shards.entries

    def __len__(self) -> int:
        return int(self.settings["num_pairs"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"condition": self.conditions[index % len(self.conditions)], **self._shards.row(index, TENSORS)}


def noise_of(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise (float32, on the CPU, whatever the device that samples) of a pair from the seed of its own stream."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
