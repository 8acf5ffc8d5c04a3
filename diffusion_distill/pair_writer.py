"""Drawing a teacher's pairs: resumable, in shards, over any number of processes."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .build import teacher_denoiser
from .denoiser import Denoiser, guided
from .errors import reject
from .families import Cond
from .pairs import PAIRS, is_index, noise_of
from .prediction import Prediction
from .provenance import provenance
from .random import derive_seed
from .sampler import FewStepSampler, ode_sample, uniform_timesteps
from .shard_writer import ShardWriter, processes
from .shards import weights_digest


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
    state, distinct = processes(), list(dict.fromkeys(conditions))
    pipe.to(state.device)
    source = _Teacher(pipe, config, resolution)
    index = {"settings": source.settings(distinct), "made_with": {"teacher": teacher, "batch_size": config.batch_size, **provenance()}}
    writer = ShardWriter(PAIRS, Path(config.output_dir), config.num_pairs, config.shard_size, is_index)
    return writer.write(state, index | {"conditions": distinct}, lambda indices: source.draw(indices, distinct))


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
            "teacher_sha256": weights_digest(self.denoiser.model.state_dict()),
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
