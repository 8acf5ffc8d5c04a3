"""Solver-based consistency distillation: the intervals of a deterministic solver, and one of its steps.

K intervals between K + 1 timesteps, the clean end first; the student at the noisy end of an interval learns from itself at the other
end, which one step of the teacher reaches (LCM, arXiv:2310.04378, sec. 4.3). Few-step samplers visit timesteps of the same grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .denoiser import Denoiser, guided
from .errors import reject
from .families import Cond
from .prediction import Prediction
from .sampler import uniform_timesteps
from .schedule import NoiseSchedule, VariancePreserving


def solver_timesteps(schedule: NoiseSchedule, intervals: int, shift: float = 1.0) -> tuple[float, ...]:
    """`intervals` + 1 ascending timesteps: (0, 19, 39, ..., 999) for 50 on a VP schedule of 1000, (0, 20, ..., 1000) for flow matching.

    The clean end of a VP schedule is its timestep 0, whose signal is a little below 1, as in the released LCM and PCM code.

    Raises:
        InputError: for intervals of unequal length on a VP schedule, where neither `LCMScheduler` nor DDIM could follow them.
    """
    if isinstance(schedule, VariancePreserving):
        length = len(schedule.alphas_cumprod)
        if length % intervals:
            divisors = [n for n in range(1, length + 1) if length % n == 0]
            raise reject("solver_intervals", intervals, f"a divisor of the schedule's {length} timesteps: {divisors}")
        if shift != 1:
            raise reject("timestep_shift", shift, "1 for a DDPM-style teacher; the shift belongs to flow matching")
    return (0.0, *reversed(uniform_timesteps(schedule, intervals, shift)))


def as_table(timesteps: Sequence[float], device: torch.device) -> Tensor:
    """The timesteps (K + 1,) as a table to index, of the type in which samplers hand them to the network."""
    whole = all(t == int(t) for t in timesteps)
    return torch.tensor(timesteps, device=device, dtype=torch.long if whole else torch.float32)


def draw_interval(uniform: Tensor, intervals: int) -> Tensor:
    """Index i (B,) in [0, intervals) of the interval from timestep i + 1 to timestep i, from numbers (B,) in [0, 1)."""
    return (uniform.double() * intervals).long()


def segment_start(interval: Tensor, intervals: int, segments: int) -> Tensor:
    """Index (B,) of the timestep at the clean end of the segment in which each interval (B,) lies: the largest of
    floor(m intervals / segments) that is at most `interval` (the edges of the released PCM code)."""
    edges = torch.arange(segments, device=interval.device) * intervals // segments
    return edges[torch.searchsorted(edges, interval, right=True) - 1]


def served_timesteps(timesteps: Sequence[float], steps: int) -> tuple[float, ...]:
    """`steps` timesteps of the solver grid, from noise to data, as `LCMScheduler` picks them: [999, 759, 499, 259] for 4 of 50.

    Raises:
        InputError: for more steps than intervals.
    """
    grid = list(reversed(timesteps[1:]))
    if steps > len(grid):
        raise reject("num_inference_steps", steps, f"at most the {len(grid)} solver_intervals")
    return tuple(grid[i * len(grid) // steps] for i in range(steps))


def jump(schedule: NoiseSchedule, pred: Prediction, s: Tensor) -> Tensor:
    """x_s (B, ...) at timesteps s (B,) on the straight line of one prediction: a DDIM step (arXiv:2010.02502, eq. 12), an Euler step."""
    return schedule.add_noise(pred.x0, pred.eps, s)


@torch.no_grad()
def solver_step(teacher: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, uncond: Cond, scale: float | Tensor) -> Tensor:
    """x_s (B, ...) by one step of the guided teacher from x_t (B, ...), t (B,) to s (B,); its x0 and eps are both guided."""
    return jump(teacher.schedule, guided(teacher, x_t, t, cond, uncond, scale), s)
