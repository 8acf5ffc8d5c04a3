"""Attention backends: what a network computes with them is what it computed before, by other operations, and only while it trains."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from test_trainer import IMAGE_FREE, METHODS, config, trainer
from tiny_pipelines import PIPELINES, example_conditions, flux, resolution_of, sana, stable_diffusion
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_distill import InputError
from diffusion_distill.attention import in_use, plain_attention, prepared, switches
from diffusion_distill.build import teacher_denoiser
from diffusion_distill.data import ConditionDataset
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.trainer import Trainer

FUSED = "_scaled_dot_product_flash_attention_for_cpu"
LOOKS_UP = ("flux", "qwen_image", "z_image", "wan")
MASKED = ("qwen_image", "z_image")  # and with diffusers' own lookup, its flash kernel takes no mask
OLDER = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "pixart_alpha", "class_dit", "class_conditional_flow")


class Operations(TorchDispatchMode):
    """Counts what is computed, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def network(name: str) -> tuple[Denoiser, Callable[[], Tensor]]:
    """A teacher, and its prediction for two prompts of unlike lengths."""
    pipe = PIPELINES[name]()
    denoiser, size = teacher_denoiser(pipe), resolution_of(pipe)
    x_t = torch.randn(2, *denoiser.family.sample_shape(pipe, size), generator=torch.Generator().manual_seed(0))
    conditions = example_conditions(pipe)
    cond = denoiser.family.encode_conditions(pipe, [conditions[0], conditions[1] * 3], size)
    return denoiser, lambda: denoiser(x_t, denoiser.schedule.timestep(torch.full((2,), 0.6)), cond).x0


@pytest.mark.parametrize("name", [*OLDER, *LOOKS_UP, "sana"])
@torch.no_grad()
def test_torchs_own_kernels_serve_every_family(name: str) -> None:
    denoiser, run = network(name)
    outputs, fused = {}, {}
    flash = [] if name in MASKED else ["_native_flash"]
    for backend in ("native", *flash, "_native_math"):
        with in_use(switches({"teacher": denoiser.model}, backend)), Operations() as operations:
            outputs[backend] = run()
        fused[backend] = operations.count[FUSED]
    layers = [m for m in denoiser.model.modules() if hasattr(m, "processor") and "Linear" not in type(m.processor).__name__]
    assert [fused[backend] for backend in ("native", *flash)] == [len(layers)] * (1 + len(flash))
    assert layers and fused["_native_math"] == 0
    for backend in outputs:
        torch.testing.assert_close(outputs[backend], outputs["native"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOOKS_UP)
@torch.no_grad()
def test_newer_layers_look_up_any_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, run = network(name)
    native, calls = run(), []
    before = [m.processor for m in denoiser.model.modules() if hasattr(m, "processor")]
    flex = _AttentionBackendRegistry._backends["flex"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return flex(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, "flex", counted)
    with in_use(switches({"teacher": denoiser.model}, "flex")):
        torch.testing.assert_close(run(), native, rtol=1e-4, atol=1e-5)
        assert len(calls) == len(before)
        with plain_attention():
            assert torch.equal(run(), native) and len(calls) == len(before)
    assert torch.equal(run(), native)
    assert [m.processor for m in denoiser.model.modules() if hasattr(m, "processor")] == before
    assert _AttentionBackendRegistry._active_backend == "native"


def reference(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, op: Any = None, scale: float | None = None
) -> Tensor:
    """What xformers documents of `memory_efficient_attention`: softmax(scale Q K^T + bias) V on (B H, N, D) or (B, N, H, D)."""
    if query.ndim == 4:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    out = (scores + (0 if attn_bias is None else attn_bias)).softmax(-1) @ value
    return out.transpose(1, 2) if query.ndim == 4 else out


@pytest.mark.parametrize("name", OLDER)
@torch.no_grad()
def test_xformers_processors_compute_the_same_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its kernel written out: the real one needs CUDA."""
    denoiser, run = network(name)
    native, calls = run(), []

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return reference(*args, **kwargs)

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    monkeypatch.setattr(
        attention_processor, "xformers", SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=kernel)), raising=False
    )
    with in_use(switches({"teacher": denoiser.model}, "xformers")):
        torch.testing.assert_close(run(), native, rtol=1e-4, atol=1e-5)
    assert len(calls) == len([m for m in denoiser.model.modules() if hasattr(m, "processor")])
    assert torch.equal(run(), native)


@pytest.mark.parametrize(
    ("pipe", "backend", "line"),
    [
        (flux, "fast", "attention_backend: got 'fast'; accepted: flash, "),
        (flux, "xformers", "Please install `xformers>="),
        (flux, "flash", "Please install `flash-attn>="),
        (
            stable_diffusion,
            "flex",
            "the student, a UNet2DConditionModel, has layers of an older kind (AttnProcessor2_0), which take native, ",
        ),
        (sana, "flex", "(SanaLinearAttnProcessor2_0), which take native, _native_math, _native_efficient, _native_flash, _native_cudnn"),
    ],
)
def test_what_a_network_cannot_take_is_one_line(pipe: Callable[[], Any], backend: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        switches({"student": teacher_denoiser(pipe()).model}, backend)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_kernel_that_cannot_run_here_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="attention_backend: got '_native_cudnn'; the teacher cannot run with it here"):
        trainer(tmp_path, attention_backend="_native_cudnn")
    assert not list(tmp_path.iterdir())
    denoiser, _ = network("flux")
    monkeypatch.setitem(_AttentionBackendRegistry._backends, "flex", lambda query, *args, **kwargs: 5 * query)
    pipe = flux()
    x_t, cond = torch.zeros(1, *denoiser.family.sample_shape(pipe, 16)), denoiser.family.unconditional(pipe, 1)
    with pytest.raises(InputError, match="its output differs from the native one by"):
        prepared({"teacher": denoiser}, "flex", x_t, torch.full((1,), 500.0), cond)


def test_masks_of_prompts_are_tried_before_training(tmp_path: Path) -> None:
    pipe, settings = PIPELINES["qwen_image"](), config(tmp_path, attention_backend="_native_flash")
    with pytest.raises(InputError, match="the teacher cannot run with it here .*attn_mask.* not supported"):
        Trainer(pipe, IMAGE_FREE, settings, ConditionDataset(["a much longer prompt than the empty one"]), resolution=16)


@pytest.mark.parametrize("name", ["scm", "lcm"])
def test_all_roles_train_with_it_and_have_their_own_layers_afterwards(tmp_path: Path, name: str) -> None:
    """sCM takes a forward-mode derivative, which no fused kernel has."""
    losses, fused = {}, {}
    for backend in ("_native_math", "_native_flash"):
        run = trainer(tmp_path / backend, METHODS[name], attention_backend=backend, max_train_steps=2, checkpointing_steps=0)
        models = {id(net.model): net.model for role in run.nets if isinstance(net := getattr(run.nets, role), Denoiser)}
        layers = [m for model in models.values() for m in model.modules() if hasattr(m, "processor")]
        before, during, step = [m.processor for m in layers], [], run.train_step

        def observed(micro_batches: Any, step: Any = step, during: Any = during, layers: Any = layers) -> Any:
            during.extend(m.processor.kernel for m in layers)
            return step(micro_batches)

        run.train_step = observed  # type: ignore[method-assign]
        with Operations() as operations:
            run.train()
        assert len(set(during)) == 1 and len(during) == 2 * len(layers) >= 2
        assert [m.processor for m in layers] == before == [m.processor for m in layers]
        losses[backend] = [json.loads(line)["student/loss"] for line in (tmp_path / backend / "metrics.jsonl").read_text().splitlines()]
        fused[backend] = operations.count[FUSED]
    assert fused["_native_math"] < fused["_native_flash"]  # sample grids are native
    assert losses["_native_math"] == pytest.approx(losses["_native_flash"], rel=1e-4)
