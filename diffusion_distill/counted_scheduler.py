"""Stock schedulers for pipelines whose call takes a number of steps and no timesteps: of itself, the scheduler visits the trained ones."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, SchedulerMixin

from .errors import reject
from .sampler import FewStepSampler
from .schedule import NoiseSchedule, RectifiedFlow
from .student_scheduler import student_scheduler


def counted_scheduler(
    schedule: NoiseSchedule, samplers: Sequence[FewStepSampler], prediction_type: str, teacher_scheduler: SchedulerMixin
) -> SchedulerMixin:
    """A scheduler with the steps of `student_scheduler`'s that visits the timesteps of each of `samplers` when told their number.

    VP: that scheduler itself, where its grid is theirs. Flow matching: `FlowMapEulerDiscreteScheduler` for ode, which is evenly spaced
    with any shift; flow-matching Euler and `FlowMatchLCMScheduler` for one number of steps, their grid bent by two options.

    Raises:
        InputError: where no stock scheduler does that.
    """
    stock = student_scheduler(schedule, samplers, prediction_type, teacher_scheduler)
    grids = [list(sampler.timesteps) for sampler in samplers]
    candidates = _flow_matching(schedule, grids, samplers[0].kind) if isinstance(schedule, RectifiedFlow) else iter([stock])
    for candidate in candidates:
        if all(_visits(candidate, grid) for grid in grids):
            return candidate
    accepted = "evenly spaced timesteps from the noisiest on (timestep_shift is free)"
    accepted += ", and with sampling 'sde' one number of steps" if isinstance(schedule, RectifiedFlow) else ""
    raise reject("timesteps", grids, f"{accepted}: the pipeline's call takes no others")


def _visits(scheduler: Any, grid: list[float]) -> bool:
    scheduler.set_timesteps(len(grid))
    return bool(np.allclose(scheduler.timesteps.double().numpy(), grid, rtol=1e-6, atol=0))  # sigmas are float32


def _flow_matching(schedule: RectifiedFlow, grids: list[list[float]], kind: str) -> Iterator[SchedulerMixin]:
    length = schedule.num_train_timesteps
    if kind == "ode" and (flow_map := _flow_map_scheduler()) is not None:
        yield flow_map(num_train_timesteps=length, shift=next((_shift(grid, length) for grid in grids if len(grid) > 1), 1.0))
    if len(grids) == 1 and (options := bent_grid(grids[0], length)) is not None:
        yield (FlowMatchLCMScheduler if kind == "sde" else FlowMatchEulerDiscreteScheduler)(num_train_timesteps=length, **options)


def _flow_map_scheduler() -> Any:
    """diffusers 0.42 has it, 0.41 does not. Without an end point its step is Euler's."""
    try:
        from diffusers import FlowMapEulerDiscreteScheduler
    except ImportError:
        return None
    return FlowMapEulerDiscreteScheduler


def _shift(grid: list[float], length: int) -> float:
    """The shift s with which s u / (1 + (s - 1) u), u = 1 - 1/n, is the second sigma of an evenly spaced grid."""
    u, sigma = 1 - 1 / len(grid), grid[1] / length
    return round(sigma * (1 - u) / (u * (1 - sigma)), 9)


def bent_grid(grid: Sequence[float], length: int) -> dict[str, float] | None:
    """Options with which flow-matching schedulers, told `len(grid)` steps, visit `grid`; None where there are none.

    Such a scheduler spaces u evenly from 1 to b = q / (length - 1 + q), its smallest sigma, shifts by q, and stretches the result from 1
    to `shift_terminal`. With a_i = i (1 - b) / (n - 1), that is 1 - sigma_i = c a_i / (q - (q - 1) a_i): c follows from the last sigma, and
    q from r = (1 - sigma_1) / (1 - sigma_last), by A q^2 + (length - 1) (A - r + 1) q + (length - 1) (r - 1) = 0, A = r (n - 1) - 1.
    Every evenly spaced grid with a shift has this form, and so has every one of two or three timesteps, although the scheduler's float32
    misses some of those where q is far below 1.
    """
    if grid[0] != length:
        return None
    if len(grid) == 1:
        return {"shift": 1.0}
    cleanness = 1 - np.array(grid) / length
    r = cleanness[1] / cleanness[-1]
    a = r * (len(grid) - 1) - 1
    if abs(a) < 1e-9:
        return {"shift": 1.0, "shift_terminal": grid[-1] / length}
    roots = np.roots([a, (length - 1) * (a - r + 1), (length - 1) * (r - 1)])
    usable = [float(root.real) for root in roots if root.imag == 0 and root.real > 0]
    return {"shift": min(usable), "shift_terminal": grid[-1] / length} if usable else None
