"""Adversarial self-distillation: its grids against diffusers, its losses by hand from recorded calls, its turns, its student on the toy."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from recording import (
    PROCESSES,
    array,
    batch,
    coefficients,
    is_unit_noise,
    networks,
    noise_in,
    record,
    record_discriminator,
    uncorrelated,
    x0_of,
)
from scipy import stats
from test_dmd2 import gradient
from test_toy import distances, distil
from tiny_pipelines import class_conditional, example_conditions, stable_diffusion_3

from diffusion_distill.adversarial import add_direction, input_direction
from diffusion_distill.build import teacher_denoiser
from diffusion_distill.discriminators import DISCRIMINATORS, map_head
from diffusion_distill.errors import InputError
from diffusion_distill.losses import relativistic_loss, surrogate
from diffusion_distill.methods import ASD
from diffusion_distill.networks import Networks
from diffusion_distill.schedule import NoiseSchedule

PLAIN: dict[str, Any] = {"timestep_shift": 1.0, "guidance_scale": 1.0, "discriminator": "own"}
for_every_process = pytest.mark.parametrize("process", PROCESSES)


def step_with(count: int, method: ASD, skip: int = 0) -> int:
    """The first training step after `skip` in which the student takes `count` network calls."""
    return next(s for s in range(skip, 200) if 1 + batch(s).random.shared_integer(method.max_inference_steps) == count)


# ------------------------------------------------------------------------------------------------ parts


def test_relativistic_loss_is_the_log_likelihood_of_the_difference() -> None:
    """-log sigmoid(real - fake) (arXiv:1807.00734, eq. 7); both sides descend in opposite directions, and neither is unbounded."""
    real, fake = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.3, -2.0, 5.0], [1.0, 0.0, -4.0]))
    loss = relativistic_loss(real, fake)
    torch.testing.assert_close(loss, -(real - fake).sigmoid().log().mean())
    (by_real, by_fake) = torch.autograd.grad(loss, (real, fake))
    torch.testing.assert_close(by_real, -(fake - real).sigmoid() / 3)
    assert (by_real < 0).all() and (by_fake > 0).all()
    assert float(relativistic_loss(torch.tensor([200.0]), torch.tensor([-200.0]))) == 0


def test_input_direction_is_the_gradient_that_surrogate_gives_back() -> None:
    x0 = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    value, direction = input_direction(x0, lambda x: x.pow(3).mean())
    (by_hand,) = torch.autograd.grad(x0.pow(3).mean(), x0)
    (found,) = torch.autograd.grad(surrogate(x0, direction), x0)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-6)
    assert float(value) == pytest.approx(float(x0.detach().pow(3).mean())) and not value.requires_grad
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(add_direction(a, b, 0.5, False), torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(add_direction(a, b, 0.5, True), torch.tensor([3.0, 6.5]))


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("build", [class_conditional, stable_diffusion_3])
def test_each_of_k_logits_is_a_discriminator(name: str, build: Any) -> None:
    """Every logit depends on the sample and on its condition in its own way; without a number there is one, and no dimension for it."""
    pipe = build()
    teacher = teacher_denoiser(pipe)
    cond = teacher.family.encode_conditions(pipe, example_conditions(pipe, 3))
    x_t, t = torch.randn(3, *teacher.family.sample_shape(pipe)), torch.full((3,), 500.0)
    torch.manual_seed(0)
    with torch.no_grad():
        several, one = (DISCRIMINATORS[name](teacher, x_t, t, cond, count) for count in (3, None))
        nets = Networks(teacher=teacher, fake_score=teacher)
        assert one(nets, x_t, t, cond).shape == (3,)
        logits = several(nets, x_t, t, cond)
        turned = several(nets, x_t, t, {key: value.roll(1, 0) for key, value in cond.items()})
    assert logits.shape == (3, 3) and logits.dtype == torch.float32
    assert logits.std(0).min() > 1e-5 and (logits - turned).abs().amax(0).min() > 1e-7
    difference = (logits - turned) / (logits - turned).norm(dim=0)
    assert not torch.allclose(difference[:, 0].abs(), difference[:, 1].abs(), rtol=1e-3)
    assert map_head(8, 8, 2)(torch.zeros(5, 8, 8, 8)).shape == (5, 2)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_every_number_of_steps_has_diffusers_grid(shift: float) -> None:
    method = ASD(8, timestep_shift=shift)
    flow, ddim = FlowMatchEulerDiscreteScheduler(shift=shift), DDIMScheduler(timestep_spacing="trailing")
    for schedule, scheduler in (
        (NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler()), flow),
        (NoiseSchedule.from_scheduler(ddim), ddim),
    ):
        grids = [s.timesteps for s in method.samplers(schedule)]
        assert [len(grid) for grid in grids] == list(range(8, 0, -1)) and method.sampler(schedule).timesteps == grids[0]
        for grid in grids:
            if scheduler is flow:
                scheduler.set_timesteps(sigmas=[1 - i / len(grid) for i in range(len(grid))])
            else:
                scheduler.set_timesteps(len(grid))
            assert grid == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


# ------------------------------------------------------------------------------------------------ turns


def test_turns_and_roles() -> None:
    turns = [[roles for roles, _ in ASD(student_update_interval=2).updates(step)] for step in range(2)]
    assert turns == [[("student",), ("fake_score",), ("discriminator",)], [("fake_score",), ("discriminator",)]]
    assert [roles for roles, _ in ASD(gan_weight=0).updates(0)] == [("student",), ("fake_score",)]
    warm = ASD(warmup_steps=2, student_update_interval=1)
    assert [[roles for roles, _ in warm.updates(step)] for step in (1, 2)] == [turns[0][:2], turns[0]]
    assert [loss_fn.args[0] for step in (1, 2) for _, loss_fn in list(warm.updates(step))[:2]] == [1, 1, 4, 4]  # type: ignore[attr-defined]
    assert not ASD().needs_images and not ASD().needs_pairs


@for_every_process
@pytest.mark.parametrize("discriminator", ["fake_score", "teacher", "own"])
def test_each_turn_moves_exactly_its_role(process: str, discriminator: Any) -> None:
    """The trunk stays frozen in the discriminator's turn (the paper), where DMD2's learns."""
    method = ASD(3, **PLAIN | {"discriminator": discriminator})
    nets = networks(process, method)
    for count in (1, 3):
        step, carried = step_with(count, method), {}
        for turn, (roles, loss_fn) in enumerate(method.updates(0)):
            with nets.only_trains(roles):
                loss_fn(nets, batch(step, turn, carried=carried))[0].backward()
            every = {role: getattr(nets, role) for role in ("teacher", *nets.trained_roles)}
            assert {role for role, net in every.items() if any(p.grad is not None and p.grad.any() for p in net.parameters())} == set(roles)
            for net in every.values():
                net.zero_grad(set_to_none=True)
        assert not carried


def test_numbers_of_steps_are_drawn_evenly_and_shared() -> None:
    method = ASD(4, gan_weight=0, **PLAIN)
    nets, drawn = networks("flow", method), []
    for step in range(12):
        found = {method.draw(4, nets, batch(step, slots=slots))[0] for slots in (range(2), range(2, 4), range(6, 8))}
        assert len(found) == 1
        drawn += found
    assert len(set(drawn)) > 1
    many = [1 + batch(step).random.shared_integer(4) for step in range(2000)]
    assert stats.chisquare(np.bincount(many)[1:]).pvalue > 1e-3


@for_every_process
@pytest.mark.parametrize("sampling", ["sde", "ode"])
def test_samples_of_n_steps_take_the_gradient_and_those_of_one_more_none(process: str, sampling: Any) -> None:
    method = ASD(4, sampling=sampling, **PLAIN)
    nets = networks(process, method)
    calls = record(nets.student)
    for count in (1, 2, 3, 4):
        calls.clear()
        given = batch(step_with(count, method), slots=range(12))
        with nets.only_trains(("student",)):
            method.student_loss(method.max_inference_steps, nets, given)[0].backward()
        fewer, more = calls[:count], calls[count:]
        grids = {len(s.timesteps): list(s.timesteps) for s in method.samplers(nets.student.schedule)}
        assert [c.with_gradient for c in fewer] == [False] * (count - 1) + [True]
        assert [float(c.t[0]) for c in fewer] == pytest.approx(grids[count])
        assert [float(c.t[0]) for c in more] == (pytest.approx(grids[count + 1]) if count < 4 else [])
        assert not any(c.with_gradient for c in more)
        assert is_unit_noise(array(fewer[0].x_t))
        if more:
            assert is_unit_noise(array(more[0].x_t)) and uncorrelated(array(more[0].x_t), array(fewer[0].x_t))
            np.testing.assert_allclose(array(given.carried["more"]), x0_of(process, more[-1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("process", ["v_prediction", "flow"])  # x0 of an epsilon network at the noisiest timestep drowns the term
@pytest.mark.parametrize("discriminator", ["fake_score", "own"])
def test_the_term_is_the_gradient_of_the_generators_relativistic_loss(process: str, discriminator: Any) -> None:
    """grad(both) - grad(matching) = w grad mean softplus(D_n(more) - D_n(fewer)), by autograd through the student's last call."""
    weight, settings = 0.7, PLAIN | {"discriminator": discriminator}
    method, matching = ASD(4, gan_weight=weight, **settings), ASD(4, gan_weight=0, **settings)
    nets = networks(process, method)
    step = step_with(2, method)
    given, seen = batch(step), record_discriminator(nets)
    with nets.only_trains(("student",)):
        both = gradient(nets, "student", method.student_loss(method.max_inference_steps, nets, given)[0])
        alone = gradient(nets, "student", matching.student_loss(4, nets, batch(step))[0])
        (far, t_far, on_more), (near, t, _) = seen[:2]
        assert torch.equal(t, t_far)
        alpha, sigma = (torch.tensor(c).float() for c in coefficients(process, t))
        eps = noise_in(process, near, t, array(given.carried["x0"]))
        assert is_unit_noise(eps)
        np.testing.assert_allclose(noise_in(process, far, t, array(given.carried["more"])), eps, rtol=1e-2, atol=1e-2)
        _, x0 = method.draw(4, nets, batch(step))
        on_fewer = nets.discriminator(nets, alpha * x0 + sigma * torch.tensor(eps).float(), t, given.cond)[:, 1]
        adversarial = gradient(nets, "student", F.softplus(on_more[:, 1] - on_fewer).mean())
    assert adversarial.norm() > 1e-7
    torch.testing.assert_close(both - alone, weight * adversarial, rtol=0, atol=float(5e-3 * weight * adversarial.norm()))


@for_every_process
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_discriminators_loss_is_written_out(process: str, count: int) -> None:
    """softplus(D_n(fewer) - D_n(more)) + w / s^2 ((D(x + s n) - D(x))^2 on both); at n = N the samples of N steps are the better ones."""
    method = ASD(3, penalty_weight=0.4, penalty_std=0.02, **PLAIN)
    nets, carried = networks(process, method), {}
    student, judged, step = record(nets.student), record_discriminator(nets), step_with(count, method)
    method.student_loss(method.max_inference_steps, nets, batch(step, carried=carried))
    x0, made = carried["x0"].clone(), len(student)
    method.critic_loss(method.max_inference_steps, nets, batch(step, 1, carried=carried))
    judged.clear()
    loss, logs = method.discriminator_loss(nets, batch(step, 2, carried=carried))
    assert not carried and len(student) - made == (2 if count == 3 else 0)
    (_, t, more), (_, _, more_near), (fewer_x, _, fewer), (fewer_near_x, _, fewer_near) = judged
    n = min(count, 2) - 1
    gap = (more - fewer)[:, n]
    slopes = ((more_near - more)[:, n] / 0.02).square().mean() + ((fewer_near - fewer)[:, n] / 0.02).square().mean()
    torch.testing.assert_close(loss.detach(), F.softplus(-gap).mean() + 0.4 * slopes)
    assert float(logs["logit_gap"]) == pytest.approx(float(gap.mean()), abs=1e-6) and slopes > 0
    assert stats.kstest(array(fewer_near_x - fewer_x).ravel() / 0.02, "norm").pvalue > 1e-3
    carried_x = judged[0][0] if count == 3 else fewer_x
    assert is_unit_noise(noise_in(process, carried_x, t, array(x0)))


def test_without_a_turn_of_the_student_the_critics_draw_their_own() -> None:
    method, carried = ASD(3, student_update_interval=2, **PLAIN), {}
    nets = networks("flow", method)
    calls = record(nets.student)
    for turn, (roles, loss_fn) in enumerate(method.updates(1)):
        with nets.only_trains(roles):
            loss_fn(nets, batch(1, turn, carried=carried))[0].backward()
    assert len(calls) in (1 + 2, 2 + 3, 3 + 2) and not any(call.with_gradient for call in calls) and not carried


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_inference_steps": 1}, "max_inference_steps: got 1; at least 2"),
        ({"min_level": 0.9, "max_level": 0.5}, "min_level, max_level: got (0.9, 0.5); "),
        ({"warmup_steps": -1}, "warmup_steps: got -1; 0 or more"),
        ({"max_gan_level": 0.0}, "max_gan_level: got 0.0; "),
        ({"student_update_interval": 0}, "student_update_interval: got 0; at least 1"),
        ({"gan_weight": -1.0}, "gan_weight: got -1.0; 0 or more"),
        ({"penalty_weight": float("nan")}, "penalty_weight: got nan; 0 or more"),
        ({"guidance_scale": float("inf")}, "guidance_scale: got inf; 0 or more"),
        ({"penalty_std": 0.0}, "penalty_std: got 0.0; a number above 0"),
        ({"timestep_shift": 0.0}, "timestep_shift: got 0.0; a number above 0"),
        ({"discriminator": "none"}, "discriminator: got 'none'; accepted: 'fake_score', 'teacher', 'own'"),
    ],
)
def test_wrong_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ASD(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ training


@cache
def trained(teacher: str, gan_weight: float) -> dict[int, tuple[float, float]]:
    """Energy distance of the one student, and of the teacher's sampler, by number of steps."""
    method: Any = ASD(
        2, gan_weight=gan_weight, gan_weighting="relative", **PLAIN | {"discriminator": "fake_score", "student_update_interval": 1}
    )
    nets = distil(method, teacher, steps=120)
    return {len(s.timesteps): distances(method, teacher, nets, sampler=s) for s in method.samplers(nets.teacher.schedule)}


@pytest.mark.parametrize("teacher", ["v_prediction", "flow_prediction"])
def test_one_student_beats_the_teacher_at_every_number_of_steps(teacher: str) -> None:
    for student, euler in trained(teacher, 0.3).values():
        assert student < euler / 2


def test_the_adversarial_term_lifts_one_step_samples_towards_those_of_two() -> None:
    """Under one fake score for both numbers of steps, one step lags behind; the term closes in."""
    assert trained("flow_prediction", 0.3)[1][0] < 0.8 * trained("flow_prediction", 0.0)[1][0]
