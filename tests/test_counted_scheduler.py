"""Schedulers that visit the trained timesteps when told how many: against the closed form of the grid, step by step."""

import itertools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from diffusion_distill import counted_scheduler as module
from diffusion_distill.counted_scheduler import bent_grid, counted_scheduler
from diffusion_distill.errors import InputError
from diffusion_distill.sampler import FewStepSampler, uniform_timesteps
from diffusion_distill.schedule import NoiseSchedule, RectifiedFlow, prediction_type_of

FLOW_OPTIONS: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
TEACHER = UniPCMultistepScheduler(**FLOW_OPTIONS)
FLOW = RectifiedFlow()
DDPM = DDIMScheduler(clip_sample=False)


def found(grids: list[list[float]], kind: Any, teacher: Any = TEACHER) -> Any:
    samplers = [FewStepSampler(tuple(grid), kind) for grid in grids]
    return counted_scheduler(NoiseSchedule.from_scheduler(teacher), samplers, prediction_type_of(teacher), teacher)


def shifted(steps: int, shift: float) -> list[float]:
    levels = [1 - i / steps for i in range(steps)]
    return [1000 * shift * u / (1 + (shift - 1) * u) for u in levels]


def visited(scheduler: Any, steps: int) -> list[float]:
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == pytest.approx((1000 * scheduler.sigmas[:-1].double()).tolist(), rel=1e-6)
    timesteps: list[float] = scheduler.timesteps.tolist()
    return timesteps


@pytest.mark.parametrize("kind", ["ode", "sde"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 12.0])
def test_every_evenly_spaced_grid_of_flow_matching_is_visited(kind: str, shift: float) -> None:
    for steps in range(1, 9):
        grid = shifted(steps, shift)
        assert grid == pytest.approx(uniform_timesteps(FLOW, steps, shift))
        assert visited(found([grid], kind), steps) == pytest.approx(grid, rel=1e-6)


def test_without_the_flow_map_scheduler_one_number_of_steps_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_flow_map_scheduler", lambda: None)
    scheduler = found([shifted(4, 5.0)], "ode")
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    assert visited(scheduler, 4) == pytest.approx(shifted(4, 5.0), rel=1e-6)
    with pytest.raises(InputError, match="evenly spaced"):
        found([shifted(4, 5.0), shifted(2, 5.0)], "ode")


@pytest.mark.parametrize("grid", [[1000.0, 400.0], [1000.0, 900.0, 100.0], [1000.0, 600.0, 450.0]])
def test_two_and_three_timesteps_are_free(grid: list[float]) -> None:
    assert visited(found([grid], "sde"), len(grid)) == pytest.approx(grid, rel=1e-6)


def test_several_numbers_of_steps_of_one_shift_are_one_deterministic_scheduler() -> None:
    grids = [shifted(steps, 5.0) for steps in (1, 4, 2, 8)]
    scheduler = found(grids, "ode")
    assert scheduler.config.shift == 5.0
    for grid in grids:
        assert visited(scheduler, len(grid)) == pytest.approx(grid, rel=1e-12)


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_steps_are_the_samplers(kind: str) -> None:
    """x' = (1 - s') x0 + s' eps with x0 = x - s v and eps = x + (1 - s) v, or new noise for sde."""
    grid = shifted(4, 5.0)
    scheduler, generator = found([grid], kind), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)  # as WanPipeline does
    sigmas = [t / 1000 for t in grid] + [0.0]
    for t, (s, after) in zip(scheduler.timesteps, itertools.pairwise(sigmas), strict=True):
        x, v = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).float() for _ in range(2))
        torch.manual_seed(7)
        output = scheduler.step(v, t, x, return_dict=False)[0]
        torch.manual_seed(7)
        eps = torch.randn(x.shape) if kind == "sde" else x + (1 - s) * v
        torch.testing.assert_close(output, (1 - after) * (x - s * v) + after * eps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("grids", "kind"),
    [
        ([[900.0, 400.0]], "sde"),  # does not start at the noisiest
        ([[1000.0, 900.0, 500.0, 490.0]], "ode"),
        ([[1000.0, 500.0, 450.0]], "sde"),  # of the form, but 1000.002 after the scheduler's rounding
        ([shifted(4, 1.0), shifted(2, 1.0)], "sde"),
        ([shifted(4, 1.0), shifted(2, 3.0)], "ode"),
    ],
)
def test_other_grids_of_flow_matching_are_refused_in_one_line(grids: list[list[float]], kind: str) -> None:
    with pytest.raises(
        InputError, match=r"timesteps: got .*; evenly spaced .* with sampling 'sde' one number of steps: the pipeline's call"
    ):
        found(grids, kind)


def test_grids_that_no_bend_gives_have_none() -> None:
    assert bent_grid([900.0, 400.0], 1000) is None
    assert bent_grid([1000.0], 1000) == {"shift": 1.0}


@pytest.mark.parametrize("kind", ["ode", "sde"])
@pytest.mark.parametrize("grid", [[999.0], [999.0, 499.0], [999.0, 749.0, 499.0, 249.0]])
def test_trailing_grids_of_ddpm_are_visited(grid: list[float], kind: str) -> None:
    scheduler = found([grid], kind, DDPM)
    scheduler.set_timesteps(len(grid))
    assert scheduler.timesteps.tolist() == grid
    assert isinstance(scheduler, DDIMScheduler if kind == "ode" and len(grid) > 1 else LCMScheduler)


def test_an_uneven_number_of_steps_is_served_by_dpm_solver() -> None:
    """DDIM would step from 666 to 333, and the grid goes on at 332."""
    scheduler = found([[999.0, 666.0, 332.0]], "ode", DDPM)
    scheduler.set_timesteps(3)
    assert isinstance(scheduler, DPMSolverMultistepScheduler) and scheduler.timesteps.tolist() == [999, 666, 332]
    power = DDPM.alphas_cumprod.double()[scheduler.timesteps]
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), ((1 - power) / power).sqrt())


@pytest.mark.parametrize(("grid", "kind"), [([399.0], "sde"), ([399.0], "ode"), ([900.0, 399.0, 20.0], "sde"), ([900.0, 399.0], "ode")])
def test_other_grids_of_ddpm_are_refused_in_one_line(grid: list[float], kind: str) -> None:
    with pytest.raises(InputError, match=r"timesteps: got \[\[.*\]\]; evenly spaced timesteps .*: the pipeline's call takes no others"):
        found([grid], kind, DDPM)


@pytest.mark.parametrize("teacher", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_matching_is_read_off_the_solvers_of_sana_and_wan(teacher: Any) -> None:
    """Their own `add_noise` is the oracle; they hand the network the whole part of 1000 sigma."""
    scheduler = teacher(**FLOW_OPTIONS)
    scheduler.set_timesteps(5)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule == FLOW and prediction_type_of(scheduler) == "flow_prediction"
    x0, eps = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = scheduler.add_noise(x0, eps, scheduler.timesteps)
    t = 1000 * scheduler.sigmas[:-1].double()
    assert scheduler.timesteps.tolist() == t.floor().tolist()
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), expected)
