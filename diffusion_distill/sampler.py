"""The student's own sampler as data: training roll-outs, validation grids, export and the model card read this one object."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import reject
from .families import Cond
from .schedule import NoiseSchedule, VariancePreserving

Draw = Callable[[Tensor], Tensor]  # noise shaped like its argument


@dataclass(frozen=True)
class FewStepSampler:
    """Visits `timesteps` from noise to data.

    `sde` predicts x0 and diffuses it to the next timestep with fresh noise (LCM, DMD2); `ode` carries the predicted noise
    along (DDIM, Euler). The first timestep receives unit noise as it is, whatever sigma is there: that is what makes a
    one-step student at an inner conditioning timestep possible (DMD2 app. on SDXL at 399). `guidance_scale` 1 is off.
    """

    timesteps: tuple[float, ...]
    kind: Literal["sde", "ode"] = "sde"
    guidance_scale: float = 1.0

    def validate(self, schedule: NoiseSchedule, prediction_type: str) -> None:
        """Raise InputError unless the timesteps are inside `schedule`, strictly descending, and give the network's x0 a meaning."""
        if not self.timesteps:
            raise reject("timesteps", self.timesteps, "at least one timestep is needed")
        for t in self.timesteps:
            if not schedule.contains(t):
                raise reject("timesteps", t, f"the teacher's {schedule.accepted}")
            if prediction_type == "epsilon" and schedule.alpha(torch.tensor(t)) == 0:
                raise reject("timesteps", t, "an epsilon network says nothing of x0 where the signal is zero; choose a smaller timestep")
        if any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:])):
            raise reject("timesteps", list(self.timesteps), "they must descend from noise to data")

    def roll_out(self, student: Denoiser, noise: Tensor, cond: Cond, draw: Draw, stop: int) -> tuple[Tensor, Tensor]:
        """The student's input (x_t, t), shapes (B, ...) and (B,), at rung `stop` of its own trajectory from `noise`."""
        x_t, t = noise, self._expand(0, noise)
        for rung in range(stop):
            pred = student(x_t, t, cond)
            t = self._expand(rung + 1, noise)
            eps = draw(pred.x0) if self.kind == "sde" else pred.eps
            x_t = student.schedule.add_noise(pred.x0, eps, t)
        return x_t, t

    @torch.no_grad()
    def sample(self, student: Denoiser, noise: Tensor, cond: Cond, draw: Draw) -> Tensor:
        """x0 (B, ...) from unit noise (B, ...) in `len(timesteps)` network calls."""
        x_t, t = self.roll_out(student, noise, cond, draw, len(self.timesteps) - 1)
        x0: Tensor = student(x_t, t, cond).x0
        return x0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"timesteps": list(self.timesteps)}

    def _expand(self, rung: int, like: Tensor) -> Tensor:
        t = self.timesteps[rung]
        return torch.full((len(like),), t, device=like.device, dtype=torch.long if t == int(t) else torch.float32)


def uniform_timesteps(schedule: NoiseSchedule, steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """`steps` evenly spaced timesteps that start at the noisiest one.

    VP: diffusers' "trailing" spacing, [999, 749, 499, 249] for four. Otherwise levels 1 - i/steps, shifted by
    shift u / (1 + (shift - 1) u) (arXiv:2403.03206, eq. 23): [1000, 750, 500, 250] for flow matching.
    """
    if steps < 1:
        raise reject("num_inference_steps", steps, "at least 1")
    levels = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    if isinstance(schedule, VariancePreserving):
        return tuple((levels * len(schedule.alphas_cumprod)).round().sub(1).tolist())
    return tuple(schedule.timestep(shift * levels / (1 + (shift - 1) * levels)).tolist())


def ode_sample(teacher: Denoiser, noise: Tensor, cond: Cond, timesteps: Sequence[float]) -> Tensor:
    """The teacher's deterministic sample (DDIM / Euler) over `timesteps`, last call to x0."""

    def unused(x: Tensor) -> Tensor:
        raise AssertionError("an ode sampler draws no noise")

    return FewStepSampler(tuple(timesteps), "ode").sample(teacher, noise, cond, unused)
