"""Z-Image (arXiv:2511.22699): `ZImagePipeline` with its `ZImageTransformer2DModel`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autoencoder import decode_unscaled, latent_side, posterior_mean
from .base import Cond, Family
from .text import image_size, mean_of_tokens, padded_tokens, prompts_of
from .transformer import middle_and_late

PIXELS = 1024  # of a side, unless the pipeline is told otherwise
PATCH = 2
TOKENS = 512  # of a prompt at most, as the pipeline cuts it unless told otherwise


class ZImage(Family):
    """Conditions: {"prompt_embeds": (B, 512, D), "prompt_mask": (B, 512)}, zero behind the last token. The unconditional prompt is "".

    The pipeline's `guidance_scale` is w of cond + w (cond - uncond), one less than the scale of this toolkit.
    """

    name: ClassVar = "z_image"
    pipelines: ClassVar = ("ZImagePipeline",)
    component: ClassVar = "transformer"
    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's time runs from noise at 0 to data at 1, its output is x0 - eps, and it takes lists: images have a frame."""
        lengths = cond["prompt_mask"].sum(1).tolist()
        prompts = [tokens[:length] for tokens, length in zip(cond["prompt_embeds"], lengths)]
        outputs = model(list(x_t.unsqueeze(2)), (1000 - t) / 1000, prompts, return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return middle_and_late(model.layers)  # type: ignore[arg-type]

    def feature(self, output: Any, x_t: Tensor) -> Tensor:
        """Image tokens (B, N, D), which come before the prompt's."""
        image: Tensor = output[:, : x_t[0, 0].numel() // PATCH**2]
        return image

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        scale = pipe.vae_scale_factor
        side = latent_side(resolution, PIXELS, scale * PATCH, scale)
        return (pipe.transformer.config.in_channels, side, side)

    @torch.no_grad()
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        embeds, _ = pipe.encode_prompt(prompts_of(conditions), pipe.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
        return padded_tokens(embeds, TOKENS)

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return self.encode_conditions(pipe, [""] * batch_size, resolution)

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return mean_of_tokens(cond["prompt_embeds"], cond["prompt_mask"])

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        x0: Tensor = (posterior_mean(pipe.vae, images) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        return x0

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        return decode_unscaled(pipe.vae, x0 / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        grid = {"sigmas": [t / schedule_length for t in timesteps], "num_inference_steps": len(timesteps)}
        return grid | {"guidance_scale": 0.0} | image_size(resolution)

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}
