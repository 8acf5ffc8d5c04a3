"""TCD: trajectory consistency distillation (Zheng et al., arXiv:2402.19159), and TSCD, its segments (Hyper-SD, arXiv:2404.13686)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..consistency import same_dropout
from ..denoiser import Denoiser
from ..errors import reject
from ..losses import element_distance
from ..networks import Networks
from ..sampler import FewStepSampler, check_steps
from ..schedule import NoiseSchedule, RectifiedFlow, expand_dims
from ..solver_grid import as_table, draw_interval, jump, segment_start, served_timesteps, solver_step, solver_timesteps
from .base import Batch, Loss, Method, Update, check_choices, check_numbers


@dataclass
class TCD(Method):
    """The student's jump from t to any earlier s equals its jump there from one solver step of the guided teacher earlier (eq. 14, 17).

    A jump is the DDIM (Euler) step of the student's own prediction, a first-order exponential integrator (eq. 15); the network is not
    told where it leads. With `segments` (8, 4, 2, 1) the jumps stay inside segments that grow from stage to stage (TSCD, sec. 3.1).
    """

    num_inference_steps: tuple[int, ...] = (4, 1, 2, 8)
    """Numbers of network calls that the one student serves, the default first."""
    gamma: float = 0.3
    """Share of fresh noise between two steps: 0 follows the trajectory, 1 re-noises x0. Flow matching has samplers for 0 and 1 only."""
    segments: tuple[int, ...] = (1,)
    """Segments of the trajectory that jumps cannot leave, stage by stage; (8, 4, 2, 1) is TSCD."""
    stage_steps: int = 1000
    """Steps of one stage; the last one goes on to the end."""
    solver_intervals: int = 50
    """Intervals of the DDIM (Euler) solver: each skips 1000 / K timesteps of the teacher. A divisor of 1000 for DDPM-style teachers."""
    timestep_shift: float = 1.0
    """Shift of the solver's timesteps towards noise; flow matching only."""
    guidance_scale: float = 8.0
    """Classifier-free guidance of the teacher; 1 is off. The student takes it in and is never guided."""
    target_decay: float = 0.0
    """Decay of a moving average in the target; 0 is the student itself without gradient."""
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
            at_least_one=("stage_steps",),
            below_one=("target_decay",),
        )
        self.num_inference_steps, self.segments = check_steps(self.num_inference_steps), tuple(self.segments)
        if self.solver_intervals < max(self.num_inference_steps):
            raise reject("solver_intervals", self.solver_intervals, f"at least the {max(self.num_inference_steps)} num_inference_steps")
        if not self.segments or any(not 1 <= count <= self.solver_intervals for count in self.segments):
            raise reject("segments", self.segments, f"one or more numbers from 1 to the {self.solver_intervals} solver_intervals")
        if not 0 <= self.gamma <= 1:
            raise reject("gamma", self.gamma, "a share from 0 to 1")

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def followers(self) -> dict[str, float]:
        return {"target": self.target_decay} if self.target_decay else {}

    def timesteps(self, schedule: NoiseSchedule) -> tuple[float, ...]:
        return solver_timesteps(schedule, self.solver_intervals, self.timestep_shift)

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return self.samplers(schedule)[0]

    def samplers(self, schedule: NoiseSchedule) -> tuple[FewStepSampler, ...]:
        """Strategic stochastic sampling (algorithm 4); for flow matching its two ends, which are Euler and multistep consistency."""
        grids = [served_timesteps(self.timesteps(schedule), steps) for steps in self.num_inference_steps]
        if not isinstance(schedule, RectifiedFlow):
            return tuple(FewStepSampler(grid, "tcd", gamma=self.gamma) for grid in grids)
        if self.gamma not in (0, 1):
            raise reject("gamma", self.gamma, "0 or 1 for a flow-matching teacher: diffusers has no scheduler for what is between")
        return tuple(FewStepSampler(grid, "sde" if self.gamma else "ode") for grid in grids)

    def updates(self, step: int) -> Iterator[Update]:
        stage = min(step // self.stage_steps, len(self.segments) - 1)
        yield ("student",), partial(self.consistency_loss, segments=self.segments[stage])

    def consistency_loss(self, nets: Networks, batch: Batch, segments: int) -> Loss:
        assert batch.x0 is not None
        student: Denoiser = nets.student
        schedule, table = student.schedule, as_table(self.timesteps(student.schedule), batch.x0.device)
        interval = draw_interval(batch.random.uniform(), self.solver_intervals)
        t, s, end = table[interval + 1], table[interval], table[self.draw_end(interval, batch.random.uniform(), segments)]
        x_t = schedule.add_noise(batch.x0, batch.random.normal_like(batch.x0), t)
        x_s = solver_step(nets.teacher, x_t, t, s, batch.cond, batch.uncond, self.guidance_scale)
        with torch.no_grad(), same_dropout(x_t):
            jumped = jump(schedule, (nets.target if self.target_decay else student)(x_s, s, batch.cond), end)
        target = torch.where(expand_dims(s == end, x_t) > 0, x_s, jumped)
        return element_distance(jump(schedule, student(x_t, t, batch.cond), end), target, self.loss, self.huber_c), {}

    def draw_end(self, interval: Tensor, uniform: Tensor, segments: int) -> Tensor:
        """Index (B,) of the timestep where the jump ends: uniform from the clean end of the segment to the solver's own timestep."""
        first = segment_start(interval, self.solver_intervals, segments)
        return first + (uniform.double() * (interval - first + 1)).long()
