"""Drawing a teacher's pairs: resumable, in shards, over any number of processes."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from .build import teacher_denoiser
from .config import difference
from .denoiser import Denoiser, guided
from .errors import InputError, reject
from .families import Cond
from .pairs import INDEX, digest, noise_of, read_index, shard_name
from .parallel import check_started
from .prediction import Prediction
from .provenance import provenance
from .random import derive_seed
from .sampler import FewStepSampler, ode_sample, uniform_timesteps

WRITING = ".writing-"


@dataclass
class PairConfig:
    """How the pairs are drawn."""

    output_dir: str = "outputs/pairs"
    """Folder of the pairs. What an interrupted command left there is continued."""
    num_pairs: int = 1000
    """How many pairs; the conditions take turns."""
    num_inference_steps: int = 50
    """Network calls of the teacher's deterministic sampler (DDIM or Euler), evenly spaced from the noisiest timestep."""
    timestep_shift: float = 1.0
    """Shift of the timesteps towards noise, as the teacher is meant to be sampled (3 for Stable Diffusion 3); flow matching only."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the teacher; 1 is off."""
    batch_size: int = 16
    """Pairs that a process draws at a time."""
    shard_size: int = 1000
    """Pairs in a file, which is what an interruption loses at most in each process."""
    seed: int = 0
    """The noise of pair i is drawn from (seed, i) alone."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs the teacher under autocast."""

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_inference_steps", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise reject(name, getattr(self, name), "at least 1")
        if not 0 <= self.guidance_scale < math.inf:
            raise reject("guidance_scale", self.guidance_scale, "0 or more")
        if not 0 < self.timestep_shift < math.inf:
            raise reject("timestep_shift", self.timestep_shift, "a number above 0")
        if self.mixed_precision not in ("no", "bf16"):
            raise reject("mixed_precision", self.mixed_precision, "accepted: 'no', 'bf16'")


def write_pairs(
    pipe: Any, conditions: Sequence[str | int], config: PairConfig, *, teacher: str | None = None, resolution: int | None = None
) -> Path:
    """Draw `config.num_pairs` pairs from the pipeline `pipe` into `config.output_dir`, and return that folder.

    Any pipeline will do, a student's too (its own deterministic trajectories, for another round of reflow). Of repeated
    conditions one is kept. Every process takes its share of the shards that are not there yet; a shard is written under a
    hidden name, forced to disk and renamed, so a visible one is complete.

    Args:
        teacher: what `pairs.json` calls the teacher.
        resolution: pixels of the samples. None: the pipeline's own.

    Raises:
        InputError: for a wrong setting, or a folder that holds pairs of other settings or of another teacher.
    """
    state, folder, distinct = _processes(), Path(config.output_dir), list(dict.fromkeys(conditions))
    pipe.to(state.device)
    source = _Teacher(pipe, config, resolution)
    made_with = {"teacher": teacher, "batch_size": config.batch_size, **provenance()}
    with state.main_process_first():
        _claim(folder, source.settings(distinct), distinct, made_with, first=state.is_main_process)
    shards = math.ceil(config.num_pairs / config.shard_size)
    missing = [number for number in range(shards) if not (folder / shard_name(number)).exists()]
    state.wait_for_everyone()  # all have looked before the first one writes
    mine = missing[state.process_index :: state.num_processes]
    for number in tqdm(mine, desc="pairs", unit="shard", disable=not state.is_local_main_process):
        indices = range(number * config.shard_size, min((number + 1) * config.shard_size, config.num_pairs))
        _write_durably(folder / shard_name(number), save(source.draw(indices, distinct)))
    state.wait_for_everyone()
    if state.is_main_process and (missing or not _index(folder)["shards"]):
        _finish(folder, shards, config)
    state.wait_for_everyone()
    return folder


def _processes() -> PartialState:
    """The processes that `accelerate launch` or `torchrun` started."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_started(state.num_processes)
    return state


class _Teacher:
    """The frozen network of a pipeline with the sampler that draws its pairs."""

    def __init__(self, pipe: Any, config: PairConfig, resolution: int | None):
        self.pipe, self.config, self.resolution = pipe, config, resolution
        self.denoiser = teacher_denoiser(pipe)
        self.denoiser.autocast_dtype = torch.bfloat16 if config.mixed_precision == "bf16" else None
        self.family, schedule = self.denoiser.family, self.denoiser.schedule
        self.shape = self.family.sample_shape(pipe, resolution)
        self.timesteps = uniform_timesteps(schedule, config.num_inference_steps, config.timestep_shift)
        FewStepSampler(self.timesteps, "ode").validate(schedule, self.denoiser.prediction_type)

    def settings(self, conditions: Sequence[str | int]) -> dict[str, Any]:
        """Everything that the pairs depend on, as JSON."""
        scheduler = self.pipe.scheduler
        options = {name: value for name, value in sorted(scheduler.config.items()) if not name.startswith("_")}
        own = ("num_pairs", "shard_size", "seed", "guidance_scale", "mixed_precision")
        return {name: getattr(self.config, name) for name in own} | {
            "sampler": "ode",
            "timesteps": list(self.timesteps),
            "resolution": self.resolution,
            "sample_shape": list(self.shape),
            "process": type(self.denoiser.schedule).__name__,
            "prediction_type": self.denoiser.prediction_type,
            "scheduler": type(scheduler).__name__,
            "scheduler_config": json.loads(json.dumps(options, default=str)),
            "teacher_sha256": _fingerprint(self.denoiser.model.state_dict()),
            "conditions_sha256": hashlib.sha256(json.dumps(list(conditions)).encode()).hexdigest(),
        }

    def draw(self, indices: Sequence[int], conditions: Sequence[str | int]) -> dict[str, Tensor]:
        """`noise` and `x0` of these pairs."""
        noise = torch.stack([noise_of(derive_seed(self.config.seed, i), self.shape) for i in indices])
        labels, size = [conditions[i % len(conditions)] for i in indices], self.config.batch_size
        parts = [self._sample(noise[i : i + size], labels[i : i + size]) for i in range(0, len(noise), size)]
        return {"noise": noise, "x0": torch.cat(parts)}

    @torch.no_grad()
    def _sample(self, noise: Tensor, conditions: Sequence[str | int]) -> Tensor:
        cond = self.family.encode_conditions(self.pipe, conditions, self.resolution)
        uncond: Cond = {}
        if self.config.guidance_scale != 1:
            uncond = self.family.unconditional(self.pipe, len(conditions), self.resolution)
        walker = cast(Denoiser, _Guided(self.denoiser, uncond, self.config.guidance_scale))
        return ode_sample(walker, noise.to(self.pipe.device), cond, self.timesteps).float().cpu()


@dataclass
class _Guided:
    """`guided` with the signature of a denoiser."""

    denoiser: Denoiser
    uncond: Cond
    scale: float

    @property
    def schedule(self) -> Any:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return guided(self.denoiser, x_t, t, cond, self.uncond, self.scale)


def _claim(folder: Path, settings: dict[str, Any], conditions: Sequence[str | int], made_with: dict[str, Any], first: bool) -> None:
    """Refuse a folder of other pairs; the `first` process prepares a new one."""
    index = read_index(folder)
    if index is not None:
        if changed := difference(index["settings"], settings):
            raise InputError(f"output_dir: {folder} holds pairs of other settings ({'; '.join(changed)}); choose another folder")
    elif folder.exists() and any(folder.glob(shard_name(0).replace("00000", "*"))):
        raise InputError(f"output_dir: {folder} holds shards of pairs without {INDEX}; choose another folder")
    if not first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(WRITING + "*"):
        path.unlink()
    if index is None:
        _write_index(folder, {"settings": settings, "made_with": made_with, "shards": [], "conditions": list(conditions)})


def _index(folder: Path) -> dict[str, Any]:
    index = read_index(folder)
    assert index is not None
    return index


def _finish(folder: Path, shards: int, config: PairConfig) -> None:
    """List the shards; one that an earlier list knows must be as it was."""
    index, found = _index(folder), []
    for number in range(shards):
        path, pairs = folder / shard_name(number), min(config.shard_size, config.num_pairs - number * config.shard_size)
        entry = {"file": path.name, "pairs": pairs, "bytes": path.stat().st_size, "sha256": digest(path)}
        if index["shards"] and entry != index["shards"][number]:
            raise InputError(f"output_dir: {path} is not as it was written; delete it and run the command again")
        found.append(entry)
    _write_index(folder, index | {"shards": found})


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    _write_durably(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


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


def _fingerprint(weights: dict[str, Tensor]) -> str:
    """SHA-256 of a network's weights: a folder may have been trained anew under its old name."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
