"""LCM: latent consistency models (Luo et al., arXiv:2310.04378), and LCM-LoRA (arXiv:2311.05556) where the trainer's `lora_rank` is set."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..consistency import same_dropout
from ..denoiser import Denoiser
from ..errors import reject
from ..families import Cond
from ..families.guidance import with_guidance_input
from ..losses import element_distance
from ..networks import Networks
from ..sampler import FewStepSampler, check_steps
from ..schedule import NoiseSchedule, expand_dims
from ..solver_grid import as_table, draw_interval, served_timesteps, solver_step, solver_timesteps
from .base import Batch, Loss, Method, Update, check_choices, check_numbers


@dataclass
class LCM(Method):
    """The student's x0 equals its follower's x0 one solver step of the guided teacher earlier (eq. 16, 17).

    The student's x0 itself is the consistency function: the paper's c_skip is below 1e-5 from the first solver timestep on, so what
    remains of eq. 8 is that the target of the last interval is the solver's own result. Guidance is the scale s = 1 + w of
    uncond + s (cond - uncond), which is the pipelines' `guidance_scale`.
    """

    num_inference_steps: tuple[int, ...] = (4, 1, 2, 8)
    """Numbers of network calls that the one student serves, the default first."""
    solver_intervals: int = 50
    """Intervals of the DDIM (Euler) solver, K: each skips 1000 / K timesteps of the teacher. A divisor of 1000 for DDPM-style teachers."""
    stages: int = 1
    """Stages of a curriculum in which the intervals double, `solver_intervals` in the last one (after iCT, arXiv:2310.14189, sec. 3.4); 1:
    the same intervals all along (the paper)."""
    stage_steps: int = 1000
    """Steps of one stage; the last one goes on to the end."""
    timestep_shift: float = 1.0
    """Shift of the solver's timesteps towards noise; flow matching only."""
    guidance: Literal["embedded", "fixed"] = "embedded"
    """Whether the student sees the guidance scale (networks with `timestep_cond`, full training), or learns one scale for good."""
    guidance_scale: float = 8.0
    """The teacher's scale where it is fixed, and the scale at which an embedding student is sampled; 1 is off."""
    min_guidance_scale: float = 3.0
    """Smallest scale that an embedding student learns (the paper's w is 2)."""
    max_guidance_scale: float = 15.0
    """Largest scale that an embedding student learns (the paper's w is 14)."""
    target_decay: float = 0.95
    """Decay of the moving average in the target; 0 is the student itself without gradient, as for LoRA."""
    loss: Literal["pseudo_huber", "l2"] = "pseudo_huber"
    """Distance of the two images, elementwise: sqrt(d^2 + c^2) - c, or d^2."""
    huber_c: float = 1e-3
    """c of the pseudo-Huber distance."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            zero_or_more=("guidance_scale",),
            above_zero=("timestep_shift", "huber_c"),
            at_least_one=("stages", "stage_steps"),
            below_one=("target_decay",),
        )
        self.num_inference_steps = check_steps(self.num_inference_steps)
        if self.solver_intervals < max(self.num_inference_steps):
            raise reject("solver_intervals", self.solver_intervals, f"at least the {max(self.num_inference_steps)} num_inference_steps")
        if self.solver_intervals % 2 ** (self.stages - 1):
            raise reject(
                "solver_intervals", self.solver_intervals, f"a multiple of {2 ** (self.stages - 1)}: halved {self.stages - 1} times"
            )
        low, high = self.min_guidance_scale, self.max_guidance_scale
        if self.guidance == "embedded" and not 0 <= low <= self.guidance_scale <= high < math.inf:
            values = (low, self.guidance_scale, high)
            raise reject("min_guidance_scale, guidance_scale, max_guidance_scale", values, "ascending, 0 or more and finite")

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def followers(self) -> dict[str, float]:
        return {"target": self.target_decay} if self.target_decay else {}

    def student_model(self, model: nn.Module) -> nn.Module:
        return with_guidance_input(model) if self.guidance == "embedded" else model

    def timesteps(self, schedule: NoiseSchedule) -> tuple[float, ...]:
        return solver_timesteps(schedule, self.solver_intervals, self.timestep_shift)

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return self.samplers(schedule)[0]

    def samplers(self, schedule: NoiseSchedule) -> tuple[FewStepSampler, ...]:
        """Multistep latent consistency sampling (algorithm 3): predict x0, diffuse it to the next timestep."""
        grid, scale = self.timesteps(schedule), self.guidance_scale if self.guidance == "embedded" else None
        return tuple(FewStepSampler(served_timesteps(grid, n), guidance_embedding=scale) for n in self.num_inference_steps)

    def updates(self, step: int) -> Iterator[Update]:
        stage = min(step // self.stage_steps, self.stages - 1)
        yield ("student",), partial(self.consistency_loss, intervals=self.solver_intervals // 2 ** (self.stages - 1 - stage))

    def consistency_loss(self, nets: Networks, batch: Batch, intervals: int) -> Loss:
        assert batch.x0 is not None
        student: Denoiser = nets.student
        schedule = student.schedule
        table = as_table(solver_timesteps(schedule, intervals, self.timestep_shift), batch.x0.device)
        interval = draw_interval(batch.random.uniform(), intervals)
        t, s = table[interval + 1], table[interval]
        x_t = schedule.add_noise(batch.x0, batch.random.normal_like(batch.x0), t)
        scale, cond = self.draw_guidance(nets, batch)
        x_s = solver_step(nets.teacher, x_t, t, s, batch.cond, batch.uncond, scale)
        with torch.no_grad(), same_dropout(x_t):
            earlier = (nets.target if self.target_decay else student)(x_s, s, cond).x0
        target = torch.where(expand_dims(interval, x_t) == 0, x_s, earlier)
        return element_distance(student(x_t, t, cond).x0, target, self.loss, self.huber_c), {}

    def draw_guidance(self, nets: Networks, batch: Batch) -> tuple[float | Tensor, Cond]:
        """The teacher's scale, one for each sample (B,) where the student sees it, and the student's conditions."""
        if self.guidance == "fixed":
            return self.guidance_scale, batch.cond
        if not any("cond_proj" in name for name in nets.parameters("student")):
            raise reject("guidance", self.guidance, "'fixed', where a LoRA adapter trains: the input for the scale would never learn")
        scale = self.min_guidance_scale + (self.max_guidance_scale - self.min_guidance_scale) * batch.random.uniform()
        return scale, nets.student.family.with_guidance(nets.student.model, batch.cond, scale)
