"""DMD2 turn by turn on real networks: which network runs on what, and what the losses leave in the parameters.

Expectations are computed from what hooks recorded, by the formulas of `recording.py` and by diffusers' schedulers.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recording import (
    COSINE,
    PROCESSES,
    SHAPE,
    UNCONDITIONAL,
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
from torch import Tensor

from diffusion_distill.errors import InputError
from diffusion_distill.methods import DMD2
from diffusion_distill.methods.base import draw_step
from diffusion_distill.networks import Networks

INNER = (799.0, 599.0, 399.0, 199.0)  # where no parameterisation is ill-conditioned
for_every_process = pytest.mark.parametrize("process", PROCESSES)


def gradient(nets: Networks, role: str, loss: Tensor) -> Tensor:
    """The gradient of `loss` in all parameters of `role`, as one vector; gradients are cleared."""
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in nets.parameters(role).values()])  # type: ignore[union-attr]
    for name in nets.trained_roles:
        getattr(nets, name).zero_grad(set_to_none=True)
    return found


# ------------------------------------------------------------------------------------------------ the student's gradient


@for_every_process
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_student_gradient_is_the_normalised_difference_of_predictions(process: str, guidance_scale: float) -> None:
    """DMD, eq. 7 and 8: (fake - real) / mean|x0 - real| over all but the batch, through the last call only; guidance for real alone."""
    floor = 1e-6
    for _ in range(2):
        method = DMD2(timesteps=INNER, gan_weight=0, guidance_scale=guidance_scale, normalizer_floor=floor)
        nets, given = networks(process, method), batch()
        student, teacher, fake_score = (record(net) for net in (nets.student, nets.teacher, nets.fake_score))
        with nets.only_trains(("student",)):
            method.student_loss(nets, given)[0].backward()
        assert len(fake_score) == 1 and torch.equal(fake_score[0].label, given.cond["class_labels"])
        assert [int(call.label[1]) for call in teacher] == ([1] if guidance_scale == 1 else [1, UNCONDITIONAL])
        assert all(torch.equal(call.x_t, fake_score[0].x_t) and torch.equal(call.t, fake_score[0].t) for call in teacher)
        x0, fake = x0_of(process, student[-1]), x0_of(process, fake_score[0])
        cond, uncond = x0_of(process, teacher[0]), x0_of(process, teacher[-1])
        real = cond if guidance_scale == 1 else uncond + guidance_scale * (cond - uncond)
        scale = np.abs(x0 - real).mean((1, 2, 3), keepdims=True)
        alpha, sigma = coefficients(process, student[-1].t)
        slope = -sigma / alpha if process == "epsilon" else -sigma  # d x0 / d output
        expected = (fake - real) / np.maximum(scale, floor) / x0.size * slope
        np.testing.assert_allclose(array(student[-1].output.grad), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
        assert any(p.grad.any() for p in nets.parameters("student").values())  # type: ignore[union-attr]
        floor = float(np.median(scale))  # second round: it holds for half of the samples
    assert (scale > floor).any() and (scale < floor).any()


@for_every_process
def test_student_samples_are_diffused_with_fresh_noise_to_the_chosen_levels(process: str) -> None:
    method = DMD2(timesteps=INNER, gan_weight=0, min_level=0.3, max_level=0.6, guidance_scale=1.0)
    nets, given = networks(process, method), batch(slots=range(48))
    student, fake_score = record(nets.student), record(nets.fake_score)
    method.student_loss(nets, given)
    t = array(fake_score[0].t)
    assert 299.5 <= t.min() < 350 and 550 < t.max() <= 600.5
    eps = noise_in(process, fake_score[0].x_t, fake_score[0].t, x0_of(process, student[-1]))
    assert is_unit_noise(eps)
    assert uncorrelated(eps, array(student[0].x_t))


# ------------------------------------------------------------------------------------------------ turns and roles


def test_student_trains_every_kth_step_and_first_the_critic_always() -> None:
    critic = ("fake_score", "discriminator")
    method = DMD2(student_update_interval=3)
    turns = [[roles for roles, _ in method.updates(step)] for step in range(7)]
    assert turns == [[("student",), critic], [critic], [critic], [("student",), critic], [critic], [critic], [("student",), critic]]
    assert [roles for roles, _ in DMD2(gan_weight=0).updates(0)] == [("student",), ("fake_score",)]


@for_every_process
@pytest.mark.parametrize("discriminator", ["fake_score", "teacher", "own"])
def test_each_turn_moves_exactly_its_roles(process: str, discriminator: Any) -> None:
    method = DMD2(timesteps=INNER, discriminator=discriminator)
    nets, given = networks(process, method), batch()
    every = {role: getattr(nets, role) for role in ("teacher", *nets.trained_roles)}
    assert set(every) == {"teacher", "student", "fake_score", "discriminator"}
    for roles, loss_fn in method.updates(0):
        with nets.only_trains(roles):
            loss_fn(nets, given)[0].backward()
        moved = {role for role, net in every.items() if any(p.grad is not None and bool(p.grad.any()) for p in net.parameters())}
        assert moved == set(roles)
        assert all(p.grad is not None for role in roles for p in nets.parameters(role).values())
        for net in every.values():
            assert not any(p.requires_grad for p in net.parameters())
            net.zero_grad(set_to_none=True)


def test_roles_are_frozen_again_after_an_error() -> None:
    nets = networks("flow", DMD2())
    with pytest.raises(RuntimeError, match="stop"), nets.only_trains(("student", "discriminator")):
        assert {r for r in nets.trained_roles if all(p.requires_grad for p in nets.parameters(r).values())} == {"student", "discriminator"}
        raise RuntimeError("stop")
    assert not any(p.requires_grad for role in nets.trained_roles for p in nets.parameters(role).values())
    with pytest.raises(AttributeError, match="no network plays the role 'expert'; there are teacher, student, fake_score, discriminator"):
        _ = nets.expert


@for_every_process
def test_the_students_sample_goes_to_the_critic_of_the_same_step(process: str) -> None:
    """The critic's input differs from that of a critic who was handed zeros by alpha x0; alone, the critic samples without gradient."""
    method = DMD2(timesteps=INNER, gan_weight=0)
    nets, given = networks(process, method), batch()
    student, fake_score = record(nets.student), record(nets.fake_score)
    method.student_loss(nets, given)
    made, x0 = len(student), x0_of(process, student[-1])
    for carried in (given.carried, {"x0": torch.zeros(4, *SHAPE)}):
        method.critic_loss(nets, batch(turn=1, carried=carried))
        assert len(student) == made and not carried
    of_sample, of_zeros = fake_score[-2:]
    assert torch.equal(of_sample.t, of_zeros.t)
    difference = array(of_sample.x_t) - array(of_zeros.x_t)
    np.testing.assert_allclose(difference, coefficients(process, of_zeros.t)[0] * x0, rtol=1e-3, atol=1e-4 * np.abs(x0).max())
    with nets.only_trains(("fake_score",)):
        method.critic_loss(nets, batch(step=1))
    assert len(student) > made and not any(call.with_gradient for call in student[made:])


# ------------------------------------------------------------------------------------------------ backward simulation


@for_every_process
@pytest.mark.parametrize("sampling", ["sde", "ode"])
def test_inputs_of_inner_steps_are_the_students_own(process: str, sampling: Any) -> None:
    """Each input is the previous prediction of x0, re-noised (sde) or carried on (ode); the gradient is in the last call alone."""
    method, visited = DMD2(timesteps=INNER, gan_weight=0, sampling=sampling), set()
    nets = networks(process, method)
    student = record(nets.student)
    for step in range(16):
        student.clear()
        with nets.only_trains(("student",)):
            x0 = method.generate(nets, batch(step))
        visited.add(len(student) - 1)
        assert [call.with_gradient for call in student] == [False] * (len(student) - 1) + [True]
        assert [float(call.t[0]) for call in student] == list(INNER[: len(student)])
        assert all((call.t == call.t[0]).all() and torch.equal(call.label, batch().cond["class_labels"]) for call in student)
        assert is_unit_noise(array(student[0].x_t))
        for before, after in zip(student, student[1:]):
            eps = noise_in(process, after.x_t, after.t, x0_of(process, before))
            carried = noise_in(process, before.x_t, before.t, x0_of(process, before))
            if sampling == "sde":
                assert is_unit_noise(eps) and uncorrelated(eps, array(before.x_t)) and uncorrelated(eps, array(student[0].x_t))
            else:
                np.testing.assert_allclose(eps, carried, rtol=1e-3, atol=1e-3 * np.abs(carried).max())
        np.testing.assert_allclose(array(x0), x0_of(process, student[-1]), rtol=1e-3, atol=1e-4 * float(x0.detach().abs().max()))
    assert visited == {0, 1, 2, 3}


def test_micro_batches_and_ranks_of_a_step_share_the_rung() -> None:
    method = DMD2(timesteps=INNER, gan_weight=0)
    nets = networks("flow", method)
    student, lengths = record(nets.student), []
    for step in range(12):
        for slots in (range(2), range(2, 4), range(6, 8)):
            student.clear()
            method.generate(nets, batch(step, slots=slots))
            lengths.append(len(student))
    assert all(len(set(lengths[i : i + 3])) == 1 for i in range(0, 36, 3)) and len(set(lengths)) > 1


@pytest.mark.parametrize(("share", "expected"), [(None, (0.25, 0.25, 0.25, 0.25)), (0.7, (0.1, 0.1, 0.1, 0.7)), (1.0, (0, 0, 0, 1))])
def test_rungs_are_drawn_with_their_shares(share: float | None, expected: tuple[float, ...]) -> None:
    count = 3000
    drawn = np.bincount([draw_step(batch(step, slots=range(1)).random, 4, share) for step in range(count)], minlength=4)
    spread = np.sqrt(count * np.array(expected) * (1 - np.array(expected)))  # of a binomial count
    assert (np.abs(drawn - count * np.array(expected)) <= 4 * spread).all()
    assert draw_step(batch().random, 1, share) == 0


@for_every_process
def test_one_step_at_an_inner_timestep_receives_unit_noise_as_it_is(process: str) -> None:
    """DMD2's one-step SDXL student is conditioned on 399 and fed pure noise, whatever sigma is there."""
    method = DMD2(timesteps=(399,), gan_weight=0)
    nets = networks(process, method)
    student = record(nets.student)
    with nets.only_trains(("student",)):
        method.generate(nets, batch(slots=range(16)))
    assert len(student) == 1 and student[0].with_gradient
    assert (student[0].t == 399).all() and is_unit_noise(array(student[0].x_t))


# ------------------------------------------------------------------------------------------------ the fake score


@for_every_process
@pytest.mark.parametrize("space", ["network", "epsilon", "sample", "v_prediction", "flow_prediction"])
def test_critic_loss_is_the_mean_squared_error_in_its_space(process: str, space: Any) -> None:
    method, x0 = DMD2(gan_weight=0, fake_score_loss=space), torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3))
    nets = networks(process, method)
    calls = record(nets.fake_score)
    method.critic_loss(nets, batch(carried={"x0": torch.zeros_like(x0)}))
    loss = float(method.critic_loss(nets, batch(carried={"x0": x0}))[0])
    call, (alpha, sigma) = calls[1], coefficients(process, calls[1].t)
    eps = array(calls[0].x_t) / sigma
    assert is_unit_noise(eps)
    x_t = alpha * array(x0) + sigma * eps if process == "flow" else array(COSINE.add_noise(x0, torch.tensor(eps), call.t))
    np.testing.assert_allclose(array(call.x_t), x_t, rtol=1e-5, atol=1e-5)

    def views(x0: np.ndarray, eps: np.ndarray) -> dict[str, np.ndarray]:
        v = alpha * eps - sigma * x0
        if process != "flow":
            v = array(COSINE.get_velocity(torch.tensor(x0), torch.tensor(eps), call.t))
        return {"epsilon": eps, "sample": x0, "v_prediction": v, "flow_prediction": eps - x0}

    own = "flow_prediction" if process == "flow" else process
    predicted = x0_of(process, call)
    prediction, target = views(predicted, (array(call.x_t) - alpha * predicted) / sigma), views(array(x0), eps)
    kind = own if space == "network" else space
    assert loss == pytest.approx(float(np.square(prediction[kind] - target[kind]).mean()), rel=1e-3)
    if kind == own:
        assert loss == pytest.approx(float(np.square(array(call.output) - target[kind]).mean()), rel=1e-4)


# ------------------------------------------------------------------------------------------------ the GAN term


@for_every_process
@pytest.mark.parametrize("discriminator", ["fake_score", "teacher", "own"])
def test_fixed_weight_is_the_gradient_of_the_sum_of_losses(process: str, discriminator: Any) -> None:
    """grad(dm + w gan) = grad(dm) + w grad(mean softplus(-D)), the latter by autograd through the student's own last call."""
    weight, settings = 0.7, {"timesteps": INNER, "discriminator": discriminator, "guidance_scale": 1.0}
    method = DMD2(gan_weight=weight, **settings)
    nets, given = networks(process, method), batch()
    seen = record_discriminator(nets)
    with nets.only_trains(("student",)):
        both = gradient(nets, "student", method.student_loss(nets, given)[0])
        matching = gradient(nets, "student", DMD2(gan_weight=0, **settings).student_loss(nets, batch())[0])
        x_t, t, _ = seen[0]
        alpha, sigma = (torch.tensor(c).float() for c in coefficients(process, t))
        eps = torch.tensor(noise_in(process, x_t, t, array(given.carried["x0"]))).float()
        logits = nets.discriminator(nets, alpha * method.generate(nets, batch()) + sigma * eps, t, given.cond)
        adversarial = gradient(nets, "student", F.softplus(-logits).mean())
    assert adversarial.norm() > 1e-6
    torch.testing.assert_close(both - matching, weight * adversarial, rtol=0, atol=float(2e-3 * weight * adversarial.norm()))


@for_every_process
def test_relative_weight_is_a_ratio_of_gradient_norms(process: str) -> None:
    """In x0, that is in the output of the last call up to a factor; the direction stays that of the fixed weighting."""
    found = []
    for weight, weighting in ((0.0, "fixed"), (1.0, "fixed"), (0.5, "relative")):
        method = DMD2(timesteps=INNER, gan_weight=weight, gan_weighting=weighting, discriminator="own", guidance_scale=1.0)  # type: ignore[arg-type]
        nets = networks(process, method)
        student = record(nets.student)
        with nets.only_trains(("student",)):
            method.student_loss(nets, batch())[0].backward()
        found.append(student[-1].output.grad.double())  # type: ignore[union-attr]
    matching, fixed, relative = found[0], found[1] - found[0], found[2] - found[0]
    assert float(relative.norm() / matching.norm()) == pytest.approx(0.5, rel=1e-3)
    assert float((fixed * relative).sum() / fixed.norm() / relative.norm()) == pytest.approx(1, abs=1e-3)


@for_every_process
def test_real_and_fake_have_timesteps_and_noise_of_their_own(process: str) -> None:
    """Handed zeros, each network sees nothing but its own noise; neither the two images nor the fake score share any."""
    method, zeros = DMD2(discriminator="own", max_gan_level=0.4), torch.zeros(8, *SHAPE)
    nets = networks(process, method)
    denoised, judged = record(nets.fake_score), record_discriminator(nets)
    method.critic_loss(nets, batch(slots=range(8), x0=zeros, carried={"x0": zeros}))
    pairs = [(denoised[0].x_t, denoised[0].t)] + [(x_t, t) for x_t, t, _ in judged]
    assert len(denoised) == 1 and len(pairs) == 3
    noises = [noise_in(process, x_t, t, array(zeros)) for x_t, t in pairs]
    for i, eps in enumerate(noises):
        assert is_unit_noise(eps)
        for j in range(i):
            assert uncorrelated(eps, noises[j])
            assert not (pairs[i][1] == pairs[j][1]).any()
    assert max(float(t.max()) for _, t in pairs[1:]) <= 400 < float(denoised[0].t.max())


@for_every_process
def test_critic_adds_the_weighted_discriminator_loss_and_penalty(process: str) -> None:
    weight, r1_weight, s = 0.3, 2.0, 0.05
    nets = networks(process, DMD2(discriminator="own"))
    fake, judged = torch.ones(4, *SHAPE), record_discriminator(nets)
    method = DMD2(discriminator="own", discriminator_weight=weight, r1_weight=r1_weight, r1_std=s)
    total, logs = method.critic_loss(nets, batch(carried={"x0": fake}))
    (_, _, on_fake), (x_t, t, on_real), (x_near, t_near, on_near) = judged
    perturbation = array(x_near - x_t)
    assert torch.equal(t, t_near) and stats.kstest(perturbation.ravel() / s, "norm").pvalue > 1e-3
    adversarial = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    penalty = r1_weight * ((on_near - on_real) / s).square().mean()
    assert penalty > 0
    torch.testing.assert_close(total, logs["denoising"] + weight * (adversarial + penalty))
    assert float(logs["accuracy"]) == pytest.approx((float((on_real > 0).sum()) + float((on_fake < 0).sum())) / 8)


@for_every_process
def test_without_gan_there_is_no_discriminator_and_no_image_is_needed(process: str) -> None:
    method = DMD2(timesteps=INNER, gan_weight=0)
    nets, given = networks(process, method), batch(x0=None)
    assert not method.needs_images and DMD2().needs_images
    assert nets.trained_roles == ("student", "fake_score") and "discriminator" not in nets
    assert all(torch.isfinite(loss_fn(nets, given)[0]) for _, loss_fn in method.updates(0))


# ------------------------------------------------------------------------------------------------ settings


def test_learning_rates_fall_back_to_the_next_network() -> None:
    roles = ("student", "fake_score", "discriminator")
    assert [DMD2().learning_rate(role) for role in roles] == [None, None, None]
    assert [DMD2(fake_score_learning_rate=2e-5).learning_rate(role) for role in roles] == [None, 2e-5, 2e-5]
    both = DMD2(fake_score_learning_rate=2e-5, discriminator_learning_rate=1e-4)
    assert [both.learning_rate(role) for role in roles] == [None, 2e-5, 1e-4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_level": 0.9, "max_level": 0.5}, "min_level, max_level: got (0.9, 0.5); "),
        ({"min_level": -0.1}, "min_level, max_level: got (-0.1, 0.98); "),
        ({"max_level": 1.5}, "min_level, max_level: got (0.02, 1.5); "),
        ({"max_gan_level": 0.0}, "max_gan_level: got 0.0; "),
        ({"last_step_share": 0.0}, "last_step_share: got 0.0; "),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0; at least 1"),
        ({"student_update_interval": 0}, "student_update_interval: got 0; at least 1"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0; 0 or more"),
        ({"gan_weight": -1.0}, "gan_weight: got -1.0; 0 or more"),
        ({"gan_weight": float("nan")}, "gan_weight: got nan; 0 or more"),
        ({"discriminator_weight": -1.0}, "discriminator_weight: got -1.0; 0 or more"),
        ({"r1_weight": -1.0}, "r1_weight: got -1.0; 0 or more"),
        ({"discriminator": "none"}, "discriminator: got 'none'; accepted: 'fake_score', 'teacher', 'own'"),
        ({"sampling": "ddim"}, "sampling: got 'ddim'; accepted: 'sde', 'ode'"),
        ({"gan_weighting": "none"}, "gan_weighting: got 'none'; accepted: 'fixed', 'relative'"),
        ({"fake_score_loss": "x0"}, "fake_score_loss: got 'x0'; accepted: 'network', 'sample', "),
        ({"timestep_shift": 0.0}, "timestep_shift: got 0.0; a number above 0"),
        ({"r1_std": 0.0}, "r1_std: got 0.0; a number above 0"),
    ],
)
def test_wrong_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        DMD2(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ((1000.0,), "timesteps: got 1000.0; the teacher's timesteps run from 0 to 999"),
        ((250, 500), "timesteps: got [250, 500]; they must descend from noise to data"),
    ],
)
def test_wrong_timesteps_are_input_errors_of_the_sampler(timesteps: tuple[float, ...], message: str) -> None:
    teacher = networks("epsilon", DMD2()).teacher
    with pytest.raises(InputError) as error:
        DMD2(timesteps=timesteps).sampler(teacher.schedule).validate(teacher.schedule, teacher.prediction_type)
    assert str(error.value) == message
