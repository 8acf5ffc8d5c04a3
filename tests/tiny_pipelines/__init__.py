"""Real diffusers pipelines of at most 300k parameters with random weights, built offline and the same at every call."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from .flow_transformers import flux, qwen_image, z_image
from .latent_transformers import dit, pixart_alpha, pixart_sigma, sana, wan
from .stable_diffusion import class_conditional, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

PIPELINES: dict[str, Callable[[], Any]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_v": partial(stable_diffusion, "v_prediction"),
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "class_dit": dit,
    "wan": wan,
    "flux": flux,
    "flux_schnell": partial(flux, guidance=False),
    "qwen_image": qwen_image,
    "z_image": z_image,
    "class_conditional_flow": class_conditional,
    "class_conditional_v": partial(class_conditional, "v_prediction"),
    "class_conditional_epsilon": partial(class_conditional, "epsilon"),
}


def example_conditions(pipe: Any, count: int = 2) -> list[Any]:
    """`count` different prompts, or class labels where the pipeline takes those."""
    labelled = type(pipe).__name__ in ("ClassConditionalPipeline", "DiTPipeline")
    return [i if labelled else f"a photo of {i}" for i in range(count)]


# Pixels at which to draw where the pipeline's own size stands in its code and is that of the full model.
RESOLUTIONS = {"PixArtAlphaPipeline": 16, "SanaPipeline": 32, "FluxPipeline": 16, "QwenImagePipeline": 16, "ZImagePipeline": 16}


def resolution_of(pipe: Any) -> int | None:
    """The resolution at which tests draw with `pipe`; None: its own."""
    return RESOLUTIONS.get(type(pipe).__name__)


# Arguments without which these pipelines draw another size than they are asked for.
OWN_SIZE: dict[str, dict[str, Any]] = {
    "PixArtAlphaPipeline": {"use_resolution_binning": False},
    "PixArtSigmaPipeline": {"use_resolution_binning": False},
    "SanaPipeline": {"use_resolution_binning": False},
    "WanPipeline": {"num_frames": 5, "height": 16, "width": 16},
}


def size_arguments(pipe: Any) -> dict[str, Any]:
    """The arguments of a call with which `pipe` draws at `resolution_of(pipe)`."""
    size = resolution_of(pipe)
    return ({} if size is None else {"height": size, "width": size}) | OWN_SIZE.get(type(pipe).__name__, {})
