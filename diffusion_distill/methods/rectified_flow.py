"""Rectified flow: reflow (Liu et al., arXiv:2209.03003), its distillation, and what later papers changed in both.

InstaFlow (2309.06380) does it to text-to-image models; improved RF (2405.20320) brings the time law, the loss and its weights; Rectified
Diffusion (2410.07303) keeps any teacher's own process and prediction type; SlimFlow (2407.12718) anneals into a smaller network.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import reject
from ..losses import image_pseudo_huber
from ..networks import Networks
from ..prediction import Prediction
from ..sampler import FewStepSampler, check_steps, uniform_timesteps
from ..schedule import NoiseSchedule, expand_dims
from ..time_laws import logit_normal, u_shaped
from .base import Batch, Loss, Method, Update, check_choices, check_numbers

Space = Literal["network", "sample", "epsilon", "v_prediction", "flow_prediction"]
Distance = Literal["l2", "pseudo_huber"]


@dataclass
class _OnPairs(Method):
    """What learns from stored pairs (noise, x0) of a deterministic sampler, and is sampled by such a one: Euler, or DDIM."""

    num_inference_steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of network calls that the one student serves, the default first; evenly spaced timesteps each."""
    loss: Distance = "l2"
    """Mean squared error, or pseudo-Huber sqrt(|d|^2 + c^2) - c over all dimensions of a sample."""
    huber_scale: float = 0.00054
    """c of the pseudo-Huber loss is this times the square root of the number of dimensions."""
    loss_space: Space = "network"
    """What is compared: the output of the network, or what it says of x0 (`sample`), of the noise, of v or of the flow."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, above_zero=("huber_scale",))
        self.num_inference_steps = check_steps(self.num_inference_steps)

    @property
    def needs_pairs(self) -> bool:
        return True

    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        return self.samplers(schedule)[0]

    def samplers(self, schedule: NoiseSchedule) -> tuple[FewStepSampler, ...]:
        return tuple(FewStepSampler(uniform_timesteps(schedule, steps), "ode") for steps in self.num_inference_steps)

    def distance(self, pred: Prediction, target: Prediction, prediction_type: str) -> Tensor:
        """One number a sample, (B,): the loss between two predictions at the same x_t."""
        space = prediction_type if self.loss_space == "network" else self.loss_space
        a, b = pred.view(space), target.view(space)
        if self.loss == "l2":
            return (a - b).square().flatten(1).mean(1)
        return image_pseudo_huber(a, b, self.huber_scale * math.sqrt(a[0].numel()))


@dataclass
class Reflow(_OnPairs):
    """The student regresses on the straight line between the two ends of a pair: x_t = alpha x0 + sigma noise of one and the same pair.

    For a flow teacher this is 2-rectified flow, v = noise - x0 (2209.03003, eq. 1), and with a reflowed student as the teacher the next
    rectification. For an epsilon or v teacher it is Rectified Diffusion (2410.07303): the same regression in the network's
    own prediction type and process. Defaults are those papers'.
    """

    time_law: Literal["uniform", "u_shaped", "logit_normal"] = "uniform"
    """Law of the noise level."""
    u_steepness: float = 4.0
    """a of the u-shaped law, density exp(a u) + exp(a (1 - u)) (improved RF)."""
    logit_mean: float = 0.0
    """Mean of the logit in the logit-normal law."""
    logit_std: float = 1.0
    """Standard deviation of the logit in the logit-normal law."""
    weighting: Literal["uniform", "signal", "inverse_noise"] = "uniform"
    """Weight of a sample: 1, alpha, or 1 / sigma (improved RF: 1 - t and 1 / t)."""
    annealing: Literal["none", "linear", "cosine", "exponential"] = "none"
    """How beta falls from 1 to 0 where the noise of a pair is sqrt(1 - beta^2) noise + beta fresh noise (SlimFlow, sec. 3.1)."""
    annealing_steps: int = 0
    """Steps of the annealing: its length, or the time constant of the exponential."""
    student_config: str = ""
    """JSON of configuration values in which a student of the teacher's class differs, such as {"block_out_channels": [16, 32]}; it
    starts from random weights. Empty: the student starts as the teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, above_zero=("u_steepness", "logit_std"))
        if (self.annealing == "none") != (self.annealing_steps == 0) or self.annealing_steps < 0:
            raise reject("annealing_steps", self.annealing_steps, "1 or more where annealing is chosen, 0 where it is none")
        self.config_changes()

    def config_changes(self) -> dict[str, object]:
        try:
            changes = json.loads(self.student_config or "{}")
        except json.JSONDecodeError:
            changes = None
        if not isinstance(changes, dict):
            raise reject("student_config", self.student_config, 'a JSON object such as {"block_out_channels": [16, 32]}')
        return changes

    def student_model(self, model: nn.Module) -> nn.Module:
        if not self.student_config:
            return model
        config, changes = model.config, self.config_changes()
        if unknown := sorted(changes.keys() - config.keys()):  # type: ignore[operator, union-attr]
            raise reject("student_config", unknown, f"keys of the configuration of {type(model).__name__}")
        smaller: nn.Module = type(model).from_config({**config, **changes})  # type: ignore[attr-defined, dict-item]
        return smaller

    def beta(self, step: int) -> float:
        """Share of fresh noise at `step`: 1 pairs x0 with independent noise (1-rectified flow), 0 with its own."""
        progress = step / self.annealing_steps if self.annealing_steps else 1.0
        if self.annealing == "exponential":
            return math.exp(-progress)
        straight = 1 - min(1.0, progress)
        return (1 - math.cos(math.pi * straight)) / 2 if self.annealing == "cosine" else straight

    def draw_level(self, batch: Batch) -> Tensor:
        uniform = batch.random.uniform()
        if self.time_law == "u_shaped":
            return u_shaped(uniform, self.u_steepness)
        return logit_normal(uniform, self.logit_mean, self.logit_std) if self.time_law == "logit_normal" else uniform

    def updates(self, step: int) -> Iterator[Update]:
        yield ("student",), partial(self.reflow_loss, beta=self.beta(step))

    def reflow_loss(self, nets: Networks, batch: Batch, beta: float = 0.0) -> Loss:
        assert batch.x0 is not None and batch.noise is not None
        student: Denoiser = nets.student
        t = student.schedule.timestep(self.draw_level(batch))
        noise = math.sqrt(1 - beta**2) * batch.noise + beta * batch.random.normal_like(batch.noise) if beta else batch.noise
        pred = student(student.schedule.add_noise(batch.x0, noise, t), t, batch.cond)
        distance = self.distance(pred, replace(pred, x0=batch.x0, eps=noise), student.prediction_type)
        return (self.weights(student.schedule, t) * distance).mean(), {"beta": distance.new_tensor(beta)}

    def weights(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        """(B,); sigma is at least 1e-5."""
        if self.weighting == "uniform":
            return torch.ones_like(t, dtype=torch.float32)
        return (schedule.alpha(t) if self.weighting == "signal" else 1 / schedule.sigma(t).clamp(min=1e-5)).float()


@dataclass
class ReflowDistillation(_OnPairs):
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
