"""Qwen-Image (arXiv:2508.02324): `QwenImagePipeline` with its `QwenImageTransformer2DModel`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autoencoder import decode_unscaled, latent_side, posterior_mean
from .base import Cond, Family
from .packing import PATCH, pack, unpack
from .text import image_size, mean_of_tokens, padded_tokens, prompts_of
from .transformer import middle_and_late

TOKENS = 512  # of a prompt at most, as the pipeline cuts it unless told otherwise
UNCONDITIONAL = " "  # the negative prompt of the model card


class QwenImage(Family):
    """Conditions: {"prompt_embeds": (B, 512, D), "prompt_mask": (B, 512)}, zero behind the last token. The unconditional prompt is " ".

    x0 is latents (C, h, w); they become tokens of 2x2 pixels in `call`. The pipeline scales a guided prediction down to the norm of the
    conditional one, token by token; a teacher is guided here without that.
    """

    name: ClassVar = "qwen_image"
    pipelines: ClassVar = ("QwenImagePipeline",)
    component: ClassVar = "transformer"
    lora_targets: ClassVar = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network takes t / 1000, and as many text tokens as the longest prompt has, as in the pipeline."""
        mask = cond["prompt_mask"]
        longest = int(mask.sum(1).max())
        text = {"encoder_hidden_states": cond["prompt_embeds"][:, :longest], "encoder_hidden_states_mask": mask[:, :longest]}
        if bool(mask[:, :longest].all()):  # the network then takes the faster attention, which knows no mask
            del text["encoder_hidden_states_mask"]
        height, width = (side // PATCH for side in x_t.shape[-2:])
        inputs = {"hidden_states": pack(x_t), "timestep": t.to(x_t.dtype) / 1000, "img_shapes": [[(1, height, width)]] * len(x_t)}
        output: Tensor = model(**inputs, **text, return_dict=False)[0]
        return unpack(output, x_t)

    def pack(self, x0: Tensor) -> Tensor:
        return pack(x0)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return unpack(packed, like)

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return middle_and_late(model.transformer_blocks)  # type: ignore[arg-type]

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
        embeds, mask = pipe.encode_prompt(prompts_of(conditions), pipe.device, max_sequence_length=TOKENS)
        lengths = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return padded_tokens([tokens[:length] for tokens, length in zip(embeds, lengths)], TOKENS)

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return self.encode_conditions(pipe, [UNCONDITIONAL] * batch_size, resolution)

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return mean_of_tokens(cond["prompt_embeds"], cond["prompt_mask"])

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        mean, std = _moments(pipe, images)
        return (posterior_mean(pipe.vae, images.unsqueeze(2)).squeeze(2) - mean) / std

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        mean, std = _moments(pipe, x0)
        return decode_unscaled(pipe.vae, (x0 * std + mean).unsqueeze(2)).squeeze(2)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        grid = {"sigmas": [t / schedule_length for t in timesteps], "num_inference_steps": len(timesteps)}
        return grid | {"true_cfg_scale": 1.0} | image_size(resolution)

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}


def _moments(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (C, 1, 1), of the VAE's latents."""
    config = pipe.vae.config
    mean, std = (torch.tensor(values, device=like.device).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return mean, std
