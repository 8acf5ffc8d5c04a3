"""Networks that wait on the CPU: what is on the device when, and that it changes no bit. Where there is one device, the book of moves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cache import PROMPTS
from test_trainer import METHODS, assert_equal, config, final_weights, trainer
from tiny_pipelines import stable_diffusion
from torch import nn

from diffusion_distill import DMD2, InputError, TrainConfig
from diffusion_distill.cached import encoders
from diffusion_distill.data import ConditionDataset
from diffusion_distill.trainer import Trainer

IMAGE_FREE = DMD2(num_inference_steps=2, guidance_scale=2.0, gan_weight=0.0, student_update_interval=2)
OFFLOADED = {"offload_idle_roles": True, "offload_encoders": True}


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def prompted(folder: Path, method: Any = IMAGE_FREE, **changes: Any) -> Trainer:
    settings = config(folder, **{"train_batch_size": 2, "max_train_steps": 4, "num_validation_images": 2} | changes)
    return Trainer(stable_diffusion(), replace(method), settings, ConditionDataset(PROMPTS))


@pytest.mark.parametrize("name", ["image_free", "gan", "lcm", "self", "vsd", "phased", "scm"])
def test_offloading_changes_no_bit_and_runs_resume_with_it(tmp_path: Path, name: str) -> None:
    trainer(tmp_path / "plain", METHODS[name]).train()
    first = trainer(tmp_path / "off", METHODS[name], **OFFLOADED)
    steps = first._data()
    for _ in range(3):
        first.train_step(first._prepare(next(steps)))
    first.save()
    trainer(tmp_path / "off", METHODS[name], resume_from_checkpoint="latest", **OFFLOADED).train()
    plain, off = final_weights(tmp_path / "plain"), final_weights(tmp_path / "off")
    assert_equal(plain, off) if len(plain) >= 3 else pytest.fail("too little to compare")


def test_a_network_is_present_whenever_it_runs_and_one_guest_at_a_time(tmp_path: Path) -> None:
    run = prompted(tmp_path, **OFFLOADED)
    rotation, ran = run.offload.rotation, []
    assert rotation is not None and len(rotation.units) == 3
    one = bytes_of(run.nets.teacher.model)
    for unit in rotation.units:
        unit.register_forward_pre_hook(lambda module, args: ran.append((module, frozenset(rotation.present))))
    steps = run._data()
    peaks: list[int] = []
    for _ in range(2):
        run.train_step(run._prepare(next(steps)))
        peaks.append(rotation.peak)
    assert all(module in present and len(present) <= 2 for module, present in ran)
    assert {module for module, _ in ran} == set(rotation.units) and set(peaks) <= {one, 2 * one}
    run.release()
    assert rotation.present == set(rotation.units)


def test_what_has_a_graph_stays_to_the_end_of_the_turn(tmp_path: Path) -> None:
    """The direction of a GAN goes back through the fake score, which therefore waits beside the student for the teacher to come."""
    run = prompted(tmp_path, **OFFLOADED)
    rotation, teacher, fake = run.offload.rotation, run.nets.teacher, run.nets.fake_score
    assert rotation is not None
    x_t, t = torch.zeros(1, *run.sample_shape), torch.tensor([500])
    rotation.begin(("student",))
    assert rotation.present == {run.nets.student.model}
    fake(x_t.requires_grad_(), t, run.uncond)
    teacher(x_t, t, run.uncond)
    assert rotation.present == set(rotation.units)
    rotation.begin(("student",))
    with torch.no_grad():
        fake(x_t, t, run.uncond)
        teacher(x_t, t, run.uncond)
    assert rotation.present == {run.nets.student.model, teacher.model}


def test_states_of_optimizers_move_with_their_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prompted(tmp_path, **OFFLOADED)
    run.train_step(run._prepare(next(run._data())))
    moved: list[tuple[int, Any]] = []
    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        moved.append((id(tensor), args[0] if args else None))
        return move(tensor, *args, **options)

    states = {role: [id(v) for s in o.state.values() for v in s.values()] for role, o in run.optimizers.items()}
    assert run.offload.rotation is not None and len(states["student"]) > 100
    monkeypatch.setattr(torch.Tensor, "to", to)
    run.offload.rotation.begin(("student",))
    assert {(key, torch.device("cpu")) for key in states["fake_score"]} <= set(moved)


def test_encoders_are_present_for_their_calls_alone(tmp_path: Path) -> None:
    run = prompted(tmp_path, offload_encoders=True, checkpointing_steps=0)
    seen: list[bool] = []
    for part in encoders(run.pipe, run.family).values():
        part.register_forward_pre_hook(lambda *_: seen.append(run.offload.encoders.present))
    assert not run.offload.encoders.present
    before = run.offload.encoders.moves
    run.train_step(run._prepare(next(run._data())))
    assert seen and all(seen) and run.offload.encoders.moves == before + 2 and not run.offload.encoders.present
    run.train()
    assert not run.offload.encoders.present
    run.release()
    assert run.offload.encoders.present


def test_a_run_that_fails_gives_everything_back(tmp_path: Path) -> None:
    run = prompted(tmp_path, **OFFLOADED, learning_rate=1e30, max_grad_norm=float("inf"))
    with pytest.raises(Exception, match="finite"):
        run.train()
    assert (
        run.offload.encoders.present
        and run.offload.rotation is not None
        and run.offload.rotation.present == set(run.offload.rotation.units)
    )


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(InputError, match="offload_idle_roles: got True; false with parallelism 'shard'"):
        TrainConfig(offload_idle_roles=True, parallelism="shard")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_waits_is_not_on_the_gpu(tmp_path: Path) -> None:
    run = prompted(tmp_path, **OFFLOADED)
    run.train_step(run._prepare(next(run._data())))
    rotation = run.offload.rotation
    assert rotation is not None
    for unit in rotation.units:
        assert {p.is_cuda for p in unit.parameters()} == {unit in rotation.present}
    assert not any(p.is_cuda for part in encoders(run.pipe, run.family).values() for p in part.parameters())
    run.train()
    run.release()
    assert all(p.is_cuda for unit in rotation.units for p in unit.parameters())
