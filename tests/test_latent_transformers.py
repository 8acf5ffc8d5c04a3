"""What PixArt, Sana, DiT and Wan have of their own: masks, sizes, labels, videos, two networks, bfloat16."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from test_export import Exported, in_process  # noqa: F401
from test_families import conditions_of, denoiser_of, random_input
from test_phased_dmd import experts_of
from tiny_pipelines import PIPELINES, example_conditions
from tiny_pipelines.latent_transformers import dit, pixart_alpha, pixart_sigma, sana, wan

from diffusion_distill.build import load_pipeline, teacher_denoiser
from diffusion_distill.config import TeacherConfig
from diffusion_distill.discriminators import DISCRIMINATORS
from diffusion_distill.errors import InputError
from diffusion_distill.families import family_of
from diffusion_distill.images import save_grid
from diffusion_distill.networks import Networks

UNEVEN = ["a bird", "two red houses on a hill, and a bird that is on neither of them"]


@torch.no_grad()
@pytest.mark.parametrize("build", [pixart_sigma, wan])
def test_the_condition_vector_is_the_mean_over_the_prompts_own_tokens(build: Any) -> None:
    pipe = build()
    vector = family_of(pipe).condition_vector(pipe.transformer, conditions_of(pipe, UNEVEN))
    for prompt, found in zip(UNEVEN, vector, strict=True):
        tokens = pipe.text_encoder(pipe.tokenizer(prompt, return_tensors="pt").input_ids).last_hidden_state[0]  # nothing is padded
        torch.testing.assert_close(found, tokens.mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("build", [pixart_sigma, sana])
def test_tokens_behind_a_prompts_end_are_not_seen(build: Any) -> None:
    pipe = build()
    x_t, t, _ = random_input(pipe)
    cond, denoiser = conditions_of(pipe, UNEVEN), denoiser_of(pipe)
    behind = cond["prompt_mask"].eq(0).unsqueeze(2)
    changed = cond | {"prompt_embeds": cond["prompt_embeds"] + behind * torch.randn_like(cond["prompt_embeds"])}
    assert behind.any() and torch.equal(denoiser(x_t, t, changed).x0, denoiser(x_t, t, cond).x0)
    seen = changed | {"prompt_mask": torch.ones_like(cond["prompt_mask"])}
    assert not torch.allclose(denoiser(x_t, t, seen).x0, denoiser(x_t, t, cond).x0, rtol=1e-3)


@torch.no_grad()
def test_only_pixart_alpha_of_1024_pixels_sees_the_size() -> None:
    alpha, sigma = pixart_alpha(), pixart_sigma()
    family = family_of(alpha)
    for resolution, side in ((16, 16.0), (None, 256.0)):  # 128 latents of 2 pixels are this tiny pipeline's own size
        cond = family.encode_conditions(alpha, ["a", "b"], resolution)
        assert torch.equal(cond["resolution"], torch.full((2, 2), side)) and torch.equal(cond["aspect_ratio"], torch.ones(2, 1))
    assert family.encode_conditions(sigma, ["a"]).keys() == {"prompt_embeds", "prompt_mask"}


def test_a_sana_students_call_gives_its_own_size(tmp_path: Path, in_process: None) -> None:  # noqa: F811
    exported = Exported(tmp_path / "student", sana, 2, "ode", resolution=None)
    exported.verify(atol=1e-6)
    call = json.loads((exported.folder / "distillation.json").read_text())["samplers"][0]["call"]
    assert (call["height"], call["width"], call["use_resolution_binning"]) == (32, 32, False)


@torch.no_grad()
def test_a_dit_in_training_sees_the_labels_it_is_given() -> None:
    pipe = dit()
    family, labels = family_of(pipe), [7] * 64
    x_t, t = torch.randn(1, *family.sample_shape(pipe)).expand(64, -1, -1, -1), torch.full((64,), 500)
    cond = family.encode_conditions(pipe, labels)
    expected = family.call(pipe.transformer.eval(), x_t, t, cond)
    torch.testing.assert_close(family.call(pipe.transformer.train(), x_t, t, cond), expected)
    assert (expected - family.call(pipe.transformer, x_t, t, family.unconditional(pipe, 64))).abs().max() > 1e-3


def test_wrong_labels_and_sizes_of_a_dit_are_input_errors() -> None:
    pipe = dit()
    family = family_of(pipe)
    assert family.num_classes(pipe) == 1000 and family.image_shape(pipe) == (3, 16)
    for label in (1000, -1, "cat", 1.5):
        with pytest.raises(InputError, match=f"class label: got {label!r}; the teacher has classes 0 to 999"):
            family.encode_conditions(pipe, [label])
    with pytest.raises(InputError, match="resolution: got 32; the pipeline draws 16 pixels"):
        family.sample_shape(pipe, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart_alpha", "sana", "class_dit", "wan"])
def test_networks_in_bfloat16_and_under_autocast_stay_close(name: str) -> None:
    pipe = PIPELINES[name]()
    denoiser, (x_t, t, cond) = denoiser_of(pipe), random_input(pipe)
    expected = denoiser(x_t, t, cond).view(denoiser.prediction_type)
    denoiser.autocast_dtype = torch.bfloat16
    for _ in range(2):  # weights in float32 first, as a student's; then a frozen teacher's
        found = denoiser(x_t, t, cond).view(denoiser.prediction_type)
        assert found.dtype == torch.float32 and 1e-5 < (found - expected).norm() / expected.norm() < 0.05
        denoiser.model.to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------ videos


def test_a_wan_pipeline_draws_its_calls_own_size_unless_it_is_told() -> None:
    pipe = wan()
    family = family_of(pipe)
    assert family.sample_shape(pipe) == (4, 2, 4, 4) and family.sample_shape(pipe, 32) == (4, 2, 8, 8)
    fresh = WanPipeline(**pipe.components)
    assert family.sample_shape(fresh) == (4, 21, 120, 208)  # 81 frames of 480 x 832, 4 to a latent in time and on each side
    assert family.size_arguments(fresh) == {"num_frames": 81, "height": 480, "width": 832}
    family.set_video_size(fresh, frames=9, height=32, width=48)
    latents = fresh("a", num_inference_steps=1, output_type="latent", **family.size_arguments(fresh)).frames
    assert latents.shape == (1, *family.sample_shape(fresh)) == (1, 4, 3, 8, 12)
    for size, message in (((8, 16, 16), "frames: got 8"), ((5, 24, 16), "height: got 24"), ((5, 16, 0), "width: got 0")):
        with pytest.raises(InputError, match=message):
            family.set_video_size(fresh, *size)
    with pytest.raises(InputError, match=r"video_size: got \(5, 16, 16\); none: a SanaPipeline draws no videos"):
        family_of(sana()).set_video_size(sana(), 5, 16, 16)


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame() -> None:
    pipe = wan()
    family, images = family_of(pipe), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0, mean = family.encode_images(pipe, images), pipe.vae.encode(images.unsqueeze(2)).latent_dist.mean
    offset, spread = (torch.tensor(pipe.vae.config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(x0, (mean - offset) / spread)
    torch.testing.assert_close(family.decode(pipe, x0), pipe.vae.decode(mean).sample.transpose(1, 2))
    family.set_video_size(pipe, frames=1, height=16, width=16)
    assert x0.shape == (2, *family.sample_shape(pipe)) and family.decode(pipe, x0).shape == (2, 1, 3, 16, 16)


@torch.no_grad()
def test_a_timestep_for_every_token_is_the_same_network() -> None:
    """Wan 2.2 of 5B: the pipeline hands one timestep to each token, all of them equal for text to video."""
    pipe, calls = wan(), []
    pipe.register_to_config(expand_timesteps=True)
    pipe.transformer.register_forward_hook(lambda *call: calls.append((call[2], call[3][0])), with_kwargs=True)
    pipe(example_conditions(pipe), num_inference_steps=2, guidance_scale=1.0, **family_of(pipe).size_arguments(pipe))
    for given, expected in list(calls):
        t = given["timestep"]
        assert t.shape == (2, 8) and t.min() == t.max()
        output = family_of(pipe).call(pipe.transformer, given["hidden_states"], t[:, 0], conditions_of(pipe))
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_frames_stand_in_a_row_in_a_picture(tmp_path: Path) -> None:
    videos = torch.linspace(-1, 1, 9).view(1, 9, 1, 1, 1).expand(2, 9, 3, 64, 64)
    save_grid(videos, tmp_path / "grid.png", columns=1)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (5 * 64 + 2, 2 * (64 + 2))
    assert [picture.getpixel((32 + 64 * i, 100))[0] for i in range(5)] == [0, 64, 128, 191, 255]


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_phased_experts_leave_as_the_two_transformers_of_wan(kind: Any, tmp_path: Path, in_process: None) -> None:  # noqa: F811
    """The grid and the boundary of 4 steps with shift 5: two steps at 1000 and 937.5, two at 833.3 and 625."""
    grid = [1000.0, 937.5, 2500 / 3, 625.0]
    student = experts_of(wan, (885.4,))
    exported = Exported(tmp_path / "student", wan, grid, kind, student=student)
    assert exported.verify(atol=1e-5)["timesteps"][0] == pytest.approx(grid, rel=1e-6)
    loaded = WanPipeline.from_pretrained(exported.folder)
    assert loaded.config.boundary_ratio == pytest.approx(0.8854)
    for network, expert in ((loaded.transformer, student.experts[0]), (loaded.transformer_2, student.experts[1])):
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), expert.model.parameters(), strict=True))
    with pytest.raises(InputError, match=r"transformer_2: got .*; a teacher of one network"):
        teacher_denoiser(loaded)


def test_a_wan_student_runs_as_its_model_card_says(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    images = torch.zeros(2, 5, 3, 16, 16)
    exported = Exported(tmp_path / "student", wan, 2, "ode", images=images, student=None)
    card = (exported.folder / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card and "![samples](samples.png)" in card
    monkeypatch.chdir(exported.folder)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, {})
    with Image.open("sample.gif") as video:
        assert video.size == (16, 16) and os.path.getsize("sample.gif") > 0
    assert len(example_conditions(exported.pipe)) == 2


def test_the_size_of_videos_comes_with_the_teacher(tmp_path: Path) -> None:
    wan().save_pretrained(tmp_path)
    pipe = load_pipeline(TeacherConfig(str(tmp_path), video_size=(9, 32, 16)))
    assert family_of(pipe).sample_shape(pipe) == (4, 3, 8, 4)
    with pytest.raises(InputError, match="frames: got 8; a multiple of 4, and one more"):
        load_pipeline(TeacherConfig(str(tmp_path), video_size=(8, 32, 16)))
    with pytest.raises(InputError, match=r"video_size: got \(9, 32\); three numbers"):
        TeacherConfig(str(tmp_path), video_size=(9, 32))


def test_discriminators_of_videos() -> None:
    """Heads on a network's tokens, whose number does not matter; the small network of its own is one of images."""
    teacher, (x_t, t, cond) = denoiser_of(wan()), random_input(wan())
    with torch.no_grad():
        head = DISCRIMINATORS["teacher"](teacher, x_t, t, cond)
        assert head(Networks(teacher=teacher), x_t, t, cond).shape == (2,)
    with pytest.raises(InputError, match="discriminator: got 'own'; 'fake_score' or 'teacher' for videos"):
        DISCRIMINATORS["own"](teacher, x_t, t, cond)
