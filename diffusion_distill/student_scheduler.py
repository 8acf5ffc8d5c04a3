"""The stock diffusers scheduler that samples a student exactly as it was trained."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
)

from .errors import InputError, reject
from .sampler import FewStepSampler
from .schedule import NoiseSchedule, RectifiedFlow, VariancePreserving

# LCMScheduler blends its input into x0 with c_skip = .25 / (s^2 + .25), s = t * timestep_scaling (arXiv:2310.04378, app. D).
# Students here are trained without: at 1e10 c_out is exactly 1 and c_skip below 1e-20 from t = 1 on. 1e20 would overflow.
NO_SKIP = 1e10
PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def student_scheduler(
    schedule: NoiseSchedule, sampler: FewStepSampler, prediction_type: str, teacher_scheduler: SchedulerMixin
) -> SchedulerMixin:
    """A scheduler, configured from the teacher's, whose steps are those of `sampler`.

    VP: `LCMScheduler` (sde, or one step); DDIM with trailing spacing where its steps land on the grid, otherwise first-order
    DPM-Solver++, which is the same map (arXiv:2211.01095, sec. 4). Flow matching: `FlowMatchLCMScheduler` and
    `FlowMatchEulerDiscreteScheduler`, which take the grid at call time, as sigmas, and do not shift it.

    Raises:
        InputError: where no stock scheduler samples as `sampler` does.
    """
    sampler.validate(schedule, prediction_type)
    if sampler.guidance_scale != 1:
        raise reject("guidance_scale", sampler.guidance_scale, "a student is exported with guidance off (1)")
    if sampler.timesteps[-1] <= 0:
        raise reject("timesteps", list(sampler.timesteps), "a timestep of 0 has nothing to denoise; end above it")
    if isinstance(schedule, RectifiedFlow):
        return _flow_matching(schedule, sampler, prediction_type)
    if isinstance(schedule, VariancePreserving):
        return _variance_preserving(schedule, sampler, prediction_type, teacher_scheduler)
    raise reject("scheduler", type(teacher_scheduler).__name__, "export serves DDPM-style and flow-matching teachers so far")


def _flow_matching(schedule: RectifiedFlow, sampler: FewStepSampler, prediction_type: str) -> SchedulerMixin:
    if prediction_type != "flow_prediction":
        raise reject("prediction_type", prediction_type, "flow-matching schedulers of diffusers read flow_prediction only")
    scheduler = FlowMatchLCMScheduler if sampler.kind == "sde" else FlowMatchEulerDiscreteScheduler
    return scheduler(num_train_timesteps=schedule.num_train_timesteps, shift=1.0, use_dynamic_shifting=False)


def _variance_preserving(
    schedule: VariancePreserving, sampler: FewStepSampler, prediction_type: str, teacher_scheduler: SchedulerMixin
) -> SchedulerMixin:
    if any(t != int(t) for t in sampler.timesteps):
        raise reject("timesteps", list(sampler.timesteps), "the exported DDPM-style schedulers visit integer timesteps only")
    grid = [int(t) for t in sampler.timesteps]

    # Named one by one: `from_config` swaps what its source left at default for the new class's defaults, which differ.
    process = {name: teacher_scheduler.config[name] for name in PROCESS if name in teacher_scheduler.config}

    def configured(scheduler: Any, **changes: Any) -> Any:
        changes |= process | {"prediction_type": prediction_type, "clip_sample": False, "thresholding": False}
        return scheduler.from_config(teacher_scheduler.config, **changes)

    build = _lcm if sampler.kind == "sde" or len(grid) == 1 else _deterministic
    found = build(configured, grid)
    if not torch.equal(found.alphas_cumprod, schedule.alphas_cumprod.to(found.alphas_cumprod)):
        name, teacher = type(found).__name__, type(teacher_scheduler).__name__
        raise InputError(f"scheduler: {name} cannot reproduce the noise schedule of {teacher} for the timesteps {grid}")
    return found


def _lcm(configured: Callable[..., Any], grid: list[int]) -> Any:
    """LCMScheduler. Where one of its own grids is the trained one, asking for so many steps is enough, and for more is an error."""
    scheduler = configured(LCMScheduler, timestep_scaling=NO_SKIP, original_inference_steps=len(grid))
    for original in (len(grid), scheduler.config.num_train_timesteps):
        scheduler.set_timesteps(len(grid), original_inference_steps=original)
        if scheduler.timesteps.tolist() == grid:
            break
    scheduler.register_to_config(original_inference_steps=original)
    return scheduler


def _deterministic(configured: Callable[..., Any], grid: list[int]) -> Any:
    ddim = configured(DDIMScheduler, timestep_spacing="trailing", set_alpha_to_one=True)
    ddim.set_timesteps(len(grid))
    stride = ddim.config.num_train_timesteps // len(grid)  # what DDIM's `step` subtracts, whatever `timesteps` says
    if ddim.timesteps.tolist() == grid and [t - stride for t in grid[:-1]] == grid[1:] and grid[-1] < stride:
        return ddim
    exact = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
    return configured(DPMSolverMultistepScheduler, **exact, **dict.fromkeys(spacings, False))
