"""The network evaluations that score-distillation methods are made of."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoiser import Denoiser, guided
from .experts import Student
from .families import Cond
from .losses import distribution_matching_direction
from .prediction import Prediction
from .sampler import FewStepSampler
from .schedule import NoiseSchedule, expand_dims


def backward_simulation(
    student: Student, sampler: FewStepSampler, noise: Tensor, cond: Cond, draw: Callable[[Tensor], Tensor], rung: int
) -> tuple[Prediction, Tensor]:
    """The student's prediction at step `rung` of its own trajectory from `noise` (B, ...), and the timesteps (B,) of that call.

    Gradient runs through that last call alone (DMD2, arXiv:2405.14867, sec. 4.5).
    """
    with torch.no_grad():
        x_t, t = sampler.roll_out(student, noise, cond, draw, rung)  # type: ignore[arg-type]
    prediction: Prediction = student(x_t, t, cond)
    return prediction, t


def draw_timesteps(schedule: NoiseSchedule, uniform: Tensor, lowest: float, highest: float) -> Tensor:
    """Timesteps (B,) at noise levels between two fractions of the schedule, from numbers (B,) in [0, 1)."""
    return schedule.timestep(lowest + (highest - lowest) * uniform)


@torch.no_grad()
def real_and_fake(
    teacher: Denoiser, fake_score: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, guidance_scale: float
) -> tuple[Prediction, Prediction]:
    """Teacher (guided) and fake score (never guided) at the same (x_t, t): x_t (B, ...), t (B,)."""
    return guided_pair(teacher, fake_score, x_t, t, cond, uncond, (guidance_scale, 1.0))


@torch.no_grad()
def guided_pair(
    teacher: Denoiser, fake_score: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, guidance_scales: tuple[float, float]
) -> tuple[Prediction, Prediction]:
    """Teacher and fake score at the same (x_t, t), x_t (B, ...), t (B,), each with its own guidance scale; 1 is off."""
    real, fake = (guided(net, x_t, t, cond, uncond, w) for net, w in zip((teacher, fake_score), guidance_scales, strict=True))
    return real, fake


def distribution_matching(
    teacher: Denoiser,
    fake_score: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    uncond: Cond,
    guidance_scale: float,
    floor: float = 1e-6,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distribution_matching_direction` (B, ...) of samples x0 (B, ...) diffused with eps to t (B,), and its `agreement`."""
    x_t = teacher.schedule.add_noise(x0.detach(), eps, t)
    real, fake = real_and_fake(teacher, fake_score, x_t, t, cond, uncond, guidance_scale)
    logs = agreement(x0, real.x0, fake.x0) | {"reliability": reliability(x0, real.x0, fake.x0)}
    return distribution_matching_direction(x0.detach(), real.x0, fake.x0, floor), logs


def denoising_score_matching(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond, space: str = "network") -> Tensor:
    """Mean squared error at x_t = alpha x0 + sigma eps, unweighted in prediction type `space` ("network": its own)."""
    pred = denoiser(denoiser.schedule.add_noise(x0, eps, t), t, cond)
    target = Prediction(x0, eps, pred.alpha, pred.sigma, pred.sigma_data)
    kind = denoiser.prediction_type if space == "network" else space
    return F.mse_loss(pred.view(kind), target.view(kind))


def diffuse_from(schedule: NoiseSchedule, x_s: Tensor, eps: Tensor, t: Tensor, s: float | None) -> Tensor:
    """x_t (B, ...) of q(x_t | x_s) from x_s and eps (B, ...) at timesteps t (B,) noisier than s; None is the clean end, x_s = x0."""
    if s is None:
        return schedule.add_noise(x_s, eps, t)
    a, b = (expand_dims(c, x_s) for c in schedule.transition(t, _scalar(s, t)))
    return a * x_s + b * eps


def subinterval_target(schedule: NoiseSchedule, x_s: Tensor, eps: Tensor, t: Tensor, s: float, floor: float = 1e-4) -> Prediction:
    """What a denoiser regresses on at x_t = a x_s + b eps, so that its mean is that of the pair (x0, eps) behind x_t.

    E[-eps / b | x_t] is the score of x_t whatever s is, so sigma_t / b eps has the mean of the whole noise, and x0 follows from x_t
    (Phased DMD, arXiv:2510.27684, for flow matching: v* = (sigma_t + alpha_t sigma_s^2 / alpha_s^2) / b eps - x_s / alpha_s). b is
    at least `floor`.
    """
    end = _scalar(s, t)
    alpha_s, sigma_s = schedule.alpha(end).to(x_s), schedule.sigma(end).to(x_s)
    alpha_t, sigma_t, b = (expand_dims(c, x_s) for c in (schedule.alpha(t), schedule.sigma(t), _spread(schedule, t, s, floor)))
    x0 = x_s / alpha_s - alpha_t * sigma_s**2 / (alpha_s**2 * b) * eps  # (x_t - sigma_t eps*) / alpha_t, where alpha_t may vanish
    return Prediction(x0, sigma_t / b * eps, alpha_t, sigma_t, schedule.sigma_data)


def subinterval_score_matching(
    denoiser: Denoiser, x_s: Tensor, eps: Tensor, t: Tensor, s: float | None, cond: Cond, max_weight: float, space: str = "network"
) -> Tensor:
    """Mean of min(1 / b^2, max_weight) |b output - b target|^2 at x_t = a x_s + b eps (arXiv:2510.27684): weight 1 but close to s.

    With s None, where nothing diverges, it is `denoising_score_matching` without a weight.
    """
    if s is None:
        return denoising_score_matching(denoiser, x_s, eps, t, cond, space)
    pred = denoiser(diffuse_from(denoiser.schedule, x_s, eps, t, s), t, cond)
    target = subinterval_target(denoiser.schedule, x_s, eps, t, s)
    weight = (max_weight * _spread(denoiser.schedule, t, s, 0.0) ** 2).clamp(max=1)
    kind = denoiser.prediction_type if space == "network" else space
    return (expand_dims(weight, x_s) * (pred.view(kind) - target.view(kind)).square()).mean()


def draw_timesteps_above(
    schedule: NoiseSchedule, uniform: Tensor, s: float | None, margin: float, highest: float, shift: float = 1.0
) -> Tensor:
    """Timesteps (B,) at noise levels from `margin` above timestep s (None: the clean end) to `highest`, fractions of the schedule.

    Numbers u of `uniform` (B,) in [0, 1) are shifted towards noise: shift u / (1 + (shift - 1) u).
    """
    u = shift * uniform / (1 + (shift - 1) * uniform)
    return draw_timesteps(schedule, u, level_above(schedule, s, margin), highest)


def level_above(schedule: NoiseSchedule, s: float | None, margin: float) -> float:
    """The noise level `margin` above timestep s; None is the clean end."""
    return margin if s is None else margin + float(schedule.level(torch.tensor(s, dtype=torch.float64)))


def _scalar(s: float, t: Tensor) -> Tensor:
    return torch.tensor(s, dtype=torch.float64, device=t.device)


def _spread(schedule: NoiseSchedule, t: Tensor, s: float, floor: float) -> Tensor:
    """b of q(x_t | x_s) at timesteps t (B,), float64, at least `floor`."""
    return schedule.transition(t, _scalar(s, t))[1].clamp(min=floor)


@torch.no_grad()
def agreement(x0: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """What tells whether score distillation works: how far and in which direction the fake score is from the teacher.

    `sample_spread` and `real_spread` are standard deviations over the batch, of the samples and of what the teacher makes of them; a
    batch of one has none. Without guidance the first is the larger by the law of total variance where student and teacher agree.
    """
    values = {
        "gap": (fake - real).square().mean().sqrt() / real.square().mean().sqrt(),
        "cosine": F.cosine_similarity(fake.flatten(1), real.flatten(1)).mean(),
        "sample_mean": x0.mean(),
        "sample_std": x0.std(),
    }
    return values | ({"sample_spread": _spread_of(x0), "real_spread": _spread_of(real)} if len(x0) > 1 else {})


@torch.no_grad()
def reliability(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Share of the direction fake - real that is true: <fake - real, x0 - real> / |fake - real|^2 over the whole batch.

    Given x_t, x0 has the mean that a perfect fake score predicts, so the numerator's mean is <fake - real, perfect - real> whatever the
    variance of x0 is: the noise floor of the fake score's loss, unknown and moving with the student, drops out. 1: the fake score is as
    good as it can be. 0.5: it knows the student's samples no better than the teacher does. 0 and below: the step goes astray.
    `real` may be guided; x0 (B, ...) is the sample that was diffused to the x_t of both predictions.
    """
    difference = (fake - real).double()
    return (difference * (x0 - real)).sum() / difference.square().sum().clamp(min=1e-30)


def _spread_of(x: Tensor) -> Tensor:
    return x.var(0).mean().sqrt()
