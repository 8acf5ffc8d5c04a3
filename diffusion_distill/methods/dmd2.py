"""DMD2: improved distribution matching distillation (Yin et al., arXiv:2405.14867)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adversarial import add_direction, approximate_r1, input_direction
from ..denoiser import Denoiser
from ..discriminators import DISCRIMINATORS
from ..families import Cond
from ..losses import discriminator_loss, generator_loss, surrogate
from ..networks import Networks
from ..sampler import FewStepSampler, uniform_timesteps
from ..schedule import NoiseSchedule
from ..score_distillation import backward_simulation, denoising_score_matching, distribution_matching, draw_timesteps
from .base import Batch, Loss, Method, Space, Update, check_choices, check_levels, check_numbers, draw_step


@dataclass
class DMD2(Method):
    """Distribution matching with a fake score on its own time scale, a GAN term and backward simulation.

    The student descends KL(student || teacher) at random noise levels (eq. 2); the fake score follows the student's samples
    at every step, the student at every `student_update_interval`-th (sec. 4.2); the GAN term learns from real images
    (sec. 4.3, `gan_weight` 0 needs none); inputs of inner steps are the student's own (sec. 4.5). Defaults are the paper's
    four-step SDXL run.
    """

    copies: ClassVar = ("student", "fake_score")

    num_inference_steps: int = 4
    """Network calls of the student."""
    timesteps: tuple[float, ...] = ()
    """Timesteps the student visits, from noise to data. Empty: evenly spaced. One step at an inner timestep: (399,)."""
    timestep_shift: float = 1.0
    """Shift of the evenly spaced timesteps towards noise; flow matching only."""
    sampling: Literal["sde", "ode"] = "sde"
    """Between two steps: re-noise the predicted x0 (the paper) or carry the predicted noise along."""
    last_step_share: float | None = None
    """Share of the training turns spent on the last step. None: all steps equally often (the paper). The fake score sees the mixture
    of all steps' samples, and it is the mixture that then matches the teacher; a large share makes that the last step's samples."""
    guidance_scale: float = 8.0
    """Classifier-free guidance of the teacher; 1 is off. The student and the fake score are never guided."""
    student_update_interval: int = 5
    """The student trains at every k-th step, the fake score at all of them."""
    min_level: float = 0.02
    """Cleanest noise level of the distribution-matching loss, as a fraction of the schedule."""
    max_level: float = 0.98
    """Noisiest noise level of the distribution-matching loss, as a fraction of the schedule."""
    fake_score_loss: Space = "network"
    """Space of the fake score's squared error; `network` is the space that the network predicts in."""
    fake_score_learning_rate: float | None = None
    """Learning rate of the fake score. None: the student's."""
    normalizer_floor: float = 1e-6
    """Smallest value of the per-sample normaliser mean|x0 - real|."""
    gan_weight: float = 5e-3
    """Weight of the GAN term in the student's loss. 0 trains without images."""
    gan_weighting: Literal["fixed", "relative"] = "fixed"
    """`fixed` multiplies the loss; `relative` makes its gradient norm `gan_weight` times the distribution-matching one's,
    batch by batch: accumulated micro-batches are then not quite one large batch."""
    discriminator: Literal["fake_score", "teacher", "own"] = "fake_score"
    """Heads on the fake score's middle block (the paper), on the teacher's, or a small network of its own."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's loss beside the fake score's."""
    discriminator_learning_rate: float | None = None
    """Learning rate of the discriminator. None: the fake score's."""
    max_gan_level: float = 1.0
    """Noisiest level at which the discriminator looks, as a fraction of the schedule."""
    r1_weight: float = 0.0
    """Weight of the approximate R1 penalty on the discriminator at real images."""
    r1_std: float = 0.1
    """Standard deviation of the perturbation in the approximate R1 penalty."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            zero_or_more=("guidance_scale", "gan_weight", "discriminator_weight", "r1_weight"),
            above_zero=("timestep_shift", "r1_std", "normalizer_floor"),
            at_least_one=("num_inference_steps", "student_update_interval"),
            fraction=("max_gan_level", "last_step_share"),
        )
        check_levels(self, "min_level", "max_level")
        self.timesteps = tuple(self.timesteps)

    @property
    def needs_images(self) -> bool:
        return self.gan_weight > 0

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        timesteps = self.timesteps or uniform_timesteps(schedule, self.num_inference_steps, self.timestep_shift)
        return FewStepSampler(timesteps, self.sampling)

    def extra_networks(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, nn.Module]:
        return {"discriminator": DISCRIMINATORS[self.discriminator](teacher, x_t, t, cond)} if self.needs_images else {}

    def learning_rate(self, role: str) -> float | None:
        if role == "discriminator" and self.discriminator_learning_rate is not None:
            return self.discriminator_learning_rate
        return None if role == "student" else self.fake_score_learning_rate

    def updates(self, step: int) -> Iterator[Update]:
        if step % self.student_update_interval == 0:
            yield ("student",), self.student_loss
        yield ("fake_score", "discriminator") if self.needs_images else ("fake_score",), self.critic_loss

    def student_loss(self, nets: Networks, batch: Batch) -> Loss:
        x0 = self.generate(nets, batch)
        batch.carried["x0"] = x0.detach()
        t = draw_timesteps(nets.teacher.schedule, batch.random.uniform(), self.min_level, self.max_level)
        eps = batch.random.normal_like(x0)
        pair, conds = (nets.teacher, nets.fake_score), (batch.cond, batch.uncond)
        direction, logs = distribution_matching(*pair, x0, eps, t, *conds, self.guidance_scale, self.normalizer_floor)
        if self.needs_images:
            logs["gan"], gan = input_direction(x0, lambda x: generator_loss(self.discriminate(nets, x, batch)[0]))
            direction = add_direction(direction, gan, self.gan_weight, self.gan_weighting == "relative")
        return surrogate(x0, direction), logs

    def critic_loss(self, nets: Networks, batch: Batch) -> Loss:
        x0 = batch.carried.pop("x0", None)
        if x0 is None:
            with torch.no_grad():
                x0 = self.generate(nets, batch)
        t = nets.fake_score.schedule.timestep(batch.random.uniform())
        loss = denoising_score_matching(nets.fake_score, x0, batch.random.normal_like(x0), t, batch.cond, self.fake_score_loss)
        if not self.needs_images:
            return loss, {"denoising": loss.detach()}
        gan, logs = self.discriminator_loss(nets, x0, batch)
        return loss + self.discriminator_weight * gan, {"denoising": loss.detach(), **logs}

    def discriminator_loss(self, nets: Networks, x0: Tensor, batch: Batch) -> Loss:
        assert batch.x0 is not None
        fake_logits, _, _ = self.discriminate(nets, x0, batch)
        real_logits, x_t, t = self.discriminate(nets, batch.x0, batch)
        loss = discriminator_loss(real_logits, fake_logits)
        logs = {"discriminator": loss.detach(), "accuracy": torch.cat([real_logits > 0, fake_logits < 0]).float().mean()}
        if self.r1_weight:
            perturbed = nets.discriminator(nets, x_t + self.r1_std * batch.random.normal_like(x_t), t, batch.cond)
            loss = loss + self.r1_weight / self.r1_std**2 * approximate_r1(real_logits, perturbed)
        return loss, logs

    def discriminate(self, nets: Networks, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B,) of x0 (B, ...) diffused with its own noise to its own timestep, and that x_t and t."""
        schedule = nets.teacher.schedule
        t = schedule.timestep(self.max_gan_level * batch.random.uniform())
        x_t = schedule.add_noise(x0, batch.random.normal_like(x0), t)
        return nets.discriminator(nets, x_t, t, batch.cond), x_t, t

    def generate(self, nets: Networks, batch: Batch) -> Tensor:
        """Backward simulation: x0 (B, ...) at a random rung of the student's own trajectory, gradient in the last call only."""
        sampler = self.sampler(nets.student.schedule)
        noise = batch.random.normal((len(batch.random.slots), *batch.sample_shape))
        rung = draw_step(batch.random, len(sampler.timesteps), self.last_step_share)
        return backward_simulation(nets.student, sampler, noise, batch.cond, batch.random.normal_like, rung)[0].x0
