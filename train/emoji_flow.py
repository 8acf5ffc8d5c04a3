"""Train a stock `StableDiffusion3Pipeline` that draws emoji from captions: a small flow-matching transformer beside the UNet.

    python train/emoji_data.py --output_dir outputs/emoji
    python train/emoji_flow.py --data_dir outputs/emoji --output_dir outputs/emoji-flow

Autoencoder and text encoder are those of `--parts`, unchanged. Stopped at any point, the same command goes on. The time on one CPU core,
and what the result draws, are in docs/text_to_image.md.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from emoji_training import DenoiserTraining, Recipe, optimise, read_split
from emoji_transformer import FlowTraining, new_pipeline, new_transformer

from diffusion_distill.config import parse, run_cli

BATCH_SIZE = 32


@dataclass
class EmojiFlow:
    data_dir: str = "outputs/emoji"
    """Folder that emoji_data.py wrote."""
    parts: str = "assets/emoji-stable-diffusion"
    """Folder of the pipeline whose autoencoder, text encoder and tokenizer are taken."""
    output_dir: str = "outputs/emoji-flow"
    """Folder for the checkpoint, pipeline/ and flow.json."""
    steps: int = 9500
    """Steps of the transformer, 32 latents each."""
    seed: int = 0
    """Seed of initial weights, batches and noise."""


@torch.no_grad()
def mean_loss(training: DenoiserTraining) -> float:
    """The loss over all images of `training`, with the same noise in every call."""
    generator = torch.Generator().manual_seed(0)
    batches = [batch.tolist() for batch in torch.arange(len(training.latents)).split(BATCH_SIZE)]
    losses = [training.loss(batch, generator).item() * len(batch) for batch in batches]
    return sum(losses) / len(training.latents)


def main() -> None:
    (config,) = parse(None, EmojiFlow, prog="emoji_flow.py", description=__doc__ or "")
    data, folder = Path(config.data_dir), Path(config.output_dir)
    images, held_out = read_split(data / "train"), read_split(data / "held_out")
    parts = StableDiffusionPipeline.from_pretrained(config.parts)
    torch.manual_seed(config.seed)
    pipe = new_pipeline(parts, new_transformer(parts.text_encoder.config.hidden_size))
    recipe, checkpoint = Recipe(config.steps, BATCH_SIZE, 2e-3, 0.998), folder / "transformer.safetensors"
    seconds = optimise(pipe.transformer, FlowTraining(pipe, images).loss, len(images.rows), recipe, checkpoint, config.seed)
    pipe.save_pretrained(folder / "pipeline")
    record = {"recipe": asdict(config), "flow": {"cpu_seconds": seconds, "loss_held_out": mean_loss(FlowTraining(pipe, held_out))}}
    (folder / "flow.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    run_cli(main)
