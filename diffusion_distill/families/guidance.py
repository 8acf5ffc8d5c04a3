"""Networks that see the guidance scale they were distilled at (arXiv:2210.03142; LCM, arXiv:2310.04378): `timestep_cond` of a UNet."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import reject

DIMENSION = 256  # of the released LCM models


def guidance_embedding(scale: Tensor, dimension: int) -> Tensor:
    """Sinusoids (B, dimension) of 1000 w for guidance scales 1 + w, (B,), as the stock pipelines compute them."""
    half = dimension // 2
    frequency = torch.exp(torch.arange(half, device=scale.device, dtype=torch.float32) * (-math.log(10_000) / (half - 1)))
    angle = (scale.float() - 1)[:, None] * 1000 * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def with_guidance_input(model: Any, dimension: int = DIMENSION) -> nn.Module:
    """The same network with `time_cond_proj_dim`; the new input's weights are zero, so that nothing changes before training.

    Raises:
        InputError: for a network that has no such input, and for one that uses it already.
    """
    if model.config.get("time_cond_proj_dim", dimension) is not None:
        raise reject("guidance", "embedded", f"'fixed': {type(model).__name__} has no free input for the scale (time_cond_proj_dim)")
    extended = type(model).from_config(model.config, time_cond_proj_dim=dimension)
    missing, unexpected = extended.load_state_dict(model.state_dict(), strict=False)
    if list(missing) != ["time_embedding.cond_proj.weight"] or unexpected:
        raise RuntimeError(f"time_cond_proj_dim changed more than one input: missing {missing}, unexpected {unexpected}")
    nn.init.zeros_(extended.time_embedding.cond_proj.weight)
    return extended.to(next(model.parameters()).device)
