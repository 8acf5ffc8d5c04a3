"""Labelled mixtures of Gaussians: exact networks in every parameterisation, and a small network to train on them."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffusion_distill.denoiser import Denoiser
from diffusion_distill.families import Cond, Family
from diffusion_distill.schedule import NoiseSchedule, prediction_type_of

TEACHERS = ("epsilon", "v_prediction", "flow_prediction")


def scheduler_of(teacher: str) -> Any:
    """The diffusers scheduler behind a teacher of `TEACHERS`: DDPM on Stable Diffusion's betas, or flow matching."""
    if teacher == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=teacher, clip_sample=False)


def denoiser_of(teacher: str, model: nn.Module) -> Denoiser:
    """`model` read as a teacher of `TEACHERS` would be."""
    scheduler = scheduler_of(teacher)
    return Denoiser(model, NoiseSchedule.from_scheduler(scheduler), prediction_type_of(scheduler), ToyFamily())


def network_output(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of prediction type `kind` is trained to output for the pair (x0, eps), written out once more."""
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0}[kind]


class GaussianMixture(nn.Module):
    """The exact network for x0 ~ sum_k w_k N(m_k, s_k^2 I): its output at (x_t, t, label) is the mean of its training target.

    A label below K conditions on that component; label K is unconditional. float64; x_t (B, ...) holds D numbers a sample.
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor, schedule: NoiseSchedule, prediction_type: str):
        super().__init__()
        self.means = nn.Parameter(means.double(), requires_grad=False)  # (K, D)
        self.stds, self.log_weights = stds.double(), weights.double().log()  # (K,)
        self.schedule, self.prediction_type = schedule, prediction_type

    @property
    def components(self) -> int:
        return len(self.means)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None, None], self.schedule.sigma(t)[:, None, None]
        residual = x_t.double().flatten(1)[:, None] - alpha * self.means  # (B, K, D)
        variance = (alpha * self.stds[:, None]) ** 2 + sigma**2  # (B, K, 1)
        share = self._posterior(residual, variance, label)[..., None]
        x0 = (share * (self.means + alpha * self.stds[:, None] ** 2 / variance * residual)).sum(1)
        eps = (share * sigma / variance * residual).sum(1)
        return network_output(self.prediction_type, x0, eps, alpha[:, 0], sigma[:, 0]).reshape(x_t.shape)

    def _posterior(self, residual: Tensor, variance: Tensor, label: Tensor) -> Tensor:
        """p(component | x_t, label), (B, K)."""
        log_density = -0.5 * (residual**2 / variance + variance.log()).sum(2)
        excluded = (label[:, None] < self.components) & (label[:, None] != torch.arange(self.components))
        return (self.log_weights + log_density).masked_fill(excluded, -torch.inf).softmax(1)

    @torch.no_grad()
    def sample(self, label: Tensor, generator: torch.Generator) -> Tensor:
        """x0 (B, D) float32 for labels (B,)."""
        drawn = torch.multinomial(self.log_weights.exp(), len(label), replacement=True, generator=generator)
        component = torch.where(label < self.components, label, drawn)
        noise = torch.randn(len(label), self.means.shape[1], dtype=torch.float64, generator=generator)
        return (self.means[component] + self.stds[component, None] * noise).float()


class ToyNetwork(nn.Module):
    """A multi-layer perceptron with the signature of `GaussianMixture`; its hidden layers see one token (B, 1, width)."""

    def __init__(self, dimension: int, components: int, width: int = 64):
        super().__init__()
        self.components = components
        self.embed = nn.Embedding(components + 1, 8)
        sizes = (dimension + 8 + 8, width, width)
        self.hidden = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in zip(sizes, sizes[1:]))
        self.out = nn.Linear(width, dimension)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angle = t.float()[:, None] / 1000 * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        hidden = torch.cat([x_t.flatten(1), angle.sin(), angle.cos(), self.embed(label)], 1)[:, None]
        for layer in self.hidden:
            hidden = layer(hidden)
        output: Tensor = self.out(hidden).reshape(x_t.shape)
        return output


class ToyFamily(Family):
    """Adapter of both networks; only `ToyNetwork` has features. In place of a pipeline it takes the `GaussianMixture`."""

    name: ClassVar = "toy"
    pipelines: ClassVar = ()
    component: ClassVar = "mixture"
    lora_targets: ClassVar = ("out",)

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        output: Tensor = model(x_t, t, cond["label"])
        return output

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return list(model.hidden)  # type: ignore[arg-type]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        return (pipe.means.shape[1],)

    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        return {"label": torch.tensor([int(c) for c in conditions])}

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return {"label": torch.full((batch_size,), pipe.components)}

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return F.one_hot(cond["label"], model.components + 1).float()  # type: ignore[arg-type, operator]

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        return images

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        return x0

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int) -> dict[str, Any]:
        return {}

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"labels": list(conditions)}


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'| from samples x (N, D) and y (M, D); zero for equal laws."""

    def within(a: Tensor) -> Tensor:
        return torch.cdist(a, a).sum() / (len(a) * (len(a) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))
