"""VSD in one step: variational score distillation (ProlificDreamer, arXiv:2305.16213) as SwiftBrush trains it (arXiv:2312.05239)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..adapters import Adapter
from ..errors import reject
from ..losses import distribution_matching_direction, surrogate, variational_direction
from ..networks import Networks
from ..sampler import FewStepSampler, uniform_timesteps
from ..schedule import NoiseSchedule
from ..score_distillation import agreement, backward_simulation, denoising_score_matching, draw_timesteps, guided_pair, reliability
from .base import Batch, Loss, Method, Space, Update, check_choices, check_levels, check_numbers


@dataclass
class VSD(Method):
    """A one-step student descends KL(student || teacher) along the difference of two guided predictions, image-free.

    The fake score is a LoRA adapter on the teacher's own weights: two networks are held, not three. It is guided like the teacher
    (SwiftBrush, sec. 3.3) and therefore also learns without conditions. Student and fake score take turns on the same samples.
    Defaults are SwiftBrush's; a random guidance scale is SNOOPI's PG-SB (arXiv:2412.02687, sec. 4.1).
    """

    timesteps: tuple[float, ...] = ()
    """The one timestep that the student is conditioned on. Empty: the noisiest."""
    guidance_scale: float = 4.5
    """Classifier-free guidance; 1 is off."""
    guidance_range: tuple[float, ...] = ()
    """Lowest and highest guidance scale, drawn anew at every step for the whole batch (PG-SB). Empty: `guidance_scale`."""
    guided_networks: Literal["both", "teacher"] = "both"
    """Who is guided: teacher and fake score (SwiftBrush) or the teacher alone (ProlificDreamer)."""
    weighting: Literal["variance", "normalized"] = "variance"
    """`variance`: w(t) = sigma_t^2 on the noise predictions (the paper); `normalized`: DMD's mean|x0 - real| for each sample."""
    min_level: float = 0.02
    """Cleanest noise level of the student's loss, as a fraction of the schedule."""
    max_level: float = 0.98
    """Noisiest noise level of the student's loss, as a fraction of the schedule."""
    fake_score: Literal["lora", "full"] = "lora"
    """The fake score is an adapter on the teacher, or a full copy of it."""
    fake_score_rank: int = 64
    """Rank of the fake score's adapter."""
    fake_score_alpha: float = 108.0
    """Scale of the fake score's adapter: it is multiplied by alpha / rank."""
    fake_score_targets: tuple[str, ...] = ("to_q", "to_v")
    """Names of the layers that the fake score adapts. Empty: all that the teacher's family lists for LoRA."""
    fake_score_learning_rate: float = 1e-3
    """Learning rate of the fake score."""
    fake_score_loss: Space = "network"
    """Space of the fake score's squared error; `network` is the space that the network predicts in."""
    unconditional_share: float = 0.1
    """Share of the steps in which the fake score trains without conditions, on its whole batch."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            zero_or_more=("guidance_scale",),
            above_zero=("fake_score_alpha", "fake_score_learning_rate"),
            at_least_one=("fake_score_rank",),
        )
        self.timesteps, self.guidance_range = tuple(self.timesteps), tuple(self.guidance_range)
        self.fake_score_targets = tuple(self.fake_score_targets)
        if len(self.timesteps) > 1:
            raise reject("timesteps", self.timesteps, "one timestep at most: the student takes one step")
        if self.guidance_range and not (len(self.guidance_range) == 2 and 0 <= self.guidance_range[0] <= self.guidance_range[1] < math.inf):
            raise reject("guidance_range", self.guidance_range, "the lowest and the highest scale, or nothing")
        check_levels(self, "min_level", "max_level")
        if not 0 <= self.unconditional_share <= 1:
            raise reject("unconditional_share", self.unconditional_share, "a share from 0 to 1")

    @property
    def copies(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("student", "fake_score") if self.fake_score == "full" else ("student",)

    @property
    def adapters(self) -> dict[str, Adapter]:
        adapter = Adapter(self.fake_score_rank, self.fake_score_alpha, self.fake_score_targets)
        return {"fake_score": adapter} if self.fake_score == "lora" else {}

    def learning_rate(self, role: str) -> float | None:
        return self.fake_score_learning_rate if role == "fake_score" else None

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return FewStepSampler(self.timesteps or uniform_timesteps(schedule, 1))

    def updates(self, step: int) -> Iterator[Update]:
        yield ("student",), self.student_loss
        yield ("fake_score",), self.critic_loss

    def student_loss(self, nets: Networks, batch: Batch) -> Loss:
        x0 = self.generate(nets, batch)
        batch.carried["x0"] = x0.detach()
        scale = self.draw_guidance(batch)
        t = draw_timesteps(nets.teacher.schedule, batch.random.uniform(), self.min_level, self.max_level)
        x_t = nets.teacher.schedule.add_noise(x0.detach(), batch.random.normal_like(x0), t)
        scales = (scale, scale if self.guided_networks == "both" else 1.0)
        real, fake = guided_pair(nets.teacher, nets.fake_score, x_t, t, batch.cond, batch.uncond, scales)
        if self.weighting == "variance":
            direction = variational_direction(real, fake)
        else:
            direction = distribution_matching_direction(x0.detach(), real.x0, fake.x0)
        return surrogate(x0, direction), agreement(x0, real.x0, fake.x0) | {"reliability": reliability(x0, real.x0, fake.x0)}

    def critic_loss(self, nets: Networks, batch: Batch) -> Loss:
        x0, schedule = batch.carried.pop("x0"), nets.fake_score.schedule
        dropped = batch.random.shared_integer(10**6) < self.unconditional_share * 10**6
        t, eps = schedule.timestep(batch.random.uniform()), batch.random.normal_like(x0)
        cond = batch.uncond if dropped else batch.cond
        loss = denoising_score_matching(nets.fake_score, x0, eps, t, cond, self.fake_score_loss)
        return loss, {"denoising": loss.detach()}

    def draw_guidance(self, batch: Batch) -> float:
        """The guidance scale of this turn, the same on every rank."""
        if not self.guidance_range:
            return self.guidance_scale
        low, high = self.guidance_range
        return low + (high - low) * batch.random.shared_integer(2**20 + 1) / 2**20

    def generate(self, nets: Networks, batch: Batch) -> Tensor:
        """x0 (B, ...) of the student's one step from unit noise, with gradient."""
        noise = batch.random.normal((len(batch.random.slots), *batch.sample_shape))
        sampler = self.sampler(nets.student.schedule)
        return backward_simulation(nets.student, sampler, noise, batch.cond, batch.random.normal_like, 0)[0].x0
