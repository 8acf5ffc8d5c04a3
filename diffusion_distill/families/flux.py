"""FLUX.1 dev and schnell (Black Forest Labs, 2024): `FluxPipeline` with its `FluxTransformer2DModel`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autoencoder import decode_unscaled, latent_side, posterior_mean
from .base import Cond, Family
from .packing import PATCH, pack, unpack
from .text import image_size, prompts_of

GUIDANCE = 3.5  # of networks that see one, as the pipeline calls them unless told otherwise


class Flux(Family):
    """Conditions: {"prompt_embeds": (B, 512, D), "pooled": (B, P)}, and "guidance" (B,) for a network that sees it (dev).

    x0 is latents (C, h, w); they become tokens of 2x2 pixels in `call`. Teacher and student see the guidance `GUIDANCE`, with which the
    student is then sampled. True classifier-free guidance comes on top of it; its unconditional prompt is "".
    """

    name: ClassVar = "flux"
    pipelines: ClassVar = ("FluxPipeline",)
    component: ClassVar = "transformer"
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    )

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network takes t / 1000, and the time in its own dtype, as in the pipeline."""
        text = {"encoder_hidden_states": cond["prompt_embeds"], "pooled_projections": cond["pooled"], "guidance": cond.get("guidance")}
        positions = {"txt_ids": x_t.new_zeros(cond["prompt_embeds"].shape[1], 3), "img_ids": _positions(x_t)}
        inputs = {"hidden_states": pack(x_t), "timestep": t.to(x_t.dtype) / 1000}
        output: Tensor = model(**inputs, **text, **positions, return_dict=False)[0]
        return unpack(output, x_t)

    def pack(self, x0: Tensor) -> Tensor:
        return pack(x0)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return unpack(packed, like)

    def with_guidance(self, model: nn.Module, cond: Cond, scale: Tensor) -> Cond:
        config: Any = model.config
        return cond | {"guidance": scale.float()} if config.guidance_embeds else super().with_guidance(model, cond, scale)

    def taps(self, model: nn.Module) -> list[nn.Module]:
        """The last block of two streams and the middle one of a single stream."""
        double, single = (getattr(model, name) for name in ("transformer_blocks", "single_transformer_blocks"))
        return [double[-1], single[len(single) // 2]]

    def feature(self, output: Any, x_t: Tensor) -> Tensor:
        """Image tokens (B, N, D) of a block's (text, image)."""
        image: Tensor = output[1]
        return image

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        scale = pipe.vae_scale_factor
        side = latent_side(resolution, pipe.default_sample_size * scale, scale * PATCH, scale)
        return (pipe.transformer.config.in_channels // PATCH**2, side, side)

    @torch.no_grad()
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        embeds, pooled, _ = pipe.encode_prompt(prompts_of(conditions), device=pipe.device)
        cond = {"prompt_embeds": embeds, "pooled": pooled}
        if pipe.transformer.config.guidance_embeds:
            cond["guidance"] = torch.full((len(embeds),), GUIDANCE, device=pipe.device)
        return cond

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
        """`guidance_scale` is the network's input here (schnell has none and ignores it); `true_cfg_scale` 1 is guidance off."""
        grid = {"sigmas": [t / schedule_length for t in timesteps], "num_inference_steps": len(timesteps)}
        return grid | {"guidance_scale": GUIDANCE, "true_cfg_scale": 1.0} | image_size(resolution)

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}


def _positions(x_t: Tensor) -> Tensor:
    """(0, row, column) of each image token, (N, 3)."""
    rows, columns = (torch.arange(side // PATCH, device=x_t.device) for side in x_t.shape[-2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).to(x_t.dtype)
