"""Reflow: rectified flow on a teacher's pairs (Liu et al., arXiv:2209.03003), and what later papers changed in it.

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
from ..networks import Networks
from ..schedule import NoiseSchedule
from ..time_laws import logit_normal, u_shaped
from .base import Batch, Loss, Update, check_numbers
from .on_pairs import OnPairs


@dataclass
class Reflow(OnPairs):
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
