"""Families of diffusers pipelines, by the class name of the pipeline."""

from ..errors import reject
from .base import Cond, Family
from .dit import DiT
from .flux import Flux
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .unet2d import ClassConditionalUNet2D
from .wan import Wan
from .z_image import ZImage

FAMILIES: dict[str, Family] = {
    name: family
    for family in (
        ClassConditionalUNet2D(),
        StableDiffusion(),
        StableDiffusionXL(),
        StableDiffusion3(),
        Flux(),
        QwenImage(),
        ZImage(),
        PixArt(),
        Sana(),
        DiT(),
        Wan(),
    )
    for name in family.pipelines
}


def family_of(pipeline: object) -> Family:
    """The adapter for a pipeline object.

    Raises:
        InputError: when no family serves the pipeline's class.
    """
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise reject("pipeline class", name, "supported: " + ", ".join(sorted(FAMILIES)))
    return FAMILIES[name]


__all__ = ["FAMILIES", "Cond", "Family", "family_of"]
