"""What the latent-diffusion families share: the VAE and the size of its latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import reject


@torch.no_grad()
def posterior_mean(vae: Any, images: Tensor) -> Tensor:
    """Mean (B, C, h, w) in float32 of the VAE's posterior for images (B, 3, H, W) in [-1, 1], before any scaling; a VAE of videos
    takes and gives a dimension of frames behind the channels.

    The mean rather than a sample: the same image is the same x0 in every epoch, in a cache and after a resume, and the
    posterior of a trained diffusion VAE is so narrow that a draw adds nothing.
    """
    with _without_overflow(vae):
        distribution = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    mean: Tensor = distribution.mode().float()
    return mean


def decode_unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in float32 of latents (B, C, h, w) in the VAE's own units, or videos; differentiable in `latents`."""
    with _without_overflow(vae):
        images: Tensor = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
    return images.float()


def latent_side(resolution: int | None, default: int, multiple: int, scale: int) -> int:
    """Height of the latents for images of `resolution` pixels (None: `default`).

    Raises:
        InputError: when the resolution is not a positive multiple of `multiple`.
    """
    pixels = default if resolution is None else resolution
    if pixels < 1 or pixels % multiple:
        raise reject("resolution", pixels, f"a positive multiple of {multiple} pixels is needed")
    return pixels // scale


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """Run a float16 VAE that overflows in half precision (SDXL's: `force_upcast`) in float32, as the pipeline does."""
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)
