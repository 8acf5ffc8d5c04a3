"""Images on disk."""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

FRAMES = 5  # of a video in a picture


def to_pil(image: Tensor) -> Image.Image:
    """One image (C, H, W) in [-1, 1], C 1 or 3, as 8-bit PIL; values outside are clamped."""
    pixels = (image.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels[0].numpy()) if len(pixels) == 1 else Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_grid(images: Tensor, path: Path, columns: int | None = None, smallest_side: int = 64) -> None:
    """Write images (B, C, H, W) in [-1, 1] as one PNG, `columns` wide (None: square); tiny images are magnified.

    Of a video (F, C, H, W), frames from the first to the last stand in a row as one image, `FRAMES` at most.
    """
    if images.ndim == 5:
        images = images[:, torch.linspace(0, images.shape[1] - 1, min(images.shape[1], FRAMES)).round().long()]
        images = images.permute(0, 2, 3, 1, 4).flatten(3)
    columns = columns or math.ceil(math.sqrt(len(images)))
    zoom = max(1, smallest_side // min(images.shape[2:]))
    height, width = (side * zoom + 2 for side in images.shape[2:])
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        tile = to_pil(image).resize((width - 2, height - 2), Image.Resampling.NEAREST)
        grid.paste(tile, ((i % columns) * width, (i // columns) * height))
    grid.save(path)
