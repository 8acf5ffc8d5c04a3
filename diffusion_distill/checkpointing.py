"""The checkpoints of a training run: when they are written, and which of them continues which run."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import parallel
from .background import BackgroundWriter
from .checkpoint import TensorGroups, checkpoints_in, load_checkpoint, resolve_checkpoint, save_checkpoint
from .config import difference
from .errors import CheckpointError, InputError, NonFiniteError
from .run_state import RunState, check_finite
from .sharding import is_spread, whole_on_rank_0
from .train_config import TrainConfig

MAY_CHANGE_ON_RESUME = {
    "output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "validation_steps",
    "num_validation_images",
    "validation_prompts",
    "report_to",
    "tracker_project_name",
    "push_to_hub",
    "hub_model_id",
    "dataloader_num_workers",
    "rank_timeout",
    "offload_encoders",
    "offload_idle_roles",
    "allow_bin_weights",
}


class RunCheckpoints:
    """Rank 0 writes, in a thread beside the steps; all ranks read.

    Args:
        folder: of the run.
        state: what the checkpoints hold.
        identity: what else decides the result: settings, method, world_size, dataset (its fingerprint), teacher (its digest). A run that
            differs in one of them does not continue.
        config: how many to keep, how long to wait for other ranks.
        device: of the tensors by which ranks agree.
    """

    def __init__(self, folder: Path, state: RunState, identity: Mapping[str, Any], config: TrainConfig, device: torch.device):
        self.folder, self.state, self.identity, self.config, self.device = folder, state, identity, config, device
        self._writer = BackgroundWriter()

    @property
    def failed(self) -> bool:
        """Whether the last write has failed; `save` raises why."""
        return self._writer.failed

    def start_save(self, step: int) -> None:
        """Begin to write the checkpoint of `step`; the state may change meanwhile. Raises what `save` raises, for the write before.

        What is spread over ranks is gathered on rank 0, so every rank calls it.
        """
        parts, state = self.state.collect()
        tensors: TensorGroups = parts
        if is_spread(parts):
            self._together(self._writer.wait, step)  # before tensors are gathered: a rank that raises alone would leave the others waiting
            tensors = whole_on_rank_0(parts)
        if parallel.rank() == 0:
            self._writer.start(tensors, partial(self._write, step, {"step": step} | state | dict(self.identity)))

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`; every rank returns when it is on disk.

        Raises:
            CheckpointError: on every rank, when this or the write before failed. NonFiniteError: for weights that are no numbers.
        """

        def write() -> None:
            self.start_save(step)
            self._writer.wait()

        self._together(write, step)

    def _together(self, act: Callable[[], None], step: int) -> None:
        """Every rank acts; where one of them fails, all raise."""
        error: Exception | None = None
        try:
            act()
        except (CheckpointError, NonFiniteError) as caught:
            error = caught
        parallel.meet(self.config.rank_timeout)
        (failed,) = parallel.maximum((int(error is not None),), self.device)
        if failed:
            raise error or CheckpointError(f"step {step}: rank 0 could not write the checkpoint; its message says why")

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Outside the block nothing is being written, whatever ended it."""
        try:
            yield
        finally:
            self._writer.finish()

    def to_continue(self, begun: bool) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` names; None for a new run, and for one that ended before its first checkpoint.

        `begun` says whether a run has left its record in the folder.

        Raises:
            InputError: when there is no such checkpoint.
        """
        value = self.config.resume_from_checkpoint
        if value == "latest" and begun and not checkpoints_in(self.folder):
            if parallel.rank() == 0:
                print(f"{self.folder}: the run ended before its first checkpoint; it starts again at step 0", file=sys.stderr)
            return None
        return resolve_checkpoint(self.folder, value) if value else None

    def load(self, path: Path) -> int:
        """Take the state from the checkpoint at `path`; its step.

        Raises:
            InputError: for a damaged checkpoint, or one of a run that differs, naming each difference.
        """
        sharded = self.config.parallelism == "shard"  # then no device has room for the whole
        tensors, state = load_checkpoint(path, "cpu" if sharded else self.device)
        if missing := sorted({"step", "optimizers", "ema_updates", "settings", "method", "world_size", "teacher"} - state.keys()):
            raise InputError(f"resume_from_checkpoint: {path} is no checkpoint of a training run: {', '.join(missing)} not in state.json")
        may_change = MAY_CHANGE_ON_RESUME | ({"max_train_steps"} if self.config.lr_scheduler.startswith("constant") else set())
        lines = difference(_flat(state), _flat(self.identity))
        if changed := [line for line in lines if line.split(":")[0] not in may_change]:
            raise InputError(f"resume_from_checkpoint: {path} belongs to a run with other settings ({'; '.join(changed)})")
        self.state.restore(tensors, state)
        return int(state["step"])

    def _write(self, step: int, state: dict[str, Any], tensors: TensorGroups) -> None:
        check_finite(tensors, step)
        try:
            save_checkpoint(self.folder, step, tensors, state, keep=self.config.checkpoints_total_limit)
        except (OSError, InputError) as error:
            raise CheckpointError(f"step {step}: {error}; the checkpoint before is as it was") from error


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping in the words of an error line."""
    data = {f"{name} of the data set": value for name, value in identity.get("dataset", {}).items()}
    own = {"method": identity["method"], "number of processes": identity["world_size"]}
    return identity["settings"] | own | {"SHA-256 of the teacher's weights": identity["teacher"]} | data
