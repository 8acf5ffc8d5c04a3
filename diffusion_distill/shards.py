"""Folders of tensors in shards: an index in JSON with the size and SHA-256 of every shard, and safetensors files of so many rows each.

The index lists no shards until all are written. `shard_writer.py` writes such folders.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class Kind:
    """A sort of folder, in the words of its files and messages."""

    rows: str  # what a row is, in the plural: the beginning of the files' names, and the key of their number
    index: str  # name of the index file
    field: str  # by which a user names the folder
    writer: str  # the command that writes it

    def shard_name(self, number: int) -> str:
        return f"{self.rows}-{number:05d}.safetensors"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a network's weights: a folder may have been trained anew under its old name."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_index(kind: Kind, folder: Path, is_index: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The content of the index, None where there is none. InputError: one for which `is_index` is false or raises KeyError or the like."""
    try:
        index: dict[str, Any] = json.loads((folder / kind.index).read_text(encoding="utf-8"))
        if is_index(index):
            return index
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(f"{folder / kind.index}: not the index of a set of {kind.rows}")


def finished_index(kind: Kind, folder: Path, is_index: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The index of a set whose shards are all written. InputError: there is none, or they are not."""
    index = read_index(kind, folder, is_index)
    if index is None:
        raise InputError(f"{kind.field}: {folder}: there is no {kind.index}; {kind.writer} writes such a folder")
    if not index["shards"]:
        raise InputError(f"{kind.field}: {folder}: its {kind.rows} are not finished; run the command that was writing them again")
    return index


def counts_fit(kind: Kind, index: Mapping[str, Any], total: int) -> bool:
    """Whether every shard's entry is there, and they hold `total` rows together, or none is listed yet."""
    shards = index["shards"]
    numbers = [value for entry in shards for value in (entry[kind.rows], entry["bytes"] + 1, len(entry["sha256"]))]
    counted = sum(entry[kind.rows] for entry in shards) == total or not shards
    return counted and all(type(number) is int and number > 0 for number in numbers)


class Shards:
    """The rows of a set, read one at a time.

    Shards are looked at when the set is opened (presence, size, shapes), and hashed once when the first of their rows is read.
    InputError: a shard that is missing or not as it was written.
    """

    def __init__(self, kind: Kind, folder: Path, index: Mapping[str, Any], size: int, shapes: Mapping[str, Sequence[int]] | None = None):
        """`index` is a finished one, `size` the rows of a shard, `shapes` those of one row by tensor (None: as in the first shard)."""
        self.kind, self.folder, self.size = kind, folder, size
        self.entries: list[dict[str, Any]] = index["shards"]
        first = self._shapes(0)
        self.shapes = {name: tuple(shape) for name, shape in (shapes or {name: shape[1:] for name, shape in first.items()}).items()}
        for number in range(len(self.entries)):
            self._check(number, self._shapes(number) if number else first)
        self._open: dict[int, Any] = {}

    def row(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of row `index` by name, each without a batch dimension."""
        number, row = divmod(index, self.size)
        if number not in self._open:
            if digest(self._path(number)) != self.entries[number]["sha256"]:
                name = self.kind.shard_name(number)
                raise self.error(f"{name} has changed since it was written (its SHA-256 is not the one in {self.kind.index})")
            file = safe_open(self._path(number), framework="pt")
            self._open[number] = {name: file.get_slice(name) for name in self.shapes}
        return {name: self._open[number][name][row : row + 1][0] for name in names}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # open files do not travel to worker processes

    def error(self, what: str) -> InputError:
        return InputError(f"{self.kind.field}: {self.folder}: {what}")

    def _path(self, number: int) -> Path:
        return self.folder / self.kind.shard_name(number)

    def _shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        path, entry = self._path(number), self.entries[number]
        if not path.is_file():
            raise self.error(f"{path.name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise self.error(f"{path.name} has {path.stat().st_size:,} bytes, {entry['bytes']:,} were written")
        try:
            with safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise self.error(f"{path.name} is not readable ({error})") from None

    def _check(self, number: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        written = {name: (self.entries[number][self.kind.rows], *shape) for name, shape in self.shapes.items()}
        if shapes != written:
            found, expected = (sorted(set(s.values())) for s in (shapes, written))
            raise self.error(f"{self.kind.shard_name(number)} holds {found}; {expected[0] if len(expected) == 1 else expected} was written")
