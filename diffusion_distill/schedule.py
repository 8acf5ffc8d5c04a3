"""The forward process x_t = alpha(t) x0 + sigma(t) eps of a pretrained pipeline, read off its diffusers scheduler.

`t` is always the timestep that the pipeline hands to the network, and x_t is always the tensor that the network sees:
an index into `alphas_cumprod` for DDPM-style models, `1000 sigma` for flow matching, `ln(sigma) / 4` for EDM models, whose
input is scaled by c_in. Shift (static or dynamic) chooses which `t` a sampler visits and never changes sigma(t), so it lives
in the sampler.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, reject


def expand_dims(a: Tensor, x: Tensor) -> Tensor:
    """Append singleton dimensions to `a` (B,) until it broadcasts against `x` (B, ...), in the dtype of `x` (fp32 at least)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return a.to(dtype).reshape(a.shape + (1,) * (x.ndim - a.ndim))


class NoiseSchedule(ABC):
    """alpha(t) and sigma(t) in float64, for timesteps of any shape."""

    sigma_data: float = 1.0  # standard deviation of the data that a v-prediction network was preconditioned for

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient at timestep `t`, same shape, float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient at timestep `t`, same shape, float64."""

    @abstractmethod
    def timestep(self, level: Tensor) -> Tensor:
        """Timestep at noise level `level` in [0, 1], 0 the clean end and 1 the noisiest timestep of the schedule."""

    @abstractmethod
    def level(self, t: Tensor) -> Tensor:
        """Noise level in [0, 1] at timestep `t`, same shape, float64: the inverse of `timestep`."""

    @abstractmethod
    def timestep_at_ratio(self, ratio: Tensor) -> Tensor:
        """Inverse of `ratio`: the timestep, float64 and in general no integer, nearest to noise-to-signal ratio `ratio` >= 0."""

    @abstractmethod
    def contains(self, t: float) -> bool:
        """Whether the network was trained at timestep `t`."""

    @property
    @abstractmethod
    def accepted(self) -> str:
        """The timesteps that `contains` accepts, in words for an error message."""

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma(t) / alpha(t), float64: what EDM calls sigma, at which the network sees alpha (x0 + ratio eps)."""
        return self.sigma(t) / self.alpha(t)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of shape (B, ...) from x0 and eps (B, ...) at timesteps t (B,)."""
        return expand_dims(self.alpha(t), x0) * x0 + expand_dims(self.sigma(t), x0) * eps

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of q(x_t | x_s) = N(a x_s, b^2 I) for t noisier than s (Kingma et al., arXiv:2107.00630, eq. 1 of A.1)."""
        a = self.alpha(t) / self.alpha(s)
        b = (self.sigma(t) ** 2 - (a * self.sigma(s)) ** 2).clamp(min=0).sqrt()
        return a, b

    @staticmethod
    def from_scheduler(scheduler: Any) -> "NoiseSchedule":
        """Read the process of a diffusers scheduler.

        Raises:
            InputError: for a scheduler whose process is none of VP, flow matching, EDM or TrigFlow.
        """
        config = scheduler.config
        name = type(scheduler).__name__
        for option, misread in (("timestep_type", "continuous"), ("invert_sigmas", True)):
            if config.get(option) == misread:
                raise reject(f"scheduler.{option}", misread, "timesteps that are table indices or 1000 sigma are needed")
        if name.startswith("EDM"):
            return EDM(config.sigma_min, config.sigma_max, config.sigma_data, config.rho)
        if name == "SCMScheduler":
            return TrigFlow(config.sigma_data)
        if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas") or name.startswith("FlowM"):
            return RectifiedFlow(config.num_train_timesteps)
        if hasattr(scheduler, "alphas_cumprod"):
            _check_signal_powers(scheduler.alphas_cumprod)
            return VariancePreserving(scheduler.alphas_cumprod)
        raise reject("scheduler", name, "a DDPM-style, flow-matching, EDM or TrigFlow (SCM) scheduler is needed")


@dataclass(frozen=True)
class VariancePreserving(NoiseSchedule):
    """DDPM: alpha^2 = alphas_cumprod, alpha^2 + sigma^2 = 1.

    Between two integer timesteps sigma/alpha is linear in t, as in diffusers' `EulerDiscreteScheduler`.
    """

    alphas_cumprod: Tensor  # (T,)

    def alpha(self, t: Tensor) -> Tensor:
        return self._signal_power(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._signal_power(t)).sqrt()

    def _signal_power(self, t: Tensor) -> Tensor:
        table = self.alphas_cumprod.to(t.device, torch.float64)
        low = t.floor().long()
        exact = table[low]
        if not t.is_floating_point():
            return exact
        weight = t.double() - low
        ratio = ((1 - table) / table).sqrt()
        between = torch.lerp(ratio[low], ratio[(low + 1).clamp(max=len(table) - 1)], weight)
        return torch.where(weight == 0, exact, 1 / (1 + between**2))

    def timestep(self, level: Tensor) -> Tensor:
        return (level * len(self.alphas_cumprod)).round().clamp(0, len(self.alphas_cumprod) - 1).long()

    def timestep_at_ratio(self, ratio: Tensor) -> Tensor:
        power = self.alphas_cumprod.to(ratio.device, torch.float64)
        table = ((1 - power) / power).sqrt()
        ratio = ratio.double().clamp(table[0], table[-1])
        low = (torch.searchsorted(table, ratio, right=True) - 1).clamp(max=len(table) - 2)
        between = (ratio - table[low]) / (table[low + 1] - table[low])
        return low + torch.where(ratio == table[low + 1], 1.0, between)  # the last ratio may be infinite

    def level(self, t: Tensor) -> Tensor:
        return t.double() / len(self.alphas_cumprod)

    def contains(self, t: float) -> bool:
        return 0 <= t <= len(self.alphas_cumprod) - 1

    @property
    def accepted(self) -> str:
        return f"timesteps run from 0 to {len(self.alphas_cumprod) - 1}"


@dataclass(frozen=True)
class RectifiedFlow(NoiseSchedule):
    """Flow matching: alpha = 1 - sigma, sigma = t / num_train_timesteps (arXiv:2209.03003, 2403.03206)."""

    num_train_timesteps: int = 1000

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double() / self.num_train_timesteps

    def timestep(self, level: Tensor) -> Tensor:
        return level * self.num_train_timesteps

    def timestep_at_ratio(self, ratio: Tensor) -> Tensor:
        return self.num_train_timesteps * (1 - 1 / (1 + ratio.double()))

    def level(self, t: Tensor) -> Tensor:
        return self.sigma(t)

    def contains(self, t: float) -> bool:
        return 0 <= t <= self.num_train_timesteps

    @property
    def accepted(self) -> str:
        return f"timesteps run from 0 to {self.num_train_timesteps}"


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """EDM (arXiv:2206.00364): noise level s = exp(4 t); the network sees c_in (x0 + s eps), c_in = 1 / sqrt(s^2 + sigma_data^2)."""

    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float = 7.0

    def alpha(self, t: Tensor) -> Tensor:
        return (self._noise(t) ** 2 + self.sigma_data**2).rsqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return self._noise(t) * self.alpha(t)

    def _noise(self, t: Tensor) -> Tensor:
        return (4 * t.double()).exp()

    def timestep(self, level: Tensor) -> Tensor:
        """Karras spacing of the noise levels (EDM eq. 5)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return self.rho * torch.log(low + level.double() * (high - low)).to(level.dtype) / 4

    def timestep_at_ratio(self, ratio: Tensor) -> Tensor:
        return ratio.double().clamp(self.sigma_min, self.sigma_max).log() / 4

    def level(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (self._noise(t) ** (1 / self.rho) - low) / (high - low)

    def contains(self, t: float) -> bool:
        low, high = self.timestep(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        return low - 1e-6 <= t <= high + 1e-6

    @property
    def accepted(self) -> str:
        low, high = self.timestep(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        return f"timesteps are ln(sigma)/4, from {low:.4f} to {high:.4f}"


@dataclass(frozen=True)
class TrigFlow(NoiseSchedule):
    """TrigFlow (arXiv:2410.11081, sec. 3): x_t = cos(t) x0 + sin(t) sigma_data eps; the network sees x_t / sigma_data."""

    sigma_data: float

    def alpha(self, t: Tensor) -> Tensor:
        return t.double().cos() / self.sigma_data

    def sigma(self, t: Tensor) -> Tensor:
        return t.double().sin()

    def timestep(self, level: Tensor) -> Tensor:
        return level * (torch.pi / 2)

    def timestep_at_ratio(self, ratio: Tensor) -> Tensor:
        return (ratio.double() / self.sigma_data).atan()

    def level(self, t: Tensor) -> Tensor:
        return t.double() / (torch.pi / 2)

    def contains(self, t: float) -> bool:
        return 0 <= t <= torch.pi / 2 + 1e-3  # diffusers' SCM scheduler starts at 1.57080

    @property
    def accepted(self) -> str:
        return "timesteps are angles from 0 to pi/2"


def _check_signal_powers(powers: Tensor) -> None:
    """Refuse betas outside [0, 1]: their square roots would be no numbers, without a word."""
    if not (len(powers) > 1 and powers.isfinite().all() and powers.min() >= 0 and powers.max() <= 1 and (powers.diff() <= 0).all()):
        raise reject("scheduler.alphas_cumprod", f"{powers[0]:g} to {powers[-1]:g}", "numbers that fall from at most 1 to at least 0")


def prediction_type_of(scheduler: Any) -> str:
    """The parameterisation of the network behind `scheduler`: one of `prediction.PREDICTION_TYPES`.

    Raises:
        InputError: when the scheduler's configuration names none.
    """
    name, declared = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if name == "SCMScheduler":
        return "v_prediction" if declared in (None, "trigflow") else str(declared)
    if name.startswith("EDM") and declared == "epsilon":
        return "edm"  # diffusers' "epsilon" there is EDM's own F with a positive c_out (eq. 7)
    if declared is None and isinstance(NoiseSchedule.from_scheduler(scheduler), RectifiedFlow):
        return "flow_prediction"
    if declared is None:
        raise InputError(f"scheduler.prediction_type: {name} has none; epsilon, sample, v_prediction or flow_prediction is needed")
    return str(declared)
