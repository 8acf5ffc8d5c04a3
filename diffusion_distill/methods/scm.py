"""Continuous-time consistency models (Lu, Song, arXiv:2410.11081), sCD and sCT, in TrigFlow's angles for any teacher."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..consistency import ratio_range, same_dropout
from ..denoiser import Denoiser, guided
from ..errors import reject
from ..families import Cond
from ..jvp import Derivative, Function, derivative_along
from ..networks import Networks
from ..prediction import Prediction
from ..sampler import FewStepSampler, check_steps, timesteps_at_ratios
from ..schedule import NoiseSchedule, expand_dims
from ..trigflow import LogVariance, angle_at_ratio, consistency_tangent, normalized, trigflow_output
from .base import Batch, Loss, Method, Update, check_choices, check_numbers


@dataclass
class SCM(Method):
    """The student's x0 stays the same along the teacher's trajectory: its derivative there, the tangent, is driven to zero.

    Angles a in [0, pi/2] are TrigFlow's, tan(a) = sigma / (alpha sigma_data); the network stays the teacher's own kind. Defaults are
    the paper's on CIFAR-10 (app. G.2).
    """

    num_inference_steps: tuple[int, ...] = (1, 2)
    """Numbers of network calls that the one student serves, the default first."""
    midpoint: float = 1.1
    """Angle of the second of two steps. Other numbers of steps visit evenly spaced angles (SANA-Sprint)."""
    velocity: Literal["teacher", "data"] = "teacher"
    """What moves along the trajectory: the teacher's ODE (sCD), or the same image and noise (sCT)."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the teacher; 1 is off. For the teacher's velocity only."""
    sigma_data: float = 0.5
    """Standard deviation of the data in the network's space."""
    p_mean: float = -1.0
    """Mean of ln(sigma / alpha), the noise-to-signal ratio."""
    p_std: float = 1.4
    """Standard deviation of ln(sigma / alpha); 1.6 on ImageNet."""
    sigma_max: float = 80.0
    """Noise-to-signal ratio where sampling starts; not above the teacher's own."""
    derivative: Derivative = "forward"
    """dF/da: exact by forward-mode differentiation, or a difference over `difference_step`. Prefer a difference where the network
    embeds its time steeply (timesteps of 0 to 1000, embedded by sines)."""
    difference_step: float = 1e-3
    """Step of a difference in ln tan(a); to first order also in ln(sigma / alpha)."""
    warmup_steps: int = 10_000
    """Steps over which the unstable part of the tangent comes in (H)."""
    tangent_normalization: Literal["norm", "rms"] = "norm"
    """|g| in g / (|g| + c): the Euclidean norm of a sample's tangent, or that divided by the root of its dimensions."""
    tangent_c: float = 0.1
    """c in g / (|g| + c)."""
    weighting: Literal["uniform", "inverse_ratio"] = "uniform"
    """Weight of a sample beside the learned one: 1 (the paper, whose prior weight 1 / (sigma_data tan(a)) is what makes sin(a) df/da
    the cos(a) df/da of the tangent; app. D), or alpha / sigma once more (released code of FastGen and SANA-Sprint)."""
    adaptive_weighting: bool = True
    """Learn the size of the loss at each angle and divide by it."""
    log_variance_learning_rate: float | None = None
    """Learning rate of that size. None: the student's, at which it hardly moves within a thousand steps."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, zero_or_more=("guidance_scale", "warmup_steps"), above_zero=("sigma_data", "p_std", "sigma_max", "tangent_c"))
        self.num_inference_steps = check_steps(self.num_inference_steps)
        if not 0 < self.midpoint < math.pi / 2:
            raise reject("midpoint", self.midpoint, "an angle above 0 and below pi/2")
        if self.velocity == "data" and self.guidance_scale != 1:
            raise reject("guidance_scale", self.guidance_scale, "1 without a teacher's velocity; velocity teacher is guided")
        if not 0 < self.difference_step < 1:
            raise reject("difference_step", self.difference_step, "above 0 and below 1")

    @property
    def needs_images(self) -> bool:
        return True

    def extra_networks(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, nn.Module]:
        return {"log_variance": LogVariance().to(x_t.device)} if self.adaptive_weighting else {}

    def learning_rate(self, role: str) -> float | None:
        return self.log_variance_learning_rate if role == "log_variance" else None

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return self.samplers(schedule)[0]

    def samplers(self, schedule: NoiseSchedule) -> tuple[FewStepSampler, ...]:
        """Predict x0, diffuse it to the next angle (sec. 5.2; arXiv:2303.01469, algorithm 1)."""
        highest = ratio_range(schedule, 0.0, self.sigma_max)[1]
        first = math.atan(highest / self.sigma_data)
        found = []
        for steps in self.num_inference_steps:
            later = [self.midpoint] if steps == 2 else [first * (steps - i) / steps for i in range(1, steps)]
            ratios = (highest, *(self.sigma_data * math.tan(a) for a in later))
            found.append(FewStepSampler(timesteps_at_ratios(schedule, ratios)))
        return tuple(found)

    def updates(self, step: int) -> Iterator[Update]:
        share = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        yield ("student", "log_variance") if self.adaptive_weighting else ("student",), partial(self.student_loss, share=share)

    def student_loss(self, nets: Networks, batch: Batch, share: float) -> Loss:
        assert batch.x0 is not None
        angle = self.draw_angles(nets.teacher.schedule, batch)
        cos, sin = expand_dims(angle.cos(), batch.x0), expand_dims(angle.sin(), batch.x0)
        noise = self.sigma_data * batch.random.normal_like(batch.x0)
        y = cos * batch.x0 + sin * noise
        velocity = cos * noise - sin * batch.x0 if self.velocity == "data" else self.teacher_velocity(nets.teacher, y, angle, batch)
        with same_dropout(y):
            f = self.network(nets.student, batch.cond)(y, angle)
        df = self.derivative_along(nets.student, batch.cond, (y, angle), (cos * sin * velocity, angle.cos() * angle.sin()), f.detach())
        g = consistency_tangent(y, angle, velocity, f.detach(), df, self.sigma_data, share)
        target = f.detach().double() + normalized(g, self.tangent_c, self.tangent_normalization == "rms")
        error = (f.double() - target).square().flatten(1).mean(1)
        logs = {"tangent": g.square().mean().sqrt(), "error": error.detach().mean()}
        return self.weighted(nets, error, angle), logs

    def weighted(self, nets: Networks, error: Tensor, angle: Tensor) -> Tensor:
        """The mean of the samples' errors (B,) under both weights (eq. 8)."""
        if self.weighting == "inverse_ratio":
            error = error / (self.sigma_data * angle.tan())
        if not self.adaptive_weighting:
            return error.mean()
        log_variance = nets.log_variance(angle)
        return (error / log_variance.exp() + log_variance).mean()

    def draw_angles(self, schedule: NoiseSchedule, batch: Batch) -> Tensor:
        """Angles (B,), float64, with normal ln(sigma / alpha), within what the teacher has and the derivative's steps need around them."""
        lowest, highest = ratio_range(schedule, 0.0, self.sigma_max)
        margin = 1 + (1e-6 if self.derivative == "forward" else 2 * self.difference_step)
        highest = highest if self.derivative == "backward" else highest / margin
        ratio = (self.p_mean + self.p_std * batch.random.normal((len(batch.random.slots),)).double()).exp()
        return angle_at_ratio(ratio.clamp(lowest * margin, highest), self.sigma_data)

    def network(self, student: Denoiser, cond: Cond) -> Function:
        """F as a function of (y, angle)."""
        return lambda y, angle: trigflow_output(lambda x_t, t: student(x_t, t, cond), student.schedule, y, angle, self.sigma_data)

    @torch.no_grad()
    def teacher_velocity(self, teacher: Denoiser, y: Tensor, angle: Tensor, batch: Batch) -> Tensor:
        def predict(x_t: Tensor, t: Tensor) -> Prediction:
            return guided(teacher, x_t, t, batch.cond, batch.uncond, self.guidance_scale)

        return self.sigma_data * trigflow_output(predict, teacher.schedule, y, angle, self.sigma_data)

    def derivative_along(
        self, student: Denoiser, cond: Cond, point: tuple[Tensor, Tensor], direction: tuple[Tensor, Tensor], value: Tensor
    ) -> Tensor:
        """Of F along `direction`, with the dropout of `value`; always in float32, for bfloat16 has too few digits for it."""
        plain = Denoiser(student.model, student.schedule, student.prediction_type, student.family, None, student.adapter)
        network = self.network(plain, cond)

        def function(y: Tensor, angle: Tensor) -> Tensor:
            with same_dropout(y):
                return network(y, angle)

        return derivative_along(function, point, direction, self.derivative, self.difference_step, value)
