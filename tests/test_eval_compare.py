"""Comparison of text-to-image pipelines (tiny, untrained), as users run it."""

import base64
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from common import sampling
from common.command_line import InputError
from common.generate import image_seed
from compare import CompareConfig, compare
from tiny_pipelines import stable_diffusion
from tiny_pipelines.parts import clip_config, clip_tokenizer, seeded

PROMPTS = ["a lighthouse at dusk", "two <b>cats</b> | one dog", "a red cube", "rain", "an old map of the sea", "snow"]


def save_clip(folder: Path) -> None:
    """A CLIP with random weights that reads the tiny pipelines' tokens and 16-pixel images."""
    tokenizer = clip_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16
    )
    with seeded(4):  # its CLIP scores are not all 0
        model = CLIPModel(CLIPConfig(text_config=clip_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    """A teacher, a student of two steps at its own timesteps, prompts, real images and a CLIP."""
    folder = tmp_path_factory.mktemp("text")
    stable_diffusion().save_pretrained(folder / "teacher")
    stable_diffusion(seed=1).save_pretrained(folder / "student")
    call = {"num_inference_steps": 2, "guidance_scale": 0.0}
    record = {"method": "dmd2", "samplers": [{"timesteps": [501, 1], "call": call}]}
    (folder / "student" / "distillation.json").write_text(json.dumps(record))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    save_clip(folder / "clip")
    (folder / "real").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "real" / f"{i}.png")
    return CompareConfig(
        teacher=folder / "teacher",
        students=(folder / "student",),
        output_dir=folder / "report",
        teacher_num_inference_steps=(2, 8),
        metrics=("fid", "clip_score"),
        features={"fid": "clip"},
        weights={"clip": folder / "clip"},
        reference=folder / "real",
        prompts_file=folder / "prompts.txt",
        cache_dir=folder / "cache",
        samples=18,
        noise_seeds=(3,),
        batch_size=9,
        device="cpu",
    )


@pytest.fixture(scope="module")
def report(config: CompareConfig) -> str:
    return compare(config).read_text()


def evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation_set.json").read_text())


def shown(page: str, alternative: str) -> list[Image.Image]:
    """The images of an HTML page whose `alt` begins so."""
    found = re.findall(rf'<img[^>]*src="data:image/\w+;base64,([^"]+)" alt="{re.escape(alternative)}', page)
    return [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for content in found]


def test_every_metric_of_the_evaluations_is_reported(config: CompareConfig, report: str) -> None:
    page = (config.output_dir / "report.html").read_text()
    for folder in (config.teacher, *config.students):
        for result in evaluation(folder)["results"]:
            for name, metric in result["metrics"].items():
                row = rf"\| {folder.name} \| {result['num_inference_steps'] or 2} \| {name} \| {metric['mean']:.6g} \|"
                assert re.search(row.replace("+", r"\+"), report) and f"<td>{metric['mean']:.6g}</td>" in page
    assert "Fréchet distance ↓ (18 × 1)" in report and "CLIP score ↑ (18 × 1)" in report and "Features: clip (SHA-256 " in report
    assert "method dmd2" in page and "--prompts_file" in page


def test_one_seed_is_judged_by_the_metrics_own_errors(config: CompareConfig, report: str) -> None:
    student = evaluation(config.students[0])["results"][0]["metrics"]
    error = student["clip_score"]["error_per_seed"]["3"]
    assert f"{student['clip_score']['mean']:.2f} ± {error:.2f}" in report
    assert error == pytest.approx(np.std(student["clip_score"]["per_image"]["3"], ddof=1) / 18**0.5)
    assert "normal test on the stated errors" in report and "2 instead of 16" in report  # the teacher is guided


def test_columns_hold_the_same_seed_and_prompt(config: CompareConfig, report: str) -> None:
    page = (config.output_dir / "report.html").read_text()
    titles = re.findall(r'title="([^"]+)"', page)
    prompts = [*PROMPTS, *PROMPTS][:8]
    expected = [f"{prompt}, seed {image_seed(3, i)}" for i, prompt in enumerate(prompts)]
    assert [title.replace("&lt;", "<").replace("&gt;", ">") for title in titles] == expected * 3
    pipe = StableDiffusionPipeline.from_pretrained(config.students[0])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(image_seed(3, 2))
    image = pipe(PROMPTS[2], generator=generator, num_inference_steps=2, guidance_scale=0.0).images[0]
    (cell,) = shown(page, f"student, 2 steps: {PROMPTS[2]}, seed")
    assert np.abs(np.asarray(cell, int) - np.asarray(image, int)).max() <= 1


def test_worst_and_best_prompts_by_clip_score(config: CompareConfig, report: str) -> None:
    scores = evaluation(config.students[0])["results"][0]["metrics"]["clip_score"]["per_image"]["3"]
    means = {prompt: np.mean(scores[i :: len(PROMPTS)]) for i, prompt in enumerate(PROMPTS)}
    order = sorted(PROMPTS, key=lambda prompt: means[prompt])
    worst, best = (report.split(f"## {name} prompts")[1].split("\n## ")[0] for name in ("Worst", "Best"))
    written = {prompt: prompt.replace("<", r"\<").replace(">", r"\>").replace("|", r"\|") for prompt in PROMPTS}
    for section, expected in ((worst, order[:3]), (best, order[:2:-1])):
        assert re.findall(r"^\*\*(.*)\*\* \(seed", section, re.MULTILINE) == [written[prompt] for prompt in expected]
        for prompt in expected:
            assert f"| {means[prompt]:.2f} |" in section
    assert (config.output_dir / "worst_prompt_3.png").is_file() and (config.output_dir / "best_prompt_1.png").is_file()


def test_steps_of_students(config: CompareConfig, tmp_path: Path) -> None:
    (folder,) = config.students
    given = replace(config, student_num_inference_steps=(4, 1), images_dir=tmp_path)
    assert given.evaluation(config.teacher).num_inference_steps == (2, 8) and given.evaluation(folder).num_inference_steps == ()
    assert given.evaluation(folder).images_dir == tmp_path / "student"
    several = tmp_path / "several"
    several.mkdir()
    with pytest.raises(InputError, match="folder: got '.*several'; a diffusers pipeline folder with a model_index.json is needed"):
        replace(given, students=(folder, several)).check()
    assert replace(given, students=(folder, several)).evaluation(several).num_inference_steps == (4, 1)
    (several / "distillation.json").write_text(json.dumps({"samplers": [{"timesteps": [999, 499]}, {"timesteps": [999]}]}))
    assert replace(given, students=(folder, several)).evaluation(several).num_inference_steps == (2, 1)


def test_a_second_comparison_draws_nothing(config: CompareConfig, report: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = sampling._draw_batch
    monkeypatch.setattr(sampling, "_draw_batch", lambda *given: drawn.append(given[-1]) or draw(*given))
    again = compare(config).read_text()
    assert [line for line in again.splitlines() if "| commit |" not in line] == [
        line for line in report.splitlines() if "| commit |" not in line
    ]
    assert not drawn
    folder = Path(evaluation(config.students[0])["results"][0]["images"]["3"]["folder"])
    (config.students[0] / "evaluation_set.json").unlink()
    (folder / sampling.file_name(0)).unlink()
    compare(replace(config, output_dir=config.output_dir.with_name("again")))
    assert drawn == [9]  # the batch that had lost an image, and no other
