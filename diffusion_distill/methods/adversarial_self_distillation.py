"""Adversarial self-distillation: one student for every number of steps (arXiv:2511.01419)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adversarial import add_direction, approximate_r1, diffused_alike, input_direction
from ..denoiser import Denoiser
from ..discriminators import DISCRIMINATORS
from ..errors import reject
from ..families import Cond
from ..losses import relativistic_loss, surrogate
from ..networks import Networks
from ..sampler import FewStepSampler, uniform_timesteps
from ..schedule import NoiseSchedule
from ..score_distillation import backward_simulation, denoising_score_matching, distribution_matching, draw_timesteps
from .base import Batch, Loss, Method, Update, check_choices, check_levels, check_numbers


@dataclass
class ASD(Method):
    """The student's n-step samples are matched to the teacher, and follow its own (n+1)-step samples in distribution, n = 1 ... N.

    Distribution matching trains the last of n calls, n drawn anew for each step; one fake score sees the samples of every n. For n < N
    a relativistic pair of logits, the n-th of a discriminator, compares them with (n+1)-step samples from other noise, which receive no
    gradient: a small step in quality at a time, where the teacher alone is a large one. Image-free.
    """

    copies: ClassVar = ("student", "fake_score")

    max_inference_steps: int = 4
    """N: the one student serves 1 to N network calls."""
    timestep_shift: float = 5.0
    """Shift of the evenly spaced timesteps towards noise; flow matching only."""
    sampling: Literal["sde", "ode"] = "sde"
    """Between two steps: re-noise the predicted x0 (the paper) or carry the predicted noise along."""
    guidance_scale: float = 3.0
    """Classifier-free guidance of the teacher; 1 is off. The student and the fake score are never guided."""
    student_update_interval: int = 5
    """The student trains at every k-th step, the fake score and the discriminator at all of them."""
    warmup_steps: int = 0
    """Training steps at first with n = 1 and no adversarial term. Samples of all n share one fake score: what those of one step still
    lack, those of more steps supply in its place if all start together. 0: all start together (the paper)."""
    min_level: float = 0.02
    """Cleanest noise level of the distribution-matching loss, as a fraction of the schedule."""
    max_level: float = 0.98
    """Noisiest noise level of the distribution-matching loss, as a fraction of the schedule."""
    fake_score_learning_rate: float | None = None
    """Learning rate of the fake score. None: the student's."""
    normalizer_floor: float = 1e-6
    """Smallest value of the per-sample normaliser mean|x0 - real|."""
    gan_weight: float = 10.0
    """Weight of the adversarial term in the student's loss. 0 trains without a discriminator."""
    gan_weighting: Literal["fixed", "relative"] = "fixed"
    """`fixed` multiplies the loss; `relative` makes its gradient norm `gan_weight` times the distribution-matching one's,
    batch by batch: accumulated micro-batches are then not quite one large batch."""
    discriminator: Literal["fake_score", "teacher", "own"] = "fake_score"
    """Heads on the fake score's middle block, which stays frozen in the discriminator's turn, on the teacher's, or a small network of
    its own."""
    discriminator_learning_rate: float | None = None
    """Learning rate of the discriminator. None: the fake score's."""
    max_gan_level: float = 1.0
    """Noisiest level at which the discriminator looks, as a fraction of the schedule."""
    penalty_weight: float = 1.5
    """Weight of the approximate R1 and R2 penalties: on the discriminator's slope at (n+1)-step and at n-step samples."""
    penalty_std: float = 0.05
    """Standard deviation of the perturbation in the approximate penalties."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            zero_or_more=("warmup_steps", "guidance_scale", "gan_weight", "penalty_weight"),
            above_zero=("timestep_shift", "penalty_std", "normalizer_floor"),
            at_least_one=("student_update_interval",),
            fraction=("max_gan_level",),
        )
        check_levels(self, "min_level", "max_level")
        if self.max_inference_steps < 2:
            raise reject("max_inference_steps", self.max_inference_steps, "at least 2; dmd2 trains a student of one step")

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return self.grid(schedule, self.max_inference_steps)

    def samplers(self, schedule: NoiseSchedule) -> tuple[FewStepSampler, ...]:
        return tuple(self.grid(schedule, steps) for steps in range(self.max_inference_steps, 0, -1))

    def grid(self, schedule: NoiseSchedule, steps: int) -> FewStepSampler:
        return FewStepSampler(uniform_timesteps(schedule, steps, self.timestep_shift), self.sampling)

    def extra_networks(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, nn.Module]:
        build = DISCRIMINATORS[self.discriminator]
        return {"discriminator": build(teacher, x_t, t, cond, self.max_inference_steps - 1)} if self.gan_weight else {}

    def learning_rate(self, role: str) -> float | None:
        if role == "discriminator" and self.discriminator_learning_rate is not None:
            return self.discriminator_learning_rate
        return None if role == "student" else self.fake_score_learning_rate

    def updates(self, step: int) -> Iterator[Update]:
        largest = 1 if step < self.warmup_steps else self.max_inference_steps
        if step % self.student_update_interval == 0:
            yield ("student",), partial(self.student_loss, largest)
        yield ("fake_score",), partial(self.critic_loss, largest)
        if self.gan_weight and largest > 1:
            yield ("discriminator",), self.discriminator_loss

    def student_loss(self, largest: int, nets: Networks, batch: Batch) -> Loss:
        steps, x0 = self.draw(largest, nets, batch)
        t = draw_timesteps(nets.teacher.schedule, batch.random.uniform(), self.min_level, self.max_level)
        eps = batch.random.normal_like(x0)
        pair, conds = (nets.teacher, nets.fake_score), (batch.cond, batch.uncond)
        direction, logs = distribution_matching(*pair, x0, eps, t, *conds, self.guidance_scale, self.normalizer_floor)
        if self.gan_weight and steps < largest:
            with torch.no_grad():
                batch.carried["more"] = more = self.generate(nets, batch, steps + 1)
            noised = self.diffuse(nets, batch)
            ahead = noised(more)[0][:, steps - 1]
            logs["gan"], gan = input_direction(x0, lambda x: relativistic_loss(noised(x)[0][:, steps - 1], ahead))
            direction = add_direction(direction, gan, self.gan_weight, self.gan_weighting == "relative")
        return surrogate(x0, direction), logs

    def critic_loss(self, largest: int, nets: Networks, batch: Batch) -> Loss:
        """The fake score learns the samples of all n; without a turn of the student in this step it draws its own."""
        if "x0" not in batch.carried:
            with torch.no_grad():
                self.draw(largest, nets, batch)
        x0 = batch.carried["x0"]
        t = nets.fake_score.schedule.timestep(batch.random.uniform())
        loss = denoising_score_matching(nets.fake_score, x0, batch.random.normal_like(x0), t, batch.cond)
        return loss, {"denoising": loss.detach()}

    def discriminator_loss(self, nets: Networks, batch: Batch) -> Loss:
        """On the pair of the student's turn; samples of N steps take the place of the better ones, beside new ones of N - 1."""
        steps, x0, more = int(batch.carried.pop("steps")), batch.carried.pop("x0"), batch.carried.pop("more", None)
        with torch.no_grad():
            if steps == self.max_inference_steps:
                steps, x0, more = steps - 1, self.generate(nets, batch, steps - 1), x0
            elif more is None:
                more = self.generate(nets, batch, steps + 1)
        noised = self.diffuse(nets, batch)
        (real, real_near), (fake, fake_near) = (noised(sample, self.penalty_weight > 0) for sample in (more, x0))
        real, fake = real[:, steps - 1], fake[:, steps - 1]
        loss = relativistic_loss(real, fake)
        logs = {"relativistic": loss.detach(), "logit_gap": (real - fake).detach().mean()}
        if self.penalty_weight:
            slopes = approximate_r1(real, real_near[:, steps - 1]) + approximate_r1(fake, fake_near[:, steps - 1])
            loss = loss + self.penalty_weight / self.penalty_std**2 * slopes
        return loss, logs

    def draw(self, largest: int, nets: Networks, batch: Batch) -> tuple[int, Tensor]:
        """The n of this step up to `largest`, the same on every rank, and n-step samples x0 (B, ...); the next turns find both."""
        steps = 1 + batch.random.shared_integer(largest)
        x0 = self.generate(nets, batch, steps)
        batch.carried |= {"steps": torch.tensor(steps), "x0": x0.detach()}
        return steps, x0

    def generate(self, nets: Networks, batch: Batch, steps: int) -> Tensor:
        """x0 (B, ...) of `steps` network calls from noise of its own, with gradient in the last one."""
        noise = batch.random.normal((len(batch.random.slots), *batch.sample_shape))
        sampler = self.grid(nets.student.schedule, steps)
        return backward_simulation(nets.student, sampler, noise, batch.cond, batch.random.normal_like, steps - 1)[0].x0

    def diffuse(self, nets: Networks, batch: Batch) -> Callable[..., tuple[Tensor, Tensor]]:
        """The logits (B, N - 1) of any samples (B, ...), diffused with the same noise to the same timesteps, and close to these."""
        t = nets.teacher.schedule.timestep(self.max_gan_level * batch.random.uniform())
        eps, nearby = (batch.random.normal((len(t), *batch.sample_shape)) for _ in range(2))

        def discriminate(x_t: Tensor) -> Tensor:
            logits: Tensor = nets.discriminator(nets, x_t, t, batch.cond)
            return logits

        return diffused_alike(discriminate, nets.teacher.schedule, eps, t, self.penalty_std * nearby)
