"""What consistency training shares: its noise levels, and one step of a teacher along its ODE.

Noise levels are noise-to-signal ratios s = sigma(t) / alpha(t), EDM's sigma, whatever process the teacher has: with z = x_t / alpha(t)
= x0 + s eps the probability-flow ODE is dz / ds = eps (EDM, arXiv:2206.00364, eq. 1 and 3, sigma(t) = t), and the network sees alpha(t) z.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from .prediction import Prediction
from .schedule import NoiseSchedule, expand_dims


def karras_levels(position: Tensor, lowest: float, highest: float, rho: float = 7.0) -> Tensor:
    """Levels, float64, from `lowest` at position 0 to `highest` at 1: even in s^(1 / rho) (arXiv:2206.00364, eq. 5)."""
    a, b = lowest ** (1 / rho), highest ** (1 / rho)
    levels = (a + position.double() * (b - a)) ** rho
    return levels.where(position > 0, lowest).where(position < 1, highest)  # to the last digit, where the map becomes the identity


def lognormal_shares(levels: Tensor, mean: float, std: float) -> Tensor:
    """Probability (N,) of each interval between `levels` (N + 1,) under ln s ~ N(mean, std^2), given that s is in one of them.

    iCT (arXiv:2310.14189), sec. 3.5.
    """
    mass = torch.erf((levels.log() - mean) / (std * 2**0.5)).diff()
    return mass / mass.sum()


def draw_intervals(shares: Tensor, uniform: Tensor) -> Tensor:
    """Index of an interval for each number of `uniform` (B,) in [0, 1), by inversion of `shares` (N,)."""
    cumulative = shares.cumsum(0).to(uniform.device)
    return torch.searchsorted(cumulative, uniform.double(), right=True).clamp(max=len(shares) - 1)


def draw_grid_levels(
    uniform: Tensor, intervals: int, lowest: float, highest: float, lognormal: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """The noisier and the cleaner end (B,), float64, of intervals in Karras spacing, drawn by numbers (B,) in [0, 1).

    Intervals are equally probable, or as under `lognormal`, mean and standard deviation of ln s.
    """
    levels = karras_levels(torch.linspace(0, 1, intervals + 1, dtype=torch.float64), lowest, highest)
    shares = lognormal_shares(levels, *lognormal) if lognormal else torch.full((intervals,), 1 / intervals).double()
    index = draw_intervals(shares, uniform)
    levels = levels.to(index.device)
    return levels[index + 1], levels[index]


def level_weight(s: Tensor, r: Tensor, kind: Literal["inverse_gap", "edm", "uniform"], sigma_data: float) -> Tensor:
    """Weight (B,), float64, of samples at levels s against neighbours r (B,): 1 / (s - r) (iCT, ECT), 1 / s^2 + 1 / sigma_data^2, or 1."""
    if kind == "inverse_gap":
        return 1 / (s - r)
    return 1 / s**2 + 1 / sigma_data**2 if kind == "edm" else torch.ones_like(s)


def shrinking_neighbour(s: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """r(s) = s (1 - q^-(stage + 1) (1 + k sigmoid(-b s))), at least 0: the neighbour of level s (ECT, arXiv:2406.14548, sec. 3.3)."""
    return (s * (1 - q ** -(stage + 1.0) * (1 + k * torch.sigmoid(-b * s)))).clamp(min=0)


def ratio_range(schedule: NoiseSchedule, lowest: float, highest: float) -> tuple[float, float]:
    """The ends of [lowest, highest], or the nearest ratios to them that `schedule` has a timestep for."""
    low, high = schedule.ratio(schedule.timestep_at_ratio(torch.tensor([lowest, highest], dtype=torch.float64))).tolist()
    return low, high


def teacher_step(
    predict: Callable[[Tensor, Tensor], Prediction],
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    solver: Literal["euler", "heun"],
) -> Tensor:
    """z (B, ...) = x_r / alpha(r) from x_t (B, ...), by one step of dz / ds = eps from timesteps t (B,) to the less noisy r (B,).

    `predict(x, t)` is the (guided) teacher. "euler" is the DDIM step in every process; "heun" has order two (arXiv:2206.00364,
    algorithm 1) and calls the teacher twice.
    """
    step = expand_dims(schedule.ratio(r) - schedule.ratio(t), x_t)
    z, eps = x_t / expand_dims(schedule.alpha(t), x_t), predict(x_t, t).eps
    euler = z + step * eps
    if solver == "euler":
        return euler
    return z + step * (eps + predict(expand_dims(schedule.alpha(r), x_t) * euler, r).eps) / 2


@contextmanager
def same_dropout(x: Tensor) -> Iterator[None]:
    """Random numbers drawn inside are drawn again by what follows: two passes on `x`'s device share their dropout."""
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        yield
