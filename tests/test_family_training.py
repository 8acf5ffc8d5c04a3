"""Every family under three methods, all weights, LoRA, or LoRA on shared weights: one optimizer step with the real trainer, export, proof.

Starting a fresh process takes seconds, so it proves one cell a family, and the others run the same script inside this process.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import in_process  # noqa: F401
from tiny_pipelines import PIPELINES, example_conditions, resolution_of
from torch import Tensor, nn

from diffusion_distill import DMD2, TrainConfig, Trainer
from diffusion_distill.export import export_student, verify_export
from diffusion_distill.families import family_of
from diffusion_distill.methods import LCM, Method, Reflow

OTHERS = {"stable_diffusion_v", "flux_schnell", "pixart_sigma", "class_conditional_v", "class_conditional_epsilon"}
FAMILIES = [name for name in PIPELINES if name not in OTHERS]
WEIGHTS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 2}, "shared": {"lora_rank": 2, "sharing": "shared"}}
RATE = 1e-3


def methods() -> dict[str, Method]:
    image_free = DMD2(num_inference_steps=2, guidance_scale=2.0, gan_weight=0.0, student_update_interval=1)
    consistency = LCM((2,), guidance="fixed", guidance_scale=2.0, solver_intervals=20, target_decay=0.0)
    return {"dmd2": image_free, "lcm": consistency, "reflow": Reflow((2,))}


@dataclass
class Run:
    """A tiny teacher, and a student of it that takes one step on two samples."""

    name: str
    method: str
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipe = PIPELINES[self.name]()
        self.family, self.resolution = family_of(self.pipe), resolution_of(self.pipe)
        self.conditions = example_conditions(self.pipe)
        self.trainer = Trainer(self.pipe, methods()[self.method], self.config(), self.data(), self.resolution)  # type: ignore[arg-type]

    def config(self) -> TrainConfig:
        return TrainConfig(output_dir=str(self.folder), train_batch_size=2, max_train_steps=1, learning_rate=RATE, **self.options)

    def data(self) -> list[dict[str, Any]]:
        """Prompts or labels alone, with latents where the method learns from images, with noise besides where it learns from pairs."""
        generator = torch.Generator().manual_seed(3)
        shape = self.family.sample_shape(self.pipe, self.resolution)
        fields = {"dmd2": (), "lcm": ("x0",), "reflow": ("x0", "noise")}[self.method]
        return [{"condition": c} | {name: torch.randn(shape, generator=generator) for name in fields} for c in self.conditions]

    def step(self) -> dict[str, Tensor]:
        """What one optimizer step logs."""
        return self.trainer.train_step(self.trainer._prepare(next(self.trainer._data())))

    def weights(self) -> dict[nn.Parameter, str]:
        """Every parameter once, with its name: roles may share weights."""
        nets = self.trainer.nets
        return {p: f"{role}.{name}" for role in reversed(list(nets)) for name, p in getattr(nets, role).named_parameters()}

    def own_weights(self, role: str) -> list[nn.Parameter]:
        """What is there to train in `role`: all of its parameters, or those of its adapter, in one of its own or on shared weights."""
        named = [(set(name.split(".")), p) for name, p in getattr(self.trainer.nets, role).named_parameters()]
        if not self.options.get("lora_rank"):
            return [p for _, p in named]
        return [p for parts, p in named if parts & {"lora_A", "lora_B"} and parts & {role, "default"}]

    def export(self) -> dict[str, Any]:
        trainer, same = self.trainer, {"family": self.family, "conditions": self.conditions}
        network = {"student": trainer.nets.student, "samplers": trainer.samplers}
        export_student(self.pipe, folder=self.folder / "student", info={}, resolution=self.resolution, **network, **same)
        return verify_export(self.folder / "student", pipe=self.pipe, trust_remote_code=True, **network, **same)


def used_weights(run: Run, role: str) -> set[nn.Parameter]:
    """The weights of a role that AdamW moves: what its output depends on, by the gradient or, where a weight is not zero, by decay."""
    denoiser, own = getattr(run.trainer.nets, role), run.own_weights(role)
    x_t = torch.randn(2, *run.family.sample_shape(run.pipe, run.resolution))
    cond = run.family.encode_conditions(run.pipe, run.conditions, run.resolution)
    for p in own:
        p.requires_grad_(True)
    x0 = denoiser(x_t, denoiser.schedule.timestep(torch.full((2,), 0.6)), cond).x0
    gradients = torch.autograd.grad(x0.square().sum(), own, allow_unused=True)
    for p in own:
        p.requires_grad_(False)
    reached = [(p, gradient) for p, gradient in zip(own, gradients, strict=True) if gradient is not None]
    assert len(reached) > 0.8 * len(own)
    return {p for p, gradient in reached if gradient.any() or p.any()}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_moves_the_right_weights_and_the_export_is_proved(
    name: str, method: str, weights: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if (method, weights) != ("dmd2", "full"):
        request.getfixturevalue("in_process")
    run = Run(name, method, tmp_path / "run", WEIGHTS[weights])
    names, roles = run.weights(), ("student", "fake_score") if method == "dmd2" else ("student",)
    before, expected = {p: p.detach().clone() for p in names}, set().union(*(used_weights(run, role) for role in roles))
    run.step()
    moved = {p for p, value in before.items() if not torch.equal(value, p)}
    assert {names[p] for p in moved} == {names[p] for p in expected}
    assert max(float((before[p] - p).abs().max()) for p in moved) <= 1.1 * RATE  # one step of Adam
    proof = run.export()
    assert len(proof["timesteps"][0]) == 2
    assert proof["max_difference"] <= 1e-6 and proof["x0_difference"] <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputation_and_bfloat16_change_a_step_by_rounding_alone(name: str, tmp_path: Path) -> None:
    plain, again, half = (
        Run(name, "dmd2", tmp_path / str(i), options).step()
        for i, options in enumerate(({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "mixed_precision": "bf16"}))
    )
    for key in ("student/loss", "student/grad_norm", "fake_score/loss", "fake_score/grad_norm"):
        torch.testing.assert_close(again[key], plain[key], rtol=1e-4, atol=0)
        assert torch.isfinite(half[key])
    # The student's loss is a difference of two networks that start as one, so rounding may double it; the fake score's is no difference.
    torch.testing.assert_close(half["fake_score/loss"].float(), plain["fake_score/loss"], rtol=0.05, atol=0)
    torch.testing.assert_close(half["fake_score/grad_norm"].float(), plain["fake_score/grad_norm"], rtol=0.2, atol=0)
    assert not torch.equal(half["fake_score/loss"].float(), plain["fake_score/loss"])
