"""Stable Diffusion XL (arXiv:2307.01952): `StableDiffusionXLPipeline` with its `UNet2DConditionModel`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autoencoder import decode_unscaled, latent_side, posterior_mean
from .base import Cond, Family
from .guidance import guidance_embedding
from .stable_diffusion import UNET_LORA_TARGETS
from .text import image_size, integer_timesteps, prompts_of


class StableDiffusionXL(Family):
    """Conditions: {"prompt_embeds": (B, 77, D), "pooled": (B, P), "time_ids": (B, 6)}, and "timestep_cond" (B, E) for a network that sees
    its guidance scale.

    `time_ids` (original size, crop corner, target size) are the pipeline's defaults: its own resolution, nothing cropped.
    """

    name: ClassVar = "stable_diffusion_xl"
    pipelines: ClassVar = ("StableDiffusionXLPipeline",)
    component: ClassVar = "unet"
    lora_targets: ClassVar = UNET_LORA_TARGETS

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        inputs = {"encoder_hidden_states": cond["prompt_embeds"], "timestep_cond": cond.get("timestep_cond")}
        output: Tensor = model(x_t, t, **inputs, added_cond_kwargs=added, return_dict=False)[0]
        return output

    def with_guidance(self, model: nn.Module, cond: Cond, scale: Tensor) -> Cond:
        config: Any = model.config
        return cond | {"timestep_cond": guidance_embedding(scale, config.time_cond_proj_dim)}

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return [model.mid_block]  # type: ignore[list-item]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        scale = pipe.vae_scale_factor
        side = latent_side(resolution, pipe.default_sample_size * scale, max(8, scale), scale)
        return (pipe.unet.config.in_channels, side, side)

    @torch.no_grad()
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        prompts = prompts_of(conditions)
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)
        size = resolution or pipe.default_sample_size * pipe.vae_scale_factor
        time_ids = torch.tensor([[size, size, 0.0, 0.0, size, size]], device=pipe.device).repeat(len(prompts), 1)
        return {"prompt_embeds": embeds, "pooled": pooled, "time_ids": time_ids}

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        """Zeros where the pipeline says so (SDXL base was trained with them), else ""; `time_ids` are kept."""
        cond = self.encode_conditions(pipe, [""] * batch_size, resolution)
        if not pipe.config.force_zeros_for_empty_prompt:
            return cond
        return cond | {name: torch.zeros_like(cond[name]) for name in ("prompt_embeds", "pooled")}

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return cond["pooled"].float()

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        latents = posterior_mean(pipe.vae, images)
        mean, std = self._latent_moments(pipe, latents)
        return (latents - mean) / std

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        mean, std = self._latent_moments(pipe, x0)
        return decode_unscaled(pipe.vae, x0 * std + mean)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        return {"timesteps": integer_timesteps(timesteps), "num_inference_steps": len(timesteps), "guidance_scale": 0.0} | image_size(
            resolution
        )

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}

    @staticmethod
    def _latent_moments(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale, each (C, 1, 1) or scalar, of the VAE's latents; models on this pipeline may whiten each channel."""
        config = pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            mean, std = [0.0], [1.0]
        offset, spread = (torch.tensor(list(values), device=like.device).view(-1, 1, 1) for values in (mean, std))
        return offset, spread / config.scaling_factor
