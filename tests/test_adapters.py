"""Adapters on a shared network: peft's and diffusers' own outputs, whatever runs in between, and no second copy of the weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_trainer import trainer
from tiny_pipelines import PIPELINES, class_conditional, example_conditions, resolution_of
from torch import Tensor, nn

from diffusion_distill.adapters import Adapter, adapter_parameters, add_adapter, checkpointed, remove_adapters, switched_on
from diffusion_distill.build import build_networks, teacher_denoiser
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.errors import InputError
from diffusion_distill.methods import DMD2, VSD
from diffusion_distill.networks import Networks
from diffusion_distill.train_config import TrainConfig

NAMES = ["stable_diffusion", "stable_diffusion_3", "flux", "qwen_image", "z_image", "class_conditional_flow"]
NAMES += ["pixart_sigma", "sana", "class_dit", "wan"]
SMALL = Adapter(rank=2, alpha=3.0, targets=("to_q", "to_v"))


class Shared:
    """A teacher and two roles on its weights, their adapters filled with noise."""

    def __init__(self, name: str = "class_conditional_flow"):
        self.pipe = PIPELINES[name]()
        self.teacher = teacher_denoiser(self.pipe)
        self.plain = copy.deepcopy(self.teacher)
        for role in ("fake_score", "other"):
            add_adapter(self.teacher.model, role, SMALL)
        fill(self.teacher.model)
        self.fake_score, self.other = (self.role(name) for name in ("fake_score", "other"))
        family, conditions, resolution = self.teacher.family, example_conditions(self.pipe), resolution_of(self.pipe)
        self.cond = family.encode_conditions(self.pipe, conditions, resolution)
        shape = (len(conditions), *family.sample_shape(self.pipe, resolution))
        self.x_t = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        self.t = self.teacher.schedule.timestep(torch.full((len(conditions),), 0.6))

    def role(self, name: str) -> Denoiser:
        t = self.teacher
        return Denoiser(t.model, t.schedule, t.prediction_type, t.family, adapter=name)

    def run(self, denoiser: Denoiser) -> Tensor:
        x0: Tensor = denoiser(self.x_t, self.t, self.cond).x0
        return x0


def fill(model: nn.Module) -> None:
    """Random weights in all adapters: the second matrix of LoRA starts at zero."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape))


def copy_adapter(source: nn.Module, name: str, to: nn.Module, its_name: str) -> None:
    own = {full.replace(f".{name}.", f".{its_name}."): p for full, p in adapter_parameters(source, name).items()}
    theirs = adapter_parameters(to, its_name)
    assert len(own) == len(theirs) > 0
    with torch.no_grad():
        for full, p in theirs.items():
            p.copy_(own[full.removeprefix("base_model.model.")])


# ------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_peft_and_diffusers(name: str) -> None:
    """One role against `PeftModel`, the other against diffusers' `add_adapter` and `set_adapters`, the teacher against the plain model."""
    shared = Shared(name)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"])
    peft_model = get_peft_model(copy.deepcopy(shared.plain.model), config, "theirs")  # type: ignore[arg-type]
    assert isinstance(peft_model, PeftModel)
    copy_adapter(shared.teacher.model, "fake_score", peft_model, "theirs")
    own_class: Any = copy.deepcopy(shared.plain.model)
    for adapter in ("a", "b"):
        own_class.add_adapter(config, adapter) if hasattr(own_class, "add_adapter") else inject_adapter_in_model(config, own_class, adapter)
    copy_adapter(shared.teacher.model, "other", own_class, "b")
    if hasattr(own_class, "set_adapters"):  # UNet2DModel has no such mixin
        own_class.set_adapters("b")
    else:
        [module.set_adapter("b") for module in own_class.modules() if isinstance(module, BaseTunerLayer)]
    with torch.no_grad():
        found = [shared.run(net) for net in (shared.fake_score, shared.other, shared.teacher)]
        expected = []
        t = shared.plain
        for model in (peft_model.base_model.model, own_class, t.model):
            expected.append(shared.run(Denoiser(model, t.schedule, t.prediction_type, t.family)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (found[0] - found[2]).abs().max() > 1e-4 and (found[0] - found[1]).abs().max() > 1e-4


def test_features_see_the_adapter_too() -> None:
    shared = Shared()
    with torch.no_grad():
        teacher, fake, plain = (
            net.features(shared.x_t, shared.t, shared.cond) for net in (shared.teacher, shared.fake_score, shared.plain)
        )
    assert torch.equal(teacher[0], plain[0]) and not torch.equal(fake[0], teacher[0])
    with torch.no_grad():
        assert torch.equal(shared.run(shared.teacher), shared.run(shared.plain))  # the early stop switched it off again


def test_an_error_in_a_call_leaves_the_adapter_off() -> None:
    shared = Shared()
    with pytest.raises(RuntimeError), torch.no_grad():
        shared.fake_score(shared.x_t[:, :, :3], shared.t[:1].expand(5), shared.cond)
    with torch.no_grad():
        assert torch.equal(shared.run(shared.teacher), shared.run(shared.plain))


def test_an_adapter_that_the_user_loaded_goes_on_working() -> None:
    pipe = class_conditional("flow")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k"]), pipe.unet, "users")
    fill(pipe.unet)
    teacher = teacher_denoiser(pipe)
    x_t, t, cond = torch.randn(2, 1, 8, 8), torch.full((2,), 500), {"class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        before = teacher(x_t, t, cond).x0
        add_adapter(teacher.model, "fake_score", SMALL)
        fake = Denoiser(teacher.model, teacher.schedule, teacher.prediction_type, teacher.family, adapter="fake_score")
        assert torch.equal(teacher(x_t, t, cond).x0, before) and torch.equal(fake(x_t, t, cond).x0, before)  # B = 0
        for p in adapter_parameters(teacher.model, "fake_score").values():
            p.fill_(0.1)
        assert not torch.equal(fake(x_t, t, cond).x0, before) and torch.equal(teacher(x_t, t, cond).x0, before)
        remove_adapters(teacher.model)
        assert torch.equal(teacher(x_t, t, cond).x0, before)
    assert {name.split(".")[-2] for name, _ in teacher.model.named_parameters() if "lora_" in name} == {"users"}


def test_removal_leaves_the_plain_model() -> None:
    shared = Shared()
    remove_adapters(shared.teacher.model)
    assert list(shared.teacher.model.state_dict()) == list(shared.plain.model.state_dict())
    with torch.no_grad():
        assert torch.equal(shared.run(shared.teacher), shared.run(shared.plain))


def test_targets_that_no_layer_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"lora targets: got \['nothing'\]; ") as error:
        add_adapter(class_conditional("flow").unet, "fake_score", Adapter(2, 2.0, ("nothing",)))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ gradients


def test_switching_leaves_requires_grad_alone() -> None:
    shared = Shared()
    nets = Networks(teacher=shared.teacher, fake_score=shared.fake_score, other=shared.other)
    assert all("fake_score" in name for name in nets.parameters("fake_score")) and nets.parameters("fake_score").keys().isdisjoint(
        nets.parameters("other")
    )
    with nets.only_trains(("other",)):
        before = [p.requires_grad for p in shared.teacher.parameters()]
        loss = sum(shared.run(net).square().mean() for net in (shared.fake_score, shared.other, shared.teacher))
        assert [p.requires_grad for p in shared.teacher.parameters()] == before
        loss.backward()  # type: ignore[union-attr]
    with_gradient = {name for name, p in shared.teacher.named_parameters() if p.grad is not None}
    assert with_gradient == set(nets.parameters("other"))


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_uses_the_adapter_of_the_forward_pass(name: str) -> None:
    """All three run before one backward pass, in which none, or another adapter, is on."""
    gradients = []
    for recomputed in (False, True):
        shared = Shared(name)
        model: Any = shared.teacher.model
        if recomputed:
            model.enable_gradient_checkpointing(checkpointed)
        nets = Networks(teacher=shared.teacher, fake_score=shared.fake_score, other=shared.other)
        x_t = shared.x_t = shared.x_t.requires_grad_(True)
        with nets.only_trains(("fake_score", "other")):
            outputs = [shared.run(net) for net in (shared.fake_score, shared.other, shared.teacher)]
            with switched_on(model, "other"):
                sum((i + 1) * x0.square().mean() for i, x0 in enumerate(outputs)).backward()  # type: ignore[union-attr]
        found = [p.grad for role in ("fake_score", "other") for p in nets.parameters(role).values()]
        gradients.append([x_t.grad, *found])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------------ roles of a method

LORA = VSD(guidance_scale=2.0, fake_score_rank=2, fake_score_alpha=4)


def test_two_networks_and_an_adapter_are_held_not_three() -> None:
    """Bytes of distinct parameter storages over all roles."""

    def held(method: Any) -> int:
        nets = build_networks(class_conditional("flow"), method, TrainConfig())
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for role in nets for p in getattr(nets, role).parameters()}
        return sum(storages.values())

    one = sum(p.numel() * 4 for p in class_conditional("flow").unet.parameters())
    adapter = sum(p.numel() * 4 for p in build_networks(class_conditional("flow"), LORA, TrainConfig()).parameters("fake_score").values())
    assert 0 < adapter < 0.1 * one
    assert held(LORA) == 2 * one + adapter
    assert held(VSD(fake_score="full")) == 3 * one


def test_adapters_of_an_earlier_training_are_taken_off() -> None:
    pipe = class_conditional("flow")
    build_networks(pipe, LORA, TrainConfig())
    nets = build_networks(pipe, DMD2(gan_weight=0), TrainConfig())
    assert not any("lora_" in name for role in nets for name, _ in getattr(nets, role).named_parameters())


def test_bf16_keeps_the_adapter_in_float32(tmp_path: Path) -> None:
    run = trainer(tmp_path, LORA, max_train_steps=2, mixed_precision="bf16", checkpointing_steps=0)
    start = {name: p.clone() for name, p in run.nets.parameters("fake_score").items()}
    run.train()
    assert next(run.nets.teacher.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in run.nets.parameters("fake_score").values())
    assert all(not torch.equal(p, start[name]) for name, p in run.nets.parameters("fake_score").items() if "lora_B" in name)


def test_checkpoints_hold_the_adapter_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, LORA, max_train_steps=1)
    before = {name: p.clone() for name, p in run.nets.teacher.named_parameters() if "lora_" not in name}
    run.train()
    files = [load_file(path) for path in (tmp_path / "checkpoint-1").glob("*.safetensors") if path.stem == "fake_score"]
    assert len(files) == 1 and files[0].keys() == run.nets.parameters("fake_score").keys()
    assert all("fake_score" in name for name in files[0])
    assert all(torch.equal(p, before[name]) for name, p in run.nets.teacher.named_parameters() if name in before)


def test_gradient_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        run = trainer(tmp_path / str(recompute), LORA, max_train_steps=2, gradient_checkpointing=recompute, checkpointing_steps=0)
        run.train()
        found.append({**run.nets.parameters("fake_score"), **run.nets.parameters("student")})
    for name, p in found[0].items():
        torch.testing.assert_close(found[1][name], p, rtol=0, atol=1e-6)
