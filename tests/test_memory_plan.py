"""The plan of a run against the run itself: bytes of tensors that exist, and of those that autograd kept."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import METHODS, PAIRS
from tiny_pipelines import PIPELINES, class_conditional, resolution_of, stable_diffusion
from torch import Tensor, nn

from diffusion_distill import DMD2, InputError, TrainConfig
from diffusion_distill.build import load_pipeline
from diffusion_distill.cached import encoders
from diffusion_distill.cli import plan_run
from diffusion_distill.config import TeacherConfig
from diffusion_distill.data import ConditionDataset
from diffusion_distill.families import family_of
from diffusion_distill.memory_plan import MemoryPlan, plan, table
from diffusion_distill.meta_pipeline import pipeline_on_meta
from diffusion_distill.methods import Method
from diffusion_distill.planning import SavedTensors
from diffusion_distill.trainer import Trainer

WITH_GAN = DMD2(num_inference_steps=2, guidance_scale=2.0, gan_weight=0.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"ema_decay": 0.9},
    "bf16": {"mixed_precision": "bf16"},
    "recomputed": {"gradient_checkpointing": True},
    "lora": {"lora_rank": 4},
    "shared": {"lora_rank": 4, "sharing": "shared", "mixed_precision": "bf16", "ema_decay": 0.9},
}


def on_meta(pipe: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        return pipeline_on_meta(TeacherConfig(folder, trust_remote_code=True, video_size=vars(pipe).get("video_size", ())))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}.values())


def measured(folder: Path, pipe: Any, method: Method, **changes: Any) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Of a run: bytes by kind after its first step, and gradients and saved tensors of each turn."""
    config = replace(TrainConfig(output_dir=str(folder), train_batch_size=2, max_train_steps=4), **changes)
    channels, side = family_of(pipe).image_shape(pipe, resolution_of(pipe))
    labelled = family_of(pipe).num_classes(pipe) is not None
    images = torch.rand(4, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data: Any = ConditionDataset(
        list(range(4)) if labelled else [f"a photo of {i}" for i in range(4)], images if method.needs_images else None
    )
    run = Trainer(pipe, replace(method), config, PAIRS if method.needs_pairs else data, resolution_of(pipe))
    turns: list[tuple[int, int]] = []
    clip, counters = run._clip, []

    def clipped(role: str) -> Tensor:
        counters[-1][1].append(size(p.grad for p in run.nets.parameters(role).values() if p.grad is not None))
        return clip(role)

    run._clip = clipped  # type: ignore[method-assign]
    trains = run.nets.only_trains

    def counted(roles: Any) -> Any:
        counters.append((SavedTensors(getattr(run.nets, role) for role in run.nets), []))
        stack = trains(roles)
        return _Both(stack, counters[-1][0])

    run.nets.only_trains = counted  # type: ignore[method-assign]
    run.train_step(run._prepare(next(run._data())))
    turns = [(sum(gradients), counter.peak) for counter, gradients in counters]
    networks = [getattr(run.nets, role) for role in run.nets] + list(encoders(pipe, run.family).values())
    held = {"weights": size(t for net in networks for t in (*net.parameters(), *net.buffers()))}
    states = [[v for state in o.state.values() for v in state.values() if isinstance(v, Tensor)] for o in run.optimizers.values()]
    held["optimizer"] = sum(map(size, states))
    held["average"] = size(value for ema in run.emas.values() for value in ema.average.values())
    return held, turns


class _Both:
    def __init__(self, first: Any, second: Any):
        self.entered = first, second

    def __enter__(self) -> None:
        for context in self.entered:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.entered):
            context.__exit__(*error)


def planned(pipe: Any, method: Method, **changes: Any) -> MemoryPlan:
    config = replace(TrainConfig(train_batch_size=2, max_train_steps=4), **changes)
    return plan(on_meta(pipe), replace(method), config, resolution=resolution_of(pipe))


def assert_as_measured(folder: Path, make: Callable[[], Any], method: Method, *, longest: bool = False, **changes: Any) -> None:
    """With `longest` the plan is for longer prompts than the run had."""
    held, turns = measured(folder, make(), method, **changes)
    found = planned(make(), method, **changes)
    assert {kind: found.bytes_of(kind) for kind in held} == held
    assert found.resident == sum(held.values())
    for turn, (gradients, saved) in zip(found.turns, turns):
        assert turn.gradients == gradients
        assert turn.activations > 2 * saved if longest else turn.activations == pytest.approx(saved, rel=0.1)
    assert found.total == found.resident + max(turn.gradients + turn.activations for turn in found.turns)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_a_plan_is_what_a_run_holds(tmp_path: Path, name: str, variant: str) -> None:
    method = replace(WITH_GAN, gan_weight=0.0) if variant == "recomputed" else WITH_GAN  # a pass that ends in a checkpoint waits for the
    assert_as_measured(tmp_path, PIPELINES[name], method, **VARIANTS[variant])  # garbage collector, here or there


def test_moments_of_eight_bits_are_planned(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert_as_measured(tmp_path, stable_diffusion, WITH_GAN, optimizer="adamw_8bit")


def test_what_is_offloaded_is_away() -> None:
    method = replace(WITH_GAN, gan_weight=0.0)
    whole, off = (
        planned(stable_diffusion(), method, **changes) for changes in ({}, {"offload_idle_roles": True, "offload_encoders": True})
    )
    weights, states = {h.owner: h.bytes for h in whole.holdings if h.kind == "weights"}, whole.bytes_of("optimizer")
    assert {h.owner for h in whole.holdings} - {h.owner for h in off.holdings} == {"text_encoder", "vae"}
    assert whole.resident - off.resident == weights["text_encoder"] + weights["vae"]
    student, critic = off.turns
    assert student.away == weights["teacher"] + states // 2  # of three networks two are there, and one optimizer's states
    assert critic.away >= student.away and all(turn.away == 0 for turn in whole.turns)


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3", "pixart_alpha", "sana", "class_dit", "wan", "z_image"])
def test_every_family_is_planned(tmp_path: Path, name: str) -> None:
    assert_as_measured(tmp_path, PIPELINES[name], replace(WITH_GAN, gan_weight=0.0), longest=name == "z_image")


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("phased")])
def test_every_method_is_planned(tmp_path: Path, name: str) -> None:
    assert_as_measured(tmp_path, class_conditional, METHODS[name])


def test_prompts_that_need_weights_are_one_line() -> None:
    with pytest.raises(InputError, match="plan: prompts of a QwenImagePipeline cannot be encoded without weights") as caught:
        planned(PIPELINES["qwen_image"](), WITH_GAN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [stable_diffusion, class_conditional])
def test_configurations_alone_give_the_networks_of_the_folder(tmp_path: Path, make: Callable[[], Any]) -> None:
    pipe = make()
    if "text_encoder" in pipe.components:
        pipe.text_encoder.bfloat16()
    pipe.save_pretrained(tmp_path)
    teacher = TeacherConfig(str(tmp_path), trust_remote_code=True)
    loaded = load_pipeline(teacher)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    bare = pipeline_on_meta(teacher)
    parts = {name: part for name, part in loaded.components.items() if isinstance(part, nn.Module)}
    assert parts
    for name, part in parts.items():
        found = getattr(bare, name)
        assert type(found) is type(part) and all(p.is_meta for p in found.parameters())
        assert [(n, p.shape, p.dtype) for n, p in found.named_parameters()] == [(n, p.shape, p.dtype) for n, p in part.named_parameters()]


def test_from_flags_to_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_conditional().save_pretrained(tmp_path)
    flags = ["--pretrained_model_name_or_path", str(tmp_path), "--trust_remote_code", "--guidance", "fixed", "--ema_decay", "0.9"]
    roomy = plan_run("lcm", [*flags, "--device_memory", "8"])
    assert plan_run("lcm", [*flags, "--device_memory", "8", "--dataset", "digits"]) == roomy  # what a run needs, a plan may be given
    assert roomy.fits and not roomy.advice and "fits" in capsys.readouterr().out
    tight = plan_run("lcm", [*flags, "--device_memory", str(0.9 * roomy.total / 2**30)])
    printed = capsys.readouterr().out
    assert not tight.fits and "does not fit" in printed and printed == table(tight) + "\n"
    changes, total = tight.advice[-1]
    assert total <= tight.device_memory < roomy.total and f"with --{next(iter(changes))}" in printed  # type: ignore[operator]
    changed: dict[str, Any] = {}
    for change, after in tight.advice:
        changed |= change
        arguments = [flag for name, value in changed.items() for flag in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
        assert plan_run("lcm", [*flags, *arguments]).total == after


def test_ranks_share_what_is_spread() -> None:
    pipe, config = on_meta(stable_diffusion()), TrainConfig(parallelism="shard")
    one, four = (plan(pipe, WITH_GAN, config, world_size=count) for count in (1, 4))
    for kind in ("optimizer", "gradients"):
        assert four.bytes_of(kind) == pytest.approx(one.bytes_of(kind) / 4, rel=1e-3)
    encoding = sum(held.bytes for held in one.holdings if held.owner in ("text_encoder", "vae"))
    assert four.bytes_of("weights") - encoding == pytest.approx((one.bytes_of("weights") - encoding) / 4, rel=1e-3)
