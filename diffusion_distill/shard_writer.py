"""Writing a folder of shards: resumable, and shared by any number of processes.

A shard is written under a hidden name, forced to disk and renamed, so a visible one is complete.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from .config import difference
from .errors import InputError
from .parallel import check_started
from .shards import Kind, digest, read_index

WRITING = ".writing-"


def processes() -> PartialState:
    """The processes that `accelerate launch` or `torchrun` started."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_started(state.num_processes)
    return state


@dataclass(frozen=True)
class ShardWriter:
    """Writes `total` rows in shards of `size` to `folder`; `is_index` knows an index of this kind."""

    kind: Kind
    folder: Path
    total: int
    size: int
    is_index: Callable[[dict[str, Any]], bool]

    def write(self, state: PartialState, index: Mapping[str, Any], draw: Callable[[range], dict[str, Tensor]]) -> Path:
        """Write the shards that are not there yet, each process its share, and return the folder.

        Args:
            index: what the index says; its "settings" are everything that the rows depend on.
            draw: the tensors (n, ...) of the n rows of these numbers, by name.

        Raises:
            InputError: for a folder that holds rows of other settings, and for shards that changed since they were listed.
        """
        with state.main_process_first():
            self._claim(index, first=state.is_main_process)
        shards = math.ceil(self.total / self.size)
        missing = [number for number in range(shards) if not self._path(number).exists()]
        state.wait_for_everyone()  # all have looked before the first one writes
        mine = missing[state.process_index :: state.num_processes]
        for number in tqdm(mine, desc=self.kind.rows, unit="shard", disable=not state.is_local_main_process):
            rows = draw(range(number * self.size, min((number + 1) * self.size, self.total)))
            _write_durably(self._path(number), save(rows))
        state.wait_for_everyone()
        if state.is_main_process and (missing or not self._read()["shards"]):
            self._finish(shards)
        state.wait_for_everyone()
        return self.folder

    def _claim(self, wanted: Mapping[str, Any], first: bool) -> None:
        """Refuse a folder of other rows; the `first` process prepares a new one."""
        index, rows = read_index(self.kind, self.folder, self.is_index), self.kind.rows
        if index is not None:
            if changed := difference(index["settings"], wanted["settings"]):
                raise InputError(f"output_dir: {self.folder} holds {rows} of other settings ({'; '.join(changed)}); choose another folder")
        elif self.folder.exists() and any(self.folder.glob(self.kind.shard_name(0).replace("00000", "*"))):
            raise InputError(f"output_dir: {self.folder} holds shards of {rows} without {self.kind.index}; choose another folder")
        if not first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(WRITING + "*"):
            path.unlink()
        if index is None:
            self._write_index({**wanted, "shards": []})

    def _read(self) -> dict[str, Any]:
        index = read_index(self.kind, self.folder, self.is_index)
        assert index is not None
        return index

    def _finish(self, shards: int) -> None:
        """List the shards; one that an earlier list knows must be as it was."""
        index, found = self._read(), []
        for number in range(shards):
            path, rows = self._path(number), min(self.size, self.total - number * self.size)
            entry = {"file": path.name, self.kind.rows: rows, "bytes": path.stat().st_size, "sha256": digest(path)}
            if index["shards"] and entry != index["shards"][number]:
                raise InputError(f"output_dir: {path} is not as it was written; delete it and run the command again")
            found.append(entry)
        self._write_index(index | {"shards": found})

    def _path(self, number: int) -> Path:
        return self.folder / self.kind.shard_name(number)

    def _write_index(self, index: Mapping[str, Any]) -> None:
        _write_durably(self.folder / self.kind.index, (json.dumps(index, indent=1) + "\n").encode())


def _write_durably(path: Path, content: bytes) -> None:
    """Give `content` its name only when all of it is on disk."""
    hidden = path.with_name(f"{WRITING}{os.getpid()}-{path.name}")
    with hidden.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
