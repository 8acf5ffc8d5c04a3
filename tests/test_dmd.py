"""DMD: distribution matching against a closed form, the regression against autograd, and students trained on both."""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recording import PROCESSES, SHAPE, array, batch, coefficients, networks, noise_in, record, x0_of
from test_toy import FIRST, gaussian, pretrained, s_curve, unlabelled
from test_toy import coefficients as toy_coefficients
from tiny_pipelines import class_conditional
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from toy import TEACHERS, denoiser_of, energy_distance

from diffusion_distill import export, export_child
from diffusion_distill.cli import train
from diffusion_distill.errors import InputError
from diffusion_distill.losses import feature_distance
from diffusion_distill.methods import DMD, Batch
from diffusion_distill.networks import Networks, trainable_copy
from diffusion_distill.random import SampleRandom
from diffusion_distill.sampler import ode_sample, uniform_timesteps

INNER = (799.0,)  # where no parameterisation is ill-conditioned
ROOT = Path(__file__).parents[1]
for_every_process = pytest.mark.parametrize("process", PROCESSES)


def gradient(nets: Networks, loss: Tensor) -> Tensor:
    """The gradient of `loss` in all parameters of the student, as one vector; gradients are cleared."""
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in nets.parameters("student").values()])  # type: ignore[union-attr]
    nets.student.zero_grad(set_to_none=True)
    return found


# ------------------------------------------------------------------------------------------------ distribution matching


class Affine(nn.Module):
    """A student x0 = mean + std * noise, whatever the timestep, as a network that predicts x0's flow or its noise."""

    def __init__(self, teacher: str, alpha: float, sigma: float, mean: float, std: float):
        super().__init__()
        self.kind, self.alpha, self.sigma = teacher, alpha, sigma
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        x0 = self.mean + self.std * x_t
        eps = (x_t - self.alpha * x0) / self.sigma
        return {"epsilon": eps, "v_prediction": self.alpha * eps - self.sigma * x0, "flow_prediction": eps - x0}[self.kind]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_gradient_is_that_of_the_kl_between_gaussians(teacher: str) -> None:
    """alpha^2 / sigma^2 (fake - real) d x0, at one noise level and with a constant normaliser, within 4 standard errors."""
    (m, c), (mean, std), floor, count, t = (0.5, 1.1), (0.9, 0.5), 1e4, 10_000, 300
    student = denoiser_of(teacher, Affine(teacher, *toy_coefficients(teacher, 799), mean, std))
    nets = Networks(teacher=gaussian(teacher, m, c), student=student, fake_score=gaussian(teacher, mean, std))
    level = (t + 0.01) / 1000
    method = DMD(INNER, 1.0, level - 1e-6, level, regression_weight=0.0, normalizer_floor=floor)
    cond = {"label": torch.ones(count, dtype=torch.long)}
    with nets.only_trains(("student",)):
        given = Batch(cond, cond, (1,), SampleRandom((0, 0), range(count)))
        method.student_loss(nets, given)[0].backward()
    alpha, sigma = toy_coefficients(teacher, t)
    found = [float(p.grad) * floor * (alpha / sigma) ** 2 for p in (student.model.mean, student.model.std)]  # type: ignore[arg-type]
    mu, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, std))
    of_student, of_teacher = alpha**2 * s**2 + sigma**2, alpha**2 * c**2 + sigma**2  # variances of x_t
    kl_divergence(Normal(alpha * mu, of_student.sqrt()), Normal(alpha * torch.tensor(m), torch.tensor(of_teacher).sqrt())).backward()
    spread = abs(alpha * std**2 / of_student.item() - alpha * c**2 / of_teacher) * math.sqrt(of_student.item())  # of fake - real
    offset = abs(mean - m) * sigma**2 / of_teacher  # its mean
    for value, exact, deviation in zip(found, (mu.grad, s.grad), (spread, offset + 2 * spread), strict=True):
        error = 4 * (alpha / sigma) ** 2 * deviation / math.sqrt(count)
        assert abs(value - float(exact)) < error < 0.2 * abs(float(exact))  # type: ignore[arg-type]


@for_every_process
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_distribution_matching_is_on_fresh_noise_and_normalised(process: str, guidance_scale: float) -> None:
    """Eq. 7 and 8: (fake - real) / mean|x0 - real| for each sample, through the student's one call; the pair is not looked at."""
    method = DMD(INNER, guidance_scale, regression_weight=0.0)
    nets, given = networks(process, method), batch(noise=None, x0=None)
    student, teacher, fake_score = (record(net) for net in (nets.student, nets.teacher, nets.fake_score))
    with nets.only_trains(("student",)):
        method.student_loss(nets, given)[0].backward()
    assert len(student) == len(fake_score) == 1 and len(teacher) == (1 if guidance_scale == 1 else 2)
    x0, fake = x0_of(process, student[0]), x0_of(process, fake_score[0])
    cond, uncond = x0_of(process, teacher[0]), x0_of(process, teacher[-1])
    real = uncond + guidance_scale * (cond - uncond)
    alpha, sigma = coefficients(process, student[0].t)
    slope = -sigma / alpha if process == "epsilon" else -sigma  # d x0 / d output
    expected = (fake - real) / np.abs(x0 - real).mean((1, 2, 3), keepdims=True) / x0.size * slope
    np.testing.assert_allclose(array(student[0].output.grad), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------ regression


def pairs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {"noise": torch.randn(4, *SHAPE, generator=generator), "x0": torch.randn(4, *SHAPE, generator=generator)}


def teacher_features(nets: Networks, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """What leaves the teacher's middle block, by a hook of this test."""
    found: list[Tensor] = []
    handle = nets.teacher.model.mid_block.register_forward_hook(lambda module, args, output: found.append(output))
    nets.teacher.model(x_t, t, class_labels=label)
    handle.remove()
    return found[0]


@for_every_process
@pytest.mark.parametrize("distance", ["l2", "teacher_features"])
def test_regression_gradient_is_autograds(process: str, distance: Any) -> None:
    """grad(dm + w reg) = grad(dm) + w grad(distance of G(noise of the pair) to its x0)."""
    weight, settings = 3.0, {"timesteps": INNER, "guidance_scale": 1.0, "regression_distance": distance, "feature_level": 0.2}
    method, pair = DMD(regression_weight=weight, **settings), pairs()  # type: ignore[arg-type]
    nets, label = networks(process, method), batch().cond["class_labels"]
    calls, seen = record(nets.student), []
    handle = nets.teacher.model.register_forward_pre_hook(lambda module, args: seen.append(args))
    with nets.only_trains(("student",)):
        loss, logs = method.student_loss(nets, batch(**pair))
        both = gradient(nets, loss)
        handle.remove()
        matching = gradient(nets, DMD(regression_weight=0.0, **settings).student_loss(nets, batch())[0])  # type: ignore[arg-type]
        assert torch.equal(calls[1].x_t, pair["noise"]) and (calls[1].t == 799).all() and calls[0].x_t.shape == calls[1].x_t.shape
        alpha, sigma = (torch.tensor(c).float() for c in coefficients(process, calls[1].t))
        output = nets.student.model(pair["noise"], calls[1].t, class_labels=label)[0]
        x, eps_like = pair["noise"], process == "epsilon"
        x0 = (x - sigma * output) / alpha if eps_like else (alpha * x - sigma * output if process == "v_prediction" else x - sigma * output)
        if distance == "l2":
            expected = (x0 - pair["x0"]).square().mean()
        else:
            target_x, t = seen[-2][:2]
            assert (t == 200).all() and torch.equal(seen[-1][1], t)
            alpha, sigma = (torch.tensor(c).float() for c in coefficients(process, t))
            eps = torch.tensor(noise_in(process, target_x, t, array(pair["x0"]))).float()
            noises = noise_in(process, seen[-1][0], t, array(x0))
            np.testing.assert_allclose(noises, array(eps), rtol=1e-3, atol=2e-3)  # the same noise on both
            a, b = (teacher_features(nets, alpha * y + sigma * eps, t, label) for y in (x0, pair["x0"]))
            a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
            expected = (a - b).square().sum(1).mean()
        regression = gradient(nets, expected)
    torch.testing.assert_close(logs["regression"], expected.detach(), rtol=1e-3, atol=1e-5)
    assert regression.norm() > 1e-6
    torch.testing.assert_close(both - matching, weight * regression, rtol=0, atol=float(3e-3 * weight * regression.norm()))


def test_feature_distance_ignores_the_scale_of_features_and_takes_maps_and_tokens() -> None:
    maps, tokens = torch.randn(2, 5, 3, 3), torch.randn(2, 7, 4)
    assert feature_distance([maps, tokens], [2 * maps, 3 * tokens]) < 1e-6
    assert float(feature_distance([maps, tokens], [-maps, tokens])) == pytest.approx(4 / 2)
    assert float(feature_distance([tokens], [-tokens])) == pytest.approx(4)


# ------------------------------------------------------------------------------------------------ turns and settings


@for_every_process
def test_student_and_fake_score_take_turns_and_share_the_sample(process: str) -> None:
    method = DMD(INNER, 1.0)
    nets, given = networks(process, method), batch(**pairs())
    assert nets.trained_roles == ("student", "fake_score") and method.needs_pairs and not method.needs_images
    student, fake_score = record(nets.student), record(nets.fake_score)
    moved = []
    for turn, (roles, loss_fn) in enumerate(method.updates(7)):
        given.random = SampleRandom((7, turn), range(4))
        with nets.only_trains(roles):
            loss_fn(nets, given)[0].backward()
        moved += [role for role in nets.trained_roles if any(p.grad is not None and p.grad.any() for p in getattr(nets, role).parameters())]
        nets.student.zero_grad(set_to_none=True)
    assert moved == ["student", "fake_score"] and len(student) == 2  # fresh noise and the pair's, both in the student's turn
    eps = noise_in(process, fake_score[1].x_t, fake_score[1].t, x0_of(process, student[0]))
    assert abs(eps.std() - 1) < 0.2 and not given.carried


def test_without_regression_no_pairs_are_needed() -> None:
    assert DMD().needs_pairs and not DMD(regression_weight=0).needs_pairs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": (999.0, 499.0)}, "timesteps: got [999.0, 499.0]; the student takes one step, "),
        ({"min_level": 0.9, "max_level": 0.5}, "min_level, max_level: got (0.9, 0.5); "),
        ({"feature_level": 1.5}, "feature_level: got 1.5; a fraction from 0 to 1"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0; 0 or more"),
        ({"regression_weight": float("nan")}, "regression_weight: got nan; 0 or more"),
        ({"regression_distance": "lpips"}, "regression_distance: got 'lpips'; accepted: 'l2', 'teacher_features'"),
        ({"fake_score_loss": "x0"}, "fake_score_loss: got 'x0'; accepted: 'network', 'sample', "),
        ({"normalizer_floor": 0.0}, "normalizer_floor: got 0.0; a number above 0"),
    ],
)
def test_wrong_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        DMD(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("teacher", ["epsilon", "flow_prediction"])
def test_student_comes_closer_to_the_data_and_to_its_pairs(teacher: str, steps: int = 150, size: int = 64) -> None:
    """One step from the teacher's weights: the distance to the data falls by more than ten, that to unseen pairs by more than two."""
    start, exact, generator = pretrained(teacher), s_curve(teacher), torch.Generator().manual_seed(0)
    method = DMD((FIRST[teacher],), 1.0)
    grid = (FIRST[teacher], *(t for t in uniform_timesteps(exact.schedule, 20) if t < FIRST[teacher]))
    noise = torch.randn(3000, 2, generator=generator)
    x0 = ode_sample(exact, noise, unlabelled(3000), grid)
    data = exact.model.sample(unlabelled(3000)["label"], generator)
    nets = Networks(teacher=exact, student=trainable_copy(start), fake_score=trainable_copy(start))
    rates = {"student": 1e-3, "fake_score": 4e-3}
    optimizers = {role: torch.optim.Adam(nets.parameters(role).values(), betas=(0.0, 0.999), fused=True) for role in rates}

    def distances() -> tuple[float, float]:
        drawn = method.sampler(exact.schedule).sample(nets.student, noise, unlabelled(3000), torch.randn_like)
        return energy_distance(drawn, data), float((drawn - x0)[2000:].square().mean())

    before = distances()
    for step in range(steps):
        index = torch.randint(2000, (size,), generator=generator)
        given = Batch(unlabelled(size), unlabelled(size), (2,), SampleRandom((), range(size)), x0[index], noise[index])
        for turn, (roles, loss_fn) in enumerate(method.updates(step)):
            given.random = SampleRandom((step, turn), range(size))
            with nets.only_trains(roles):
                loss_fn(nets, given)[0].backward()
            for role in roles:
                optimizers[role].param_groups[0]["lr"] = rates[role] * (1 - step / steps)
                optimizers[role].step()
                optimizers[role].zero_grad()
    after = distances()
    assert after[0] < before[0] / 10 and after[1] < before[1] / 2


def test_from_a_teacher_to_its_pairs_to_an_exported_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified in this process: tests of the export start fresh ones."""

    def verify(request: dict[str, Any]) -> Any:
        with torch.random.fork_rng():
            export_child.main(request | {"output": str(tmp_path)})
        return export.read_results(tmp_path)[0], []

    monkeypatch.setattr(export, "_fresh_process", verify)
    class_conditional("flow").save_pretrained(tmp_path / "teacher")
    source = ["--pretrained_model_name_or_path", str(tmp_path / "teacher"), "--trust_remote_code"]
    how = ["--num_pairs", "12", "--num_inference_steps", "3", "--output_dir", str(tmp_path / "pairs")]
    monkeypatch.setattr(sys, "argv", ["make_pairs.py", *source, "--dataset", "digits", *how])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train" / "make_pairs.py"), run_name="__main__")
    assert stop.value.code == 0
    loop = ["--max_train_steps", "2", "--train_batch_size", "4", "--num_validation_images", "4", "--output_dir", str(tmp_path / "run")]
    train("dmd", [*source, "--pairs_dir", str(tmp_path / "pairs"), *loop])
    proof = json.loads((tmp_path / "run" / "student" / "verification.json").read_text())
    assert proof["max_difference"] <= 1e-6
    assert "student/regression" in (tmp_path / "run" / "metrics.jsonl").read_text()
