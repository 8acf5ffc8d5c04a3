"""What the networks of the emoji pipeline share in training: the images in memory, and one loop that goes on where it was stopped."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusion_distill.batches import GlobalBatchSampler
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.ema import EMA
from diffusion_distill.errors import reject
from diffusion_distill.families import family_of
from diffusion_distill.schedule import NoiseSchedule, prediction_type_of
from diffusion_distill.score_distillation import denoising_score_matching

SAVE_EVERY = 60.0  # seconds between two checkpoints
CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class CaptionedImages:
    """Images (N, 3, H, W) as uint8 and the rows of metadata.jsonl that belong to them."""

    pixels: Tensor
    rows: Sequence[dict[str, str]]

    def batch(self, index: Sequence[int] | Tensor) -> Tensor:
        """Images (B, 3, H, W) as float32 in [-1, 1]."""
        return self.pixels[torch.as_tensor(index)].float() / 127.5 - 1

    @property
    def captions(self) -> list[str]:
        return [row["text"] for row in self.rows]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a network is trained: AdamW with 50 steps of warm-up, then a cosine to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float


def read_split(folder: Path) -> CaptionedImages:
    """A split that emoji_data.py wrote.

    Raises:
        InputError: where there is none.
    """
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise reject("data_dir", str(folder), "the folder of a split that train/emoji_data.py wrote")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pixels = [np.array(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
    return CaptionedImages(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), rows)


class DenoiserTraining:
    """Denoising score matching of a pipeline's network on the latents of images with their captions, a tenth of them dropped.

    `law` turns uniform numbers (B,) into noise levels in [0, 1].
    """

    def __init__(self, pipe: Any, images: CaptionedImages, law: Callable[[Tensor], Tensor] = lambda uniform: uniform):
        family = family_of(pipe)
        self.schedule, self.law = NoiseSchedule.from_scheduler(pipe.scheduler), law
        self.denoiser = Denoiser(getattr(pipe, family.component), self.schedule, prediction_type_of(pipe.scheduler), family)
        batches = torch.arange(len(images.rows)).split(128)
        self.latents = torch.cat([family.encode_images(pipe, images.batch(rows)) for rows in batches])
        distinct = ["", *sorted(set(images.captions))]
        rows = {caption: i for i, caption in enumerate(distinct)}
        self.caption = torch.tensor([rows[caption] for caption in images.captions])
        self.cond = family.encode_conditions(pipe, distinct)

    def loss(self, index: list[int], generator: torch.Generator) -> Tensor:
        """Squared error of what the network predicts, at random noise levels."""
        x0 = self.latents[index]
        uniform, drop = torch.rand(2, len(index), generator=generator)
        caption = self.caption[index].masked_fill(drop < CAPTION_DROPOUT, 0)
        eps = torch.randn(x0.shape, generator=generator)
        cond = {name: value[caption] for name, value in self.cond.items()}
        return denoising_score_matching(self.denoiser, x0, eps, self.schedule.timestep(self.law(uniform)), cond)


def optimise(
    network: nn.Module,
    loss_of: Callable[[list[int], torch.Generator], Tensor],
    samples: int,
    recipe: Recipe,
    checkpoint: Path,
    seed: int = 0,
) -> float:
    """Train `network` and leave it with the moving average of its weights, in evaluation mode; return the CPU seconds of all steps.

    `loss_of(index, generator)` is the loss of the samples `index`; all its randomness comes from `generator`, which depends on the seed
    and the step alone. Stopped, the same call goes on from `checkpoint`, which may be a minute behind.
    """
    weights = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    ema, order = EMA(weights, recipe.ema_decay), GlobalBatchSampler(samples, recipe.batch_size, seed)
    first, earlier = _restore(checkpoint, weights, optimizer, ema)
    seconds = lambda: earlier + time.process_time() - started  # noqa: E731
    optimizer.param_groups[0]["initial_lr"] = recipe.learning_rate  # which a schedule that starts in between asks for
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, recipe.steps, last_epoch=first - 1)
    started, saved, average = time.process_time(), time.monotonic(), 0.0
    bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=checkpoint.stem, mininterval=10)
    network.train()
    for step in bar:
        loss = loss_of(order.indices(step), torch.Generator().manual_seed(1_000_003 * seed + step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        ema.update()
        average += (loss.item() - average) * max(0.02, 1 / (step - first + 1))
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if time.monotonic() - saved > SAVE_EVERY or step + 1 == recipe.steps:
            _save(checkpoint, weights, optimizer, ema, {"step": str(step + 1), "cpu_seconds": str(seconds())})
            saved = time.monotonic()
    ema.settle()
    network.eval()
    return seconds()


def _save(path: Path, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMA, progress: dict[str, str]) -> None:
    tensors = {f"weight.{name}": p.detach() for name, p in weights.items()}
    tensors |= {f"average.{name}": value for name, value in ema.average.items()}
    for name, p in weights.items():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, progress)
    os.replace(partial, path)


def _restore(path: Path, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMA) -> tuple[int, float]:
    """The step to go on with, and the CPU seconds of those before."""
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, "pt") as file:
        progress = file.metadata()
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(tensors[f"weight.{name}"])
            ema.average[name].copy_(tensors[f"average.{name}"])
            optimizer.state[p] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    ema.updates = int(progress["step"])
    return ema.updates, float(progress["cpu_seconds"])
