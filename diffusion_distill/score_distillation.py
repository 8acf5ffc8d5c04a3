"""The network evaluations that score-distillation methods are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoiser import Denoiser, guided
from .families import Cond
from .prediction import Prediction


@torch.no_grad()
def real_and_fake(
    teacher: Denoiser, fake_score: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, guidance_scale: float
) -> tuple[Prediction, Prediction]:
    """Teacher (guided) and fake score (never guided) at the same (x_t, t): x_t (B, ...), t (B,)."""
    return guided(teacher, x_t, t, cond, uncond, guidance_scale), fake_score(x_t, t, cond)


def denoising_score_matching(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond, space: str | None = None) -> Tensor:
    """Mean squared error at x_t = alpha x0 + sigma eps, unweighted in prediction type `space` (None: the network's own)."""
    pred = denoiser(denoiser.schedule.add_noise(x0, eps, t), t, cond)
    target = Prediction(x0, eps, pred.alpha, pred.sigma, pred.sigma_data)
    kind = space or denoiser.prediction_type
    return F.mse_loss(pred.view(kind), target.view(kind))


def approximate_r1(logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """E (D(x + s n) - D(x))^2 = s^2 E|grad D|^2 + O(s^4): R1 without a second derivative (arXiv:2501.08316, eq. 5)."""
    return (perturbed_logits - logits).square().mean()


@torch.no_grad()
def agreement(x0: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """What tells whether score distillation works: how far and in which direction the fake score is from the teacher."""
    return {
        "gap": (fake - real).square().mean().sqrt() / real.square().mean().sqrt(),
        "cosine": F.cosine_similarity(fake.flatten(1), real.flatten(1)).mean(),
        "sample_mean": x0.mean(),
        "sample_std": x0.std(),
    }
