"""Train a stock `StableDiffusionPipeline` that draws emoji from captions: autoencoder, CLIP, UNet, and a second CLIP that scores.

    apt-get install fonts-noto-color-emoji
    python train/emoji_data.py --output_dir outputs/emoji
    python train/emoji_teacher.py --data_dir outputs/emoji --output_dir outputs/emoji-teacher
    python eval/emoji_judge.py --data_dir outputs/emoji --autoencoder outputs/emoji-teacher/pipeline/vae

Stopped at any point, the same command goes on. The times on one CPU core, and what the result draws, are in docs/text_to_image.md.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from emoji_clip import JUDGE_CLIP, PIPELINE_CLIP, ClipSize, ClipTraining, image_processor, matching_share, new_clip, word_tokenizer
from emoji_training import CaptionedImages, DenoiserTraining, Recipe, optimise, read_split
from emoji_unet import new_pipeline
from emoji_vae import autoencoder_loss, encode, fold_whitening, new_autoencoder, psnr

from diffusion_distill.config import parse, run_cli

TESTED_ON = 512  # pictures of held-out captions
WHITENED_ON = 2048  # images whose latents' deviation is made one


@dataclass
class EmojiTeacher:
    data_dir: str = "outputs/emoji"
    """Folder that emoji_data.py wrote."""
    output_dir: str = "outputs/emoji-teacher"
    """Folder for the checkpoints, pipeline/, clip/ and teacher.json."""
    vae_steps: int = 3000
    """Steps of the autoencoder, 16 images each."""
    clip_steps: int = 400
    """Steps of the pipeline's CLIP model, 64 images each."""
    judge_clip_steps: int = 600
    """Steps of the CLIP model that scores, 64 images each."""
    unet_steps: int = 3200
    """Steps of the UNet, 32 latents each."""
    seed: int = 0
    """Seed of initial weights, batches and noise; the scoring CLIP takes the next one."""


def train_autoencoder(config: EmojiTeacher, images: CaptionedImages) -> AutoencoderKL:
    """The autoencoder with latents of zero mean and unit deviation."""
    torch.manual_seed(config.seed)
    vae, recipe = new_autoencoder(), Recipe(config.vae_steps, 16, 1e-3, 0.995)
    step = lambda index, generator: autoencoder_loss(vae, images.batch(index), generator)  # noqa: E731
    optimise(vae, step, len(images.rows), recipe, Path(config.output_dir, "vae.safetensors"), config.seed)
    fold_whitening(vae, encode(vae, first(images, WHITENED_ON)))
    return vae


def train_clip(images: CaptionedImages, tokenizer: CLIPTokenizer, size: ClipSize, steps: int, seed: int, checkpoint: Path) -> CLIPModel:
    """A CLIP model of `size`; the heads that helped to train it are left behind."""
    torch.manual_seed(seed)
    training = ClipTraining(new_clip(tokenizer, size), tokenizer, images)
    optimise(training, training.loss, len(images.rows), Recipe(steps, 64, 1e-3, 0.99), checkpoint, seed)
    return training.clip.eval()


def train_unet(config: EmojiTeacher, pipe: StableDiffusionPipeline, images: CaptionedImages) -> None:
    """Train the pipeline's UNet on the latents of all images."""
    training = DenoiserTraining(pipe, images)
    recipe = Recipe(config.unet_steps, 32, 1e-3, 0.998)
    checkpoint = Path(config.output_dir, "unet.safetensors")
    optimise(pipe.unet, training.loss, len(images.rows), recipe, checkpoint, config.seed)


def first(images: CaptionedImages, count: int) -> CaptionedImages:
    """The first `count` images."""
    return CaptionedImages(images.pixels[:count], images.rows[:count])


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """The text tower as a model of its own."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval()


def main() -> None:
    (config,) = parse(None, EmojiTeacher, prog="emoji_teacher.py", description=__doc__ or "")
    data, folder = Path(config.data_dir), Path(config.output_dir)
    record = {"recipe": asdict(config)}
    images, further = read_split(data / "train"), read_split(data / "held_out")
    held_out = first(further, TESTED_ON)
    tokenizer = word_tokenizer(images.captions)
    vae = train_autoencoder(config, images)
    record["autoencoder"] = {"psnr_train": psnr(vae, first(images, 512)), "psnr_held_out": psnr(vae, held_out)}
    clip = train_clip(images, tokenizer, PIPELINE_CLIP, config.clip_steps, config.seed, folder / "clip.safetensors")
    captions = sorted({*images.captions, *further.captions})
    record["clip"] = {"top1_held_out": matching_share(clip, tokenizer, held_out, captions)}
    torch.manual_seed(config.seed)
    pipe = new_pipeline(vae, text_encoder_of(clip), tokenizer)
    train_unet(config, pipe, images)
    pipe.save_pretrained(folder / "pipeline")
    every = CaptionedImages(
        torch.cat([images.pixels, further.pixels[TESTED_ON:]]), [*images.rows, *further.rows[TESTED_ON:]]
    )  # the scorer must know the held-out captions; its own test is on other pictures of them
    judge = train_clip(every, tokenizer, JUDGE_CLIP, config.judge_clip_steps, config.seed + 1, folder / "judge_clip.safetensors")
    record["judge_clip"] = {"top1_held_out": matching_share(judge, tokenizer, held_out, captions)}
    for part in (judge, tokenizer, image_processor()):
        part.save_pretrained(folder / "clip")
    (folder / "teacher.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    run_cli(main)
