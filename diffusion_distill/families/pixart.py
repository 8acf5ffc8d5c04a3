"""PixArt-alpha (arXiv:2310.00426) and PixArt-Sigma (arXiv:2403.04692), with their `PixArtTransformer2DModel`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autoencoder import decode_unscaled, latent_side, posterior_mean
from .base import Cond, Family
from .text import image_size, integer_timesteps, mean_of_tokens, prompts_of
from .transformer import middle_and_late, without_variance


class PixArt(Family):
    """Conditions: {"prompt_embeds": (B, 120 or 300, D), "prompt_mask": (B, 120 or 300)}, and {"resolution": (B, 2), "aspect_ratio":
    (B, 1)} for the networks of 1024 pixels of PixArt-alpha, which see the size of the image. The unconditional prompt is "".

    Images have the size that is asked for: the pipelines' own detour over a table of sizes and back is off.
    """

    name: ClassVar = "pixart"
    pipelines: ClassVar = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    component: ClassVar = "transformer"
    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        size = {name: cond.get(name) for name in ("resolution", "aspect_ratio")}
        text = {"encoder_hidden_states": cond["prompt_embeds"], "encoder_attention_mask": cond["prompt_mask"]}
        output: Tensor = model(x_t, timestep=t, **text, added_cond_kwargs=size, return_dict=False)[0]
        return without_variance(output, x_t)

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return middle_and_late(model.transformer_blocks)  # type: ignore[arg-type]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        config, scale = pipe.transformer.config, pipe.vae_scale_factor
        side = latent_side(resolution, config.sample_size * scale, max(8, scale * config.patch_size), scale)
        return (config.in_channels, side, side)

    @torch.no_grad()
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        prompts = prompts_of(conditions)
        embeds, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=pipe.device, clean_caption=True)
        cond = {"prompt_embeds": embeds, "prompt_mask": mask}
        if not pipe.transformer.use_additional_conditions:
            return cond
        side = resolution or pipe.transformer.config.sample_size * pipe.vae_scale_factor
        size = torch.tensor([[side, side]], dtype=embeds.dtype, device=pipe.device).repeat(len(prompts), 1)
        return cond | {"resolution": size, "aspect_ratio": torch.ones_like(size[:, :1])}

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return self.encode_conditions(pipe, [""] * batch_size, resolution)

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return mean_of_tokens(cond["prompt_embeds"], cond["prompt_mask"])

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        x0: Tensor = posterior_mean(pipe.vae, images) * pipe.vae.config.scaling_factor
        return x0

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        return decode_unscaled(pipe.vae, x0 / pipe.vae.config.scaling_factor)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        grid = {"timesteps": integer_timesteps(timesteps), "num_inference_steps": len(timesteps)}
        return grid | {"guidance_scale": 0.0, "use_resolution_binning": False} | image_size(resolution)

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}
