"""Derivative of a network along a direction of its input (x, t), without gradient.

Forward mode is exact. The attention backends that fuse have no forward derivative, so it runs on the plain one, and gradient
checkpointing has none either; diffusers switches that off without gradient. Nor do diffusers' UNets under bfloat16 autocast: the function
to differentiate has to run in float32.

The exact derivative is not always the useful one. Where a network embeds t in 0..1000 by sines of periods down to six timesteps, what it
never learnt to ignore oscillates, and the derivative amplifies it (arXiv:2410.11081, sec. 4.1, on time scales). A difference over many
timesteps averages that out.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .attention import plain_attention

Point = tuple[Tensor, Tensor]  # x (B, ...) and t (B,), or a direction in which both move
Function = Callable[[Tensor, Tensor], Tensor]
Derivative = Literal["forward", "central", "backward"]


def derivative_along(function: Function, point: Point, direction: Point, kind: Derivative, step: float, value: Tensor) -> Tensor:
    """The derivative by its `kind`; differences take a `step`, and the backward one the function's `value` at the point."""
    if kind == "forward":
        return forward_derivative(function, point, direction)
    if kind == "central":
        return central_difference(function, point, direction, step)
    return backward_difference(function, point, direction, step, value)


@torch.no_grad()
def forward_derivative(function: Function, point: Point, direction: Point) -> Tensor:
    """d function(x + h dx, t + h dt) / dh at h = 0, by forward-mode differentiation."""
    with plain_attention(), sdpa_kernel(SDPBackend.MATH), _ContiguousGroupNorm():
        derivative: Tensor = torch.func.jvp(function, point, direction)[1]
    return derivative


@torch.no_grad()
def central_difference(function: Function, point: Point, direction: Point, step: float) -> Tensor:
    """The same from the points `step` ahead and behind, float64; the error is of second order in `step`."""
    ahead, behind = (function(*_moved(point, direction, h)).double() for h in (step, -step))
    return (ahead - behind) / (2 * step)


@torch.no_grad()
def backward_difference(function: Function, point: Point, direction: Point, step: float, value: Tensor) -> Tensor:
    """The same from the point `step` behind and the `value` here, float64; of first order, for half the network calls."""
    return (value.double() - function(*_moved(point, direction, -step)).double()) / step


class _ContiguousGroupNorm(TorchFunctionMode):
    """The forward derivative of group normalisation takes views that a transposed input does not allow."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def _moved(point: Point, direction: Point, h: float) -> Point:
    (x, t), (dx, dt) = point, direction
    return (x.double() + h * dx.double()).to(x.dtype), t + h * dt
