"""Text-to-image from end to end: `distill` trains, exports, and proves the export in a fresh process."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import stable_diffusion, stable_diffusion_3, stable_diffusion_xl

from diffusion_distill import DMD2, DataConfig, InputError, TrainConfig, Trainer, build_dataset, distill

PROMPTS = ("a seven", "two birds", "a red house on a hill")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize(("build", "resolution", "lora_rank"), [(stable_diffusion_xl, 32, 0), (stable_diffusion_3, None, 2)])
def test_a_text_to_image_student_is_what_plain_diffusers_draws(
    tmp_path: Path, prompts: Path, build: object, resolution: int | None, lora_rank: int
) -> None:
    pipe = build()  # type: ignore[operator]
    pipe.set_progress_bar_config(disable=True)
    data = build_dataset(DataConfig(prompts_file=str(prompts)), needs_images=False, channels=3, resolution=resolution)
    method = DMD2(num_inference_steps=2, guidance_scale=3.0, gan_weight=0.0, student_update_interval=1)
    config = TrainConfig(
        output_dir=str(tmp_path / "run"), max_train_steps=2, train_batch_size=2, num_validation_images=4, lora_rank=lora_rank
    )
    folder = distill(pipe, method, data, config, teacher="somebody/some-model", resolution=resolution)
    proof = json.loads((folder / "verification.json").read_text())
    assert proof["max_difference"] <= 1e-6 and len(proof["timesteps"][0]) == 2
    call = json.loads((folder / "distillation.json").read_text())["samplers"][0]["call"]
    image = DiffusionPipeline.from_pretrained(folder)(PROMPTS[0], **call).images[0]
    assert image.size == ((resolution, resolution) if resolution else (16, 16))
    assert "somebody/some-model" in (folder / "README.md").read_text()


@pytest.mark.parametrize("discriminator", ["fake_score", "teacher", "own"])
def test_the_gan_term_learns_from_captioned_images(tmp_path: Path, discriminator: str) -> None:
    for i, prompt in enumerate(PROMPTS):
        Image.new("RGB", (24, 16), (40 * i, 80, 200)).save(tmp_path / f"{i}.png")
        with (tmp_path / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{i}.png", "text": prompt}) + "\n")
    data = build_dataset(DataConfig(train_data_dir=str(tmp_path)), needs_images=True, channels=3, resolution=16)
    method = DMD2(num_inference_steps=1, guidance_scale=2.0, gan_weight=0.1, discriminator=discriminator, student_update_interval=1)  # type: ignore[arg-type]
    config = TrainConfig(output_dir=str(tmp_path / "run"), max_train_steps=2, train_batch_size=2, num_validation_images=2)
    run = Trainer(stable_diffusion(), method, config, data)
    before = {role: [p.clone() for p in run.nets.parameters(role).values()] for role in run.trained}
    run.train()
    for role in ("student", "fake_score", "discriminator"):
        assert any(not torch.equal(a, b) for a, b in zip(before[role], run.nets.parameters(role).values(), strict=True))


def test_images_of_another_size_than_the_samples_are_refused(tmp_path: Path) -> None:
    items = [{"condition": "a", "image": torch.zeros(3, 32, 32)}] * 2
    config = TrainConfig(output_dir=str(tmp_path), max_train_steps=1, train_batch_size=2)
    run = Trainer(stable_diffusion(), DMD2(gan_weight=0.1), config, items)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="resolution"):
        run.train()
    assert not (tmp_path / "run.json").exists()
