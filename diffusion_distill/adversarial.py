"""What the adversarial terms of distillation share: a GAN loss as a direction beside another one, and the discriminator's penalty."""

from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import NoiseSchedule


def input_direction(x0: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The scalar loss(x0) of samples x0 (B, ...), and its gradient in the scale of `losses.surrogate`'s direction, (B, ...)."""
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_(True)
        value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0] * leaf.numel()


def add_direction(direction: Tensor, other: Tensor, weight: float, relative: bool) -> Tensor:
    """direction + weight other; where `relative`, `other` (B, ...) is scaled to the norm of `direction` (B, ...) first."""
    scale = direction.norm() / other.norm().clamp(min=1e-12) if relative else 1
    return direction + weight * scale * other


def approximate_r1(logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """E (D(x + s n) - D(x))^2 = s^2 E|grad D|^2 + O(s^4): R1 without a second derivative (arXiv:2501.08316, eq. 5)."""
    return (perturbed_logits - logits).square().mean()


def diffused_alike(
    discriminate: Callable[[Tensor], Tensor], schedule: NoiseSchedule, eps: Tensor, t: Tensor, nearby: Tensor
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of samples (B, ...): their logits, all with the same noise eps (B, ...) at the same t (B,), so that a pair differs in
    nothing else; and, where asked for by its second argument, those at `nearby` (B, ...) beside."""

    def logits(x0: Tensor, perturbed: bool = False) -> tuple[Tensor, Tensor]:
        x_t = schedule.add_noise(x0, eps, t)
        found = discriminate(x_t)
        return found, discriminate(x_t + nearby) if perturbed else found

    return logits
