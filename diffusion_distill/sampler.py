"""The student's own sampler as data: training roll-outs, validation grids, export and the model card read this one object."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import reject
from .families import Cond
from .prediction import Prediction
from .schedule import NoiseSchedule, RectifiedFlow, VariancePreserving, expand_dims

Draw = Callable[[Tensor], Tensor]  # noise shaped like its argument


@dataclass(frozen=True)
class FewStepSampler:
    """Visits `timesteps` from noise to data.

    `sde` predicts x0 and diffuses it to the next timestep with fresh noise (LCM, DMD2); `ode` carries the predicted noise
    along (DDIM, Euler); `tcd` carries it to timestep (1 - gamma) of the next and diffuses from there (arXiv:2402.19159, sec. 4.2),
    and ends at timestep 0 instead of x0, as `TCDScheduler` does. The first timestep receives unit noise as it is, whatever sigma is
    there: that is what makes a one-step student at an inner conditioning timestep possible (DMD2 app. on SDXL at 399).
    `guidance_scale` 1 is off.
    """

    timesteps: tuple[float, ...]
    kind: Literal["sde", "ode", "tcd"] = "sde"
    guidance_scale: float = 1.0
    gamma: float = 0.0  # share of fresh noise, `tcd` only
    guidance_embedding: float | None = None  # guidance scale that the network sees as an input, where it has one

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
        if not 0 <= self.gamma <= (1 if self.kind == "tcd" else 0):
            raise reject("gamma", self.gamma, "a share from 0 to 1 for tcd sampling, 0 for any other")
        if self.kind == "tcd" and not isinstance(schedule, VariancePreserving):
            raise reject("sampling", self.kind, "sde or ode: tcd sampling is for DDPM-style teachers, whose TCDScheduler exists")

    def roll_out(self, student: Denoiser, noise: Tensor, cond: Cond, draw: Draw, stop: int) -> tuple[Tensor, Tensor]:
        """The student's input (x_t, t), shapes (B, ...) and (B,), at rung `stop` of its own trajectory from `noise`."""
        x_t, t, cond = noise, self._expand(0, noise), self._condition(student, cond)
        for rung in range(stop):
            pred = student(x_t, t, cond)
            t = self._expand(rung + 1, noise)
            x_t = self._step(student.schedule, pred, t, draw)
        return x_t, t

    @torch.no_grad()
    def sample(self, student: Denoiser, noise: Tensor, cond: Cond, draw: Draw) -> Tensor:
        """x0 (B, ...) from unit noise (B, ...) in `len(timesteps)` network calls."""
        x_t, t = self.roll_out(student, noise, cond, draw, len(self.timesteps) - 1)
        pred: Prediction = student(x_t, t, self._condition(student, cond))
        return student.schedule.add_noise(pred.x0, pred.eps, torch.zeros_like(t)) if self.kind == "tcd" else pred.x0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"timesteps": list(self.timesteps)}

    def _step(self, schedule: NoiseSchedule, pred: Prediction, t: Tensor, draw: Draw) -> Tensor:
        """The input (B, ...) at the next timesteps t (B,) from the prediction before it."""
        if self.kind == "sde":
            return schedule.add_noise(pred.x0, draw(pred.x0), t)
        if self.kind == "ode" or self.gamma == 0:
            return schedule.add_noise(pred.x0, pred.eps, t)
        s = ((1 - self.gamma) * t.double()).floor().long()
        a, b = (expand_dims(c, pred.x0) for c in schedule.transition(t, s))
        return a * schedule.add_noise(pred.x0, pred.eps, s) + b * draw(pred.x0)

    def _condition(self, student: Denoiser, cond: Cond) -> Cond:
        if self.guidance_embedding is None:
            return cond
        like = next(iter(cond.values()))
        return student.family.with_guidance(student.model, cond, torch.full((len(like),), self.guidance_embedding, device=like.device))

    def _expand(self, rung: int, like: Tensor) -> Tensor:
        t = self.timesteps[rung]
        return torch.full((len(like),), t, device=like.device, dtype=torch.long if t == int(t) else torch.float32)


def check_steps(num_inference_steps: Sequence[int]) -> tuple[int, ...]:
    """The numbers of network calls that one student serves, as a tuple.

    Raises:
        InputError: unless they are one or more different numbers of at least 1.
    """
    steps = tuple(num_inference_steps)
    if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
        raise reject("num_inference_steps", steps, "one or more whole numbers, each at least 1 and each once")
    return steps


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


def timesteps_at_ratios(schedule: NoiseSchedule, ratios: Sequence[float]) -> tuple[float, ...]:
    """Timesteps at noise-to-signal ratios; whole numbers for VP and flow matching.

    The schedulers that VP students are exported with visit no others, and those of flow matching carry float32 sigmas, from which a
    fraction comes back a little different.
    """
    timesteps = schedule.timestep_at_ratio(torch.tensor(ratios, dtype=torch.float64))
    return tuple((timesteps.round() if isinstance(schedule, VariancePreserving | RectifiedFlow) else timesteps).tolist())


def ode_sample(teacher: Denoiser, noise: Tensor, cond: Cond, timesteps: Sequence[float]) -> Tensor:
    """The teacher's deterministic sample (DDIM / Euler) over `timesteps`, last call to x0."""

    def unused(x: Tensor) -> Tensor:
        raise AssertionError("an ode sampler draws no noise")

    return FewStepSampler(tuple(timesteps), "ode").sample(teacher, noise, cond, unused)
