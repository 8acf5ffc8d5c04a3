"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): `StableDiffusion3Pipeline` with its `SD3Transformer2DModel`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autoencoder import decode_unscaled, latent_side, posterior_mean
from .base import Cond, Family
from .text import image_size, prompts_of


class StableDiffusion3(Family):
    """Conditions: {"prompt_embeds": (B, 77 + 256, D), "pooled": (B, P)}. The unconditional prompt is "" for every encoder."""

    name: ClassVar = "stable_diffusion_3"
    pipelines: ClassVar = ("StableDiffusion3Pipeline",)
    component: ClassVar = "transformer"
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text = {"encoder_hidden_states": cond["prompt_embeds"], "pooled_projections": cond["pooled"]}
        output: Tensor = model(hidden_states=x_t, timestep=t, **text, return_dict=False)[0]
        return output

    def taps(self, model: nn.Module) -> list[nn.Module]:
        """Image tokens (B, N, D) after the attention of a middle and a late block (the place of LADD's heads, arXiv:2403.12015).

        A joint block returns (text, image); its `norm2` sees the image tokens alone, and hands them on with unit variance.
        """
        blocks: Any = model.transformer_blocks
        return [blocks[i].norm2 for i in sorted({len(blocks) // 2, 3 * len(blocks) // 4})]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        scale, patch = pipe.vae_scale_factor, pipe.patch_size
        side = latent_side(resolution, pipe.default_sample_size * scale, scale * patch, scale)
        return (pipe.transformer.config.in_channels, side, side)

    @torch.no_grad()
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        prompts = prompts_of(conditions)
        options = {"device": pipe.device, "do_classifier_free_guidance": False}
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, **options)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return self.encode_conditions(pipe, [""] * batch_size, resolution)

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return cond["pooled"].float()

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        x0: Tensor = (posterior_mean(pipe.vae, images) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        return x0

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        return decode_unscaled(pipe.vae, x0 / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        """Sigmas, which the exported scheduler must not shift again: it needs shift = 1."""
        sigmas = [t / schedule_length for t in timesteps]
        return {"sigmas": sigmas, "num_inference_steps": len(sigmas), "guidance_scale": 0.0} | image_size(resolution)

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}
