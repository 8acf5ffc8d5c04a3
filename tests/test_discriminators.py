"""Discriminators on real networks: where their features come from, what they train, and what they can learn."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from tiny_pipelines import class_conditional, example_conditions, stable_diffusion, stable_diffusion_3
from torch import Tensor, nn

from diffusion_distill.adversarial import approximate_r1
from diffusion_distill.build import teacher_denoiser
from diffusion_distill.discriminators import DISCRIMINATORS, map_head
from diffusion_distill.losses import discriminator_loss, generator_loss
from diffusion_distill.networks import Networks, trainable_copy

PIPELINES = {
    "unet2d": cache(class_conditional),
    "stable_diffusion": cache(stable_diffusion),
    "stable_diffusion_3": cache(stable_diffusion_3),
}


def setting(pipe: Any, name: str, count: int = 3) -> tuple[Networks, Tensor, Tensor, dict[str, Tensor]]:
    """Networks with the discriminator `name`, and x_t (B, ...), t (B,) and conditions for it."""
    teacher = teacher_denoiser(pipe)
    cond = teacher.family.encode_conditions(pipe, example_conditions(pipe, count))
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(count, *teacher.family.sample_shape(pipe), generator=generator)
    t = teacher.schedule.timestep(torch.rand(count, generator=generator))
    torch.manual_seed(0)
    with torch.no_grad():
        one = {key: value[:1] for key, value in cond.items()}
        discriminator = DISCRIMINATORS[name](teacher, x_t[:1], t[:1], one)
    return Networks(teacher=teacher, fake_score=trainable_copy(teacher), discriminator=discriminator), x_t, t, cond


def trained_by(nets: Networks, roles: tuple[str, ...], loss: Any) -> dict[str, bool]:
    """Which roles (the teacher too) hold a gradient other than zero after the backward pass of loss()."""
    with nets.only_trains(roles):
        loss().backward()
    networks = {role: getattr(nets, role) for role in (*nets.trained_roles, "teacher")}
    return {role: any(p.grad is not None and bool(p.grad.any()) for p in net.parameters()) for role, net in networks.items()}


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_one_logit_a_sample_that_depends_on_that_sample_alone(family: str, name: str) -> None:
    nets, x_t, t, cond = setting(PIPELINES[family](), name)
    with torch.no_grad():
        together = nets.discriminator(nets, x_t, t, cond)
        assert together.shape == (3,) and together.dtype == torch.float32
        alone = [nets.discriminator(nets, x_t[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert together.std() > 1e-4


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_logits_depend_on_input_time_and_condition(family: str, name: str) -> None:
    """Through the trunk, or through the own network's noise-level channel and projection."""
    nets, x_t, t, cond = setting(PIPELINES[family](), name)
    turned = {key: value.roll(1, 0) for key, value in cond.items()}
    with torch.no_grad():
        base = nets.discriminator(nets, x_t, t, cond)
        for other in ((x_t.flip(-1), t, cond), (x_t, t.flip(0), cond), (x_t, t, turned)):
            assert not torch.allclose(base, nets.discriminator(nets, *other), rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_only_a_fake_score_trunk_learns_with_its_heads(family: str, name: str) -> None:
    nets, x_t, t, cond = setting(PIPELINES[family](), name)
    moved = trained_by(nets, ("fake_score", "discriminator"), lambda: generator_loss(nets.discriminator(nets, x_t, t, cond)))
    assert moved == {"teacher": False, "fake_score": name == "fake_score", "discriminator": True}
    assert all(p.grad is not None for p in nets.parameters("discriminator").values())


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_frozen_discriminators_pass_the_gradient_to_their_input(family: str, name: str) -> None:
    """As in the student's turn; against the slope along the gradient's own direction, by central differences."""
    nets, x_t, t, cond = setting(PIPELINES[family](), name)
    leaf = x_t.clone().requires_grad_(True)
    nets.discriminator(nets, leaf, t, cond).sum().backward()
    assert not any(p.grad is not None for role in (*nets.trained_roles, "teacher") for p in getattr(nets, role).parameters())
    unit = leaf.grad / leaf.grad.norm()
    with torch.no_grad():
        up, down = (nets.discriminator(nets, x_t + sign * 1e-2 * unit, t, cond).double().sum() for sign in (1, -1))
    assert float(up - down) / 2e-2 == pytest.approx(float(leaf.grad.norm()), rel=0.03)


@pytest.mark.parametrize("name", ["fake_score", "teacher"])
def test_features_are_the_middle_blocks_of_the_trunk(name: str) -> None:
    """DMD2, sec. 4.3: the heads read what the whole network's own forward pass has there; the two trunks differ."""
    nets, x_t, t, cond = setting(PIPELINES["unet2d"](), name)
    with torch.no_grad():
        for p in nets.fake_score.parameters():
            p.mul_(1.1)
    seen = {}
    for role in ("teacher", "fake_score"):
        unet = getattr(nets, role).model
        handle = unet.mid_block.register_forward_hook(lambda module, args, output, role=role: seen.update({role: output}))
        unet(x_t, t, class_labels=cond["class_labels"])
        handle.remove()
    expected = {role: nets.discriminator.heads[0](middle) for role, middle in seen.items()}
    torch.testing.assert_close(nets.discriminator(nets, x_t, t, cond), expected[name])
    assert not torch.allclose(expected["teacher"], expected["fake_score"], rtol=1e-3)


def test_several_taps_have_a_head_each_and_the_logit_is_their_mean() -> None:
    nets, x_t, t, cond = setting(PIPELINES["stable_diffusion_3"](), "teacher")
    features = nets.teacher.features(x_t, t, cond)
    assert len(nets.discriminator.heads) == len(features) > 1
    each = torch.stack([head(f) for head, f in zip(nets.discriminator.heads, features)])
    torch.testing.assert_close(nets.discriminator(nets, x_t, t, cond), each.mean(0))


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 16, 31, 64])
def test_map_heads_give_one_logit_at_any_size(size: int) -> None:
    assert map_head(8, size)(torch.zeros(2, 8, size, size)).shape == (2,)


@pytest.mark.parametrize(("channels", "size"), [(4, 4), (8, 1), (8, 8), (16, 4), (24, 8), (48, 2), (66, 4), (1280, 1)])
def test_map_heads_see_their_input_at_any_width(channels: int, size: int) -> None:
    """A group of one channel on the last, one-pixel map would be normalised to a constant; at 1280 there are 32 groups, as in DMD2."""
    torch.manual_seed(0)
    head = map_head(channels, size)
    with torch.no_grad():
        assert head(torch.randn(16, channels, size, size)).std() > 0.02
    assert channels < 1280 or all(layer.num_groups == 32 for layer in head if isinstance(layer, nn.GroupNorm))


def test_the_own_network_owns_nothing_of_the_teacher() -> None:
    nets = setting(PIPELINES["unet2d"](), "own")[0]
    teachers = {id(p) for p in nets.teacher.parameters()}
    assert not teachers & {id(p) for p in nets.discriminator.parameters()}
    assert not any(key.startswith("teacher") for key in nets.discriminator.state_dict())


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_learns_to_tell_real_from_fake(name: str) -> None:
    """40 steps on flat images against noisy ones of the same class: nearly all held-out images are on their side."""
    nets, _, _, cond = setting(PIPELINES["unet2d"](), name, count=8)
    generator, t = torch.Generator().manual_seed(1), torch.full((8,), 100.0)

    def pair() -> tuple[Tensor, Tensor]:
        return torch.rand(8, 1, 1, 1, generator=generator).expand(-1, 1, 8, 8), torch.randn(8, 1, 8, 8, generator=generator)

    parameters = [*nets.parameters("discriminator").values(), *(nets.parameters("fake_score").values() if name == "fake_score" else ())]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    for _ in range(40):
        real, fake = pair()
        with nets.only_trains(("fake_score", "discriminator")):
            optimizer.zero_grad()
            discriminator_loss(nets.discriminator(nets, real, t, cond), nets.discriminator(nets, fake, t, cond)).backward()
            optimizer.step()
    with torch.no_grad():
        real, fake = pair()
        right = torch.cat([nets.discriminator(nets, real, t, cond) > 0, nets.discriminator(nets, fake, t, cond) < 0])
    assert right.float().mean() > 0.85


# ------------------------------------------------------------------------------------------------ losses


def test_gan_losses_are_the_log_likelihoods() -> None:
    """-log D and -log(1 - D) with D = sigmoid(logit) (arXiv:1406.2661); finite for logits that saturate."""
    real, fake = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64), torch.tensor([1.0, 0.0, -4.0], dtype=torch.float64)
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake), -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean())
    assert float(generator_loss(torch.tensor([-200.0]))) == 200


def test_approximate_r1_of_a_linear_discriminator_is_its_slope() -> None:
    """E (D(x + s n) - D(x))^2 = s^2 |w|^2; the mean of 20,000 chi-square draws has a relative standard error of sqrt(2 / n)."""
    generator, count, s = torch.Generator().manual_seed(0), 20_000, 0.3
    linear = nn.Linear(6, 1).double()
    x, n = torch.randn(2, count, 6, dtype=torch.float64, generator=generator)
    penalty = float(approximate_r1(linear(x), linear(x + s * n)).detach())
    exact = s**2 * float(linear.weight.detach().square().sum())
    assert abs(penalty / exact - 1) < 4 * math.sqrt(2 / count)
