"""DMD: one-step diffusion with distribution matching distillation (Yin et al., arXiv:2311.18828)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import reject
from ..losses import feature_distance, surrogate
from ..networks import Networks
from ..sampler import FewStepSampler, uniform_timesteps
from ..schedule import NoiseSchedule
from ..score_distillation import backward_simulation, denoising_score_matching, distribution_matching, draw_timesteps
from .base import Batch, Loss, Method, Space, Update, check_choices, check_levels, check_numbers


@dataclass
class DMD(Method):
    """Distribution matching with a fake score, held in place by a regression on stored pairs of the teacher.

    The one-step student descends KL(student || teacher) at random noise levels (eq. 7) on fresh noise, and regresses on the
    teacher's deterministic sample from a pair's own noise (eq. 9), which keeps the modes that the KL divergence would drop. Student
    and fake score take turns (algorithm 1). Pairs: train/make_pairs.py, at the guidance scale of the training.
    """

    copies: ClassVar = ("student", "fake_score")

    timesteps: tuple[float, ...] = ()
    """The one timestep on which the student is conditioned. Empty: the noisiest (the paper)."""
    guidance_scale: float = 3.0
    """Classifier-free guidance of the teacher; 1 is off. The student and the fake score are never guided."""
    min_level: float = 0.02
    """Cleanest noise level of the distribution-matching loss, as a fraction of the schedule."""
    max_level: float = 0.98
    """Noisiest noise level of the distribution-matching loss, as a fraction of the schedule."""
    regression_weight: float = 0.25
    """Weight of the regression on pairs. 0 needs no pairs."""
    regression_distance: Literal["l2", "teacher_features"] = "l2"
    """Mean squared error of x0, or LPIPS's formula on features of the frozen teacher; the paper's LPIPS needs a network of its own."""
    feature_level: float = 0.1
    """Noise level, as a fraction of the schedule, at which the teacher looks at both samples of a pair, with the same noise."""
    fake_score_loss: Space = "network"
    """Space of the fake score's squared error; `network` is the space that the network predicts in."""
    fake_score_learning_rate: float | None = None
    """Learning rate of the fake score. None: the student's."""
    normalizer_floor: float = 1e-6
    """Smallest value of the per-sample normaliser mean|x0 - real|."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, zero_or_more=("guidance_scale", "regression_weight"), above_zero=("normalizer_floor",))
        self.timesteps = tuple(self.timesteps)
        if len(self.timesteps) > 1:
            accepted = "the student takes one step, for a pair ties its noise to one sample; dmd2 trains several"
            raise reject("timesteps", list(self.timesteps), accepted)
        check_levels(self, "min_level", "max_level")
        if not 0 <= self.feature_level <= 1:
            raise reject("feature_level", self.feature_level, "a fraction from 0 to 1")

    @property
    def needs_pairs(self) -> bool:
        return self.regression_weight > 0

    @property
    def expected_pairs(self) -> dict[str, float]:
        return {"guidance_scale": self.guidance_scale}

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return FewStepSampler(self.timesteps or uniform_timesteps(schedule, 1))

    def learning_rate(self, role: str) -> float | None:
        return None if role == "student" else self.fake_score_learning_rate

    def updates(self, step: int) -> Iterator[Update]:
        yield ("student",), self.student_loss
        yield ("fake_score",), self.critic_loss

    def student_loss(self, nets: Networks, batch: Batch) -> Loss:
        x0 = self.generate(nets, batch.random.normal((len(batch.random.slots), *batch.sample_shape)), batch)
        batch.carried["x0"] = x0.detach()
        t = draw_timesteps(nets.teacher.schedule, batch.random.uniform(), self.min_level, self.max_level)
        eps = batch.random.normal_like(x0)
        pair, conds = (nets.teacher, nets.fake_score), (batch.cond, batch.uncond)
        direction, logs = distribution_matching(*pair, x0, eps, t, *conds, self.guidance_scale, self.normalizer_floor)
        if not self.needs_pairs:
            return surrogate(x0, direction), logs
        regression = self.regression_loss(nets, batch)
        return surrogate(x0, direction) + self.regression_weight * regression, logs | {"regression": regression}

    def regression_loss(self, nets: Networks, batch: Batch) -> Tensor:
        """Distance of the student's sample from the teacher's at the noise of a pair (eq. 9)."""
        assert batch.x0 is not None and batch.noise is not None, "the data set yields no pairs"
        x0 = self.generate(nets, batch.noise, batch)
        if self.regression_distance == "l2":
            return F.mse_loss(x0, batch.x0)
        t = nets.teacher.schedule.timestep(torch.full((len(x0),), self.feature_level, device=x0.device))
        eps = batch.random.normal_like(x0)
        with torch.no_grad():
            target = nets.teacher.features(nets.teacher.schedule.add_noise(batch.x0, eps, t), t, batch.cond)
        return feature_distance(nets.teacher.features(nets.teacher.schedule.add_noise(x0, eps, t), t, batch.cond), target)

    def critic_loss(self, nets: Networks, batch: Batch) -> Loss:
        """The fake score learns the samples of the student's turn at all noise levels (eq. 6)."""
        x0 = batch.carried.pop("x0")
        t = nets.fake_score.schedule.timestep(batch.random.uniform())
        loss = denoising_score_matching(nets.fake_score, x0, batch.random.normal_like(x0), t, batch.cond, self.fake_score_loss)
        return loss, {"denoising": loss.detach()}

    def generate(self, nets: Networks, noise: Tensor, batch: Batch) -> Tensor:
        """The student's one-step sample x0 (B, ...) of `noise`."""
        sampler = self.sampler(nets.student.schedule)
        return backward_simulation(nets.student, sampler, noise, batch.cond, batch.random.normal_like, 0)[0].x0
