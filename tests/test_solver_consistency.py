"""LCM, PCM and TCD: solver grids and steps against diffusers, losses by hand, Gaussians in closed form, guidance inputs, exports.

For x0 ~ N(m, c^2) the probability-flow ODE takes x_t to x_s = alpha_s m + (x_t - alpha_t m) d_s / d_t with d^2 = alpha^2 c^2 + sigma^2, so
the network whose line from x_t passes through that x_s is a perfect consistency function for the segment that ends at s.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline, TCDScheduler
from recording import PROCESSES, Call, array, coefficients, is_unit_noise, noise_in, pipeline, record, x0_of
from recording import batch as batch_of
from scipy import stats
from test_export import PIPELINES, in_process, student_of  # noqa: F401
from test_sampler import COND, noise_source, teacher, unit_noise, walk
from test_toy import gaussian, pretrained, s_curve, unlabelled
from tiny_pipelines import example_conditions, resolution_of, stable_diffusion
from torch import Tensor, nn
from toy import TEACHERS, denoiser_of, energy_distance, network_output, scheduler_of

from diffusion_distill.build import build_networks
from diffusion_distill.errors import InputError
from diffusion_distill.export import check_exportable, export_student, verify_export
from diffusion_distill.families import family_of
from diffusion_distill.families.guidance import guidance_embedding, with_guidance_input
from diffusion_distill.losses import element_distance
from diffusion_distill.methods import LCM, PCM, TCD, Batch, Method
from diffusion_distill.networks import Networks, trainable_copy
from diffusion_distill.random import SampleRandom
from diffusion_distill.sampler import FewStepSampler, ode_sample
from diffusion_distill.schedule import NoiseSchedule
from diffusion_distill.solver_grid import as_table, draw_interval, segment_start, served_timesteps, solver_step, solver_timesteps
from diffusion_distill.train_config import TrainConfig

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = NoiseSchedule.from_scheduler(DDPMScheduler(**SD))
FLOW = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
PLAIN = LCM(guidance="fixed", guidance_scale=1.0)
ROWS: dict[str, Any] = {
    "lcm": LCM((2, 1), solver_intervals=10, guidance="fixed", guidance_scale=2.0),
    "pcm": PCM(phases=2, solver_intervals=10, guidance_scale=2.0, gan_weight=0.0),
    "tcd": TCD((2, 1), gamma=1.0, solver_intervals=10, guidance_scale=2.0, loss="l2"),
}
for_every_process = pytest.mark.parametrize("process", PROCESSES)
for_every_method = pytest.mark.parametrize("name", ROWS)


# ------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize("intervals", [8, 20, 25, 40, 50, 100, 200])
def test_served_timesteps_are_those_of_the_lcm_and_tcd_schedulers(intervals: int) -> None:
    grid = solver_timesteps(VP, intervals)
    assert grid[0] == 0 and np.allclose(np.diff(grid[1:]), 1000 / intervals)
    for steps in (n for n in (1, 2, 3, 4, 5, 7, 8, 13) if n <= intervals):
        for scheduler in (LCMScheduler(original_inference_steps=intervals), TCDScheduler(original_inference_steps=intervals)):
            scheduler.set_timesteps(steps)
            assert scheduler.timesteps.tolist() == list(served_timesteps(grid, steps))


def test_four_of_fifty() -> None:
    assert served_timesteps(solver_timesteps(VP, 50), 4) == (999, 759, 499, 259)
    assert [len(s.timesteps) for s in PLAIN.samplers(VP)] == [4, 1, 2, 8]
    assert as_table(solver_timesteps(VP, 50), torch.device("cpu")).dtype == torch.long


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_grids_are_shifted_sigmas(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 50 for i in range(50)])
    assert solver_timesteps(FLOW, 50, shift)[1:] == pytest.approx(scheduler.timesteps.flip(0).tolist(), rel=1e-6)
    served = PCM(phases=4, timestep_shift=shift).sampler(FLOW).timesteps
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert served == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_phases_start_at_ddims_trailing_timesteps(phases: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(phases)
    method = PCM(phases=phases)
    assert method.sampler(VP) == FewStepSampler(tuple(scheduler.timesteps.tolist()), "ode")
    edges = segment_start(torch.arange(method.solver_intervals), method.solver_intervals, phases)
    jumps = {method.timesteps(VP)[e] for e in edges.unique().tolist()}
    assert jumps == {0.0, *scheduler.timesteps[1:].tolist()}


@pytest.mark.parametrize(("intervals", "segments"), [(50, 4), (50, 8), (40, 8), (20, 3), (7, 7)])
def test_segments_start_where_the_released_code_puts_them(intervals: int, segments: int) -> None:
    edges = np.floor(np.linspace(0, intervals, segments, endpoint=False)).astype(int)
    expected = [max(e for e in edges if e <= i) for i in range(intervals)]
    assert segment_start(torch.arange(intervals), intervals, segments).tolist() == expected


def test_intervals_and_ends_are_drawn_evenly() -> None:
    drawn = draw_interval(SampleRandom((0,), range(6000)).uniform(), 12)
    assert stats.chisquare(torch.bincount(drawn, minlength=12)).pvalue > 1e-3
    method, uniform = TCD((1,), solver_intervals=12), torch.linspace(0, 1, 841)[:-1]  # every number up to 8 divides 840
    for segments, first in ((1, 0), (3, 4), (4, 6)):
        ends = method.draw_end(torch.full((840,), 7), uniform, segments)
        counts = torch.bincount(ends, minlength=8)
        assert counts[:first].sum() == 0 and bool((counts[first:] - 840 / (8 - first)).abs().max() <= 1) and len(counts) == 8


def test_lcms_intervals_double_from_stage_to_stage() -> None:
    method = LCM((1,), solver_intervals=40, stages=3, stage_steps=10)
    stages = [next(method.updates(step))[1].keywords["intervals"] for step in (0, 9, 10, 20, 400)]  # type: ignore[attr-defined]
    assert stages == [10, 10, 20, 40, 40] and len(method.timesteps(VP)) == 41
    assert next(PLAIN.updates(10**6))[1].keywords["intervals"] == PLAIN.solver_intervals  # type: ignore[attr-defined]


def test_tscd_grows_its_segments() -> None:
    method = TCD(segments=(8, 4, 2, 1), stage_steps=10)
    stages = [next(method.updates(step))[1].keywords["segments"] for step in (0, 9, 10, 20, 30, 400)]  # type: ignore[attr-defined]
    assert stages == [8, 8, 4, 2, 1, 1]


# ------------------------------------------------------------------------------------------------ solver steps


class Fixed(nn.Module):
    """Two outputs by label, whatever the input."""

    def __init__(self, outputs: Tensor):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.outputs[label].expand(x_t.shape)


@pytest.mark.parametrize("scale", [1.0, 7.5, "each"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_solver_steps_are_ddims(kind: str, scale: float | str) -> None:
    """All of the 50 intervals, the last one to timestep 0."""
    ddim = DDIMScheduler(**SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    ddim.set_timesteps(50)
    table = as_table(solver_timesteps(VP, 50), torch.device("cpu"))
    outputs, x_t = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))[:2].double(), torch.randn(50, 6, dtype=torch.float64)
    each = torch.linspace(1, 15, 50, dtype=torch.float64) if scale == "each" else torch.full((50,), float(scale), dtype=torch.float64)
    denoiser = denoiser_of("epsilon", Fixed(outputs))
    denoiser.prediction_type, denoiser.schedule = kind, VP
    cond, uncond = {"label": torch.tensor(1)}, {"label": torch.tensor(0)}
    found = solver_step(denoiser, x_t, table[1:], table[:-1], cond, uncond, each if scale == "each" else float(scale))
    guided = outputs[0] + each[:, None] * (outputs[1] - outputs[0])
    for i in range(50):
        expected = ddim.step(guided[i], int(table[i + 1]), x_t[i]).prev_sample
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max() + guided[i].abs().max()))


def test_solver_steps_are_flow_match_eulers() -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(sigmas=[1 - i / 20 for i in range(20)])
    table = as_table(solver_timesteps(FLOW, 20, 3.0), torch.device("cpu"))
    output, x_t = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    denoiser = denoiser_of("flow_prediction", Fixed(output[None]))
    cond = {"label": torch.tensor(0)}
    found = solver_step(denoiser, x_t, table[1:], table[:-1], cond, cond, 1.0).flip(0)
    for i, t in enumerate(euler.timesteps):
        torch.testing.assert_close(found[i], euler.step(output.flip(0)[i], t, x_t.flip(0)[i]).prev_sample, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ losses by hand


def networks(process: str, method: Method) -> Networks:
    """What the trainer builds; the student is moved away from the teacher and its follower, which it equals at the start."""
    nets = build_networks(pipeline(process), method, TrainConfig(batch_guidance=False))
    move(nets.parameters("student").values())
    return nets


def move(parameters: Iterable[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.data += 0.03 * torch.randn(p.shape, generator=generator)


def end_of(name: str, process: str, interval: np.ndarray, method: Any, t: Tensor, uniform: Tensor) -> Tensor:
    """Index of the timestep at which the pair is compared; LCM compares x0 instead."""
    first = interval // 5 * 5 if name == "pcm" else np.zeros_like(interval)
    return torch.tensor(first if name != "tcd" else np.floor(array(uniform) * (interval + 1)).astype(int))


def jumped(name: str, process: str, call: Call, end: Tensor) -> np.ndarray:
    x0 = x0_of(process, call)
    if name == "lcm":
        return x0
    alpha, sigma = coefficients(process, end)
    return alpha * x0 + sigma * noise_in(process, call.x_t, call.t, x0)


@for_every_method
@for_every_process
def test_losses_by_hand(process: str, name: str) -> None:
    """A guided DDIM (Euler) step of the teacher, one forward pass of each side, and the distance of their ends."""
    method, nets = ROWS[name], networks(process, ROWS[name])
    batch = batch_of(slots=range(12))
    calls = {role: record(getattr(nets, role)) for role in ("teacher", "student", "target") if role in nets}
    with nets.only_trains(("student",)):
        loss, _ = next(method.updates(0))[1](nets, batch)
        loss.backward()
    conditional, unconditional = calls["teacher"]
    assert conditional.label.tolist() == batch.cond["class_labels"].tolist() and set(unconditional.label.tolist()) == {10}
    earlier, online = (calls["target"][0], calls["student"][0]) if name == "lcm" else calls["student"]
    assert len(calls["student"]) == (1 if name == "lcm" else 2) and online.with_gradient and not earlier.with_gradient
    assert all(p.grad is not None for p in nets.parameters("student").values())
    assert all(p.grad is None for role in ("teacher", "target") if role in nets for p in getattr(nets, role).parameters())

    grid = np.array([0, *((np.arange(1, 11) * 100) - (process != "flow"))])
    interval = np.searchsorted(grid, array(online.t)) - 1
    assert len(set(interval)) > 5 and 0 in interval
    t, s = online.t, torch.tensor(grid[interval])
    assert torch.equal(conditional.t, t) and torch.equal(conditional.x_t, online.x_t) and array(earlier.t).tolist() == s.tolist()
    assert is_unit_noise(noise_in(process, online.x_t, t, array(batch.x0)))  # type: ignore[arg-type]
    combined = replace(conditional, output=2 * conditional.output - unconditional.output)
    with np.errstate(divide="ignore", invalid="ignore"):
        x0, (alpha, sigma) = x0_of(process, combined), coefficients(process, s)
        x_s = alpha * x0 + sigma * noise_in(process, online.x_t, t, x0)
        np.testing.assert_allclose(array(earlier.x_t), x_s, rtol=1e-4, atol=2e-4 * np.abs(x_s).max())
        uniform = SampleRandom((0, 0), range(12))
        uniform.uniform()
        index = end_of(name, process, interval, method, t, uniform.uniform())
        end = torch.tensor(grid)[index]
        target = jumped(name, process, earlier, end)
        last = torch.tensor(interval) == index if name != "lcm" else torch.tensor(interval) == 0
        target = np.where(last[:, None, None, None], x_s, target)
        difference = jumped(name, process, online, end) - target
    value = np.mean(difference**2) if name == "tcd" else np.mean(np.sqrt(difference**2 + 1e-6) - 1e-3)
    assert float(loss) == pytest.approx(value, rel=2e-3)


def test_pseudo_huber_is_quadratic_near_zero_and_absolute_far_away() -> None:
    x = torch.tensor([1e-6, 3.0])
    near, far = (element_distance(v, torch.zeros_like(v), "pseudo_huber", 1e-3).item() for v in x)
    assert near == pytest.approx(x[0].item() ** 2 / 2e-3, abs=1e-9) and far == pytest.approx(3 - 1e-3, rel=1e-6)
    assert element_distance(x, -x, "l2", 1.0).item() == pytest.approx(18.0, rel=1e-6)


# ------------------------------------------------------------------------------------------------ Gaussians in closed form

MEAN, STD = 0.7, 0.4


class ExactMap(nn.Module):
    """The network whose line from x_t passes through the exact x_s at the clean end s of the segment of t; `shift` moves it off."""

    def __init__(self, kind: str, schedule: NoiseSchedule, edges: tuple[float, ...], shift: float = 0.0):
        super().__init__()
        self.kind, self.schedule, self.edges = kind, schedule, torch.tensor(edges, dtype=torch.float64)
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        s = self.edges[(torch.searchsorted(self.edges, t.double()) - 1).clamp(min=0)].to(t.dtype)
        (a, b), (alpha, sigma) = ((self.schedule.alpha(u)[:, None], self.schedule.sigma(u)[:, None]) for u in (t, s))
        spread = [((p * STD) ** 2 + q**2).sqrt() for p, q in ((a, b), (alpha, sigma))]
        x_s = alpha * MEAN + (x_t.double() - a * MEAN) * spread[1] / spread[0] + self.shift
        determinant = alpha * b - a * sigma
        x0, eps = (b * x_s - sigma * x_t) / determinant, (alpha * x_t - a * x_s) / determinant
        return network_output(self.kind, x0, eps, a, b).nan_to_num()  # at t = s = 0 the target is the solver's own x_s


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize(
    "method", [replace(PLAIN, solver_intervals=200), PCM(4, 200, guidance_scale=1.0, gan_weight=0.0)], ids=lambda m: type(m).__name__
)
def test_the_exact_map_has_no_loss(kind: str, method: Any) -> None:
    """Up to the solver's error, which is of second order in the interval; a map that is off by .05 has a loss a hundred times as large."""
    schedule, phases = NoiseSchedule.from_scheduler(scheduler_of(kind)), getattr(method, "phases", 1)
    edges = method.timesteps(schedule)[:: method.solver_intervals // phases][:-1]
    losses = []
    for shift in (0.0, 0.05):
        exact = denoiser_of(kind, ExactMap(kind, schedule, edges, shift))
        nets = Networks(teacher=gaussian(kind, MEAN, STD), student=exact)
        nets.add(target=exact)
        x0 = MEAN + STD * torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        cond = {"label": torch.zeros(2000, dtype=torch.long)}
        batch = Batch(cond, cond, (1,), SampleRandom((0,), range(2000)), x0)
        losses.append(float(next(replace(method, loss="l2").updates(0))[1](nets, batch)[0]))
    boundary = (
        0.05**2 * phases / method.solver_intervals
    )  # a shift shows in full where the target is the solver's own, and cancels elsewhere
    assert losses[0] < 0.05 * boundary < losses[1] < 6 * boundary


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("segments", [1, 4])
def test_straight_trajectories_leave_tcd_no_loss(kind: str, segments: int) -> None:
    """Data in one point: every jump along the teacher's own prediction is exact, wherever it ends."""
    nets = Networks(teacher=gaussian(kind, MEAN, 1e-6), student=gaussian(kind, MEAN, 1e-6))
    cond = {"label": torch.zeros(500, dtype=torch.long)}
    batch = Batch(cond, cond, (1,), SampleRandom((0,), range(500)), torch.full((500, 1), MEAN, dtype=torch.float64))
    loss, _ = TCD(guidance_scale=1.0, loss="l2").consistency_loss(nets, batch, segments)
    assert float(loss) < 1e-10


# ------------------------------------------------------------------------------------------------ the discriminator of PCM


@for_every_process
def test_the_discriminator_compares_the_pair_inside_its_phase(process: str) -> None:
    method = PCM(phases=2, solver_intervals=10, guidance_scale=1.0, gan_weight=0.5, discriminator="own")
    nets, batch = networks(process, method), batch_of(slots=range(40))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    nets.discriminator.register_forward_hook(lambda module, args, output: seen.append((args[1].detach(), args[2], output.detach())))
    (student, student_loss), (critic, critic_loss) = method.updates(0)
    with nets.only_trains(student):
        loss, logs = student_loss(nets, batch)
        loss.backward()
    assert all(p.grad is None for p in nets.discriminator.parameters())
    edge, target, first = (batch.carried[key] for key in ("edge", "target", "first"))
    assert set(first.tolist()) == {0, 5} and not target.requires_grad
    assert float(loss) == pytest.approx(float(logs["consistency"] - 0.5 * seen[0][2].mean()), rel=1e-5)
    batch.random = SampleRandom((0, 1), batch.random.slots)
    with nets.only_trains(critic):
        value, _ = critic_loss(nets, batch)
    logits = [array(call[2]) for call in seen]
    assert float(value) == pytest.approx(np.maximum(0, 1 - logits[1]).mean() + np.maximum(0, 1 + logits[2]).mean(), rel=1e-5)
    start = method.timesteps(nets.teacher.schedule)
    low, high = (np.array(start)[first.numpy() + k] for k in (0, 5))
    for x, (x_t, t, _) in zip((edge, target, edge), seen):
        assert np.all(low <= array(t)) and np.all(array(t) < high)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = coefficients(process, torch.tensor(low)), coefficients(process, t)
        added = np.sqrt(np.maximum(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2, 0))
        keep = (added > 1e-3).ravel()
        assert is_unit_noise(((array(x_t) - alpha_t / alpha_s * array(x)) / np.where(added > 0, added, 1))[keep])
    assert not batch.carried


# ------------------------------------------------------------------------------------------------ guidance as an input


def verify(folder: Path, pipe: Any, student: Any, samplers: Sequence[FewStepSampler]) -> list[list[float]]:
    same = {"family": family_of(pipe), "pipe": pipe, "conditions": example_conditions(pipe), "trust_remote_code": True}
    visited: list[list[float]] = verify_export(folder, student=student, samplers=samplers, atol=1e-5, **same)["timesteps"]
    return visited


def exported_and_verified(folder: Path, pipe: Any, student: Any, samplers: Sequence[FewStepSampler]) -> list[list[float]]:
    arguments = {"family": family_of(pipe), "info": {}, "conditions": example_conditions(pipe), "resolution": resolution_of(pipe)}
    export_student(pipe, student, samplers, folder, **arguments)
    return verify(folder, pipe, student, samplers)


def test_the_embedding_is_the_stock_pipelines() -> None:
    scale = torch.tensor([1.0, 3.3, 8.0, 15.0])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=256)  # type: ignore[arg-type]
    torch.testing.assert_close(guidance_embedding(scale, 256), expected, rtol=0, atol=1e-5)


def test_the_new_input_changes_nothing_at_the_start() -> None:
    pipe = stable_diffusion()
    nets = build_networks(pipe, LCM(), TrainConfig())
    new = set(nets.student.model.state_dict()) - set(pipe.unet.state_dict())
    assert new == {"time_embedding.cond_proj.weight"} and nets.student.model.config.time_cond_proj_dim == 256
    cond = nets.student.family.encode_conditions(pipe, ["a", "b"])
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 10])
    seen = nets.student.family.with_guidance(nets.student.model, cond, torch.tensor([3.0, 15.0]))
    nets.student.eval()
    torch.testing.assert_close(nets.student(x_t, t, seen).eps, nets.teacher(x_t, t, cond).eps, rtol=1e-5, atol=1e-5)


def test_an_embedding_student_learns_each_samples_own_scale() -> None:
    pipe, method = stable_diffusion(), LCM((1,), solver_intervals=10, min_guidance_scale=2.0, max_guidance_scale=12.0)
    nets = build_networks(pipe, method, TrainConfig())
    seen: list[Tensor] = []
    for role in ("student", "target"):
        getattr(nets, role).model.register_forward_pre_hook(lambda m, a, k: seen.append(k["timestep_cond"]), with_kwargs=True)
    cond, uncond = (nets.student.family.encode_conditions(pipe, [text] * 6) for text in ("a", ""))
    batch = Batch(cond, uncond, (4, 8, 8), SampleRandom((0,), range(6)), torch.randn(6, 4, 8, 8))
    with nets.only_trains(("student",)):
        next(method.updates(0))[1](nets, batch)[0].backward()
    assert torch.equal(seen[0], seen[1]) and len(seen[0].unique(dim=0)) == 6
    gradient = nets.parameters("student")["model.time_embedding.cond_proj.weight"].grad
    assert gradient is not None and float(gradient.abs().max()) > 0
    scale, _ = method.draw_guidance(nets, replace(batch, random=SampleRandom((3,), range(6))))
    assert isinstance(scale, Tensor) and 2 <= float(scale.min()) < float(scale.max()) <= 12


def test_networks_and_adapters_without_the_input_are_refused() -> None:
    with pytest.raises(InputError, match=r"guidance: got 'embedded'; 'fixed': UNet2DModel has no free input"):
        build_networks(pipeline("flow"), LCM(), TrainConfig())
    pipe = stable_diffusion()
    with pytest.raises(InputError, match="no free input"):
        with_guidance_input(with_guidance_input(pipe.unet))
    nets = build_networks(pipe, LCM(), TrainConfig(lora_rank=2))
    with pytest.raises(InputError, match=r"guidance: .*LoRA"):
        LCM().draw_guidance(nets, batch_of())


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_v", "stable_diffusion_xl"])
def test_stock_pipelines_hand_the_scale_to_the_network(name: str, tmp_path: Path, in_process: None) -> None:  # noqa: F811
    pipe, method = PIPELINES[name](), LCM(guidance_scale=6.5)
    nets = build_networks(pipe, method, TrainConfig())
    move(nets.parameters("student").values())
    samplers = method.samplers(nets.student.schedule)
    visited = exported_and_verified(tmp_path / "student", pipe, nets.student, samplers)
    assert visited == [[999, 759, 499, 259], [999], [999, 499], [999, 879, 759, 639, 499, 379, 259, 139]]
    record = json.loads((tmp_path / "student" / "distillation.json").read_text())
    assert {sampler["call"]["guidance_scale"] for sampler in record["samplers"]} == {6.5}
    with pytest.raises(RuntimeError, match="differ"):
        verify(tmp_path / "student", pipe, nets.student, [replace(sampler, guidance_embedding=7.5) for sampler in samplers])


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("process", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_tcd_sampling_is_tcd_schedulers(process: str, gamma: float, steps: int) -> None:
    denoiser = teacher(process)
    scheduler = TCDScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=process, clip_sample=False)
    scheduler.set_timesteps(steps)
    expected = walk(scheduler, denoiser, unit_noise(), eta=gamma, generator=torch.Generator().manual_seed(5))
    (sampler,) = TCD((steps,), gamma=gamma).samplers(denoiser.schedule)
    actual = sampler.sample(denoiser, unit_noise(), COND, noise_source())
    torch.testing.assert_close(actual / expected.std(), expected / expected.std(), rtol=2e-5, atol=2e-5)


def test_flow_matching_serves_the_two_ends_of_gamma() -> None:
    assert TCD((2,), gamma=1.0).sampler(FLOW) == FewStepSampler((1000.0, 500.0), "sde")
    assert TCD((2,), gamma=0.0).sampler(FLOW) == FewStepSampler((1000.0, 500.0), "ode")
    with pytest.raises(InputError, match="gamma: got 0.3; 0 or 1 for a flow-matching teacher"):
        TCD((2,)).sampler(FLOW)


built = cache(lambda name: PIPELINES[name]())


@pytest.mark.parametrize(
    "name", [name for name in PIPELINES if name.startswith(("class", "stable_diffusion")) and name != "stable_diffusion_3"]
)
@pytest.mark.parametrize(
    "methods",
    [(TCD(),), (TCD(gamma=1.0),), (TCD(gamma=0.0),), (PCM(1), PCM(2), PCM(4), PCM(8)), (PLAIN,)],
    ids=lambda m: f"{type(m[0]).__name__}-{getattr(m[0], 'gamma', len(m))}",
)
def test_one_export_serves_all_numbers_of_steps(
    name: str,
    methods: tuple[Method, ...],
    tmp_path: Path,
    in_process: None,  # noqa: F811
) -> None:
    pipe = built(name)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    gamma = getattr(methods[0], "gamma", None)
    if gamma not in (None, 0, 1) and schedule == FLOW:
        pytest.skip("no scheduler")
    samplers = [sampler for method in methods for sampler in method.samplers(schedule)]
    if name == "class_dit" and gamma not in (None, 0.3):
        with pytest.raises(InputError, match=r"gamma: got [01].0; 0.3, the scheduler's own"):
            check_exportable(pipe, student_of(pipe), samplers, family_of(pipe))
        return
    visited = exported_and_verified(tmp_path / "student", pipe, student_of(pipe), samplers)
    assert visited == [list(sampler.timesteps) for sampler in samplers]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: LCM(()), "num_inference_steps"),
        (lambda: LCM((2, 2)), "num_inference_steps"),
        (lambda: LCM((8,), solver_intervals=4), "solver_intervals: got 4; at least the 8"),
        (lambda: LCM(guidance_scale=2.0), "ascending"),
        (lambda: LCM(guidance="free"), "guidance: got 'free'"),
        (lambda: LCM(target_decay=1.0), "target_decay"),
        (lambda: LCM(huber_c=0.0), "huber_c"),
        (lambda: LCM((1,), solver_intervals=30).samplers(VP), r"solver_intervals: got 30; a divisor of the schedule's 1000 timesteps"),
        (lambda: LCM((1,), timestep_shift=3.0).samplers(VP), "timestep_shift: got 3.0"),
        (lambda: PCM(phases=4, solver_intervals=50), "solver_intervals: got 50; a multiple of the 4 phases"),
        (lambda: PCM(phases=0), "phases"),
        (lambda: PCM(16, 48).sampler(VP), "a divisor"),
        (lambda: PCM(gan_weight=-1.0), "gan_weight"),
        (lambda: TCD(gamma=1.5), "gamma"),
        (lambda: TCD(segments=()), "segments"),
        (lambda: TCD(segments=(99,)), "segments"),
        (lambda: TCD(stage_steps=0), "stage_steps"),
        (lambda: FewStepSampler((999,), "sde", gamma=0.3).validate(VP, "epsilon"), "gamma: got 0.3"),
        (lambda: FewStepSampler((1000,), "tcd", gamma=0.3).validate(FLOW, "flow_prediction"), "sampling: got 'tcd'"),
    ],
)
def test_wrong_settings_name_themselves(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings()


# ------------------------------------------------------------------------------------------------ training


def distil(method: Method, kind: str, steps: int = 250, size: int = 128, rate: float = 1e-3) -> Networks:
    """The loop in its shortest form, from a small network that equals the teacher up to its fit; linear decay of the rate."""
    exact, start, generator = s_curve(kind), pretrained(kind), torch.Generator().manual_seed(0)
    nets = Networks(teacher=exact, student=trainable_copy(start))
    nets.add(**{role: trainable_copy(start) for role in method.followers})
    parameters = list(nets.parameters("student").values())
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        x0 = exact.model.sample(unlabelled(size)["label"], generator)
        batch = Batch(unlabelled(size), unlabelled(size), (2,), SampleRandom((0, step), range(size)), x0)
        with nets.only_trains(("student",)):
            next(method.updates(step))[1](nets, batch)[0].backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        for role, decay in method.followers.items():
            own = list(getattr(nets, role).parameters())
            torch._foreach_lerp_(own, parameters, 1 - decay)
    return nets


TOY: dict[str, Any] = {
    "lcm": LCM((1, 2), solver_intervals=10, guidance="fixed", guidance_scale=1.0, target_decay=0.8),
    "pcm": PCM(2, solver_intervals=10, guidance_scale=1.0, gan_weight=0.0),
    "tcd": TCD((1, 2), gamma=1.0, solver_intervals=10, guidance_scale=1.0, segments=(2, 1), stage_steps=100),
}


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
@for_every_method
def test_students_beat_the_teacher_at_as_many_steps(name: str, kind: str) -> None:
    nets, generator, count = distil(TOY[name], kind), torch.Generator().manual_seed(1), 2000
    data, noise = nets.teacher.model.sample(unlabelled(count)["label"], generator), torch.randn(count, 2, generator=generator)
    for sampler in TOY[name].samplers(nets.teacher.schedule):
        student = sampler.sample(nets.student, noise, unlabelled(count), lambda x: torch.randn(x.shape, generator=generator))
        euler = ode_sample(nets.teacher, noise, unlabelled(count), sampler.timesteps)
        assert energy_distance(student, data) < energy_distance(euler, data) / 1.5, len(sampler.timesteps)
