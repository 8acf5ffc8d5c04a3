"""Distillation of a rectified flow (Liu et al., arXiv:2209.03003; InstaFlow, 2309.06380), with SlimFlow's two-step term (2407.12718)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..networks import Networks
from ..prediction import Prediction
from ..schedule import NoiseSchedule, expand_dims
from .base import Batch, Loss, Space, Update, check_numbers
from .on_pairs import OnPairs


@dataclass
class ReflowDistillation(OnPairs):
    """The student regresses on x0 of a pair from the timesteps that its samplers visit, and from no others.

    One step is the distillation of 2209.03003 and InstaFlow: one jump from the noise to x0; the teacher should be a reflowed
    student. Several numbers of steps are its k-step distillation, each number trained equally often.
    """

    num_inference_steps: tuple[int, ...] = (1,)
    """Numbers of network calls that the one student serves, the default first; evenly spaced timesteps each."""
    loss_space: Space = "sample"
    """What is compared: what the network says of x0 (`sample`), of the noise, of v or of the flow, or its output (`network`)."""
    inputs: Literal["line", "student"] = "line"
    """Inputs of inner steps: on the line between the ends of the pair (the papers), or the student's own trajectory from the noise."""
    two_step_weight: float = 0.0
    """Weight of a second term at fresh noise: the student's jump against its own step to a level in [0.2, 0.8] and the teacher's jump
    from there (SlimFlow, sec. 3.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, zero_or_more=("two_step_weight",))

    def updates(self, step: int) -> Iterator[Update]:
        yield ("student",), self.distillation_loss

    def distillation_loss(self, nets: Networks, batch: Batch) -> Loss:
        assert batch.x0 is not None and batch.noise is not None
        x_t, t = self.student_inputs(nets.student, batch) if self.inputs == "student" else self.line_inputs(nets.student.schedule, batch)
        loss = self.jump_loss(nets.student, nets.student(x_t, t, batch.cond), x_t, batch.x0)
        if not self.two_step_weight:
            return loss, {}
        two_step = self.two_step_loss(nets, batch)
        return loss + self.two_step_weight * two_step, {"pairs": loss.detach(), "two_step": two_step.detach()}

    def jump_loss(self, student: Denoiser, pred: Prediction, x_t: Tensor, x0: Tensor) -> Tensor:
        """Mean distance of the student's prediction at x_t from the one that says x0."""
        target = Prediction.from_output(x0, "sample", x_t, pred.alpha, pred.sigma, pred.sigma_data)
        return self.distance(pred, target, student.prediction_type).mean()

    def line_inputs(self, schedule: NoiseSchedule, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x_t, t), each sample at a timestep of its own; at the noisiest one the noise itself, as in sampling."""
        assert batch.x0 is not None and batch.noise is not None
        grids = [sampler.timesteps for sampler in self.samplers(schedule)]
        rungs = torch.tensor([t for grid in grids for t in grid], device=batch.noise.device)
        shares = torch.tensor([1 / len(grids) / len(grid) for grid in grids for _ in grid], device=batch.noise.device)
        index = torch.searchsorted(shares.cumsum(0), batch.random.uniform(), right=True)
        t = rungs[index.clamp(max=len(rungs) - 1)]
        x_t = schedule.add_noise(batch.x0, batch.noise, t)
        return torch.where(expand_dims(t, x_t) == grids[0][0], batch.noise, x_t), t

    def student_inputs(self, student: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x_t, t) at one step of the student's own trajectory, the same step for all samples."""
        assert batch.noise is not None
        samplers = self.samplers(student.schedule)
        sampler = samplers[batch.random.shared_integer(len(samplers))]
        rung = batch.random.shared_integer(len(sampler.timesteps))
        with torch.no_grad():
            return sampler.roll_out(student, batch.noise, batch.cond, batch.random.normal_like, rung)

    def two_step_loss(self, nets: Networks, batch: Batch) -> Tensor:
        student: Denoiser = nets.student
        noise = batch.random.normal((len(batch.random.slots), *batch.sample_shape))
        x_t, t = self.sampler(student.schedule).roll_out(student, noise, batch.cond, batch.random.normal_like, 0)
        pred = student(x_t, t, batch.cond)
        with torch.no_grad():
            middle = student.schedule.timestep(0.2 + 0.6 * batch.random.uniform())
            x0 = nets.teacher(student.schedule.add_noise(pred.x0, pred.eps, middle), middle, batch.cond).x0
        return self.jump_loss(student, pred, x_t, x0)
