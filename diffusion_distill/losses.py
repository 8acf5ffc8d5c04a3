"""Distillation losses: tensors in, scalar out. No network is called here."""

import torch.nn.functional as F
from torch import Tensor


def surrogate(x: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient with respect to `x` (B, ...) is `direction / x.numel()` (B, ...), treated as a constant."""
    return 0.5 * F.mse_loss(x.float(), (x - direction).detach().float())


def distribution_matching_direction(x0: Tensor, real: Tensor, fake: Tensor, floor: float = 1e-6) -> Tensor:
    """(fake - real) / mean|x0 - real| (B, ...): ascends the KL divergence (DMD, arXiv:2311.18828, eq. 7 and 8; DMD2's code).

    The mean runs over all non-batch dimensions and is at least `floor`. `real` is the guided teacher's x0, `fake` the fake score's.
    """
    dims = tuple(range(1, x0.ndim))
    scale = (x0 - real).abs().mean(dims, keepdim=True).clamp(min=floor)
    return (fake - real) / scale


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating GAN loss of the generator (arXiv:1406.2661, sec. 3)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic GAN loss of the discriminator (arXiv:1406.2661, eq. 1)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
