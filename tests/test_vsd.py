"""VSD: its weight against diffusers' conversions, its gradient against quadrature, its turns on real networks, its students on the toy."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from recording import PROCESSES, UNCONDITIONAL, array, batch, coefficients, is_unit_noise, networks, noise_in, record, x0_of
from scipy import integrate, stats
from test_toy import ALL, FIRST, MEANS, STDS, WEIGHTS, distances, distil, gaussian, one_dimensional
from test_toy import coefficients as toy_coefficients
from toy import TEACHERS

from diffusion_distill.denoiser import Denoiser
from diffusion_distill.errors import InputError
from diffusion_distill.losses import variational_direction
from diffusion_distill.methods import VSD
from diffusion_distill.prediction import Prediction
from diffusion_distill.score_distillation import guided_pair, reliability

for_every_process = pytest.mark.parametrize("process", PROCESSES)
SMALL: dict[str, Any] = {"fake_score_rank": 4, "fake_score_alpha": 4, "timesteps": (799,)}


# ------------------------------------------------------------------------------------------------ the direction


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [20, 500, 980])
def test_direction_is_the_variance_times_the_difference_of_noises(scheduler_class: Any, kind: str, t: int) -> None:
    """sigma^2 (eps_real - eps_fake), the noises read off diffusers' own step: (x_t - sqrt(abar) pred_original_sample) / sigma."""
    scheduler = scheduler_class(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    generator = torch.Generator().manual_seed(t)
    x_t, *outputs = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64, generator=generator)
    alpha = scheduler.alphas_cumprod.double()[t].sqrt()
    sigma = (1 - alpha**2).sqrt()
    originals = [scheduler.step(output, t, x_t).pred_original_sample for output in outputs]
    eps_real, eps_fake = ((x_t - alpha * x0) / sigma for x0 in originals)
    real, fake = (Prediction.from_output(output, kind, x_t, alpha, sigma) for output in outputs)
    torch.testing.assert_close(variational_direction(real, fake), sigma**2 * (eps_real - eps_fake), rtol=1e-5, atol=1e-6)


def test_direction_of_a_flow_network_is_written_out() -> None:
    """Flow matching has x0 = x_t - t v and eps = x_t + (1 - t) v: sigma^2 (eps_real - eps_fake) = t^2 (1 - t) (v_real - v_fake)."""
    x_t, v_real, v_fake = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0.02, 0.5, 0.98):
        alpha, sigma = torch.tensor(1 - t).double(), torch.tensor(t).double()
        real, fake = (Prediction.from_output(v, "flow_prediction", x_t, alpha, sigma) for v in (v_real, v_fake))
        torch.testing.assert_close(variational_direction(real, fake), t**2 * (1 - t) * (v_real - v_fake))


def guided_gradient(teacher: str, mu: float, s: float, t: int, scale: float) -> tuple[float, float]:
    """E[sigma^2 (eps_real - eps_fake) d x0 / d(mu, s)] by quadrature, scores written as derivatives of log-densities.

    The guided teacher's score is that of p(x)^(1-w) p(x | label 0)^w; the student has no labels, so its own guidance changes nothing.
    """
    alpha, sigma = toy_coefficients(teacher, t)
    width = math.hypot(alpha * s, sigma)
    parts = [(w, stats.norm(alpha * m, math.hypot(alpha * c, sigma))) for m, c, w in zip(MEANS, STDS, WEIGHTS)]

    def teacher_score(x: float) -> float:
        densities = [w * p.pdf(x) for w, p in parts]
        each = [-(x - p.mean()) / p.var() for _, p in parts]
        everything = sum(d * e for d, e in zip(densities, each)) / sum(densities)
        return float(everything + scale * (each[0] - everything))

    def along(x: float) -> tuple[float, float]:
        """Density times direction, and times the mean of z given x_t."""
        direction = sigma**3 * (-(x - alpha * mu) / width**2 - teacher_score(x))
        density = stats.norm(alpha * mu, width).pdf(x)
        return direction * density, direction * density * alpha * s * (x - alpha * mu) / width**2

    ends = alpha * mu - 8 * width, alpha * mu + 8 * width
    found = [integrate.quad(lambda x, i=i: along(x)[i], *ends, limit=200)[0] for i in (0, 1)]  # type: ignore[misc]
    return found[0], found[1]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradient_on_closed_form_gaussians(teacher: str, scale: float) -> None:
    """Guidance on both: eps_real - eps_fake = sigma (score_fake - score_real), within 4 standard errors of the quadrature."""
    mu, s, t, count = 1.6, 1.0, 500, 1_500_000 if scale == 1 else 60_000
    z, eps = torch.randn(2, count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real_net, fake_net = one_dimensional(teacher), gaussian(teacher, mu, s)
    timesteps = torch.full((count,), t)
    x_t = real_net.schedule.add_noise(mu + s * z, eps, timesteps)
    labels = {"label": torch.zeros(count, dtype=torch.long)}, {"label": torch.full((count,), ALL)}
    real, _ = guided_pair(real_net, real_net, x_t, timesteps, *labels, (scale, 1.0))
    only = {"label": torch.zeros(count, dtype=torch.long)}, {"label": torch.ones(count, dtype=torch.long)}
    _, fake = guided_pair(fake_net, fake_net, x_t, timesteps, *only, (1.0, scale))
    direction = variational_direction(real, fake)
    for samples, exact in zip((direction, direction * z), guided_gradient(teacher, mu, s, t, scale)):
        error = float(samples.std()) / math.sqrt(count)
        assert abs(float(samples.mean()) - exact) < 4 * error and error < 0.1 * abs(exact)


def test_reliability_measures_the_true_share_of_the_direction() -> None:
    """Exact fake score: 1. The teacher on its own data, a wrong fake score: 0. Half-way from teacher to truth: its direction is 1/0.5."""
    mu, s, count, t = 1.0, 0.5, 200_000, 500
    z, eps = torch.randn(2, count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    truth, other = gaussian("flow_prediction", mu, s), gaussian("flow_prediction", 0.2, 0.5)
    timesteps, cond = torch.full((count,), t), {"label": torch.zeros(count, dtype=torch.long)}
    x0 = mu + s * z
    x_t = truth.schedule.add_noise(x0, eps, timesteps)
    exact, wrong = truth(x_t, timesteps, cond).x0, other(x_t, timesteps, cond).x0
    assert float(reliability(x0, wrong, exact)) == pytest.approx(1, abs=0.02)
    assert float(reliability(x0, exact, wrong)) == pytest.approx(0, abs=0.02)
    assert float(reliability(x0, wrong, wrong + 2 * (exact - wrong))) == pytest.approx(0.5, abs=0.02)


# ------------------------------------------------------------------------------------------------ turns on real networks


@for_every_process
@pytest.mark.parametrize("fake_score", ["lora", "full"])
@pytest.mark.parametrize(("guided_networks", "calls"), [("both", 4), ("teacher", 3)])
def test_student_gradient(process: str, fake_score: Any, guided_networks: Any, calls: int) -> None:
    """alpha sigma (F_g - R_g) / numel in x0, both guided by U + w (C - U), from one x_t, on the student's one call."""
    method = VSD(guidance_scale=3.0, guided_networks=guided_networks, fake_score=fake_score, **SMALL)
    nets, given = networks(process, method), batch()
    student = record(nets.student)
    seen = record(nets.teacher) if fake_score == "lora" else []
    if fake_score == "full":
        seen_teacher, seen_fake = record(nets.teacher), record(nets.fake_score)
    with nets.only_trains(("student",)):
        method.student_loss(nets, given)[0].backward()
    if fake_score == "full":
        seen = seen_teacher + seen_fake
    assert len(student) == 1 and len(seen) == calls
    assert all(torch.equal(call.x_t, seen[0].x_t) and torch.equal(call.t, seen[0].t) and not call.with_gradient for call in seen)
    assert [int(call.label[1]) for call in seen] == [1, UNCONDITIONAL, 1, UNCONDITIONAL][:calls]
    found = [x0_of(process, call) for call in seen]
    real = found[1] + 3 * (found[0] - found[1])
    fake = found[3] + 3 * (found[2] - found[3]) if calls == 4 else found[2]
    (alpha, sigma), (own_alpha, own_sigma) = coefficients(process, seen[0].t), coefficients(process, student[0].t)
    slope = -own_sigma / own_alpha if process == "epsilon" else -own_sigma
    expected = alpha * sigma * (fake - real) / real.size * slope
    np.testing.assert_allclose(array(student[0].output.grad), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
    assert is_unit_noise(array(student[0].x_t)) and (student[0].t == 799).all()


@for_every_process
def test_fake_score_learns_from_the_same_samples_and_sometimes_without_conditions(process: str) -> None:
    method, dropped = VSD(unconditional_share=0.3, **SMALL), 0
    nets = networks(process, method)
    calls = record(nets.fake_score)
    x0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for step in range(40):
        calls.clear()
        given = batch(step=step, carried={"x0": x0})
        with nets.only_trains(("fake_score",)):
            loss, _ = method.critic_loss(nets, given)
        whole = {tuple(call.label.tolist()) for call in calls}
        assert len(calls) == 1 and whole <= {(0, 1, 2, 3), (UNCONDITIONAL,) * 4} and not given.carried
        assert is_unit_noise(noise_in(process, calls[0].x_t, calls[0].t, array(x0)))
        assert loss.requires_grad
        dropped += int(calls[0].label[0]) == UNCONDITIONAL
    assert stats.binomtest(dropped, 40, 0.3).pvalue > 1e-3


@for_every_process
def test_each_turn_moves_exactly_its_role(process: str) -> None:
    method = VSD(**SMALL)
    nets, given = networks(process, method), batch()
    assert [roles for roles, _ in method.updates(5)] == [("student",), ("fake_score",)]
    for roles, loss_fn in method.updates(0):
        with nets.only_trains(roles):
            loss_fn(nets, given)[0].backward()
        for role in nets.trained_roles:
            assert all((p.grad is not None) == (role in roles) for p in nets.parameters(role).values())
        moved = {name for name, p in nets.teacher.named_parameters() if p.grad is not None}
        assert moved == (set(nets.parameters("fake_score")) if "fake_score" in roles else set())
        for role in ("teacher", "student"):
            getattr(nets, role).zero_grad(set_to_none=True)


def test_guidance_scales_are_uniform_in_their_range() -> None:
    method = VSD(guidance_range=(0.5, 4.0))
    drawn = [method.draw_guidance(batch(step=step)) for step in range(400)]
    assert stats.kstest(drawn, stats.uniform(0.5, 3.5).cdf).pvalue > 1e-3
    assert method.draw_guidance(batch(step=3, slots=range(4, 8))) == drawn[3]  # the same for every micro-batch and rank
    assert VSD(guidance_scale=2.0).draw_guidance(batch()) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": (999, 499)}, "timesteps: got (999, 499); one timestep at most"),
        ({"guidance_range": (2.0,)}, "guidance_range: got (2.0,); "),
        ({"guidance_range": (4.0, 1.0)}, "guidance_range: got (4.0, 1.0); "),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0; 0 or more"),
        ({"min_level": 0.9, "max_level": 0.5}, "min_level, max_level: got (0.9, 0.5); "),
        ({"fake_score_rank": 0}, "fake_score_rank: got 0; at least 1"),
        ({"fake_score_alpha": 0.0}, "fake_score_alpha: got 0.0; a number above 0"),
        ({"unconditional_share": 1.5}, "unconditional_share: got 1.5; "),
        ({"fake_score": "none"}, "fake_score: got 'none'; accepted: 'lora', 'full'"),
        ({"guided_networks": "fake"}, "guided_networks: got 'fake'; accepted: 'both', 'teacher'"),
    ],
)
def test_wrong_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        VSD(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ training


@cache
def trained(teacher: str) -> tuple[float, float]:
    method: Any = VSD((FIRST[teacher],), guidance_scale=1.0, fake_score="full", unconditional_share=0.0)
    return distances(method, teacher, distil(method, teacher))


@pytest.mark.parametrize("teacher", ["epsilon", "flow_prediction"])
def test_student_beats_the_teacher_in_one_step(teacher: str) -> None:
    student, euler = trained(teacher)
    assert student < euler / 8


def test_the_fake_score_is_a_denoiser_on_the_teachers_weights() -> None:
    nets = networks("flow", VSD(**SMALL))
    assert isinstance(nets.fake_score, Denoiser) and nets.fake_score.model is nets.teacher.model
