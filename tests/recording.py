"""Tiny class-conditional networks of a method, what they receive and return, and what that means by the textbook.

The formulas are written out here (numpy, float64) on diffusers' own tables, never taken from the package. Noise is recovered from
recorded inputs, so no test depends on the order of the draws.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from scipy import stats
from tiny_pipelines import class_conditional
from torch import Tensor, nn

from diffusion_distill.build import build_networks
from diffusion_distill.methods import Batch, Method
from diffusion_distill.networks import Networks
from diffusion_distill.random import SampleRandom
from diffusion_distill.train_config import TrainConfig

PROCESSES = ("epsilon", "v_prediction", "flow")
SHAPE, UNCONDITIONAL = (1, 8, 8), 10
COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
pipeline = cache(class_conditional)


@dataclass
class Call:
    x_t: Tensor
    t: Tensor
    label: Tensor
    output: Tensor
    with_gradient: bool


def networks(process: str, method: Method) -> Networks:
    """What the trainer builds, with a call for each condition (test_guidance.py compares one call for both); student and fake score
    are moved apart, for at the start both equal the teacher."""
    nets = build_networks(pipeline(process), method, TrainConfig(batch_guidance=False))
    generator = torch.Generator().manual_seed(1)
    for role in ("student", "fake_score"):
        for p in nets.parameters(role).values():
            p.data += 0.03 * torch.randn(p.shape, generator=generator)
    return nets


def batch(step: int = 0, turn: int = 0, slots: range = range(4), **fields: Any) -> Batch:
    cond = {"class_labels": torch.tensor([slot % 10 for slot in slots])}
    uncond = {"class_labels": torch.full((len(slots),), UNCONDITIONAL)}
    images = torch.randn(len(slots), *SHAPE, generator=torch.Generator().manual_seed(2))
    return Batch(cond, uncond, SHAPE, SampleRandom((step, turn), slots), **{"x0": images} | fields)


def record(net: Any) -> list[Call]:
    """Every completed forward pass of a Denoiser's model from now on; outputs keep their gradient."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Tensor, Tensor], kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        if output[0].requires_grad:
            output[0].retain_grad()
        calls.append(Call(*args, kwargs["class_labels"], output[0], torch.is_grad_enabled()))

    net.model.register_forward_hook(hook, with_kwargs=True)
    return calls


def record_discriminator(nets: Networks) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x_t, t, logits) of every call of the discriminator from now on."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    nets.discriminator.register_forward_hook(lambda module, args, output: calls.append((args[1].detach(), args[2], output.detach())))
    return calls


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def coefficients(process: str, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma), each (B, 1, 1, 1), from diffusers' table or the definition of flow matching."""
    power = array(COSINE.alphas_cumprod)[t.long().clamp(max=999)]
    alpha, sigma = (1 - array(t) / 1000, array(t) / 1000) if process == "flow" else (np.sqrt(power), np.sqrt(1 - power))
    return alpha[:, None, None, None], sigma[:, None, None, None]


def x0_of(process: str, call: Call) -> np.ndarray:
    """x0 that a network output means."""
    (alpha, sigma), x_t, output = coefficients(process, call.t), array(call.x_t), array(call.output)
    with np.errstate(divide="ignore", invalid="ignore"):  # no signal at the noisiest timestep of flow matching
        epsilon = (x_t - sigma * output) / alpha
    return {"epsilon": epsilon, "v_prediction": alpha * x_t - sigma * output, "flow": x_t - sigma * output}[process]


def noise_in(process: str, x_t: Tensor, t: Tensor, x0: np.ndarray) -> np.ndarray:
    alpha, sigma = coefficients(process, t)
    return (array(x_t) - alpha * x0) / sigma


def is_unit_noise(eps: np.ndarray) -> bool:
    return bool(stats.kstest(eps.ravel(), "norm").pvalue > 1e-3)


def uncorrelated(a: np.ndarray, b: np.ndarray) -> bool:
    """Within four standard errors."""
    return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
