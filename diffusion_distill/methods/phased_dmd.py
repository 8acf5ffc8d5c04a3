"""Phased DMD: few-step distribution matching distillation via score matching within subintervals (Fan et al., arXiv:2510.27684)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters import Adapter
from ..errors import reject
from ..experts import Experts
from ..losses import distribution_matching_direction, surrogate
from ..networks import Networks
from ..sampler import FewStepSampler, uniform_timesteps
from ..schedule import NoiseSchedule
from ..score_distillation import (
    agreement,
    backward_simulation,
    diffuse_from,
    draw_timesteps_above,
    level_above,
    real_and_fake,
    subinterval_score_matching,
)
from .base import Batch, Loss, Method, Space, Update, check_choices, check_levels, check_numbers, draw_step


@dataclass
class PhasedDMD(Method):
    """An expert for each phase of the student's steps, matched to the teacher where its phase ends and not at the data.

    Phase k carries samples from timestep t_k to t_(k+1). Its samples x_s, s = t_(k+1), are diffused on to noise levels above s, where
    the teacher and a fake score of the phase's own are compared: the intervals (s, 1) are nested and grow from phase to phase. The
    fake score regresses on the exact target within the subinterval, for eps - x_s is biased. Image-free, without a GAN. One phase is
    DMD2 without a GAN.
    """

    steps_per_phase: tuple[int, ...] = (2, 2)
    """Network calls of the student in each phase, from noise to data; an expert for each."""
    timesteps: tuple[float, ...] = ()
    """Timesteps the student visits, from noise to data. Empty: evenly spaced."""
    timestep_shift: float = 5.0
    """Shift of the evenly spaced timesteps towards noise; flow matching only."""
    sampling: Literal["ode", "sde"] = "ode"
    """Between two steps: carry the predicted noise along (the paper's Euler steps) or re-noise the predicted x0."""
    training: Literal["sequential", "joint"] = "sequential"
    """One phase after the other on frozen earlier experts (the paper), or all in turn from the start (LightX2V)."""
    phase_steps: int = 2000
    """Training steps of each phase in sequential training; the last one goes on to the end."""
    experts: Literal["lora", "full"] = "lora"
    """Each expert is a LoRA adapter on the teacher's own weights (the paper), or a full copy. The fake scores are copies."""
    expert_rank: int = 64
    """Rank of the experts' adapters."""
    expert_alpha: float = 8.0
    """Scale of the experts' adapters: they are multiplied by alpha / rank."""
    guidance_scale: float = 4.0
    """Classifier-free guidance of the teacher; 1 is off. The experts and the fake scores are never guided."""
    student_update_interval: int = 5
    """The expert of a phase trains at every k-th of the phase's steps, its fake score at all of them."""
    last_step_share: float | None = None
    """Share of a phase's training turns spent on its last step. None: all of its steps equally often (the paper)."""
    level_margin: float = 0.02
    """Cleanest noise level of the distribution-matching loss above the end of the phase, as a fraction of the schedule."""
    max_level: float = 0.98
    """Noisiest noise level of the distribution-matching loss, as a fraction of the schedule."""
    level_shift: float = 1.0
    """Shift of the drawn noise levels towards noise: u -> shift u / (1 + (shift - 1) u) of the way from the cleanest to the noisiest."""
    fake_score_loss: Space = "network"
    """Space of the fake scores' squared error; `network` is the space that the network predicts in."""
    max_weight: float = 10.0
    """Largest weight of a fake score's error close to the end of its phase: min(1 / b^2, max_weight), b the added noise."""
    fake_score_learning_rate: float | None = None
    """Learning rate of the fake scores. None: the experts'."""
    normalizer_floor: float = 1e-6
    """Smallest value of the per-sample normaliser mean|x0 - real|."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            zero_or_more=("guidance_scale",),
            above_zero=("timestep_shift", "level_shift", "expert_alpha", "max_weight", "normalizer_floor"),
            at_least_one=("phase_steps", "student_update_interval", "expert_rank"),
            fraction=("last_step_share",),
        )
        check_levels(self, "level_margin", "max_level")
        self.timesteps, self.steps_per_phase = tuple(self.timesteps), tuple(self.steps_per_phase)
        if not self.steps_per_phase or min(self.steps_per_phase) < 1:
            raise reject("steps_per_phase", self.steps_per_phase, "at least one phase, each of at least 1 step")
        if self.timesteps and len(self.timesteps) != sum(self.steps_per_phase):
            raise reject("timesteps", self.timesteps, f"steps_per_phase asks for {sum(self.steps_per_phase)} of them")

    @property
    def phases(self) -> int:
        return len(self.steps_per_phase)

    @property
    def student_roles(self) -> tuple[str, ...]:
        return tuple(f"expert_{k}" for k in range(self.phases))

    @property
    def copies(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*(self.student_roles if self.experts == "full" else ()), *(f"fake_score_{k}" for k in range(self.phases)))

    @property
    def adapters(self) -> dict[str, Adapter]:
        return dict.fromkeys(self.student_roles, Adapter(self.expert_rank, self.expert_alpha)) if self.experts == "lora" else {}

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        timesteps = self.timesteps or uniform_timesteps(schedule, sum(self.steps_per_phase), self.timestep_shift)
        return FewStepSampler(timesteps, self.sampling)

    def views(self, nets: Networks) -> dict[str, nn.Module]:
        """The experts as one student. They change half-way between two steps, where rounding of a timestep cannot matter."""
        schedule, grid = nets.teacher.schedule, self.sampler(nets.teacher.schedule).timesteps
        for s in (self.end(schedule, phase) for phase in range(self.phases)):
            if not level_above(schedule, s, self.level_margin) < self.max_level:
                raise reject("level_margin", self.level_margin, f"a phase ends at timestep {s:.2f}: no level is left below max_level")
        boundaries = [(grid[first - 1] + grid[first]) / 2 for first in accumulate(self.steps_per_phase[:-1])]
        return {"student": Experts([getattr(nets, role) for role in self.student_roles], boundaries)}

    def learning_rate(self, role: str) -> float | None:
        return None if role in self.student_roles else self.fake_score_learning_rate

    def phase(self, step: int) -> tuple[int, int]:
        """The phase that trains at `step`, and how many steps it had before."""
        if self.training == "joint":
            return step % self.phases, step // self.phases
        phase = min(step // self.phase_steps, self.phases - 1)
        return phase, step - phase * self.phase_steps

    def finished(self, step: int) -> tuple[str, ...]:
        """Later phases then start from the expert that is exported, its moving average."""
        done = self.training == "sequential" and self.phase(step)[0] < self.phase(step + 1)[0]
        return (self.student_roles[self.phase(step)[0]],) if done else ()

    def updates(self, step: int) -> Iterator[Update]:
        phase, number = self.phase(step)
        if number % self.student_update_interval == 0:
            yield (f"expert_{phase}",), partial(self.student_loss, phase)
        yield (f"fake_score_{phase}",), partial(self.critic_loss, phase)

    def student_loss(self, phase: int, nets: Networks, batch: Batch) -> Loss:
        """In x0, as in LightX2V: x_s is affine in x0 with a positive factor, constant for each step, so the sign is that of x_s."""
        x0, x_s, s = self.generate(phase, nets, batch)
        batch.carried["x_s"] = x_s.detach()
        schedule = nets.teacher.schedule
        t = draw_timesteps_above(schedule, batch.random.uniform(), s, self.level_margin, self.max_level, self.level_shift)
        x_t = diffuse_from(schedule, x_s.detach(), batch.random.normal_like(x_s), t, s)
        fake_score = getattr(nets, f"fake_score_{phase}")
        real, fake = real_and_fake(nets.teacher, fake_score, x_t, t, batch.cond, batch.uncond, self.guidance_scale)
        direction = distribution_matching_direction(x0.detach(), real.x0, fake.x0, self.normalizer_floor)
        return surrogate(x0, direction), agreement(x0, real.x0, fake.x0)

    def critic_loss(self, phase: int, nets: Networks, batch: Batch) -> Loss:
        schedule, s = nets.teacher.schedule, self.end(nets.teacher.schedule, phase)
        x_s = batch.carried.pop("x_s", None)
        if x_s is None:
            with torch.no_grad():
                x_s = self.generate(phase, nets, batch)[1]
        t = draw_timesteps_above(schedule, batch.random.uniform(), s, 0.0, 1.0, self.level_shift)
        fake_score, eps = getattr(nets, f"fake_score_{phase}"), batch.random.normal_like(x_s)
        loss = subinterval_score_matching(fake_score, x_s, eps, t, s, batch.cond, self.max_weight, self.fake_score_loss)
        return loss, {"denoising": loss.detach()}

    def end(self, schedule: NoiseSchedule, phase: int) -> float | None:
        """The timestep at which `phase` ends and the next one begins; None is the data."""
        return None if phase == self.phases - 1 else self.sampler(schedule).timesteps[sum(self.steps_per_phase[: phase + 1])]

    def generate(self, phase: int, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, float | None]:
        """Backward simulation to a random step of `phase`: its x0 and x_s (B, ...), gradient in the last call only, and s."""
        schedule = nets.student.schedule
        sampler, s = self.sampler(schedule), self.end(schedule, phase)
        noise = batch.random.normal((len(batch.random.slots), *batch.sample_shape))
        rung = sum(self.steps_per_phase[:phase]) + draw_step(batch.random, self.steps_per_phase[phase], self.last_step_share)
        pred, t = backward_simulation(nets.student, sampler, noise, batch.cond, batch.random.normal_like, rung)
        if s is None:
            return pred.x0, pred.x0, s
        eps = batch.random.normal_like(pred.x0) if self.sampling == "sde" else pred.eps
        return pred.x0, schedule.add_noise(pred.x0, eps, torch.full_like(t, s, dtype=torch.float64)), s
