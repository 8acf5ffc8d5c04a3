"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752): `StableDiffusionPipeline` with its `UNet2DConditionModel`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autoencoder import decode_unscaled, latent_side, posterior_mean
from .base import Cond, Family
from .guidance import guidance_embedding
from .text import image_size, integer_timesteps, prompts_of

# The modules of diffusers' LCM-LoRA recipe: a student that changes its step count moves more than its attention.
UNET_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


class StableDiffusion(Family):
    """Conditions: {"prompt_embeds": (B, 77, D)}, and "timestep_cond" (B, E) for a network that sees its guidance scale.

    The unconditional prompt is "".
    """

    name: ClassVar = "stable_diffusion"
    pipelines: ClassVar = ("StableDiffusionPipeline",)
    component: ClassVar = "unet"
    lora_targets: ClassVar = UNET_LORA_TARGETS

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, scale = cond["prompt_embeds"], cond.get("timestep_cond")
        output: Tensor = model(x_t, t, encoder_hidden_states=text, timestep_cond=scale, return_dict=False)[0]
        return output

    def with_guidance(self, model: nn.Module, cond: Cond, scale: Tensor) -> Cond:
        config: Any = model.config
        return cond | {"timestep_cond": guidance_embedding(scale, config.time_cond_proj_dim)}

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return [model.mid_block]  # type: ignore[list-item]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        scale = pipe.vae_scale_factor
        side = latent_side(resolution, pipe.unet.config.sample_size * scale, max(8, scale), scale)
        return (pipe.unet.config.in_channels, side, side)

    @torch.no_grad()
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        embeds, _ = pipe.encode_prompt(prompts_of(conditions), pipe.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return self.encode_conditions(pipe, [""] * batch_size, resolution)

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return cond["prompt_embeds"].float().mean(1)

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        x0: Tensor = posterior_mean(pipe.vae, images) * pipe.vae.config.scaling_factor
        return x0

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        return decode_unscaled(pipe.vae, x0 / pipe.vae.config.scaling_factor)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        return {"timesteps": integer_timesteps(timesteps), "num_inference_steps": len(timesteps), "guidance_scale": 0.0} | image_size(
            resolution
        )

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}
