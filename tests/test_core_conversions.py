"""The forward processes and the conversions between predictions, against diffusers' schedulers and closed forms.

Everything runs in float64. Where a scheduler can be given float64 tables the tolerance is 1e-10; where it fixes float32 (Euler
and flow-matching `step` cast the sample, their sigmas are float32 arrays, EDM's timesteps are float32 logarithms) it is a few
float32 units, 1e-6 of the largest value.
"""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
    VQDiffusionScheduler,
)
from diffusers.schedulers.deprecated import KarrasVeScheduler
from torch import Tensor

from diffusion_distill.errors import InputError
from diffusion_distill.prediction import PREDICTION_TYPES, Prediction
from diffusion_distill.schedule import EDM, NoiseSchedule, RectifiedFlow, TrigFlow, expand_dims, prediction_type_of

EXACT, FLOAT32 = 1e-10, 1e-6
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIMESTEPS = torch.tensor([1, 250, 777, 999])
SCHEDULES: dict[str, tuple[NoiseSchedule, Tensor]] = {
    "vp": (NoiseSchedule.from_scheduler(DDPMScheduler(**SD)), TIMESTEPS),
    "vp_fractional": (NoiseSchedule.from_scheduler(DDPMScheduler(**SD)), torch.tensor([0.25, 250.5, 776.9, 998.5])),
    "flow": (NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler()), torch.tensor([1.0, 250.0, 777.5, 999.0])),
    "edm": (NoiseSchedule.from_scheduler(EDMEulerScheduler()), torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64).log() / 4),
    "trigflow": (NoiseSchedule.from_scheduler(SCMScheduler()), torch.tensor([0.01, 0.5, 1.3, 1.57])),
}


def randn(seed: int) -> Tensor:
    return torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == torch.float64
    expected = expected.double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def in_float64(scheduler: Any) -> Any:
    """The same scheduler with its table of cumulative products in float64, so that its own arithmetic is too."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def read(scheduler: Any, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
    """Our reading of a network output at x_t (B, ...) and t (B,)."""
    schedule = NoiseSchedule.from_scheduler(scheduler)
    alpha, sigma = expand_dims(schedule.alpha(t), x_t), expand_dims(schedule.sigma(t), x_t)
    return Prediction.from_output(output, prediction_type_of(scheduler), x_t, alpha, sigma, schedule.sigma_data)


# ------------------------------------------------------------------------------------------------ the forward process


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    "betas", [SD, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, SD | {"rescale_betas_zero_snr": True}]
)
def test_add_noise_is_ddpms(scheduler_class: Any, betas: dict[str, Any]) -> None:
    scheduler = in_float64(scheduler_class(**betas))
    x0, eps = randn(0), randn(1)
    close(NoiseSchedule.from_scheduler(scheduler).add_noise(x0, eps, TIMESTEPS), scheduler.add_noise(x0, eps, TIMESTEPS), EXACT)


def test_add_noise_is_eulers_in_the_coordinates_of_the_network() -> None:
    scheduler = EulerDiscreteScheduler(**SD)
    x0, eps, t = randn(0), randn(1), TIMESTEPS.float()
    sigmas = scheduler.sigmas[:-1].flip(0)[TIMESTEPS].double().view(-1, 1, 1, 1)
    expected = scheduler.add_noise(x0, eps, t) / (sigmas**2 + 1).sqrt()
    close(NoiseSchedule.from_scheduler(scheduler).add_noise(x0, eps, t), expected, FLOAT32)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_add_noise_is_flow_matchings(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, eps, t = randn(0), randn(1), scheduler.timesteps[[0, 400, 700, 998]]
    close(NoiseSchedule.from_scheduler(scheduler).add_noise(x0, eps, t), scheduler.scale_noise(x0, t, eps), FLOAT32)


def test_add_noise_is_edms_after_input_preconditioning() -> None:
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    x0, eps, index = randn(0), randn(1), [0, 400, 700, 999]
    t, sigmas = scheduler.timesteps[index], scheduler.sigmas[index].double().view(-1, 1, 1, 1)
    expected = scheduler.precondition_inputs(scheduler.add_noise(x0, eps, t), sigmas)
    close(NoiseSchedule.from_scheduler(scheduler).add_noise(x0, eps, t), expected, FLOAT32)


def test_fractional_timesteps_interpolate_as_eulers_sigmas() -> None:
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="linspace")
    scheduler.set_timesteps(8)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()
    schedule = NoiseSchedule.from_scheduler(scheduler)
    ratio = schedule.sigma(scheduler.timesteps) / schedule.alpha(scheduler.timesteps)
    torch.testing.assert_close(ratio, scheduler.sigmas[:-1].double(), rtol=FLOAT32, atol=0)


def test_vp_keeps_unit_variance_and_integers_agree_with_floats() -> None:
    schedule, _ = SCHEDULES["vp"]
    t = torch.arange(1000)
    close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(1000), EXACT)
    assert torch.equal(schedule.alpha(t), schedule.alpha(t.float()))


@pytest.mark.parametrize("options", [{"shift": 1.0}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.1}, {"use_dynamic_shifting": True}])
def test_shift_moves_the_grid_and_never_sigma(options: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(5, mu=0.8 if "use_dynamic_shifting" in options else None)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule == RectifiedFlow(1000)
    torch.testing.assert_close(schedule.sigma(scheduler.timesteps), scheduler.sigmas[:-1].double(), rtol=FLOAT32, atol=0)


def test_transition_is_ddpms_single_step() -> None:
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x, beta_t): float32 betas against float32 cumulative products."""
    scheduler = DDPMScheduler(**SD)
    t = torch.arange(1, 1000)
    a, b = NoiseSchedule.from_scheduler(scheduler).transition(t, t - 1)
    torch.testing.assert_close(a**2, 1 - scheduler.betas[1:].double(), rtol=FLOAT32, atol=0)
    torch.testing.assert_close(b**2, scheduler.betas[1:].double(), rtol=1e-3, atol=FLOAT32)


def test_transition_of_edm_adds_the_difference_of_variances() -> None:
    low, high = torch.tensor([0.1, 1.0], dtype=torch.float64), torch.tensor([0.5, 70.0], dtype=torch.float64)
    _, b = EDM(0.002, 80.0, 0.5).transition(high.log() / 4, low.log() / 4)
    close(b, ((high**2 - low**2) / (high**2 + 0.25)).sqrt(), EXACT)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noising_to_s_then_on_to_t_has_the_moments_of_noising_to_t(name: str) -> None:
    schedule, t = SCHEDULES[name]
    s, t = t[:-1], t[1:]
    a, b = schedule.transition(t, s)
    close(a * schedule.alpha(s), schedule.alpha(t), EXACT)
    close(((a * schedule.sigma(s)) ** 2 + b**2).sqrt(), schedule.sigma(t), EXACT)
    assert (b > 0).all()


@pytest.mark.parametrize("rho", [7.0, 5.0])
def test_levels_of_edm_are_karras_spaced(rho: float) -> None:
    scheduler = EDMEulerScheduler(rho=rho)
    levels = torch.linspace(1, 0, len(scheduler.timesteps), dtype=torch.float64)
    close(NoiseSchedule.from_scheduler(scheduler).timestep(levels), scheduler.timesteps, FLOAT32)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows_with_the_timestep_and_levels_span_the_schedule(name: str) -> None:
    schedule, _ = SCHEDULES[name]
    t = schedule.timestep(torch.linspace(0, 1, 21, dtype=torch.float64))
    ratio = schedule.alpha(t) / schedule.sigma(t)
    assert (ratio.diff() < 0).all()
    assert schedule.contains(float(t[0])) and schedule.contains(float(t[-1]))


# -------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_reading_can_be_undone(name: str, prediction_type: str) -> None:
    schedule, t = SCHEDULES[name]
    x0, eps = randn(0), randn(1)
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = expand_dims(schedule.alpha(t), x_t), expand_dims(schedule.sigma(t), x_t)
    truth = Prediction(x0, eps, alpha, sigma, schedule.sigma_data)
    pred = Prediction.from_output(truth.view(prediction_type), prediction_type, x_t, alpha, sigma, schedule.sigma_data)
    # dividing by alpha or sigma magnifies the last digits of x_t: up to 2e-16 / 2.5e-5 for TrigFlow and EDM at their ends
    close(pred.x0, x0, EXACT)
    close(pred.eps, eps, EXACT)
    output = randn(2)
    again = Prediction.from_output(output, prediction_type, x_t, alpha, sigma, schedule.sigma_data)
    close(again.view(prediction_type), output, EXACT)
    close(alpha * again.x0 + sigma * again.eps, x_t, EXACT)


def test_v_is_ddpms_velocity_and_flow_is_noise_minus_data() -> None:
    scheduler = in_float64(DDPMScheduler(**SD))
    schedule, x0, eps = NoiseSchedule.from_scheduler(scheduler), randn(0), randn(1)
    pred = Prediction(x0, eps, expand_dims(schedule.alpha(TIMESTEPS), x0), expand_dims(schedule.sigma(TIMESTEPS), x0))
    close(pred.v, scheduler.get_velocity(x0, eps, TIMESTEPS), EXACT)
    close(pred.flow, eps - x0, EXACT)


@pytest.mark.parametrize("name", SCHEDULES)
def test_score_is_the_gradient_of_the_gaussian_kernel(name: str) -> None:
    """For one data point x0, p_t = N(alpha x0, sigma^2): autograd on its log-density is the oracle."""
    schedule, t = SCHEDULES[name]
    x0, eps = randn(0), randn(1)
    alpha, sigma = expand_dims(schedule.alpha(t), x0), expand_dims(schedule.sigma(t), x0)
    x_t = schedule.add_noise(x0, eps, t).requires_grad_(True)
    log_density = torch.distributions.Normal(alpha * x0, sigma).log_prob(x_t).sum()
    close(Prediction(x0, eps, alpha, sigma).score, torch.autograd.grad(log_density, x_t)[0], EXACT)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [1, 500, 999])
def test_x0_and_eps_are_ddims(prediction_type: str, t: int) -> None:
    options = {"prediction_type": prediction_type, "clip_sample": False, "timestep_spacing": "trailing"}
    scheduler = in_float64(DDIMScheduler(**SD, **options))
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(1000)
    x_t, output = randn(0), randn(1)
    expected, steps = scheduler.step(output, t, x_t), torch.full((4,), t)
    pred = read(scheduler, output, x_t, steps)
    close(pred.x0, expected.pred_original_sample, EXACT)
    close(NoiseSchedule.from_scheduler(scheduler).add_noise(pred.x0, pred.eps, steps - 1), expected.prev_sample, EXACT)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("index", [0, 2])
def test_x0_is_dpm_solvers(prediction_type: str, index: int) -> None:
    flow = {"use_flow_sigmas": True} if prediction_type == "flow_prediction" else {}
    scheduler = DPMSolverMultistepScheduler(**SD, prediction_type=prediction_type, **flow)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(index)
    t, x_t, output = scheduler.timesteps[index], randn(0), randn(1)
    scheduler.step(output, t, x_t)
    level = scheduler.sigmas[index] * 1000 if flow else t  # its flow timesteps are rounded to integers, its sigmas are not
    close(read(scheduler, output, x_t, level.expand(4)).x0, scheduler.model_outputs[-1], 2 * FLOAT32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("index", [0, 4, 7])
def test_x0_is_eulers(prediction_type: str, index: int) -> None:
    """Euler's own sample is x_t / alpha; half of the visited timesteps have a fraction."""
    scheduler = EulerDiscreteScheduler(**SD, prediction_type=prediction_type, timestep_spacing="linspace")
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(index)
    t, own, output = scheduler.timesteps[index], randn(0) * scheduler.sigmas[index], randn(1)
    x_t = scheduler.scale_model_input(own, t)
    expected = scheduler.step(output, t, own).pred_original_sample
    close(read(scheduler, output, x_t, t.expand(4)).x0, expected, 2 * FLOAT32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma", [0.002, 0.7, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_x0_is_edms_denoised(prediction_type: str, sigma: float, sigma_data: float) -> None:
    scheduler = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=sigma_data)
    level, sample, output = torch.tensor(sigma, dtype=torch.float64), sigma * randn(0) + randn(2), randn(1)
    t, x_t = scheduler.precondition_noise(level), scheduler.precondition_inputs(sample, level)
    close(read(scheduler, output, x_t, t.expand(4)).x0, scheduler.precondition_outputs(sample, output, level), EXACT)


def test_x0_is_scms() -> None:
    """The pipeline hands x_t / sigma_data to the network, and sigma_data times its output to the scheduler."""
    scheduler = SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(2)
    scheduler.timesteps = scheduler.timesteps.double()
    x_t, output = randn(0), randn(1)
    for index in (0, 1):
        scheduler.set_begin_index(index)
        scheduler._step_index = None
        t = scheduler.timesteps[index]
        expected = scheduler.step(0.5 * output, t, 0.5 * x_t).pred_original_sample
        close(read(scheduler, output, x_t, t.expand(4)).x0, expected, EXACT)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_flow_matching_step_is_renoising(shift: float, stochastic: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
    scheduler.set_timesteps(4)
    schedule, x_t, output = NoiseSchedule.from_scheduler(scheduler), randn(0), randn(1)
    pred = read(scheduler, output, x_t, scheduler.timesteps[0].expand(4))
    stepped = scheduler.step(output, scheduler.timesteps[0], x_t, generator=torch.Generator().manual_seed(3)).prev_sample
    fresh = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3)).double()
    renoised = schedule.add_noise(pred.x0, fresh if stochastic else pred.eps, scheduler.timesteps[1].expand(4))
    close(renoised, stepped, FLOAT32)


def test_zero_terminal_snr_is_read_exactly() -> None:
    """At t = 999 alpha is 0 and v-prediction gives x0 = -v, eps = x_t (arXiv:2305.08891, sec. 3.4)."""
    scheduler = in_float64(DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False))
    scheduler.set_timesteps(1000)
    x_t, output, t = randn(0), randn(1), torch.full((4,), 999)
    assert NoiseSchedule.from_scheduler(scheduler).alpha(t).eq(0).all()
    pred = read(scheduler, output, x_t, t)
    close(pred.x0, -output, EXACT)
    close(pred.eps, x_t, EXACT)
    close(pred.x0, scheduler.step(output, 999, x_t).pred_original_sample, EXACT)
    close(read(scheduler, output, x_t, t.float()).x0, pred.x0, EXACT)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_interpolation_is_classifier_free_guidance_on_raw_outputs(prediction_type: str) -> None:
    schedule, t = SCHEDULES["vp"]
    x_t, uncond, cond = randn(0), randn(1), randn(2)
    coefficients = expand_dims(schedule.alpha(t), x_t), expand_dims(schedule.sigma(t), x_t)
    first, second = (Prediction.from_output(output, prediction_type, x_t, *coefficients) for output in (uncond, cond))
    guided = Prediction.from_output(uncond + 7.5 * (cond - uncond), prediction_type, x_t, *coefficients)
    both = first.interpolate(second, 7.5)
    close(both.x0, guided.x0, EXACT)
    close(both.eps, guided.eps, EXACT)


# ------------------------------------------------------------------------------------- what is refused, and what is read


def test_prediction_types_are_read_from_the_scheduler() -> None:
    assert prediction_type_of(DDPMScheduler(prediction_type="sample")) == "sample"
    assert prediction_type_of(FlowMatchEulerDiscreteScheduler()) == "flow_prediction"
    assert prediction_type_of(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)) == "flow_prediction"
    assert prediction_type_of(EDMEulerScheduler()) == "edm"
    assert prediction_type_of(EDMEulerScheduler(prediction_type="v_prediction")) == "v_prediction"
    assert prediction_type_of(SCMScheduler()) == "v_prediction"


@pytest.mark.parametrize(
    ("scheduler", "inside", "outside"),
    [
        (DDPMScheduler(**SD), (0, 0.5, 999), (-1, 999.5, 1000)),
        (FlowMatchEulerDiscreteScheduler(), (0, 0.5, 1000), (-0.5, 1001)),
        (EDMEulerScheduler(), (math.log(0.002) / 4, 0.0, math.log(80) / 4), (math.log(0.0019) / 4, math.log(81) / 4)),
        (SCMScheduler(), (0, 1.3, 1.5708), (-0.1, 1.6)),
    ],
)
def test_contains_the_timesteps_that_the_scheduler_visits(scheduler: Any, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler)
    if not isinstance(scheduler, SCMScheduler):  # before set_timesteps its timesteps are not angles
        assert all(schedule.contains(t) for t in scheduler.timesteps.tolist())
    assert all(schedule.contains(t) for t in inside)
    assert not any(schedule.contains(t) for t in outside)


def test_trigflow_ends_at_pure_noise() -> None:
    schedule, t = TrigFlow(0.5), torch.tensor([0.0, math.pi / 2], dtype=torch.float64)
    close(schedule.alpha(t), torch.tensor([2.0, 0.0]), EXACT)
    close(schedule.sigma(t), torch.tensor([0.0, 1.0]), EXACT)


@pytest.mark.parametrize("scheduler", [KarrasVeScheduler(), VQDiffusionScheduler(num_vec_classes=8)])
def test_unreadable_scheduler_is_an_input_error(scheduler: Any) -> None:
    with pytest.raises(InputError, match=f"scheduler: got '{type(scheduler).__name__}'"):
        NoiseSchedule.from_scheduler(scheduler)


@pytest.mark.parametrize(
    ("scheduler", "field"),
    [
        (EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"), "timestep_type"),  # t = ln(sigma) / 4
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),  # t grows towards data
    ],
)
def test_scheduler_with_another_clock_is_an_input_error(scheduler: Any, field: str) -> None:
    with pytest.raises(InputError, match=f"scheduler.{field}: got"):
        NoiseSchedule.from_scheduler(scheduler)


def test_unknown_prediction_type_is_an_input_error() -> None:
    one = torch.ones(1)
    with pytest.raises(InputError, match="prediction_type: got 'noise'; accepted: epsilon, sample"):
        Prediction.from_output(one, "noise", one, one, one)
