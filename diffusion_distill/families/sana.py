"""Sana (arXiv:2410.10629): `SanaPipeline` with its `SanaTransformer2DModel` and the deep-compression autoencoder."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autoencoder import decode_unscaled, latent_side
from .base import Cond, Family
from .text import image_size, mean_of_tokens, prompts_of
from .transformer import middle_and_late, without_variance


class Sana(Family):
    """Conditions: {"prompt_embeds": (B, 300, D), "prompt_mask": (B, 300)}.

    Prompts come with the pipeline's own instruction to the language model that encodes them; the unconditional prompt is "" without it.
    Images have the size that is asked for: the pipeline's own detour over a table of sizes and back is off.
    """

    name: ClassVar = "sana"
    pipelines: ClassVar = ("SanaPipeline",)
    component: ClassVar = "transformer"
    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        config: Any = model.config
        text = {"encoder_hidden_states": cond["prompt_embeds"], "encoder_attention_mask": cond["prompt_mask"]}
        output: Tensor = model(x_t, timestep=t * config.timestep_scale, **text, return_dict=False)[0]
        return without_variance(output, x_t)

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return middle_and_late(model.transformer_blocks)  # type: ignore[arg-type]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        config, scale = pipe.transformer.config, pipe.vae_scale_factor
        side = latent_side(resolution, config.sample_size * scale, max(32, scale * config.patch_size), scale)
        return (config.in_channels, side, side)

    @torch.no_grad()
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        call = inspect.signature(type(pipe).__call__).parameters
        return self._encode(pipe, conditions, call["complex_human_instruction"].default)

    @torch.no_grad()
    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return self._encode(pipe, [""] * batch_size, None)

    def _encode(self, pipe: Any, conditions: Sequence[Any], instruction: list[str] | None) -> Cond:
        options = {"do_classifier_free_guidance": False, "device": pipe.device, "complex_human_instruction": instruction}
        embeds, mask, _, _ = pipe.encode_prompt(prompts_of(conditions), **options)
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return mean_of_tokens(cond["prompt_embeds"], cond["prompt_mask"])

    @torch.no_grad()
    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        latents: Tensor = pipe.vae.encode(images.to(pipe.vae.device, pipe.vae.dtype), return_dict=False)[0]  # no distribution here
        return latents.float() * float(pipe.vae.config.scaling_factor)

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        return decode_unscaled(pipe.vae, x0 / pipe.vae.config.scaling_factor)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        """Sigmas, which the exported scheduler must not shift again: it needs shift = 1."""
        sigmas = [t / schedule_length for t in timesteps]
        return {"sigmas": sigmas, "num_inference_steps": len(sigmas), "guidance_scale": 0.0, "use_resolution_binning": False}

    def size_arguments(self, pipe: Any, resolution: int | None = None) -> dict[str, Any]:
        """Always: the pipeline's own default is 1024 pixels for every network."""
        return image_size(self.image_shape(pipe, resolution)[1])

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}
