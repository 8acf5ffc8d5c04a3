"""Laws of the noise level that a training step looks at, as inverse distribution functions: uniform numbers in, levels out."""

import math

import torch
from torch import Tensor


def u_shaped(uniform: Tensor, steepness: float) -> Tensor:
    """Levels (B,) in [0, 1] of density proportional to exp(a u) + exp(a (1 - u)), a = `steepness` (improved RF, arXiv:2405.20320, sec. 4).

    The density is proportional to cosh(a (u - 1/2)), whose integral inverts in closed form.
    """
    half = math.sinh(steepness / 2)
    return (0.5 + torch.asinh((2 * uniform.double() - 1) * half) / steepness).to(uniform.dtype)


def logit_normal(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Levels (B,) in [0, 1) whose logit is N(mean, std^2) (arXiv:2403.03206, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform.double())).to(uniform.dtype)
