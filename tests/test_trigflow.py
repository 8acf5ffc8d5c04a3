"""TrigFlow's view of any denoiser, its tangent, and derivatives along a direction, against closed forms and reverse mode."""

import math
from typing import Any

import pytest
import torch
from test_toy import gaussian
from tiny_pipelines import class_conditional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from toy import TEACHERS

from diffusion_distill.build import teacher_denoiser
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.jvp import backward_difference, central_difference, forward_derivative
from diffusion_distill.trigflow import angle_at_ratio, consistency_tangent, network_input, normalized, trigflow_output

MEAN, STD, SIGMA_DATA = 0.7, 0.4, 0.5
COND = {"label": torch.zeros(64, dtype=torch.long)}


def points(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angle = 0.1 + 1.3 * torch.rand(64, dtype=torch.float64, generator=generator)
    return torch.randn(64, 1, dtype=torch.float64, generator=generator), angle


def exact_f(y: Tensor, angle: Tensor) -> Tensor:
    """F of the consistency function of N(MEAN, STD^2): its trajectories keep (y - cos(a) MEAN) / std(a)."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x0 = MEAN + STD * (y - cos * MEAN) / (STD**2 * cos**2 + SIGMA_DATA**2 * sin**2).sqrt()
    return (cos * y - x0) / (sin * SIGMA_DATA)


def teacher_velocity(net: Denoiser, y: Tensor, angle: Tensor) -> Tensor:
    return SIGMA_DATA * trigflow_output(lambda x, t: net(x, t, COND), net.schedule, y, angle, SIGMA_DATA)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_network_says_the_closed_form_velocity(teacher: str) -> None:
    net, (y, angle) = gaussian(teacher, MEAN, STD), points()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    variance = STD**2 * cos**2 + SIGMA_DATA**2 * sin**2
    exact = -sin * MEAN + (SIGMA_DATA**2 - STD**2) * cos * sin / variance * (y - cos * MEAN)  # d mean / da + d ln std / da (y - mean)
    torch.testing.assert_close(teacher_velocity(net, y, angle), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_network_sees_its_own_process(teacher: str) -> None:
    schedule, (_, angle) = gaussian(teacher, MEAN, STD).schedule, points()
    x0, eps = torch.randn(2, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x_t, t = network_input(schedule, angle.cos()[:, None] * x0 + angle.sin()[:, None] * SIGMA_DATA * eps, angle, SIGMA_DATA)
    torch.testing.assert_close(x_t, schedule.add_noise(x0, eps, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(angle_at_ratio(schedule.ratio(t), SIGMA_DATA), angle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_tangent_vanishes_at_the_exact_consistency_function(teacher: str) -> None:
    net, (y, angle) = gaussian(teacher, MEAN, STD), points()
    velocity = teacher_velocity(net, y, angle)
    scale = angle.cos() * angle.sin()
    df = forward_derivative(exact_f, (y, angle), (scale[:, None] * velocity, scale))
    g = consistency_tangent(y, angle, velocity, exact_f(y, angle), df, SIGMA_DATA, 1.0)
    assert g.abs().max() < 1e-6  # the toy's standard deviations are float32
    wrong = consistency_tangent(y, angle, velocity, exact_f(y, angle) + 0.1, df, SIGMA_DATA, 1.0)
    assert wrong.abs().max() > 1e-3


def test_the_tangent_is_the_derivative_of_the_consistency_function() -> None:
    """cos(a) d/da [cos(a) y - sin(a) sigma_data F(y, a)] along any velocity, by autograd."""
    y, angle = points()
    velocity = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def f(y: Tensor, angle: Tensor) -> Tensor:
        return (1.3 * y + angle[:, None] ** 2).sin()

    def consistency(y: Tensor, angle: Tensor) -> Tensor:
        return angle.cos()[:, None] * y - angle.sin()[:, None] * SIGMA_DATA * f(y, angle)

    exact = angle.cos()[:, None] * torch.autograd.functional.jvp(consistency, (y, angle), (velocity, torch.ones_like(angle)))[1]
    scale = angle.cos() * angle.sin()
    df = forward_derivative(f, (y, angle), (scale[:, None] * velocity, scale))
    torch.testing.assert_close(consistency_tangent(y, angle, velocity, f(y, angle), df, SIGMA_DATA, 1.0), exact)


def test_normalization() -> None:
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert normalized(g, 0.1)[0].tolist() == pytest.approx([3 / 5.1, 4 / 5.1]) and normalized(g, 0.1)[1].tolist() == [0, 0]
    assert normalized(g, 0.1, True)[0].tolist() == pytest.approx([v / (5 / math.sqrt(2) + 0.1) for v in (3, 4)])


def test_derivatives_of_a_network_equal_double_reverse_mode() -> None:
    pipe = class_conditional("flow")
    net: Any = teacher_denoiser(pipe)
    net.model.double()
    generator = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64, generator=generator)
    t, dt = torch.tensor([100.0, 300.0, 500.0, 900.0], dtype=torch.float64), torch.full((4,), 20.0, dtype=torch.float64)
    cond = {"class_labels": torch.tensor([0, 1, 2, 3])}

    def function(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, cond).x0  # type: ignore[no-any-return]

    found = forward_derivative(function, (x, t), (dx, dt))
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.autograd.functional.jvp(function, (x, t), (dx, dt))[1]  # two reverse passes
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    errors = [(central_difference(function, (x, t), (dx, dt), h) - exact).abs().max().item() for h in (2e-2, 1e-2)]
    assert errors[1] < 0.35 * errors[0]  # second order: a quarter
    one_sided = [(backward_difference(function, (x, t), (dx, dt), h, function(x, t)) - exact).abs().max().item() for h in (2e-3, 1e-3)]
    assert 0.4 * one_sided[0] < one_sided[1] < 0.6 * one_sided[0]
    assert not found.requires_grad
