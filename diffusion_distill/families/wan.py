"""Wan 2.1 and 2.2 (arXiv:2503.20314), text to video: `WanPipeline` with its `WanTransformer3DModel`."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import reject
from .autoencoder import decode_unscaled, posterior_mean
from .base import Cond, Family
from .text import mean_of_tokens, prompts_of
from .transformer import middle_and_late

PIXELS = 16  # the pipeline takes multiples of this for a side
_SIZE = "video_size"  # attribute of a pipeline: (frames, height, width)


class Wan(Family):
    """x0 is a video (C, F, h, w). Conditions: {"prompt_embeds": (B, 512, D)}, zero behind the prompt's end. The unconditional prompt is "".

    A pipeline draws what its call is asked for: 81 frames of 480 x 832 pixels unless `set_video_size` says otherwise; a resolution is a
    square of so many pixels. The call takes a number of steps and no timesteps, so students are exported with a scheduler whose own grid
    is theirs. Images become videos of one frame. Decoded videos are (B, F, C, H, W), as the pipeline's.
    """

    name: ClassVar = "wan"
    pipelines: ClassVar = ("WanPipeline",)
    component: ClassVar = "transformer"
    expert_components: ClassVar = ("transformer_2",)
    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    output: ClassVar = "frames"

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        output: Tensor = model(hidden_states=x_t, timestep=t, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
        return output

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return middle_and_late(model.blocks)  # type: ignore[arg-type]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        frames, height, width = self._size(pipe, resolution)
        scale = pipe.vae_scale_factor_spatial
        return (pipe.transformer.config.in_channels, (frames - 1) // pipe.vae_scale_factor_temporal + 1, height // scale, width // scale)

    def image_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, int]:
        return 3, self._size(pipe, resolution)[1]

    def set_video_size(self, pipe: Any, frames: int, height: int, width: int) -> None:
        """Let teacher and student draw videos of this size, in frames and pixels; remembered in the pipeline object.

        Raises:
            InputError: for a size that the autoencoder and the network cannot have.
        """
        temporal, multiple = pipe.vae_scale_factor_temporal, self._multiple(pipe)
        if frames < 1 or (frames - 1) % temporal:
            raise reject("frames", frames, f"a multiple of {temporal}, and one more")
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % multiple:
                raise reject(name, pixels, f"a positive multiple of {multiple} pixels")
        vars(pipe)[_SIZE] = (frames, height, width)

    def _size(self, pipe: Any, resolution: int | None) -> tuple[int, int, int]:
        call = inspect.signature(type(pipe).__call__).parameters
        own: list[int] = [call[name].default for name in ("num_frames", "height", "width")]
        frames, height, width = vars(pipe).get(_SIZE, own)
        if resolution is None:
            return frames, height, width
        if resolution < 1 or resolution % self._multiple(pipe):
            raise reject("resolution", resolution, f"a positive multiple of {self._multiple(pipe)} pixels is needed")
        return frames, resolution, resolution

    @staticmethod
    def _multiple(pipe: Any) -> int:
        return math.lcm(PIXELS, pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1])

    @torch.no_grad()
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        length = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
        options = {"do_classifier_free_guidance": False, "max_sequence_length": length, "device": pipe.device}
        return {"prompt_embeds": pipe.encode_prompt(prompts_of(conditions), **options)[0]}

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return self.encode_conditions(pipe, [""] * batch_size, resolution)

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        return mean_of_tokens(cond["prompt_embeds"], cond["prompt_embeds"].ne(0).any(2))

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        latents = posterior_mean(pipe.vae, images.unsqueeze(2))
        mean, std = _moments(pipe.vae, latents)
        return (latents - mean) / std

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        mean, std = _moments(pipe.vae, x0)
        return decode_unscaled(pipe.vae, x0 * std + mean).transpose(1, 2)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        return {"num_inference_steps": len(timesteps), "guidance_scale": 1.0}

    def size_arguments(self, pipe: Any, resolution: int | None = None) -> dict[str, Any]:
        return dict(zip(("num_frames", "height", "width"), self._size(pipe, resolution)))

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"prompt": prompts_of(conditions)}

    def expert_options(self, boundaries: Sequence[float], schedule_length: int) -> dict[str, Any]:
        return {"boundary_ratio": boundaries[0] / schedule_length if boundaries else None}


def _moments(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and spread (C, 1, 1, 1) of the VAE's latents."""
    mean, std = (torch.tensor(list(values), device=like.device) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)
