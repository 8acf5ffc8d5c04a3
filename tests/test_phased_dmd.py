"""Phased DMD: the exact target within a subinterval, the gradient of the divergence where a phase ends, and experts as one student."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from recording import COSINE, PROCESSES, SHAPE, array, batch, coefficients, networks, pipeline, record, x0_of
from scipy import integrate, stats
from test_export import PIPELINES, Exported, in_process, student_of  # noqa: F401
from test_toy import ALL, MEANS, STDS, WEIGHTS, distances, gaussian, mixture, one_dimensional, pretrained, s_curve, unlabelled
from test_toy import coefficients as toy_coefficients
from test_trainer import trainer
from torch import Tensor, nn
from toy import TEACHERS, denoiser_of, network_output

from diffusion_distill.build import build_networks
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.errors import InputError
from diffusion_distill.experts import Experts
from diffusion_distill.methods import DMD2, Batch, PhasedDMD
from diffusion_distill.networks import Networks, trainable_copy
from diffusion_distill.random import SampleRandom
from diffusion_distill.schedule import EDM, NoiseSchedule, RectifiedFlow, TrigFlow, VariancePreserving
from diffusion_distill.score_distillation import draw_timesteps_above, subinterval_score_matching, subinterval_target
from diffusion_distill.train_config import TrainConfig

for_every_process = pytest.mark.parametrize("process", PROCESSES)
INNER = (799.0, 599.0, 399.0, 199.0)  # where no parameterisation is ill-conditioned
TWO = PhasedDMD((2, 2), timesteps=INNER, guidance_scale=1.0, experts="full")


def mean_over_x_s(teacher: str, x_t: float, t: int, s: int, function: Any) -> float:
    """E[function(x_s, eps) | x_t] for x0 ~ the mixture of test_toy, by quadrature over x_s; schedule straight from diffusers."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = toy_coefficients(teacher, t), toy_coefficients(teacher, s)
    a = alpha_t / alpha_s
    b = math.sqrt(sigma_t**2 - (a * sigma_s) ** 2)
    x_s = np.linspace(-8, 10, 100_001)
    density = sum(w * stats.norm.pdf(x_s, alpha_s * m, math.hypot(alpha_s * c, sigma_s)) for m, c, w in zip(MEANS, STDS, WEIGHTS))
    eps = (x_t - a * x_s) / b
    posterior = density * np.exp(-0.5 * eps**2 + 0.5 * np.min(eps**2))
    values = function(torch.tensor(x_s)[:, None], torch.tensor(eps)[:, None])
    return float((posterior * np.asarray(values).ravel()).sum() / posterior.sum())


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("teacher", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize(("t", "s"), [(500, 490), (700, 400), (990, 600)])
def test_the_targets_mean_is_the_exact_network(teacher: str, kind: str, t: int, s: int) -> None:
    """VP and flow matching, in every parameterisation: E[target | x_t] is the posterior mean of (x0, eps), known in closed form."""
    exact = one_dimensional(teacher)
    for x_t in (-1.2, 0.3, 1.4):
        pred = exact(torch.tensor([[x_t]], dtype=torch.float64), torch.tensor([t]), {"label": torch.tensor([ALL])})
        expected = network_output(kind, pred.x0, pred.eps, pred.alpha, pred.sigma)

        def target(x_s: Tensor, eps: Tensor) -> Tensor:
            return subinterval_target(exact.schedule, x_s, eps, torch.full((len(x_s),), t), s).view(kind)

        assert mean_over_x_s(teacher, x_t, t, s, target) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("t", "s"), [(600, 500), (750, 500), (990, 600)])
def test_the_papers_velocity_and_the_bias_of_the_naive_one(t: int, s: int) -> None:
    """v* as the paper writes it; eps - x_s misses the velocity by (b / sigma - 1) eps^ - (x_t - b^2 / sigma eps^) / a + x0^."""
    exact, tau, end = one_dimensional("flow_prediction"), t / 1000, s / 1000
    a, b = (1 - tau) / (1 - end), math.sqrt(tau**2 - ((1 - tau) / (1 - end) * end) ** 2)
    x_s, eps = torch.randn(2, 50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    written = (tau + (1 - tau) * end**2 / (1 - end) ** 2) / b * eps - x_s / (1 - end)
    torch.testing.assert_close(subinterval_target(exact.schedule, x_s, eps, torch.full((50,), t), s).flow, written)
    biases = []
    for x_t in (-1.2, 0.3, 1.4):
        pred = exact(torch.tensor([[x_t]], dtype=torch.float64), torch.tensor([t]), {"label": torch.tensor([ALL])})
        eps_mean, x0_mean = float(pred.eps), float(pred.x0)
        biases.append((b / tau - 1) * eps_mean - (x_t - b**2 / tau * eps_mean) / a + x0_mean)
        naive = mean_over_x_s("flow_prediction", x_t, t, s, lambda x_s, eps: eps - x_s)
        assert naive - (eps_mean - x0_mean) == pytest.approx(biases[-1], rel=1e-6, abs=1e-6)
    assert max(map(abs, biases)) > 0.15


@pytest.mark.parametrize(
    ("schedule", "t", "s"), [(EDM(0.002, 80.0, 0.5), 0.3, -0.2), (TrigFlow(0.5), 1.2, 0.7), (RectifiedFlow(), 1000.0, 500.0)]
)
def test_the_target_explains_its_x_t_on_every_schedule(schedule: NoiseSchedule, t: float, s: float) -> None:
    """alpha x0* + sigma eps* = x_t, where alpha is 0 too; for Gaussian data equal covariances with x_t show equal means given x_t."""
    x0, n, eps = torch.randn(3, 200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times, end = torch.full((len(x0),), t), torch.full((len(x0),), s)
    x_s = schedule.add_noise(x0, n, end)
    a, b = (c[0] for c in schedule.transition(times, end))
    x_t, target = a * x_s + b * eps, subinterval_target(schedule, x_s, eps, times, s)
    torch.testing.assert_close(target.alpha * target.x0 + target.sigma * target.eps, x_t)
    total = (x_t - target.alpha * x0) / target.sigma
    for wanted, found in ((x0, target.x0), (total, target.eps)):
        error = float(((found - wanted) * x_t).std()) / math.sqrt(len(x0))
        assert abs(float(((found - wanted) * x_t).mean())) <= 4 * error


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_exact_network_minimises_the_loss_within_the_subinterval(teacher: str) -> None:
    generator, s = torch.Generator().manual_seed(0), 500.0
    exact = one_dimensional(teacher)
    x0 = exact.model.sample(torch.full((20_000,), ALL), generator)
    n, eps = torch.randn(2, *x0.shape, generator=generator)
    x_s, cond = exact.schedule.add_noise(x0, n, torch.full((len(x0),), s)), {"label": torch.full((len(x0),), ALL)}
    t = exact.schedule.timestep(0.5 + 0.5 * torch.rand(len(x0), generator=generator))
    losses = []
    for shift in (-0.2, 0.0, 0.2):
        net = denoiser_of(teacher, mixture(teacher, torch.tensor(MEANS)[:, None] + shift, torch.tensor(STDS), torch.tensor(WEIGHTS)))
        losses.append(float(subinterval_score_matching(net, x_s, eps, t, s, cond, 10.0)))
    assert losses[1] < min(losses[0], losses[2])


@pytest.mark.parametrize("schedule", [EDM(0.002, 80.0, 0.5), TrigFlow(0.5), RectifiedFlow(), VariancePreserving(COSINE.alphas_cumprod)])
def test_levels_and_timesteps_are_inverse(schedule: NoiseSchedule) -> None:
    level = torch.linspace(0, 0.999, 334, dtype=torch.float64)
    found = schedule.level(schedule.timestep(level))
    torch.testing.assert_close(found, level, rtol=0, atol=5.01e-4 if isinstance(schedule, VariancePreserving) else 1e-9)


# ------------------------------------------------------------------------------------------------ the generator's gradient


class Affine(nn.Module):
    """Predicts x0 = mu + w x_t."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.w = nn.Parameter(torch.tensor(1.1)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.mu + self.w * x_t


class GaussianScore(nn.Module):
    """The network whose score is that of N(mean, std^2) at every timestep."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, mean: float, std: float):
        super().__init__()
        self.schedule, self.kind, self.law = schedule, prediction_type, (mean, std)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        eps = sigma * (x_t - self.law[0]) / self.law[1] ** 2
        return network_output(self.kind, (x_t - sigma * eps) / alpha, eps, alpha, sigma).float()


@pytest.mark.parametrize("teacher", ["epsilon", "flow_prediction"])
def test_student_loss_is_the_gradient_of_the_kl_where_the_phase_ends(teacher: str) -> None:
    """An affine expert from t = 800 to s = 500 against the mixture at t = 700: x_s, x_t and the KL are Gaussian and known.

    d KL(q_t || p_t) = E[alpha / sigma^2 (fake - real) a d x_s], and d x_s = c d x0 with one positive c for the step.
    """
    start, s, t = 800, 500, 700
    method = PhasedDMD((1, 1), timesteps=(start, s), level_margin=0.1999, max_level=0.7001, guidance_scale=1.0, normalizer_floor=1e6)
    real = one_dimensional(teacher)
    expert = Denoiser(Affine(), real.schedule, "sample", real.family)
    (alpha_0, sigma_0), (alpha_s, sigma_s), (alpha, sigma) = (toy_coefficients(teacher, at) for at in (start, s, t))
    a = alpha / alpha_s
    b = math.sqrt(sigma**2 - (a * sigma_s) ** 2)
    c = alpha_s - sigma_s * alpha_0 / sigma_0
    assert c > 0

    def kl(mu: float, w: float) -> float:
        q = stats.norm(a * c * mu, math.hypot(a * (c * w + sigma_s / sigma_0), b))
        parts = [(p, stats.norm(alpha * m, math.hypot(alpha * v, sigma))) for m, v, p in zip(MEANS, STDS, WEIGHTS)]

        def integrand(x: float) -> float:
            return float(q.pdf(x) * (q.logpdf(x) - np.logaddexp.reduce([math.log(p) + law.logpdf(x) for p, law in parts])))

        return integrate.quad(integrand, q.mean() - 10 * q.std(), q.mean() + 10 * q.std(), epsabs=1e-11, limit=200)[0]

    mu, w, step, count = 1.1, 0.2, 1e-3, 12_000
    law = a * c * mu, math.hypot(a * (c * w + sigma_s / sigma_0), b)
    fake = denoiser_of(teacher, GaussianScore(real.schedule, teacher, *law))
    nets = Networks(teacher=real, expert_0=expert, expert_1=copy.deepcopy(expert), fake_score_0=fake, fake_score_1=copy.deepcopy(fake))
    nets.add(**method.views(nets))
    cond = {"label": torch.full((count,), ALL)}
    with nets.only_trains(("expert_0",)):
        method.student_loss(0, nets, Batch(cond, cond, (1,), SampleRandom((0,), range(count))))[0].backward()
    scale = 1e6 * alpha / sigma**2 * a * c
    found = [float(p.grad) * scale for p in (expert.model.mu, expert.model.w)]
    exact = [(kl(mu + step, w) - kl(mu - step, w)) / (2 * step), (kl(mu, w + step) - kl(mu, w - step)) / (2 * step)]
    assert found == pytest.approx(exact, rel=0.05)


@for_every_process
def test_one_phase_is_dmd2(process: str) -> None:
    """The same numbers on the same batch, losses and gradients, with and without a carried sample."""
    for changes in ({"sampling": "ode"}, {"sampling": "sde", "last_step_share": 0.5}):
        same: Any = {"timesteps": INNER, "guidance_scale": 2.0, **changes}
        one, two = PhasedDMD((4,), experts="full", **same), DMD2(gan_weight=0.0, **same)
        nets = networks(process, two)
        ours = Networks(teacher=nets.teacher, expert_0=copy.deepcopy(nets.student), fake_score_0=copy.deepcopy(nets.fake_score))
        for role in ours.trained_roles:
            getattr(ours, role).requires_grad_(True)
        ours = Networks(teacher=nets.teacher, expert_0=ours.expert_0, fake_score_0=ours.fake_score_0)
        ours.add(**one.views(ours))
        for step in (0, 1, 5):
            first, second = batch(step), batch(step)
            for (mine, loss), (roles, expected) in zip(one.updates(step), two.updates(step), strict=True):
                with ours.only_trains(mine), nets.only_trains(roles):
                    found, wanted = loss(ours, first)[0], expected(nets, second)[0]
                    found.backward()
                    wanted.backward()
                assert torch.equal(found, wanted)
                for a, b in zip(ours.parameters(mine[0]).values(), nets.parameters(roles[0]).values(), strict=True):
                    assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
                    a.grad = b.grad = None


# ------------------------------------------------------------------------------------------------ roll-outs and the fake score


def phased(process: str, method: PhasedDMD) -> Networks:
    """What the trainer builds, all trained networks moved apart."""
    nets, generator = build_networks(pipeline(process), method, TrainConfig(batch_guidance=False)), torch.Generator().manual_seed(1)
    for role in nets.trained_roles:
        for p in nets.parameters(role).values():
            p.data += 0.03 * torch.randn(p.shape, generator=generator)
    return nets


def diffusers_step(process: str, output: Tensor, x_t: Tensor, t: float, s: float) -> Tensor:
    """One deterministic step of diffusers between timesteps 200 apart, or to 0."""
    if process == "flow":
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[t / 1000, s / 1000] if s else [t / 1000])
        return scheduler.step(output, scheduler.timesteps[0], x_t).prev_sample
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=process, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    return scheduler.step(output, int(t), x_t).prev_sample


@for_every_process
def test_a_phase_ends_where_diffusers_steps_to(process: str) -> None:
    """Every call is that of its own expert, the gradient is in the last one, and x_s is the diffusers step to the phase's end."""
    nets = phased(process, TWO)
    calls = [record(expert) for expert in nets.student.experts]
    visited = set()
    for phase in (0, 1):
        for step in range(8):
            for made in calls:
                made.clear()
            with nets.only_trains((f"expert_{phase}",)):
                x0, x_s, s = TWO.generate(phase, nets, batch(step))
            assert s == (399.0 if phase == 0 else None)
            assert [float(c.t[0]) for made in calls for c in made] == list(INNER[: sum(map(len, calls))])
            assert len(calls[0]) == (2 if phase else len(calls[0])) and [c.with_gradient for made in calls for c in made][-1]
            last = calls[phase][-1]
            visited.add((phase, len(calls[phase])))
            scale = float(x0.detach().abs().max())
            np.testing.assert_allclose(array(x0), x0_of(process, last), rtol=1e-3, atol=1e-4 * scale)
            if phase == 0 and len(calls[0]) == 2:  # the step before the boundary: 599 to 399
                expected = diffusers_step(process, last.output.detach(), last.x_t, 599, 399)
                np.testing.assert_allclose(array(x_s), array(expected), rtol=1e-3, atol=1e-4 * scale)
            elif phase == 0:  # from the first step straight to the boundary, on the line of the same x0 and noise
                alpha, sigma = coefficients(process, last.t)
                eps = (array(last.x_t) - alpha * array(x0)) / sigma
                to_alpha, to_sigma = coefficients(process, torch.full_like(last.t, 399))
                np.testing.assert_allclose(array(x_s), to_alpha * array(x0) + to_sigma * eps, rtol=1e-3, atol=1e-4 * scale)
            else:
                assert x_s is x0
    assert visited == {(0, 1), (0, 2), (1, 1), (1, 2)}


@for_every_process
def test_renoised_phases_end_with_fresh_noise(process: str) -> None:
    method = PhasedDMD((1, 1), timesteps=(799, 399), sampling="sde", guidance_scale=1.0, experts="full")
    nets = phased(process, method)
    first = record(nets.expert_0)
    x0, x_s, _ = method.generate(0, nets, batch(slots=range(16)))
    alpha, sigma = coefficients(process, torch.full((16,), 399))
    eps = (array(x_s) - alpha * array(x0)) / sigma
    assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(eps.ravel(), array(first[0].x_t).ravel())[0, 1]) < 4 / math.sqrt(eps.size)


@for_every_process
@pytest.mark.parametrize("max_weight", [10.0, 1.2])
def test_fake_score_loss_is_the_papers(process: str, max_weight: float) -> None:
    """min(1 / b^2, max_weight) |b output - b target|^2 by the formulas of the paper, from the recorded call; both regimes occur."""
    method = PhasedDMD((1, 1), timesteps=(799, 599), max_weight=max_weight)
    nets, x_s, slots = phased(process, method), torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(3)), range(24)
    calls = record(nets.fake_score_0)
    loss = float(method.critic_loss(0, nets, batch(slots=slots, carried={"x_s": x_s}))[0])
    (call,) = calls
    (alpha, sigma), (alpha_s, sigma_s) = coefficients(process, call.t), coefficients(process, torch.full_like(call.t, 599))
    a = alpha / alpha_s
    b = np.sqrt(sigma**2 - (a * sigma_s) ** 2)
    eps = (array(call.x_t) - a * array(x_s)) / b
    assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-3
    noise = sigma / b * eps
    x0 = array(x_s) / alpha_s - alpha * sigma_s**2 / (alpha_s**2 * b) * eps
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[process]
    weight = np.minimum(1 / b**2, max_weight)
    assert (weight == max_weight).any() and (weight < max_weight).any()
    assert loss == pytest.approx(float((weight * (b * array(call.output) - b * target) ** 2).mean()), rel=1e-3)


@for_every_process
def test_levels_lie_above_the_end_of_the_phase(process: str) -> None:
    method = PhasedDMD((2, 2), timesteps=INNER, guidance_scale=1.0)
    nets = phased(process, method)
    schedule, end, slots = nets.teacher.schedule, method.end(nets.teacher.schedule, 0), range(1500)
    for margin, highest, low, high in ((0.02, 0.98, 419, 980), (0.0, 1.0, 399, 1000)):
        t = array(draw_timesteps_above(schedule, batch(slots=slots).random.uniform(), end, margin, highest))
        assert low - 0.51 <= t.min() and t.max() <= high + 0.51
        assert stats.kstest((t - low) / (high - low), "uniform").pvalue > 1e-3
    shifted = draw_timesteps_above(schedule, batch(slots=slots).random.uniform(), end, 0.02, 0.98, shift=3.0)
    u = (array(shifted) - 419) / 561
    assert stats.kstest(u / (3 - 2 * u), "uniform").pvalue > 1e-3
    fake_score = record(nets.fake_score_0)
    method.student_loss(0, nets, batch())
    assert fake_score[0].t.min() >= 418


# ------------------------------------------------------------------------------------------------ phases and experts


def test_phases_train_one_after_another_or_in_turn() -> None:
    def turns(method: PhasedDMD, steps: int) -> list[list[str]]:
        return [[role for roles, _ in method.updates(step) for role in roles] for step in range(steps)]

    first, second = [["expert_0", "fake_score_0"], ["fake_score_0"]], [["expert_1", "fake_score_1"], ["fake_score_1"]]
    sequential = PhasedDMD((1, 1), phase_steps=3, student_update_interval=2)
    assert turns(sequential, 8) == [*first, first[0], *second, *second, second[0]]
    assert [sequential.finished(step) for step in range(5)] == [(), (), ("expert_0",), (), ()]
    joint = PhasedDMD((1, 1), training="joint", phase_steps=3, student_update_interval=2)
    assert turns(joint, 6) == [first[0], second[0], first[1], second[1], first[0], second[0]]
    assert not any(joint.finished(step) for step in range(8))
    experts, fake_scores = ("expert_0", "expert_1", "expert_2"), ("fake_score_0", "fake_score_1", "fake_score_2")
    full, lora = PhasedDMD((1, 2, 3), experts="full"), PhasedDMD((1, 2, 3))
    assert full.copies == (*experts, *fake_scores) and not full.adapters
    assert lora.copies == fake_scores and tuple(lora.adapters) == experts == lora.student_roles


def test_a_finished_expert_is_its_moving_average(tmp_path: Path) -> None:
    """So the next phase starts from what is exported; it stays so until the end, and the other expert goes on."""
    method = PhasedDMD((1, 1), timestep_shift=1.0, guidance_scale=1.0, phase_steps=3, student_update_interval=1, expert_rank=2)
    run = trainer(tmp_path, method, max_train_steps=5, ema_decay=0.5)
    raw = run._data()

    def settled(role: str) -> bool:
        average = run.emas[role].average
        return all(torch.equal(p, average[name]) for name, p in run.nets.parameters(role).items())

    seen = []
    for _ in range(5):
        run.train_step(run._prepare(next(raw)))
        seen.append((settled("expert_0"), settled("expert_1")))
    assert seen == [(False, True), (False, True), (True, True), (True, False), (True, False)]


def test_the_expert_of_the_noise_level_answers() -> None:
    experts = [gaussian("flow_prediction", mean, 1.0) for mean in (-1.0, 0.0, 1.0)]
    student = Experts(experts, (700.0, 300.0))
    x_t, cond = torch.zeros(2, 1), {"label": torch.zeros(2, dtype=torch.long)}
    for t, expert in ((1000.0, 0), (700.0, 0), (699.9, 1), (300.0, 1), (299.0, 2), (1.0, 2)):
        times = torch.full((2,), t)
        torch.testing.assert_close(student(x_t, times, cond).x0, experts[expert](x_t, times, cond).x0)
    with pytest.raises(ValueError, match="belong to several experts"):
        student(x_t, torch.tensor([800.0, 600.0]), cond)
    for boundaries in ((300.0, 700.0), (300.0,)):
        with pytest.raises(ValueError, match="2 descending timesteps"):
            Experts(experts, boundaries)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_phase": ()}, "steps_per_phase: got (); "),
        ({"steps_per_phase": (2, 0)}, "steps_per_phase: got (2, 0); "),
        ({"timesteps": (900.0,)}, "timesteps: got (900.0,); steps_per_phase asks for 4 of them"),
        ({"level_margin": 0.99}, "level_margin, max_level: got (0.99, 0.98); "),
        ({"phase_steps": 0}, "phase_steps: got 0; at least 1"),
        ({"student_update_interval": 0}, "student_update_interval: got 0; at least 1"),
        ({"last_step_share": 1.5}, "last_step_share: got 1.5; "),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0; 0 or more"),
        ({"expert_rank": 0}, "expert_rank: got 0; at least 1"),
        ({"experts": "shared"}, "experts: got 'shared'; accepted: 'lora', 'full'"),
        ({"max_weight": 0.0}, "max_weight: got 0.0; a number above 0"),
        ({"level_shift": 0.0}, "level_shift: got 0.0; a number above 0"),
        ({"training": "alternating"}, "training: got 'alternating'; accepted: 'sequential', 'joint'"),
        ({"sampling": "ddim"}, "sampling: got 'ddim'; accepted: 'ode', 'sde'"),
    ],
)
def test_wrong_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        PhasedDMD(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_phase_that_leaves_no_levels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"level_margin.*972\.22"):
        trainer(tmp_path, PhasedDMD((1, 7)))


def test_a_run_that_ends_before_its_last_phase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_train_steps: got 6; expert_1 would never train"):
        trainer(tmp_path, PhasedDMD((1, 1), timestep_shift=1.0, phase_steps=6))


# ------------------------------------------------------------------------------------------------ export


def experts_of(build: Any, boundaries: tuple[float, ...]) -> Experts:
    experts = [student_of(build()) for _ in range(len(boundaries) + 1)]
    with torch.no_grad():
        for number, expert in enumerate(experts):
            for p in expert.parameters():
                p.mul_(1 + 0.05 * number)
    return Experts(experts, boundaries)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("name", "steps", "boundaries", "kind"),
    [
        ("class_conditional_flow", 2, (750.0,), "ode"),
        ("class_conditional_flow", 4, (625.0,), "sde"),
        ("class_conditional_flow", 8, (900.0, 700.0, 300.0), "ode"),
        ("class_conditional_v", 2, (749.0,), "ode"),
        ("class_conditional_v", 4, (874.0, 374.0), "sde"),
        ("class_conditional_v", 8, (686.5,), "ode"),
    ],
)
def test_diffusers_switches_experts_as_the_trainer_does(
    name: str, steps: int, boundaries: tuple[float, ...], kind: Any, tmp_path: Path
) -> None:
    student = experts_of(PIPELINES[name], boundaries)
    Exported(tmp_path / "student", PIPELINES[name], steps, kind, student=student).verify(atol=1e-6)
    assert student.training


def test_a_fresh_process_switches_experts_too(tmp_path: Path) -> None:
    build = PIPELINES["class_conditional_flow"]
    exported = Exported(tmp_path / "student", build, 4, "ode", student=experts_of(build, (625.0,)))
    assert exported.verify()["timesteps"] == [[1000.0, 750.0, 500.0, 250.0]]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("shared", [True, False], ids=["one_base", "own_base"])
def test_each_experts_lora_adapter_is_merged(shared: bool, tmp_path: Path) -> None:
    build = PIPELINES["class_conditional_flow"]
    method = replace(TWO, experts="lora", expert_rank=2) if shared else TWO
    nets = build_networks(build(), method, TrainConfig(lora_rank=2))
    for number, role in enumerate(TWO.student_roles):
        for p in nets.parameters(role).values():
            torch.nn.init.normal_(p, std=0.1 * (1 + number))
    noise, cond = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), {"class_labels": torch.tensor([0, 1])}
    sampler = Exported(tmp_path / "student", build, 4, "ode", student=nets.student)
    sampler.verify(atol=1e-5)
    merged_one = DiffusionPipeline.from_pretrained(sampler.folder, trust_remote_code=True).unet_2
    t = torch.full((2,), 300.0)
    output = merged_one(noise, t, class_labels=cond["class_labels"]).sample.detach()
    pred = nets.student(noise, t, cond)
    torch.testing.assert_close(output, pred.flow, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output, nets.teacher(noise, t, cond).flow, atol=1e-3)


@pytest.mark.usefixtures("in_process")
def test_calling_the_wrong_expert_is_seen(tmp_path: Path) -> None:
    build = PIPELINES["class_conditional_flow"]
    exported = Exported(tmp_path / "student", build, 4, "ode", student=experts_of(build, (625.0,)))
    index = exported.folder / "model_index.json"
    index.write_text(index.read_text().replace("625.0", "400.0"))
    with pytest.raises(RuntimeError, match=r"experts \[0, 0, 0, 1\] were called at .*; trained there: \[0, 0, 1, 1\]"):
        exported.verify()


def test_pipelines_without_room_for_experts_are_refused(tmp_path: Path) -> None:
    for name, boundaries, limit in (("stable_diffusion_3", (500.0,), 1), ("class_conditional_flow", (900.0, 700.0, 500.0, 300.0), 4)):
        with pytest.raises(InputError, match=rf"experts: got {len(boundaries) + 1}; .* takes {limit} network"):
            Exported(tmp_path / name, PIPELINES[name], 8, "ode", student=experts_of(PIPELINES[name], boundaries))


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("teacher", "training"), [("epsilon", "sequential"), ("flow_prediction", "joint")])
def test_two_experts_beat_the_teacher_at_as_many_steps(teacher: str, training: Any) -> None:
    steps, size, rate = 240, 96, 1e-3
    first = {"epsilon": 599.0, "flow_prediction": 1000.0}[teacher]
    settings: Any = {"training": training, "experts": "full", "phase_steps": steps // 2, "student_update_interval": 2}
    method = PhasedDMD((1, 1), (first, 300.0), guidance_scale=1.0, **settings)
    start = pretrained(teacher)
    nets = Networks(teacher=s_curve(teacher), **{role: trainable_copy(start) for role in method.copies})
    nets.add(**method.views(nets))
    optimizers = {role: torch.optim.Adam(nets.parameters(role).values(), betas=(0.0, 0.999), fused=True) for role in method.copies}
    for step in range(steps):
        given = Batch(unlabelled(size), unlabelled(size), (2,), SampleRandom((), range(size)))
        anneal = 1 - (step / steps if training == "joint" else step % (steps // 2) / (steps // 2))
        for turn, (roles, loss_fn) in enumerate(method.updates(step)):
            given.random = SampleRandom((0, step, turn), range(size))
            with nets.only_trains(roles):
                loss_fn(nets, given)[0].backward()
            for role in roles:
                optimizers[role].param_groups[0]["lr"] = anneal * (rate if role in method.student_roles else 4 * rate)
                optimizers[role].step()
                optimizers[role].zero_grad()
    student, euler = distances(method, teacher, nets)
    assert student < euler / 5
