"""Guidance in one call of twice the batch against two calls, on real networks of several families."""

from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, example_conditions
from torch import Tensor

from diffusion_distill.build import teacher_denoiser
from diffusion_distill.denoiser import Denoiser, guided

NAMES = ("class_conditional_epsilon", "stable_diffusion_v", "stable_diffusion_xl", "stable_diffusion_3")


def case(name: str) -> tuple[Denoiser, tuple[Any, ...]]:
    """A tiny network, and everything of a guided call but the scale."""
    pipe = PIPELINES[name]()
    denoiser = teacher_denoiser(pipe)
    family, conditions = denoiser.family, example_conditions(pipe)
    cond, uncond = family.encode_conditions(pipe, conditions), family.unconditional(pipe, len(conditions))
    x_t = torch.randn(len(conditions), *family.sample_shape(pipe), generator=torch.Generator().manual_seed(0))
    return denoiser, (x_t, denoiser.schedule.timestep(torch.tensor([0.3, 0.8])), cond, uncond)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_call_of_twice_the_batch_is_two_calls(name: str) -> None:
    denoiser, inputs = case(name)
    batches: list[int] = []
    denoiser.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    for scale in (3.5, torch.tensor([2.0, 5.0])):
        batches.clear()
        denoiser.batch_guidance = False
        two = guided(denoiser, *inputs, scale)
        denoiser.batch_guidance = True
        one = guided(denoiser, *inputs, scale)
        assert batches == [2, 2, 4]
        for a, b in ((one.x0, two.x0), (one.eps, two.eps), (one.alpha, two.alpha), (one.sigma, two.sigma)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert guided(denoiser, *inputs, 1.0).x0.shape == two.x0.shape and batches[-1] == 2


@torch.no_grad()
def test_conditions_of_other_shapes_take_two_calls() -> None:
    denoiser, (x_t, t, cond, uncond) = case("stable_diffusion_v")
    shorter = {name: value[:, :5] if value.ndim == 3 else value for name, value in uncond.items()}
    batches: list[int] = []
    denoiser.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    denoiser.batch_guidance = True
    found = guided(denoiser, x_t, t, cond, shorter, 3.0).x0
    assert batches == [2, 2] and any(cond[name].shape != shorter[name].shape for name in cond)
    expected: Tensor = 3 * denoiser(x_t, t, cond).x0 - 2 * denoiser(x_t, t, shorter).x0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
