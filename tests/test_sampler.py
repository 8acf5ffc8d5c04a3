"""The student's sampler against the schedulers of diffusers that do the same."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler
from tiny_pipelines import class_conditional
from torch import Tensor

from diffusion_distill.build import teacher_denoiser
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.errors import InputError
from diffusion_distill.sampler import FewStepSampler, ode_sample, uniform_timesteps
from diffusion_distill.schedule import NoiseSchedule

VP = NoiseSchedule.from_scheduler(DDPMScheduler())
FLOW = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
COND = {"class_labels": torch.tensor([1, 4])}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def teacher(process: str) -> Denoiser:
    return teacher_denoiser(class_conditional(process))  # type: ignore[arg-type]


def noise_source(seed: int = 5) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator)


def unit_noise() -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def walk(scheduler: Any, denoiser: Denoiser, noise: Tensor, **step: Any) -> Tensor:
    """The loop of a diffusers pipeline over a scheduler whose timesteps are set."""
    x = noise
    for t in scheduler.timesteps:
        output = denoiser.model(x, t.expand(len(x)), class_labels=COND["class_labels"]).sample
        x = scheduler.step(output, t, x, **step, return_dict=False)[0]
    return x


# ------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_uniform_timesteps_are_ddims_trailing_spacing(steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert uniform_timesteps(VP, steps) == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_uniform_timesteps_are_flow_matchings_shifted_sigmas(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert uniform_timesteps(FLOW, steps, shift) == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


def test_uniform_timesteps_of_four_steps() -> None:
    assert uniform_timesteps(VP, 4) == (999, 749, 499, 249)
    assert uniform_timesteps(FLOW, 4) == (1000, 750, 500, 250)


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("process", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timesteps", [(999, 749, 499, 249), (799, 399), (399,)])
def test_sde_is_lcm_schedulers(process: str, timesteps: tuple[int, ...]) -> None:
    """At timestep_scaling 1e10 LCM's boundary scalings are exactly 0 and 1, so its step is "predict x0, re-noise"."""
    denoiser = teacher(process)
    scheduler = LCMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=process, clip_sample=False, timestep_scaling=1e10)
    scheduler.set_timesteps(timesteps=list(timesteps))
    expected = walk(scheduler, denoiser, unit_noise(), generator=torch.Generator().manual_seed(5))
    actual = FewStepSampler(timesteps, "sde").sample(denoiser, unit_noise(), COND, noise_source())
    torch.testing.assert_close(actual / expected.std(), expected / expected.std(), **TOLERANCE)


@pytest.mark.parametrize("timesteps", [(1000.0, 750.0, 500.0, 250.0), (1000.0, 900.0, 637.5), (600.0,)])
def test_sde_is_flow_match_lcm_schedulers(timesteps: tuple[float, ...]) -> None:
    denoiser = teacher("flow")
    scheduler = FlowMatchLCMScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[t / 1000 for t in timesteps])
    expected = walk(scheduler, denoiser, unit_noise(), generator=torch.Generator().manual_seed(5))
    actual = FewStepSampler(timesteps, "sde").sample(denoiser, unit_noise(), COND, noise_source())
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("process", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_ode_is_ddims(process: str, steps: int) -> None:
    denoiser = teacher(process)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=process, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    expected = walk(scheduler, denoiser, unit_noise())
    actual = ode_sample(denoiser, unit_noise(), COND, uniform_timesteps(denoiser.schedule, steps))
    torch.testing.assert_close(actual / expected.std(), expected / expected.std(), **TOLERANCE)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ode_is_flow_match_eulers(steps: int, shift: float) -> None:
    denoiser = teacher("flow")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    expected = walk(scheduler, denoiser, unit_noise())
    actual = ode_sample(denoiser, unit_noise(), COND, uniform_timesteps(denoiser.schedule, steps, shift))
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("process", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_roll_out_stops_on_the_way_of_sample(process: str, kind: Any) -> None:
    """Rung k is the input of call k + 1 of `sample`, and reaching it takes k calls."""
    denoiser = teacher(process)
    sampler, inputs = FewStepSampler((900, 600, 300), kind), []
    handle = denoiser.model.register_forward_pre_hook(lambda module, args: inputs.append(args))
    sampler.sample(denoiser, unit_noise(), COND, noise_source())
    assert [int(t[0]) for _, t in inputs] == [900, 600, 300]
    visited = list(inputs)
    for stop in range(3):
        inputs.clear()
        with torch.no_grad():
            x_t, t = sampler.roll_out(denoiser, unit_noise(), COND, noise_source(), stop)
        assert len(inputs) == stop
        assert torch.equal(x_t, visited[stop][0]) and torch.equal(t, visited[stop][1])
    handle.remove()


def test_sample_needs_no_gradient_and_roll_out_keeps_it() -> None:
    denoiser = teacher("flow").requires_grad_(True)
    sampler = FewStepSampler((1000, 500))
    assert not sampler.sample(denoiser, unit_noise(), COND, noise_source()).requires_grad
    assert sampler.roll_out(denoiser, unit_noise(), COND, noise_source(), 1)[0].requires_grad


def test_an_ode_sample_draws_nothing() -> None:
    def refuse(like: Tensor) -> Tensor:
        raise AssertionError("drew noise")

    denoiser = teacher("flow")
    FewStepSampler((1000, 500), "ode").sample(denoiser, unit_noise(), COND, refuse)
    with pytest.raises(AssertionError, match="drew noise"):
        FewStepSampler((1000, 500), "sde").sample(denoiser, unit_noise(), COND, refuse)


# ------------------------------------------------------------------------------------------------ wrong settings


@pytest.mark.parametrize(
    ("schedule", "timesteps", "message"),
    [
        (VP, (), "timesteps: got (); at least one timestep is needed"),
        (VP, (1000.0,), "timesteps: got 1000.0; the teacher's timesteps run from 0 to 999"),
        (VP, (999.0, -1.0), "timesteps: got -1.0; the teacher's timesteps run from 0 to 999"),
        (FLOW, (1000.5, 500.0), "timesteps: got 1000.5; the teacher's timesteps run from 0 to 1000"),
        (VP, (249.0, 499.0), "timesteps: got [249.0, 499.0]; they must descend from noise to data"),
        (VP, (499.0, 499.0), "timesteps: got [499.0, 499.0]; they must descend from noise to data"),
    ],
)
def test_impossible_timesteps_are_input_errors(schedule: NoiseSchedule, timesteps: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        FewStepSampler(timesteps).validate(schedule, "epsilon")
    assert str(error.value) == message


def test_possible_timesteps_are_accepted() -> None:
    FewStepSampler((999.0, 0.0)).validate(VP, "epsilon")
    FewStepSampler((1000.0, 937.5, 0.5)).validate(FLOW, "flow_prediction")


def test_an_epsilon_student_cannot_start_from_pure_noise() -> None:
    """At zero terminal SNR (arXiv:2305.08891) x0 = (x - sigma eps) / alpha divides by zero; a v-prediction network is fine there."""
    zero_snr = NoiseSchedule.from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(InputError, match=r"^timesteps: got 999.0; an epsilon network says nothing of x0"):
        FewStepSampler((999.0, 499.0)).validate(zero_snr, "epsilon")
    FewStepSampler((998.0, 499.0)).validate(zero_snr, "epsilon")
    FewStepSampler((999.0, 499.0)).validate(zero_snr, "v_prediction")


@pytest.mark.parametrize("steps", [0, -4])
def test_a_grid_of_no_steps_is_an_input_error(steps: int) -> None:
    with pytest.raises(InputError, match=f"num_inference_steps: got {steps}; at least 1"):
        uniform_timesteps(FLOW, steps)


def test_as_dict_reads_back_from_json() -> None:
    sampler = FewStepSampler((999.0, 499.0), "ode", 1.0)
    read = json.loads(json.dumps(sampler.as_dict()))
    assert FewStepSampler(tuple(read.pop("timesteps")), **read) == sampler
