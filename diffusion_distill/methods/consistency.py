"""Consistency distillation and training (Song et al., arXiv:2303.01469; iCT, 2310.14189; ECT, 2406.14548) of any teacher.

The papers' sigma is the noise-to-signal ratio s = sigma(t) / alpha(t) here, so that an EDM, flow-matching or DDPM-style teacher makes no
difference: f(z, s) is the network's x0 at alpha(t) z. The papers' constants are for data of standard deviation 0.5: for standard
deviation d, multiply `sigma_min`, `sigma_max`, `midpoint`, `huber_scale` and `sigma_data` by 2d, divide `gap_b` by 2d, and add ln 2d
to `p_mean`.

    ECT  the defaults
    iCT  discretization grid
    CD   neighbour distillation, target follower, discretization grid, level_law uniform, initial_intervals 39, stages 1, loss l2,
         weighting uniform
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..consistency import (
    draw_grid_levels,
    karras_levels,
    level_weight,
    ratio_range,
    same_dropout,
    shrinking_neighbour,
    teacher_step,
)
from ..denoiser import guided
from ..errors import reject
from ..losses import sample_distance
from ..networks import Networks
from ..prediction import Prediction
from ..sampler import FewStepSampler, check_steps, timesteps_at_ratios, uniform_timesteps
from ..schedule import NoiseSchedule, expand_dims
from .base import Batch, Loss, Method, Update, check_choices, check_numbers


@dataclass
class Consistency(Method):
    """The student's x0 at level s equals its x0 at the neighbour level r < s of the same trajectory, and x0 itself at the cleanest.

    The defaults are ECT's CIFAR-10 run; the settings of iCT and CD stand at the head of this file. x0 = (x_t - sigma eps) / alpha, or
    the same from v or flow, is the identity at sigma = 0 whatever the network says: c_skip and c_out (eq. 5 of 2303.01469) are built in.
    """

    num_inference_steps: tuple[int, ...] = (1, 2)
    """Numbers of network calls that the one student serves, the default first."""
    midpoint: float = 0.821
    """Noise-to-signal ratio of the second of two steps. Other numbers of steps visit evenly spaced timesteps."""
    neighbour: Literal["distillation", "training"] = "training"
    """Where the neighbour comes from: one step of the teacher (CD), or the same image and noise (CT)."""
    solver: Literal["euler", "heun"] = "heun"
    """The teacher's step, one call (DDIM) or two; distillation only."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the teacher; 1 is off. Distillation only: training learns the conditional data as it is."""
    target: Literal["student", "follower"] = "student"
    """Who answers at the neighbour: the student without gradient (iCT, ECT), or its moving average (CD)."""
    target_decay: float = 0.95
    """Decay of the moving average in the target."""
    discretization: Literal["continuous", "grid"] = "continuous"
    """Neighbours: r(s) of ECT around any s, or the next of N + 1 levels in Karras spacing."""
    level_law: Literal["lognormal", "uniform"] = "lognormal"
    """Law of s (on a grid, of its interval): log-normal, or uniform along the Karras spacing."""
    p_mean: float = -1.1
    """Mean of ln s in the log-normal law."""
    p_std: float = 2.0
    """Standard deviation of ln s in the log-normal law."""
    sigma_min: float = 0.002
    """Cleanest level, where the map is the identity; not below the teacher's own."""
    sigma_max: float = 80.0
    """Noisiest level, where sampling starts; not above the teacher's own."""
    stages: int = 8
    """Stages of the curriculum; neighbours come closer from each to the next."""
    stage_steps: int = 50_000
    """Steps of one stage; the last one goes on to the end."""
    initial_intervals: int = 10
    """Intervals of the grid in the first stage; they double with each stage (iCT, sec. 3.4)."""
    gap_q: float = 2.0
    """ECT's q: in each stage the relative gap 1 - r/s is 1/q of the one before."""
    gap_k: float = 8.0
    """ECT's k: how much wider the relative gap is at low noise."""
    gap_b: float = 1.0
    """ECT's b: how fast that fades with s."""
    loss: Literal["pseudo_huber", "l2"] = "pseudo_huber"
    """Distance of the two images: sqrt(|d|^2 + c^2) - c over the whole image, or the mean of d^2."""
    huber_scale: float = 0.00054
    """c of the pseudo-Huber distance is this times the square root of the number of dimensions (iCT, sec. 3.3)."""
    weighting: Literal["inverse_gap", "edm", "uniform"] = "inverse_gap"
    """Weight of a sample: 1 / (s - r); EDM's 1 / s^2 + 1 / sigma_data^2, as in ECT's code for ImageNet; or 1."""
    sigma_data: float = 0.5
    """Standard deviation of the data in the weighting edm."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            zero_or_more=("guidance_scale", "gap_k", "gap_b"),
            above_zero=("p_std", "huber_scale", "sigma_data"),
            at_least_one=("stages", "stage_steps", "initial_intervals"),
            below_one=("target_decay",),
        )
        self.num_inference_steps = check_steps(self.num_inference_steps)
        if not 0 < self.sigma_min < self.midpoint < self.sigma_max < math.inf:
            values = (self.sigma_min, self.midpoint, self.sigma_max)
            raise reject("sigma_min, midpoint, sigma_max", values, "ascending, above 0 and finite")
        if not 1 < self.gap_q < math.inf:
            raise reject("gap_q", self.gap_q, "a number above 1")
        if self.neighbour == "training" and self.guidance_scale != 1:
            raise reject("guidance_scale", self.guidance_scale, "1 without a teacher's step; neighbour distillation is guided")

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def followers(self) -> dict[str, float]:
        return {"target": self.target_decay} if self.target == "follower" else {}

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return self.samplers(schedule)[0]

    def samplers(self, schedule: NoiseSchedule) -> tuple[FewStepSampler, ...]:
        """Multistep consistency sampling (algorithm 1): predict x0, diffuse it to the next level."""
        first, middle = timesteps_at_ratios(schedule, (ratio_range(schedule, self.sigma_min, self.sigma_max)[1], self.midpoint))
        grids = {steps: (first, *uniform_timesteps(schedule, steps)[1:]) for steps in self.num_inference_steps}
        return tuple(FewStepSampler((first, middle) if steps == 2 else grid) for steps, grid in grids.items())

    def updates(self, step: int) -> Iterator[Update]:
        yield ("student",), partial(self.consistency_loss, stage=min(step // self.stage_steps, self.stages - 1))

    def consistency_loss(self, nets: Networks, batch: Batch, stage: int) -> Loss:
        assert batch.x0 is not None
        schedule = nets.teacher.schedule
        lowest, highest = ratio_range(schedule, self.sigma_min, self.sigma_max)
        s, s_r = self.draw_levels(batch, lowest, highest, stage)
        t, r = (schedule.timestep_at_ratio(level.clamp(min=lowest)).float() for level in (s, s_r))
        eps = batch.random.normal_like(batch.x0)
        x_t = schedule.add_noise(batch.x0, eps, t)
        answerer = nets.target if self.target == "follower" else nets.student
        with torch.no_grad():
            z_r = batch.x0 + expand_dims(s_r, eps) * eps if self.neighbour == "training" else self.teacher_neighbour(nets, batch, x_t, t, r)
            with same_dropout(x_t):
                answer = answerer(expand_dims(schedule.alpha(r), z_r) * z_r, r, batch.cond).x0
            noisy = (s_r > lowest).view(-1, *[1] * (z_r.ndim - 1))
            target = torch.where(noisy, answer, z_r)  # at the cleanest level the map is the identity
        x0 = nets.student(x_t, t, batch.cond).x0
        distance = sample_distance(x0, target, self.loss, self.huber_scale)
        root_mean_square = (x0 - target).detach().square().flatten(1).mean(1).sqrt().mean()
        weight = level_weight(s, s_r, self.weighting, self.sigma_data).to(distance)
        return (weight * distance).mean(), {"distance": root_mean_square}

    def draw_levels(self, batch: Batch, lowest: float, highest: float, stage: int) -> tuple[Tensor, Tensor]:
        """Level s and neighbour level r < s (B,), float64; r may lie below `lowest`, down to 0."""
        if self.discretization == "grid":
            law = (self.p_mean, self.p_std) if self.level_law == "lognormal" else None
            return draw_grid_levels(batch.random.uniform(), self.initial_intervals * 2**stage, lowest, highest, law)
        if self.level_law == "lognormal":
            s = (self.p_mean + self.p_std * batch.random.normal((len(batch.random.slots),)).double()).exp().clamp(lowest, highest)
        else:
            s = karras_levels(batch.random.uniform(), lowest, highest)
        return s, shrinking_neighbour(s, stage, self.gap_q, self.gap_k, self.gap_b)

    def teacher_neighbour(self, nets: Networks, batch: Batch, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        def teacher(x: Tensor, t: Tensor) -> Prediction:
            return guided(nets.teacher, x, t, batch.cond, batch.uncond, self.guidance_scale)

        return teacher_step(teacher, nets.teacher.schedule, x_t, t, r, self.solver)
