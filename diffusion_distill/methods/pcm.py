"""PCM: phased consistency models (Wang et al., arXiv:2405.18407)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..consistency import same_dropout
from ..denoiser import Denoiser
from ..discriminators import DISCRIMINATORS
from ..errors import reject
from ..families import Cond
from ..losses import element_distance, hinge_loss
from ..networks import Networks
from ..sampler import FewStepSampler
from ..schedule import NoiseSchedule, expand_dims
from ..solver_grid import as_table, draw_interval, jump, segment_start, served_timesteps, solver_step, solver_timesteps
from .base import Batch, Loss, Method, Update, check_choices, check_numbers


@dataclass
class PCM(Method):
    """The student's jump from t to the clean edge of its phase equals its jump there from one solver step of the teacher earlier (eq. 6).

    As many deterministic steps as phases, edge to edge, sample it (sec. 3.1). With `gan_weight` a discriminator compares the two sides of
    the pair at the edge, both diffused on into the phase (sec. 3.3): what counts as real is the consistency target, and not an image.
    """

    phases: int = 4
    """Phases of the trajectory, which are the student's network calls; 1 is a deterministic LCM of one step."""
    solver_intervals: int = 40
    """Intervals of the DDIM (Euler) solver. A multiple of the phases, so that edges are the timesteps of DDIM's trailing spacing; the
    paper's 50 puts four phases at 739, 499 and 239, where that scheduler does not go."""
    timestep_shift: float = 1.0
    """Shift of the solver's timesteps, and so of the edges, towards noise; flow matching only."""
    guidance_scale: float = 5.5
    """Classifier-free guidance of the teacher; 1 is off (the released code draws w from 4 to 5, which is 5 to 6 here)."""
    target_decay: float = 0.0
    """Decay of a moving average in the target; 0 is the student itself without gradient."""
    loss: Literal["pseudo_huber", "l2"] = "pseudo_huber"
    """Distance of the two edges, elementwise: sqrt(d^2 + c^2) - c, or d^2."""
    huber_c: float = 1e-3
    """c of the pseudo-Huber distance."""
    gan_weight: float = 0.1
    """Weight of the adversarial consistency loss. 0 trains without a discriminator."""
    discriminator: Literal["teacher", "own"] = "teacher"
    """Heads on the frozen teacher's middle block (the paper: on all of its encoder's), or a small network of its own."""
    discriminator_learning_rate: float | None = 1e-5
    """Learning rate of the discriminator. None: the student's."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            zero_or_more=("guidance_scale", "gan_weight"),
            above_zero=("timestep_shift", "huber_c"),
            at_least_one=("phases",),
            below_one=("target_decay",),
        )
        if self.solver_intervals < 1 or self.solver_intervals % self.phases:
            raise reject(
                "solver_intervals", self.solver_intervals, f"a multiple of the {self.phases} phases, so that edges are on the grid"
            )

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def followers(self) -> dict[str, float]:
        return {"target": self.target_decay} if self.target_decay else {}

    def timesteps(self, schedule: NoiseSchedule) -> tuple[float, ...]:
        return solver_timesteps(schedule, self.solver_intervals, self.timestep_shift)

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return FewStepSampler(served_timesteps(self.timesteps(schedule), self.phases), "ode")

    def extra_networks(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, nn.Module]:
        return {"discriminator": DISCRIMINATORS[self.discriminator](teacher, x_t, t, cond)} if self.gan_weight else {}

    def learning_rate(self, role: str) -> float | None:
        return self.discriminator_learning_rate if role == "discriminator" else None

    def updates(self, step: int) -> Iterator[Update]:
        yield ("student",), self.student_loss
        if self.gan_weight:
            yield ("discriminator",), self.discriminator_loss

    def student_loss(self, nets: Networks, batch: Batch) -> Loss:
        edge, target, first = self.edges(nets, batch)
        loss = element_distance(edge, target, self.loss, self.huber_c)
        if not self.gan_weight:
            return loss, {}
        batch.carried |= {"edge": edge.detach(), "target": target, "first": first}
        gan = -self.discriminate(nets, edge, first, batch).mean()
        return loss + self.gan_weight * gan, {"consistency": loss.detach(), "gan": gan.detach()}

    def edges(self, nets: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's x at the edge, with gradient, its target, both (B, ...), and the edge's index in the solver grid, (B,)."""
        assert batch.x0 is not None
        student: Denoiser = nets.student
        schedule, table = student.schedule, as_table(self.timesteps(student.schedule), batch.x0.device)
        interval = draw_interval(batch.random.uniform(), self.solver_intervals)
        first = segment_start(interval, self.solver_intervals, self.phases)
        t, s, end = table[interval + 1], table[interval], table[first]
        x_t = schedule.add_noise(batch.x0, batch.random.normal_like(batch.x0), t)
        x_s = solver_step(nets.teacher, x_t, t, s, batch.cond, batch.uncond, self.guidance_scale)
        with torch.no_grad(), same_dropout(x_t):
            jumped = jump(schedule, (nets.target if self.target_decay else student)(x_s, s, batch.cond), end)
        target = torch.where(expand_dims(interval == first, x_t) > 0, x_s, jumped)
        return jump(schedule, student(x_t, t, batch.cond), end), target, first

    def discriminator_loss(self, nets: Networks, batch: Batch) -> Loss:
        edge, target, first = (batch.carried.pop(name) for name in ("edge", "target", "first"))
        real, fake = self.discriminate(nets, target, first, batch), self.discriminate(nets, edge, first, batch)
        accuracy = torch.cat([real > 0, fake < 0]).float().mean()
        return hinge_loss(real, fake), {"accuracy": accuracy}

    def discriminate(self, nets: Networks, edge: Tensor, first: Tensor, batch: Batch) -> Tensor:
        """Logits (B,) of x at its edge (B, ...), diffused on to a timestep of its phase (eq. 12)."""
        schedule = nets.teacher.schedule
        table = as_table(self.timesteps(schedule), edge.device)
        s, top = table[first], table[first + self.solver_intervals // self.phases]
        t = (s + batch.random.uniform() * (top - s)).to(s.dtype)
        a, b = (expand_dims(c, edge) for c in schedule.transition(t, s))
        logits: Tensor = nets.discriminator(nets, a * edge + b * batch.random.normal_like(edge), t, batch.cond)
        return logits
