"""The exported adapter, loaded by plain diffusers onto the untouched teacher, draws the images of the trained student."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_export import Exported, in_process  # noqa: F401
from tiny_pipelines import PIPELINES, example_conditions

from diffusion_distill import DMD2, TrainConfig
from diffusion_distill.build import build_networks
from diffusion_distill.families import family_of

LOADABLE = [name for name in PIPELINES if hasattr(type(PIPELINES[name]()), "save_lora_weights")]
RANK, ALPHA = 2, 6


def student_of(pipe: Any, sharing: str) -> Any:
    """A student whose adapter says something, as a DMD2 run builds it."""
    method = DMD2(num_inference_steps=2, guidance_scale=1.0, gan_weight=0.0)
    nets = build_networks(pipe, method, TrainConfig(lora_rank=RANK, lora_alpha=ALPHA, sharing=sharing))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in nets.trained_roles:
            for p in nets.parameters(role).values():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return nets.student


def test_most_families_load_adapters() -> None:
    assert {"stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "sana"} <= set(LOADABLE)


@pytest.mark.parametrize("sharing", ["full", "shared"])
@pytest.mark.parametrize("name", LOADABLE)
def test_the_adapter_on_the_teacher_draws_the_students_images(name: str, sharing: str, tmp_path: Path, in_process: None) -> None:  # noqa: F811
    exported = Exported(tmp_path / "student", PIPELINES[name], 2, "ode", student=student_of(PIPELINES[name](), sharing))
    student, pipe = diffusers.DiffusionPipeline.from_pretrained(exported.folder), PIPELINES[name]()
    pipe.scheduler = student.scheduler
    plain = draw(pipe, exported)
    pipe.load_lora_weights(exported.folder / "lora")
    merged, loaded = draw(student, exported), draw(pipe, exported)
    assert np.abs(plain - merged).max() > 1e-2  # the adapter does something
    np.testing.assert_allclose(loaded, merged, atol=1e-4)


def draw(pipe: Any, exported: Exported) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    record = json.loads((exported.folder / "distillation.json").read_text())
    family, call = family_of(pipe), record["samplers"][0]["call"]
    condition = family.condition_argument(example_conditions(pipe))
    output = pipe(**condition, **call, generator=torch.Generator().manual_seed(0), output_type="np")
    return np.asarray(output[0])


def test_rank_and_alpha_travel_in_the_file(tmp_path: Path, in_process: None) -> None:  # noqa: F811
    exported = Exported(
        tmp_path / "student", PIPELINES["stable_diffusion"], 2, "ode", student=student_of(PIPELINES["stable_diffusion"](), "shared")
    )
    with safe_open(exported.folder / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    text = str(metadata)
    assert f'unet.r": {RANK}' in text.replace("\\", "") and f'unet.lora_alpha": {ALPHA}' in text.replace("\\", "")
    assert names and all(key.startswith("unet.") and ".lora_" in key for key in names)
    assert "fake_score" not in "".join(names)
    assert 'pipe.load_lora_weights("lora")' in (exported.folder / "README.md").read_text()


def test_a_student_without_an_adapter_has_none(tmp_path: Path, in_process: None) -> None:  # noqa: F811
    exported = Exported(tmp_path / "student", PIPELINES["stable_diffusion"], 2, "ode")
    assert not (exported.folder / "lora").exists() and "load_lora_weights" not in (exported.folder / "README.md").read_text()
