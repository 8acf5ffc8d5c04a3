"""Latents as tokens of 2x2 pixels, as the pipelines of FLUX and Qwen-Image hand them to network and scheduler."""

import torch.nn.functional as F
from torch import Tensor

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """Tokens (B, h / 2 * w / 2, 4 C), row by row, of latents (B, C, h, w)."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """Latents (B, C, h, w) from tokens (B, h / 2 * w / 2, 4 C); h and w are those of `like`."""
    height, width = (side // PATCH for side in like.shape[-2:])
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PATCH)
