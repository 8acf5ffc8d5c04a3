"""The stock diffusers scheduler that samples a student exactly as it was trained."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)

from .errors import InputError, reject
from .sampler import FewStepSampler
from .schedule import NoiseSchedule, RectifiedFlow, VariancePreserving

# LCMScheduler blends its input into x0 with c_skip = .25 / (s^2 + .25), s = t * timestep_scaling (arXiv:2310.04378, app. D).
# Students here are trained without: at 1e10 c_out is exactly 1 and c_skip below 1e-20 from t = 1 on. 1e20 would overflow.
NO_SKIP = 1e10
PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def student_scheduler(
    schedule: NoiseSchedule, samplers: Sequence[FewStepSampler], prediction_type: str, teacher_scheduler: SchedulerMixin
) -> SchedulerMixin:
    """One scheduler, configured from the teacher's, whose steps are those of every one of `samplers`.

    VP: `LCMScheduler` (sde, or one step); `TCDScheduler` (tcd; its `eta` is the sampler's gamma, given at call time); DDIM with
    trailing spacing where its steps land on the grid, otherwise first-order DPM-Solver++, which is the same map (arXiv:2211.01095,
    sec. 4). Flow matching: `FlowMatchLCMScheduler` and `FlowMatchEulerDiscreteScheduler`, which take the grid at call time, as
    sigmas, and do not shift it.

    Raises:
        InputError: where no stock scheduler samples as they do.
    """
    for sampler in samplers:
        sampler.validate(schedule, prediction_type)
        if sampler.guidance_scale != 1:
            raise reject("guidance_scale", sampler.guidance_scale, "a student is exported with guidance off (1)")
        if sampler.timesteps[-1] <= 0:
            raise reject("timesteps", list(sampler.timesteps), "a timestep of 0 has nothing to denoise; end above it")
    if len({(sampler.kind, sampler.gamma) for sampler in samplers}) != 1:
        kinds = [sampler.kind for sampler in samplers]
        raise reject("sampling", kinds, "one kind (and one gamma) for all step counts: an export has one scheduler")
    if isinstance(schedule, RectifiedFlow):
        return _flow_matching(schedule, samplers[0].kind, prediction_type)
    if isinstance(schedule, VariancePreserving):
        return _variance_preserving(schedule, samplers, prediction_type, teacher_scheduler)
    raise reject("scheduler", type(teacher_scheduler).__name__, "export serves DDPM-style and flow-matching teachers so far")


def _flow_matching(schedule: RectifiedFlow, kind: str, prediction_type: str) -> SchedulerMixin:
    if prediction_type != "flow_prediction":
        raise reject("prediction_type", prediction_type, "flow-matching schedulers of diffusers read flow_prediction only")
    scheduler = FlowMatchLCMScheduler if kind == "sde" else FlowMatchEulerDiscreteScheduler
    return scheduler(num_train_timesteps=schedule.num_train_timesteps, shift=1.0, use_dynamic_shifting=False)


def _variance_preserving(
    schedule: VariancePreserving, samplers: Sequence[FewStepSampler], prediction_type: str, teacher_scheduler: SchedulerMixin
) -> SchedulerMixin:
    for sampler in samplers:
        if any(t != int(t) for t in sampler.timesteps):
            raise reject("timesteps", list(sampler.timesteps), "the exported DDPM-style schedulers visit integer timesteps only")
    grids = [[int(t) for t in sampler.timesteps] for sampler in samplers]

    # Named one by one: `from_config` swaps what its source left at default for the new class's defaults, which differ.
    process = {name: teacher_scheduler.config[name] for name in PROCESS if name in teacher_scheduler.config}

    def configured(scheduler: Any, **changes: Any) -> Any:
        changes |= process | {"prediction_type": prediction_type, "clip_sample": False, "thresholding": False}
        return scheduler.from_config(teacher_scheduler.config, **changes)

    build = {"sde": _lcm, "tcd": _tcd, "ode": _lcm if max(map(len, grids)) == 1 else _deterministic}[samplers[0].kind]
    found = build(configured, grids)
    if not torch.equal(found.alphas_cumprod, schedule.alphas_cumprod.to(found.alphas_cumprod)):
        name, teacher = type(found).__name__, type(teacher_scheduler).__name__
        raise InputError(f"scheduler: {name} cannot reproduce the noise schedule of {teacher} for the timesteps {grids}")
    return found


def _lcm(configured: Callable[..., Any], grids: list[list[int]]) -> Any:
    return _with_own_grids(configured(LCMScheduler, timestep_scaling=NO_SKIP, original_inference_steps=max(map(len, grids))), grids)


def _tcd(configured: Callable[..., Any], grids: list[list[int]]) -> Any:
    return _with_own_grids(configured(TCDScheduler, original_inference_steps=max(map(len, grids))), grids)


def _with_own_grids(scheduler: Any, grids: list[list[int]]) -> Any:
    """Where its own grids are the trained ones, the number of steps is enough, and more than the longest is an error."""
    train, longest = scheduler.config.num_train_timesteps, max(map(len, grids))
    for original in (n for n in range(longest, train + 1) if n == longest or train % n == 0):
        scheduler.register_to_config(original_inference_steps=original)
        if all(_visited(scheduler, len(grid)) == grid for grid in grids):
            break
    return scheduler


def _visited(scheduler: Any, steps: int) -> list[int]:
    scheduler.set_timesteps(steps)
    visited: list[int] = scheduler.timesteps.tolist()
    return visited


def _deterministic(configured: Callable[..., Any], grids: list[list[int]]) -> Any:
    ddim = configured(DDIMScheduler, timestep_spacing="trailing", set_alpha_to_one=True)
    if all(_ddim_visits(ddim, grid) for grid in grids):
        return ddim
    exact = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero", "timestep_spacing": "trailing"}
    exact["variance_type"] = None  # with a learned variance it would keep three channels of the prediction
    spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
    return configured(DPMSolverMultistepScheduler, **exact, **dict.fromkeys(spacings, False))


def _ddim_visits(ddim: Any, grid: list[int]) -> bool:
    ddim.set_timesteps(len(grid))
    stride = ddim.config.num_train_timesteps // len(grid)  # what DDIM's `step` subtracts, whatever `timesteps` says
    lands = [t - stride for t in grid[:-1]] == grid[1:] and grid[-1] < stride
    return bool(ddim.timesteps.tolist() == grid and lands)
