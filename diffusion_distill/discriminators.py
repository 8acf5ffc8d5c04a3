"""Discriminators: `nets.discriminator(nets, x_t, t, cond)` is one logit a sample, (B,), wherever its features come from.

Built with a number of `logits` K, it is K of them, (B, K): as many discriminators on the same features.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .errors import reject
from .families import Cond
from .schedule import expand_dims


def _norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of 8 channels or more: on a one-pixel map, groups of one channel would leave nothing but a constant."""
    return nn.GroupNorm(math.gcd(32, channels, max(channels // 8, 1)), channels)


def map_head(channels: int, size: int, logits: int | None = None) -> nn.Sequential:
    """Head on a feature map (B, C, H, W): 4x4 convolutions to one logit, as DMD2's on the middle block (app. of 2405.14867)."""
    layers: list[nn.Module] = []
    while size > 4:
        layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _norm(channels), nn.SiLU()]
        size //= 2
    layers += [nn.Conv2d(channels, channels, size), _norm(channels), nn.SiLU(), nn.Conv2d(channels, logits or 1, 1)]
    layers.append(nn.Flatten(1 if logits else 0))
    return nn.Sequential(*layers)


class TokenHead(nn.Sequential):
    """Head on tokens (B, N, C): the mean over the tokens' logits."""

    def __init__(self, channels: int, logits: int | None = None):
        super().__init__(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, logits or 1))
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        mean: Tensor = super().forward(tokens).mean(1)
        return mean if self.logits else mean.squeeze(1)


class FeatureDiscriminator(nn.Module):
    """Heads on the tapped features of another network: `trunk` "fake_score" (DMD2, sec. 4.3) or "teacher" (LADD, 2403.12015).

    A fake-score trunk learns from the discriminator's loss too.
    """

    def __init__(self, trunk: str, features: list[Tensor], logits: int | None = None):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(
            map_head(f.shape[1], min(f.shape[2:]), logits) if f.ndim == 4 else TokenHead(f.shape[2], logits) for f in features
        )

    def forward(self, nets: Any, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        features = getattr(nets, self.trunk).features(x_t, t, cond)
        return torch.stack([head(f.float()) for head, f in zip(self.heads, features, strict=True)]).mean(0)


class OwnDiscriminator(nn.Module):
    """A small convolutional network of its own with a projection of the condition (Miyato & Koyama, arXiv:1802.05637).

    For teachers that are too small to have features worth a head, and for x0 small enough for plain convolutions.
    """

    def __init__(self, teacher: Denoiser, channels: int, condition_size: int, logits: int | None = None, width: int = 48):
        super().__init__()
        self.family, self.schedule, self.teacher_model = teacher.family, teacher.schedule, [teacher.model]  # a list: not a submodule
        self.body = nn.Sequential(
            nn.Conv2d(channels + 1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.head = nn.LazyLinear(logits or 1)
        self.project = nn.Linear(condition_size, (logits or 1) * 2 * width, bias=False)
        self.logits = logits

    def forward(self, nets: Any, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x_t = x_t.float()
        noise_level = expand_dims(self.schedule.sigma(t), x_t).expand(-1, 1, *x_t.shape[2:])
        hidden = self.body(torch.cat([x_t, noise_level], 1))
        condition = self.project(self.family.condition_vector(self.teacher_model[0], cond).float())
        condition = condition.unflatten(1, (self.head.out_features, -1))
        pooled = hidden.reshape(len(hidden), condition.shape[2], -1).mean(2)
        logits: Tensor = self.head(hidden) + (pooled[:, None] * condition).sum(2)
        return logits if self.logits else logits.squeeze(1)


def _own(teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, logits: int | None = None) -> nn.Module:
    if x_t.ndim != 4:
        raise reject("discriminator", "own", "'fake_score' or 'teacher' for videos: its convolutions are those of images")
    vector = teacher.family.condition_vector(teacher.model, cond)
    network = OwnDiscriminator(teacher, x_t.shape[1], vector.shape[1], logits).to(x_t.device)
    network(None, x_t, t, cond)  # sizes the lazy head
    return network


def _heads_on(trunk: str) -> Callable[..., nn.Module]:
    def build(teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, logits: int | None = None) -> nn.Module:
        return FeatureDiscriminator(trunk, teacher.features(x_t, t, cond), logits).to(x_t.device)

    return build


DISCRIMINATORS: dict[str, Callable[..., nn.Module]] = {"fake_score": _heads_on("fake_score"), "teacher": _heads_on("teacher"), "own": _own}
"""Builders by name: `(teacher, x_t, t, cond, logits) -> module`, shapes taken from one example input."""
