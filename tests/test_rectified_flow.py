"""Rectified flow: closed forms for Gaussians, time laws against scipy, inputs and losses of real networks by hand, and exports."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from recording import PROCESSES, SHAPE, array, coefficients, noise_in, pipeline, record, uncorrelated, x0_of
from recording import batch as batch_of
from scipy import integrate, stats
from test_export import PIPELINES, Exported, in_process  # noqa: F401
from test_toy import gaussian, pretrained, s_curve, unlabelled
from tiny_pipelines import class_conditional
from torch import Tensor, nn
from toy import TEACHERS, denoiser_of, energy_distance, network_output

from diffusion_distill import distill
from diffusion_distill.build import build_networks, teacher_denoiser
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.errors import InputError
from diffusion_distill.methods import Batch, Method, Reflow, ReflowDistillation
from diffusion_distill.networks import Networks, trainable_copy
from diffusion_distill.pair_writer import PairConfig, write_pairs
from diffusion_distill.pairs import PairDataset
from diffusion_distill.random import SampleRandom
from diffusion_distill.sampler import ode_sample, uniform_timesteps
from diffusion_distill.time_laws import logit_normal, u_shaped
from diffusion_distill.train_config import TrainConfig

for_every_process = pytest.mark.parametrize("process", PROCESSES)
SERVED = (1, 2, 4, 8)


# ------------------------------------------------------------------------------------------------ time laws

UNIFORM = torch.linspace(0, 1, 41, dtype=torch.float64)[:-1]


@pytest.mark.parametrize("a", [0.5, 4.0])
def test_u_shaped_levels_invert_the_integrated_density(a: float) -> None:
    """Half of an exponential truncated to [0, 1], half of its mirror image (the released code of 2405.20320), by quadrature."""

    def density(u: float) -> float:
        return (math.exp(a * u) + math.exp(a * (1 - u))) * a / (math.exp(a) - 1) / 2

    found = [integrate.quad(density, 0, float(level))[0] for level in u_shaped(UNIFORM, a)]
    np.testing.assert_allclose(found, UNIFORM, atol=1e-9)
    assert integrate.quad(density, 0, 1)[0] == pytest.approx(1)


def test_logit_normal_levels_are_scipys() -> None:
    level = array(logit_normal(UNIFORM[1:], -0.4, 1.7))
    np.testing.assert_allclose(stats.norm.cdf(np.log(level / (1 - level)), -0.4, 1.7), UNIFORM[1:], atol=1e-9)
    assert logit_normal(torch.zeros(1), 0.0, 1.0).item() == 0 and u_shaped(torch.zeros(1), 4.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("law", "cdf"),
    [
        ("uniform", lambda u: u),
        ("u_shaped", lambda u: (np.sinh(4 * (u - 0.5)) + math.sinh(2)) / 2 / math.sinh(2)),
        ("logit_normal", lambda u: stats.norm.cdf(np.log(u / (1 - u)), 0.5, 2.0)),
    ],
)
def test_a_step_draws_its_levels_from_the_law(law: Any, cdf: Any) -> None:
    levels = Reflow(time_law=law, logit_mean=0.5, logit_std=2.0).draw_level(batch_of(slots=range(4000)))
    assert stats.kstest(array(levels), cdf).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------ closed forms


class Line(nn.Module):
    """The exact network for pairs x0 = a + b noise: x_t determines the noise, (x_t - alpha a) / (alpha b + sigma)."""

    def __init__(self, a: float, b: float, teacher: str):
        super().__init__()
        self.ends, self.teacher = nn.Parameter(torch.tensor([a, b], dtype=torch.float64)), teacher
        self.schedule = gaussian(teacher, 0, 1).schedule

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        a, b = self.ends
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        eps = (x_t.double() - alpha * a) / (alpha * b + sigma)
        return network_output(self.teacher, a + b * eps, eps, alpha, sigma)


def pairs(count: int, a: float, b: float, seed: int = 0) -> Batch:
    noise = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cond = {"label": torch.zeros(count, dtype=torch.long)}
    return Batch(cond, cond, (1,), SampleRandom((seed,), range(count)), a + b * noise, noise)


def student_alone(model: nn.Module, teacher: str) -> Networks:
    return Networks(teacher=gaussian(teacher, 0, 1), student=denoiser_of(teacher, model))


def loss_of(method: Method, nets: Networks, given: Batch, step: int = 0) -> Tensor:
    ((roles, loss_fn),) = method.updates(step)
    assert roles == ("student",)
    given.random = SampleRandom((0,), given.random.slots)
    return loss_fn(nets, given)[0]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("method", [Reflow(), Reflow(time_law="u_shaped", loss="pseudo_huber"), Reflow(loss_space="sample")])
def test_the_straight_flow_of_a_gaussian_minimises_reflow(teacher: str, method: Reflow) -> None:
    """Its loss is zero in any process, because the pairs' coupling is deterministic; on both sides of it the loss rises."""
    given = pairs(256, 0.7, 0.4)
    assert loss_of(method, student_alone(Line(0.7, 0.4, teacher), teacher), given) < 1e-9
    for a, b in ((0.65, 0.4), (0.75, 0.4), (0.7, 0.35), (0.7, 0.45)):
        assert loss_of(method, student_alone(Line(a, b, teacher), teacher), given) > 1e-5


def test_the_minimiser_is_the_least_squares_velocity() -> None:
    """At one level, numpy's linear regression of noise - x0 on x_t is the closed form that the loss calls perfect."""
    given, level = pairs(500, 0.7, 0.4), 0.3
    x_t = (1 - level) * given.x0 + level * given.noise
    design = np.stack([array(x_t[:, 0]), np.ones(500)], 1)
    (slope, offset), *_ = np.linalg.lstsq(design, array((given.noise - given.x0)[:, 0]), rcond=None)
    velocity = Line(0.7, 0.4, "flow_prediction")(x_t, torch.full((500,), 1000 * level), given.cond["label"])
    np.testing.assert_allclose(array(velocity[:, 0]), slope * array(x_t[:, 0]) + offset, atol=1e-9)


@pytest.mark.parametrize("teacher", ["v_prediction", "flow_prediction"])
def test_after_reflow_one_step_is_the_teachers_whole_trajectory(teacher: str) -> None:
    """The ODE of a Gaussian teacher maps noise to mu + s noise; the straight flow does so in any number of steps."""
    mu, s = 0.7, 0.4
    exact, given = gaussian(teacher, mu, s), pairs(64, mu, s)
    assert given.x0 is not None and given.noise is not None
    first = torch.tensor(uniform_timesteps(exact.schedule, 1)[0])
    alpha, sigma = float(exact.schedule.alpha(first)), float(exact.schedule.sigma(first))
    x0 = mu + s * (given.noise - alpha * mu) / math.hypot(alpha * s, sigma)  # noise stands for x_T, which has a little signal in VP
    by_teacher = ode_sample(exact, given.noise, given.cond, uniform_timesteps(exact.schedule, 500))
    torch.testing.assert_close(by_teacher, x0, atol=0.02, rtol=0)  # of first order in 1 / 500
    assert (ode_sample(exact, given.noise, given.cond, uniform_timesteps(exact.schedule, 1)) - x0).abs().max() > 0.2
    if teacher == "flow_prediction":
        straight = denoiser_of(teacher, Line(mu, s, teacher))
        for sampler in Reflow(num_inference_steps=SERVED).samplers(exact.schedule):
            torch.testing.assert_close(sampler.sample(straight, given.noise, given.cond, torch.randn_like), x0, atol=1e-12, rtol=0)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_at_full_annealing_the_minimiser_is_the_teacher(teacher: str) -> None:
    """beta = 1 pairs x0 with fresh noise: 1-rectified flow, or plain diffusion training, whose minimiser is the exact network."""
    method, given = Reflow(annealing="linear", annealing_steps=10), pairs(5000, 0.7, 0.4)
    losses = [float(loss_of(method, student_alone(gaussian(teacher, mu, s).model, teacher), given)) for mu, s in
              ((0.7, 0.4), (0.6, 0.4), (0.8, 0.4), (0.7, 0.3), (0.7, 0.5))]  # fmt: skip
    assert losses[0] < min(losses[1:])
    assert loss_of(method, student_alone(Line(0.7, 0.4, teacher), teacher), given, 10) < 1e-9  # beta = 0


# ------------------------------------------------------------------------------------------------ real networks, by hand


def networks(process: str, method: Method) -> Networks:
    nets = build_networks(pipeline(process), method, TrainConfig())
    generator = torch.Generator().manual_seed(1)
    for p in nets.parameters("student").values():
        p.data += 0.03 * torch.randn(p.shape, generator=generator)
    return nets


def batch(slots: int = 64, **fields: Any) -> Batch:
    return batch_of(slots=range(slots), noise=torch.randn(slots, *SHAPE, generator=torch.Generator().manual_seed(3)), **fields)


KINDS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "flow": "flow_prediction"}


def view(kind: str, process: str, t: Tensor, x0: np.ndarray, eps: np.ndarray) -> np.ndarray:
    return np.asarray(network_output(kind, x0, eps, *coefficients(process, t)))  # type: ignore[arg-type]


@for_every_process
@pytest.mark.parametrize("space", ["network", "sample", "flow_prediction"])
@pytest.mark.parametrize("loss", ["l2", "pseudo_huber"])
@pytest.mark.parametrize("weighting", ["uniform", "signal", "inverse_noise"])
def test_reflow_compares_at_the_line_between_the_ends_of_a_pair(process: str, space: Any, loss: Any, weighting: Any) -> None:
    method = Reflow(loss_space=space, loss=loss, weighting=weighting, huber_scale=0.05, time_law="logit_normal")
    nets, given = networks(process, method), batch()
    assert given.x0 is not None and given.noise is not None
    calls = record(nets.student)
    found = loss_of(method, nets, given)
    (call,) = calls
    t, x0, noise, (alpha, sigma) = call.t, array(given.x0), array(given.noise), coefficients(process, call.t)
    np.testing.assert_allclose(noise_in(process, call.x_t, t, x0), noise, atol=1e-3)
    predicted = x0_of(process, call)
    eps = (array(call.x_t) - alpha * predicted) / sigma
    kind = KINDS[process] if space == "network" else space
    squares = (view(kind, process, t, predicted, eps) - view(kind, process, t, x0, noise)) ** 2
    c = 0.05 * math.sqrt(64)
    distance = squares.mean((1, 2, 3)) if loss == "l2" else np.sqrt(squares.sum((1, 2, 3)) + c**2) - c
    weight = {"uniform": 1.0, "signal": alpha.ravel(), "inverse_noise": 1 / sigma.ravel()}[weighting]
    assert float(found) == pytest.approx(float((weight * distance).mean()), rel=2e-3)


@pytest.mark.parametrize(
    ("annealing", "expected"),
    [
        ("linear", lambda k: max(0.0, 1 - k / 8)),
        ("cosine", lambda k: (1 + math.cos(math.pi * min(1.0, k / 8))) / 2),
        ("exponential", lambda k: math.exp(-k / 8)),
    ],
)
def test_annealed_noise_keeps_its_variance_and_ends_at_the_pair(annealing: Any, expected: Any) -> None:
    method, given = Reflow(annealing=annealing, annealing_steps=8), batch(slots=256)
    nets = networks("flow", method)
    assert given.noise is not None and given.x0 is not None
    calls = record(nets.student)
    for step in (0, 3, 8, 20):
        loss_of(method, nets, given, step)
        beta = expected(step)
        noise = noise_in("flow", calls[-1].x_t, calls[-1].t, array(given.x0))
        noise = noise[array(calls[-1].t) > 20]  # above rounding
        own = array(given.noise)[array(calls[-1].t) > 20]
        assert noise.var() == pytest.approx(1, abs=4 * math.sqrt(2 / noise.size))
        assert np.corrcoef(noise.ravel(), own.ravel())[0, 1] == pytest.approx(math.sqrt(1 - beta**2), abs=4 / math.sqrt(noise.size))
        if beta == 0:
            np.testing.assert_allclose(noise, own, atol=1e-3)
        else:
            assert uncorrelated((noise - math.sqrt(1 - beta**2) * own) / beta, own)


@for_every_process
def test_distillation_starts_at_the_noise_itself_and_visits_the_served_timesteps(process: str) -> None:
    """Each number of steps has an equal share of the batch, each of its steps an equal share of that: .583 at the first of 1, 2, 4."""
    method, count = ReflowDistillation(num_inference_steps=(1, 2, 4)), 3000
    given, schedule = batch(slots=count), teacher_denoiser(pipeline(process)).schedule
    given.x0 = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))
    x_t, t = method.line_inputs(schedule, given)
    grid = [1000.0, 750.0, 500.0, 250.0] if process == "flow" else [999.0, 749.0, 499.0, 249.0]
    counts = [int((t == value).sum()) for value in grid]
    assert sum(counts) == count
    assert stats.chisquare(counts, np.array([7 / 12, 1 / 12, 3 / 12, 1 / 12]) * count).pvalue > 1e-3
    assert given.noise is not None and torch.equal(x_t[t == grid[0]], given.noise[t == grid[0]])
    inner = t != grid[0]
    np.testing.assert_allclose(noise_in(process, x_t[inner], t[inner], array(given.x0[inner])), array(given.noise[inner]), atol=1e-3)


@for_every_process
def test_distillation_on_the_students_trajectory_is_diffusers_step_by_step(process: str) -> None:
    """FlowMatchEuler at sigmas 1 - i/N, or DDIM with trailing spacing; the loss is the squared error of x0 in the last call alone."""
    method = ReflowDistillation(num_inference_steps=(4,), inputs="student")
    nets, seen = networks(process, method), set()
    student = record(nets.student)
    for key in range(12):
        given, first = batch(slots=4), len(student)
        given.random = SampleRandom((key,), range(4))
        loss = method.distillation_loss(nets, given)[0]
        calls = student[first:]
        seen.add(len(calls))
        assert [call.with_gradient for call in calls] == [False] * (len(calls) - 1) + [True]
        assert given.x0 is not None and given.noise is not None
        if process == "flow":
            scheduler: Any = FlowMatchEulerDiscreteScheduler()
            scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
        else:
            scheduler = DDIMScheduler.from_config(pipeline(process).scheduler.config, timestep_spacing="trailing", clip_sample=False)
            scheduler.set_timesteps(4)
        x_t = given.noise
        for call, t in zip(calls, scheduler.timesteps):
            torch.testing.assert_close(call.x_t, x_t, atol=2e-3, rtol=2e-3)
            assert call.t.tolist() == [float(t)] * 4
            x_t = scheduler.step(call.output.detach(), t, call.x_t).prev_sample
        assert float(loss) == pytest.approx(float(((x0_of(process, calls[-1]) - array(given.x0)) ** 2).mean()), rel=1e-3)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("process", ["v_prediction", "flow"])
def test_the_two_step_term_follows_the_teacher_from_the_students_own_state(process: str) -> None:
    method = ReflowDistillation(two_step_weight=2.0)
    nets, given = networks(process, method), batch()
    student, teacher = record(nets.student), record(nets.teacher)
    loss, logs = method.distillation_loss(nets, given)
    (on_pair, on_fresh), (jump,) = student, teacher
    assert given.noise is not None and torch.equal(on_pair.x_t, given.noise)
    assert uncorrelated(array(on_fresh.x_t), array(given.noise)) and not jump.with_gradient
    assert jump.t.min() >= 199 and jump.t.max() <= 801
    alpha, sigma = coefficients(process, on_fresh.t)
    own = x0_of(process, on_fresh)
    eps = (array(on_fresh.x_t) - alpha * own) / sigma
    np.testing.assert_allclose(noise_in(process, jump.x_t, jump.t, own), eps, atol=1e-3)
    expected = float(((own - x0_of(process, jump)) ** 2).mean())
    assert float(logs["two_step"]) == pytest.approx(expected, rel=1e-3)
    assert float(loss) == pytest.approx(float(logs["pairs"]) + 2 * expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------ a smaller student

SMALLER = '{"block_out_channels": [8, 8], "norm_num_groups": 4}'


def test_a_smaller_student_starts_from_its_own_random_weights() -> None:
    method = Reflow(student_config=SMALLER, annealing="cosine", annealing_steps=5)
    first, second = (build_networks(pipeline("flow"), method, TrainConfig()).student for _ in range(2))
    other = build_networks(pipeline("flow"), method, TrainConfig(seed=1)).student
    sizes = [sum(p.numel() for p in net.parameters()) for net in (first, teacher_denoiser(pipeline("flow")))]
    assert sizes[0] < sizes[1] and tuple(first.model.config.block_out_channels) == (8, 8)
    assert first.model.config.num_class_embeds == pipeline("flow").unet.config.num_class_embeds
    pairs_of_weights = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs_of_weights) and any(not torch.equal(a, c) for a, _, c in pairs_of_weights)


# ------------------------------------------------------------------------------------------------ what leaves, and comes back


@pytest.mark.parametrize("name", ["class_conditional_flow", "class_conditional_v", "class_conditional_epsilon", "stable_diffusion_3"])
def test_one_student_of_1_2_4_8_steps_leaves_and_is_a_teacher_again(name: str, tmp_path: Path, in_process: None) -> None:  # noqa: F811
    if name not in PIPELINES:
        pytest.skip(name)
    schedule = teacher_denoiser(PIPELINES[name]()).schedule
    default, *others = Reflow(num_inference_steps=(4, 1, 2, 8)).samplers(schedule)
    exported = Exported(tmp_path / "student", PIPELINES[name], list(default.timesteps), "ode", others=others)
    assert [len(grid) for grid in exported.verify(atol=1e-6)["timesteps"]] == [4, 1, 2, 8]
    again = teacher_denoiser(DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True))
    assert again.prediction_type == exported.student.prediction_type and type(again.schedule) is type(schedule)
    noise = torch.randn(2, *exported.family.sample_shape(exported.pipe), generator=torch.Generator().manual_seed(0))
    cond = exported.family.encode_conditions(exported.pipe, exported.conditions[:2])
    own = default.sample(exported.student.eval(), noise, cond, torch.randn_like)
    torch.testing.assert_close(ode_sample(again, noise, cond, default.timesteps), own)


def test_reflow_repeats_from_the_exported_student(tmp_path: Path, in_process: None) -> None:  # noqa: F811
    """Pairs of the teacher, a smaller student of them; pairs of that student, and a student of its own kind."""
    pipe, rounds = class_conditional("flow"), (Reflow((2, 1), student_config=SMALLER, annealing="linear", annealing_steps=2), Reflow((1,)))
    for number, method in enumerate(rounds):
        drawing = PairConfig(output_dir=str(tmp_path / f"pairs-{number}"), num_pairs=10, num_inference_steps=3, batch_size=5)
        data = PairDataset(write_pairs(pipe, list(range(10)), drawing))
        own = teacher_denoiser(pipe)
        cond = {"class_labels": torch.tensor([data[i]["condition"] for i in range(10)])}
        noise, x0 = (torch.stack([data[i][key] for i in range(10)]) for key in ("noise", "x0"))
        torch.testing.assert_close(ode_sample(own, noise, cond, uniform_timesteps(own.schedule, 3)), x0, atol=1e-5, rtol=1e-5)
        run = TrainConfig(str(tmp_path / f"run-{number}"), max_train_steps=2, train_batch_size=4, validation_prompts=("0", "1"))
        pipe = DiffusionPipeline.from_pretrained(distill(pipe, method, data, run, teacher="tiny"), trust_remote_code=True)
        assert tuple(pipe.unet.config.block_out_channels) == (8, 8)
        assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)


# ------------------------------------------------------------------------------------------------ training on the toy


def toy_pairs(teacher: str, count: int = 1024) -> tuple[Tensor, Tensor]:
    exact, noise = s_curve(teacher), torch.randn(count, 2, generator=torch.Generator().manual_seed(5))
    return noise, ode_sample(exact, noise, unlabelled(count), uniform_timesteps(exact.schedule, 32)).float()


def fit(method: Method, start: Denoiser, data: tuple[Tensor, Tensor], steps: int = 250, size: int = 128) -> Denoiser:
    """The loop in its shortest form."""
    nets = Networks(teacher=start, student=trainable_copy(start))
    optimizer = torch.optim.Adam(nets.parameters("student").values(), fused=True)
    for step in range(steps):
        chosen = torch.randint(len(data[0]), (size,), generator=torch.Generator().manual_seed(step))
        given = Batch(unlabelled(size), unlabelled(size), (2,), SampleRandom((0, step), range(size)), data[1][chosen], data[0][chosen])
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        with nets.only_trains(("student",)):
            next(method.updates(step))[1](nets, given)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    student: Denoiser = nets.student
    return student


@pytest.mark.parametrize("teacher", TEACHERS)
def test_reflow_then_distillation_beats_the_teacher_at_as_many_steps(teacher: str) -> None:
    """In one step reflow is 7 (epsilon) to 35 times closer to the data than the teacher's own step, and distillation 80 to 130 times."""
    data, steps = toy_pairs(teacher), (1, 4)
    reflowed = fit(Reflow(num_inference_steps=steps), pretrained(teacher), data)
    distilled = fit(ReflowDistillation(num_inference_steps=steps, inputs="student"), reflowed, data)
    exact, generator = s_curve(teacher), torch.Generator().manual_seed(1)
    real, noise = exact.model.sample(unlabelled(1500)["label"], generator), torch.randn(1500, 2, generator=generator)
    table = []
    for sampler in Reflow(num_inference_steps=steps).samplers(exact.schedule):
        samples = [sampler.sample(net, noise, unlabelled(1500), torch.randn_like) for net in (exact, reflowed, distilled)]
        table.append([energy_distance(x.float(), real) for x in samples])
    (euler, straight, one), (euler_4, straight_4, four) = table
    assert straight < euler / 4 and one < euler / 30
    assert max(straight_4, four) < euler_4 / 2


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (Reflow, {"num_inference_steps": ()}, "num_inference_steps"),
        (Reflow, {"num_inference_steps": (0,)}, "num_inference_steps"),
        (Reflow, {"num_inference_steps": (2, 2)}, "num_inference_steps"),
        (Reflow, {"loss": "l1"}, "loss: got 'l1'"),
        (Reflow, {"time_law": "beta"}, "time_law"),
        (Reflow, {"huber_scale": 0.0}, "huber_scale"),
        (Reflow, {"u_steepness": 0.0}, "u_steepness"),
        (Reflow, {"logit_std": -1.0}, "logit_std"),
        (Reflow, {"annealing": "linear"}, "annealing_steps"),
        (Reflow, {"annealing_steps": 3}, "annealing_steps"),
        (Reflow, {"student_config": "[8, 8]"}, "student_config"),
        (Reflow, {"student_config": "{8"}, "student_config"),
        (ReflowDistillation, {"inputs": "data"}, "inputs"),
        (ReflowDistillation, {"two_step_weight": -1.0}, "two_step_weight"),
    ],
)
def test_wrong_values_name_their_field(kind: type[Method], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        kind(**fields)


def test_unknown_configuration_keys_are_refused() -> None:
    with pytest.raises(InputError, match=r"student_config.*channels.*UNet2DModel"):
        build_networks(pipeline("flow"), Reflow(student_config=json.dumps({"channels": 8})), TrainConfig())
