"""What rectified-flow methods share: a student that learns from stored pairs (noise, x0) and is sampled by an ODE solver."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..losses import sample_distance
from ..prediction import Prediction
from ..sampler import FewStepSampler, check_steps, uniform_timesteps
from ..schedule import NoiseSchedule
from .base import Method, Space, check_choices, check_numbers


@dataclass
class OnPairs(Method):
    """What learns from stored pairs (noise, x0) of a deterministic sampler, and is sampled by such a one: Euler, or DDIM."""

    num_inference_steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of network calls that the one student serves, the default first; evenly spaced timesteps each."""
    loss: Literal["l2", "pseudo_huber"] = "l2"
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
        return sample_distance(pred.view(space), target.view(space), self.loss, self.huber_scale)
