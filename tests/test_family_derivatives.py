"""Derivatives of every family's network along a direction of (x_t, t): forward mode against double backward and against differences.

In float64 as far as the networks go: time embeddings, rotary embeddings and norms of diffusers compute in float32 whatever they are given.
"""

from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, example_conditions, resolution_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_distill.families import family_of
from diffusion_distill.jvp import Function, Point, central_difference, forward_derivative

SAME_NETWORK = {"stable_diffusion_v", "class_conditional_v", "class_conditional_epsilon"}  # as a pipeline of another process
NETWORKS = [name for name in PIPELINES if name not in SAME_NETWORK]


def network(name: str) -> tuple[Function, Point, Point]:
    """The network as a function of (x_t, t) in float64, a point between noise and data, and a direction: unit variance, 4 timesteps."""
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    model: Any = getattr(pipe, family.component).double()
    cond = family.encode_conditions(pipe, example_conditions(pipe), resolution_of(pipe))
    cond = {name: value.double() if value.is_floating_point() else value for name, value in cond.items()}
    generator = torch.Generator().manual_seed(2)
    shape = (2, *family.sample_shape(pipe, resolution_of(pipe)))
    x_t, dx = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    t, dt = torch.tensor([[612.3, 287.9], [4.0, -4.0]], dtype=torch.float64)
    return (lambda x, time: family.call(model, x, time, cond)), (x_t, t), (dx, dt)


def double_backward(function: Function, point: Point, direction: Point) -> Tensor:
    """J v as the derivative of u -> (J^T u) v, which is linear in u."""
    x, t = (value.clone().requires_grad_(True) for value in point)
    with sdpa_kernel(SDPBackend.MATH):
        output = function(x, t)
        u = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, (x, t), u, create_graph=True)
        product = sum((a * b).sum() for a, b in zip(pulled, direction, strict=True))
        return torch.autograd.grad(product, u)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_mode_is_the_double_backward(name: str) -> None:
    """Each of x_t and t alone, so that neither hides behind the other."""
    function, point, (dx, dt) = network(name)
    for direction in ((dx, torch.zeros_like(dt)), (torch.zeros_like(dx), dt)):
        expected = double_backward(function, point, direction)
        assert expected.norm() > 1e-4
        assert relative(forward_derivative(function, point, direction), expected) <= 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_mode_is_the_limit_of_differences(name: str) -> None:
    """Truncation and float32 rounding meet near this step, at 2e-5 to 6e-4; the corners of Sana's linear attention (ReLU) cost more."""
    function, point, direction = network(name)
    with sdpa_kernel(SDPBackend.MATH):
        difference = central_difference(function, point, direction, 3e-3)
    assert relative(difference, forward_derivative(function, point, direction)) <= (2e-2 if name == "sana" else 1e-3)
