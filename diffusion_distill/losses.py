"""Distillation losses: tensors in, scalar out. No network is called here."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .prediction import Prediction


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


def variational_direction(real: Prediction, fake: Prediction) -> Tensor:
    """alpha sigma (fake - real) in x0 (B, ...), which is sigma^2 (eps_real - eps_fake).

    VSD with w(t) = sigma_t^2 (arXiv:2305.16213, eq. 9).
    """
    return real.alpha * real.sigma * (fake.x0 - real.x0)


def feature_distance(features: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """LPIPS (arXiv:1801.03924, eq. 1) with weights 1: squared distance of features scaled to unit length over their channels.

    Maps (B, C, H, W) or tokens (B, N, C); the mean over positions, samples and layers.
    """
    found = []
    for a, b in zip(features, others, strict=True):
        channels = 1 if a.ndim == 4 else -1
        found.append((F.normalize(a.float(), dim=channels) - F.normalize(b.float(), dim=channels)).square().sum(channels).mean())
    return torch.stack(found).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating GAN loss of the generator (arXiv:1406.2661, sec. 3)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic GAN loss of the discriminator (arXiv:1406.2661, eq. 1)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def relativistic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic pairing loss of the discriminator (arXiv:1807.00734; R3GAN, 2501.05417, eq. 2); swapped, the generator's."""
    return F.softplus(fake_logits - real_logits).mean()


def image_pseudo_huber(x: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(|x - target|^2 + c^2) - c over the whole of each sample, (B,) (iCT, arXiv:2310.14189, eq. 8)."""
    return ((x - target).square().flatten(1).sum(1) + c**2).sqrt() - c


def sample_distance(x: Tensor, target: Tensor, kind: str, huber_scale: float) -> Tensor:
    """One number a sample, (B,): `image_pseudo_huber` of c = `huber_scale` times the square root of the number of dimensions (iCT, sec.
    3.3), or for `kind` "l2" the mean squared error."""
    if kind == "l2":
        return (x - target).square().flatten(1).mean(1)
    return image_pseudo_huber(x, target, huber_scale * math.sqrt(x[0].numel()))


def pseudo_huber(x: Tensor, target: Tensor, c: float) -> Tensor:
    """Mean over all elements of sqrt((x - target)^2 + c^2) - c, in float32 (the released LCM code; compare `image_pseudo_huber`)."""
    return (((x.float() - target.float()).square() + c**2).sqrt() - c).mean()


def element_distance(x: Tensor, target: Tensor, kind: str, c: float) -> Tensor:
    """`pseudo_huber` of scale `c`, or for `kind` "l2" the mean squared error, in float32."""
    return pseudo_huber(x, target, c) if kind == "pseudo_huber" else F.mse_loss(x.float(), target.float())


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator (arXiv:1705.02894, eq. 5); its generator's loss is the mean of -fake_logits."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
