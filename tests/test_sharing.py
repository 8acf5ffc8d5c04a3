"""Roles as adapters on one frozen copy of the weights: the same training as on copies of their own, in the memory of one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import METHODS, assert_equal, final_weights, trainer
from tiny_pipelines import class_conditional, stable_diffusion

from diffusion_distill import DMD2, InputError, TrainConfig
from diffusion_distill.build import build_networks
from diffusion_distill.methods import LCM, PhasedDMD, Reflow
from diffusion_distill.networks import Networks

SHARED = {"lora_rank": 2, "lora_alpha": 4, "sharing": "shared"}
IMAGE_FREE = DMD2(num_inference_steps=2, guidance_scale=1.0, gan_weight=0.0)


def held(nets: Networks) -> int:
    """Bytes of the distinct parameter storages of all roles."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for role in nets for p in getattr(nets, role).parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("name", METHODS)
def test_sharing_changes_no_bit_of_the_training(tmp_path: Path, name: str) -> None:
    """Every method, its followers and moving averages too: six steps on one copy of the weights, and on a copy for each role."""
    for sharing in ("full", "shared"):
        trainer(tmp_path / sharing, METHODS[name], **SHARED | {"sharing": sharing, "checkpointing_steps": 0}).train()
    assert_equal_files(final_weights(tmp_path / "full"), final_weights(tmp_path / "shared"))


def assert_equal_files(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert any("lora_B" in name for file in a.values() for name in file)
    assert_equal(a, b)


@pytest.mark.parametrize("rank", [1, 2])
def test_dmd2_holds_one_copy_of_the_weights(rank: int) -> None:
    pipe = stable_diffusion()
    one = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
    full = held(build_networks(pipe, IMAGE_FREE, TrainConfig(lora_rank=rank)))
    nets = build_networks(pipe, IMAGE_FREE, TrainConfig(lora_rank=rank, sharing="shared"))
    adapters = sum(4 * p.numel() for role in nets.trained_roles for p in nets.parameters(role).values())
    assert nets.trained_roles == ("student", "fake_score") and held(nets) == one + adapters
    assert full == 3 * one + adapters


def test_a_follower_is_an_adapter_that_starts_as_the_student() -> None:
    method = METHODS["lcm"]
    nets = build_networks(class_conditional("flow"), method, TrainConfig(**SHARED))
    assert nets.target.model is nets.student.model is nets.teacher.model
    student, target = ([p for n, p in nets.teacher.named_parameters() if f".{role}." in n] for role in ("student", "target"))
    assert len(student) == len(target) > 0
    for p, q in zip(student, target, strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()


@pytest.mark.parametrize("name", ["lcm", "gan", "self"])
def test_resuming_is_bit_exact(tmp_path: Path, name: str) -> None:
    trainer(tmp_path / "whole", METHODS[name], **SHARED).train()
    first = trainer(tmp_path / "parts", METHODS[name], **SHARED)
    micro_batches = first._data()
    for _ in range(3):
        first.train_step(first._prepare(next(micro_batches)))
    first.save()
    trainer(tmp_path / "parts", METHODS[name], resume_from_checkpoint="latest", **SHARED).train()
    assert_equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts"))


def test_gradient_checkpointing_recomputes_with_the_adapters_of_the_forward_pass(tmp_path: Path) -> None:
    for recompute in (False, True):
        changes = SHARED | {"gradient_checkpointing": recompute, "max_train_steps": 3, "checkpointing_steps": 0}
        trainer(tmp_path / str(recompute), METHODS["lcm"], **changes).train()
    assert_equal(final_weights(tmp_path / "False", 3), final_weights(tmp_path / "True", 3), tolerance=1e-6)


def test_phased_experts_and_their_fake_scores_share_too() -> None:
    pipe = class_conditional("flow")
    one = sum(4 * p.numel() for p in pipe.unet.parameters())
    nets = build_networks(pipe, PhasedDMD((1, 1), experts="lora", expert_rank=2, timestep_shift=1.0), TrainConfig(**SHARED))
    assert held(nets) == one + sum(4 * p.numel() for role in nets.trained_roles for p in nets.parameters(role).values())


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (IMAGE_FREE, {"lora_rank": 0}, "lora_rank: got 0; 1 or more with sharing 'shared'"),
        (Reflow(student_config='{"block_out_channels": [4, 8]}'), {}, "sharing: got 'shared'; 'full' for this method"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path: Path, method: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, method, **SHARED | changes)


def test_a_guidance_input_cannot_be_shared() -> None:
    with pytest.raises(InputError, match="sharing: got 'shared'; 'full' for this method"):
        build_networks(stable_diffusion(), replace(LCM(), guidance="embedded"), TrainConfig(**SHARED))
