"""Any denoiser as a TrigFlow network (arXiv:2410.11081): y = cos(a) x0 + sin(a) sigma_data eps at an angle a in [0, pi/2].

A process x_t = alpha x0 + sigma eps is TrigFlow up to scale at tan(a) = sigma / (alpha sigma_data): x_t = k y there, with
k = hypot(alpha, sigma / sigma_data). The pair (x0, eps) that the network implies then gives F = cos(a) eps - sin(a) x0 / sigma_data, the
solution of the two linear equations, for every parameterisation (app. B.2, eq. 29; for flow matching: SANA-Sprint, arXiv:2503.09641).

All of it can be differentiated in (y, a). k is a smooth function of the angle for every process; the timestep of a DDPM-style network
between two integers is linear in sigma / alpha, so its slope in the angle jumps at integers by the table's second difference.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .prediction import Prediction
from .schedule import NoiseSchedule, expand_dims

Predict = Callable[[Tensor, Tensor], Prediction]  # of (x_t, t)


def angle_at_ratio(ratio: Tensor, sigma_data: float) -> Tensor:
    """Angle, float64, at noise-to-signal ratio `ratio`."""
    return (ratio.double() / sigma_data).atan()


def network_input(schedule: NoiseSchedule, y: Tensor, angle: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(x_t, t), shapes (B, ...) and (B,) float64, which the network of `schedule` sees for y (B, ...) at angles (B,)."""
    t = schedule.timestep_at_ratio(sigma_data * angle.double().tan())
    return expand_dims(torch.hypot(schedule.alpha(t), schedule.sigma(t) / sigma_data), y) * y, t


def trigflow_output(predict: Predict, schedule: NoiseSchedule, y: Tensor, angle: Tensor, sigma_data: float) -> Tensor:
    """F (B, ...): the consistency function is cos(a) y - sin(a) sigma_data F (eq. 5), and a teacher's dy / da is sigma_data F (eq. 3)."""
    pred = predict(*network_input(schedule, y, angle, sigma_data))
    return expand_dims(angle.cos(), y) * pred.eps - expand_dims(angle.sin() / sigma_data, y) * pred.x0


def consistency_tangent(y: Tensor, angle: Tensor, velocity: Tensor, f: Tensor, df: Tensor, sigma_data: float, share: float) -> Tensor:
    """cos(a) df/da of the consistency function (B, ...), in float64 (arXiv:2410.11081, eq. 6 and algorithm 1).

    Args:
        y: (B, ...) at angles `angle` (B,).
        velocity: dy / da (B, ...), the teacher's or the data's.
        f: the student's F (B, ...).
        df: cos(a) sin(a) dF / da (B, ...) along the trajectory.
        share: r, how much of the term that grows with training is in.
    """
    y, velocity, f, df = (x.double() for x in (y, velocity, f, df))
    cos, sin = expand_dims(angle.cos(), y), expand_dims(angle.sin(), y)
    return -(cos**2) * (sigma_data * f - velocity) - share * (cos * sin * y + sigma_data * df)


def normalized(g: Tensor, c: float, root_mean_square: bool = False) -> Tensor:
    """g / (|g| + c) for each sample of g (B, ...); |g| is its Euclidean norm, or that divided by the root of its dimensions (sec. 4.2)."""
    norm = torch.linalg.vector_norm(g.flatten(1), dim=1) / (g[0].numel() ** 0.5 if root_mean_square else 1)
    return g / (expand_dims(norm, g) + c)


class LogVariance(nn.Module):
    """A learned logarithm of the loss's size at each angle, (B,) for angles (B,), zero at first (adaptive weighting, sec. 4.2, app. D)."""

    def __init__(self, frequencies: int = 8):
        super().__init__()
        self.frequencies = frequencies
        self.linear = nn.Linear(2 * frequencies, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, angle: Tensor) -> Tensor:
        phase = angle.float()[:, None] * torch.arange(1, self.frequencies + 1, device=angle.device)
        output: Tensor = self.linear(torch.cat([phase.sin(), phase.cos()], 1)).squeeze(1)
        return output
