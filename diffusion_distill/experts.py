"""Several denoisers that are one: each serves a part of the noise levels, as in a mixture of experts switched by timestep."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .families import Cond, Family
from .prediction import Prediction
from .schedule import NoiseSchedule


class Experts(nn.Module):
    """Calls like a `Denoiser`; `experts` go from noise to data, and expert k + 1 takes over below `boundaries[k]`.

    A timestep on a boundary belongs to the noisier expert, as in diffusers' pipelines with two transformers. The weights, the
    schedule and the prediction type are the experts' own; this holds nothing beside them.

    Raises:
        ValueError: when called with timesteps of more than one expert.
    """

    def __init__(self, experts: Sequence[Denoiser], boundaries: Sequence[float]):
        super().__init__()
        if len(boundaries) != len(experts) - 1 or any(a <= b for a, b in zip(boundaries, boundaries[1:])):
            raise ValueError(f"boundaries: got {list(boundaries)}; {len(experts) - 1} descending timesteps are needed")
        self.experts, self.boundaries = nn.ModuleList(experts), tuple(boundaries)

    @property
    def schedule(self) -> NoiseSchedule:
        return self._first.schedule

    @property
    def prediction_type(self) -> str:
        return self._first.prediction_type

    @property
    def family(self) -> Family:
        return self._first.family

    @property
    def _first(self) -> Denoiser:
        return denoisers(self)[0]

    def number(self, t: float) -> int:
        """Which expert serves timestep `t`, from 0."""
        return sum(t < boundary for boundary in self.boundaries)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """Prediction at x_t (B, ...) and t (B,) of the one expert that serves all of t."""
        lowest, highest = torch.stack(torch.aminmax(t)).tolist()
        number = self.number(highest)
        if self.number(lowest) != number:
            raise ValueError(f"timesteps {lowest} to {highest} of one call belong to several experts; boundaries: {list(self.boundaries)}")
        prediction: Prediction = self.experts[number](x_t, t, cond)
        return prediction


Student = Denoiser | Experts


def denoisers(student: Student) -> list[Denoiser]:
    """The student's networks, from noise to data."""
    return list(student.experts) if isinstance(student, Experts) else [student]  # type: ignore[arg-type]


def expert_number(student: Student, t: float) -> int:
    """Which of `denoisers(student)` serves timestep `t`."""
    return student.number(t) if isinstance(student, Experts) else 0


def with_models(student: Student, models: Sequence[nn.Module]) -> Student:
    """The student that `models`, plain or with merged adapters, make in place of its own; without autocast."""
    plain = [Denoiser(model, d.schedule, d.prediction_type, d.family) for model, d in zip(models, denoisers(student), strict=True)]
    return Experts(plain, student.boundaries) if isinstance(student, Experts) else plain[0]
