"""Stored pairs of noise and the deterministic sample that a teacher draws from it, and the folder that holds them.

`pairs.json` says how the pairs were drawn, lists the conditions, and gives the size and SHA-256 of every shard; it lists no shards
until all are written. A shard `pairs-00000.safetensors` holds `noise` and `x0`, each (pairs, ...) float32. Pair i has condition
i modulo their number, so every condition appears equally often.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .errors import InputError

INDEX, TENSORS = "pairs.json", ("noise", "x0")


def shard_name(number: int) -> str:
    return f"pairs-{number:05d}.safetensors"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def read_index(folder: Path) -> dict[str, Any] | None:
    """The content of `pairs.json`, None where there is none. InputError: one that this module did not write."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if _is_index(index):
            return index
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(f"{folder / INDEX}: not the index of a set of pairs")


def _is_index(index: dict[str, Any]) -> bool:
    """Whether every entry that is read later is there; other exceptions than KeyError mean no as well."""
    settings, shards = index["settings"], index["shards"]
    numbers = [settings["num_pairs"], settings["shard_size"], *settings["sample_shape"], len(index["conditions"])]
    numbers += [value for entry in shards for value in (entry["pairs"], entry["bytes"] + 1, len(entry["sha256"]))]
    counted = sum(entry["pairs"] for entry in shards) == settings["num_pairs"] or not shards
    return counted and all(type(number) is int and number > 0 for number in numbers)


class PairDataset(Dataset[dict[str, Any]]):
    """Items {"condition", "noise", "x0"}, read one at a time; nothing but the list of conditions is held in memory.

    Shards are looked at when the set is opened (presence, size, shapes), and hashed once when the first of their pairs is read.
    InputError: a folder without pairs, an unfinished set, a shard that is missing or not as it was written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise self._error(f"there is no {INDEX}; train/make_pairs.py writes such a folder")
        if not index["shards"]:
            raise self._error("its pairs are not finished; run the command that was writing them again")
        self.settings: dict[str, Any] = index["settings"]
        self.conditions: Sequence[str | int] = index["conditions"]
        self.shards: list[dict[str, Any]] = index["shards"]
        self.shape = tuple(self.settings["sample_shape"])
        for number in range(len(self.shards)):
            self._check(number)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.settings["num_pairs"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, row = divmod(index, self.settings["shard_size"])
        if number not in self._open:
            if digest(self.folder / shard_name(number)) != self.shards[number]["sha256"]:
                raise self._error(f"{shard_name(number)} has changed since it was written (its SHA-256 is not the one in {INDEX})")
            file = safe_open(self.folder / shard_name(number), framework="pt")
            self._open[number] = {name: file.get_slice(name) for name in TENSORS}
        tensors = {name: rows[row : row + 1][0] for name, rows in self._open[number].items()}
        return {"condition": self.conditions[index % len(self.conditions)], **tensors}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # open files do not travel to worker processes

    def _check(self, number: int) -> None:
        path, entry = self.folder / shard_name(number), self.shards[number]
        if not path.is_file():
            raise self._error(f"{path.name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise self._error(f"{path.name} has {path.stat().st_size:,} bytes, {entry['bytes']:,} were written")
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {tuple(file.get_slice(name).get_shape()) for name in TENSORS}
        except SafetensorError as error:
            raise self._error(f"{path.name} is not readable ({error})") from None
        if shapes != {(entry["pairs"], *self.shape)}:
            raise self._error(f"{path.name} holds {sorted(shapes)}; {(entry['pairs'], *self.shape)} was written")

    def _error(self, what: str) -> InputError:
        return InputError(f"pairs_dir: {self.folder}: {what}")


def noise_of(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise (float32, on the CPU, whatever the device that samples) of a pair from the seed of its own stream."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
