"""What the text-to-image families share: prompts, and the pipeline's own arguments for them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import reject


def prompts_of(conditions: Sequence[Any]) -> list[str]:
    """`conditions` as a list of prompts.

    Raises:
        InputError: when one of them is not a string, or when they are one string instead of a list.
    """
    if isinstance(conditions, str) or not conditions:
        raise reject("prompt", conditions, "a list of at least one prompt is needed")
    for prompt in conditions:
        if not isinstance(prompt, str):
            raise reject("prompt", prompt, "a string is needed")
    return list(conditions)


def integer_timesteps(timesteps: Sequence[float]) -> list[int]:
    """The timesteps as integers, which is what the few-step schedulers of the UNet pipelines take.

    Raises:
        InputError: when one of them has a fraction.
    """
    for t in timesteps:
        if t != int(t):
            raise reject("timesteps", t, "the exported UNet pipelines visit integer timesteps only")
    return [int(t) for t in timesteps]


def image_size(resolution: int | None) -> dict[str, int]:
    """A text-to-image pipeline's arguments for square images of `resolution` pixels; none for its own size."""
    return {} if resolution is None else {"height": resolution, "width": resolution}


def mean_of_tokens(embeds: Tensor, mask: Tensor) -> Tensor:
    """Mean (B, D) in float32 of token embeddings (B, N, D) where `mask` (B, N) is not zero."""
    kept = mask.ne(0).unsqueeze(2)
    return (embeds.float() * kept).sum(1) / kept.sum(1).clamp(min=1)


def padded_tokens(prompts: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """Embeddings of prompts, each (n, D) with its own n, as {"prompt_embeds": (B, length, D), "prompt_mask": (B, length)}.

    Conditions of one shape can be cut and joined, whatever prompts they are of.
    """
    embeds = torch.stack([F.pad(tokens, (0, 0, 0, length - len(tokens))) for tokens in prompts])
    mask = torch.stack([torch.arange(length, device=tokens.device) < len(tokens) for tokens in prompts])
    return {"prompt_embeds": embeds, "prompt_mask": mask}
