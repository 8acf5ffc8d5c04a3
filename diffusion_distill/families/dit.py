"""DiT (arXiv:2212.09748), class-conditional: `DiTPipeline` with its `DiTTransformer2DModel`."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import reject
from .autoencoder import decode_unscaled, posterior_mean
from .base import Cond, Family
from .transformer import middle_and_late, without_variance


class DiT(Family):
    """Conditions: {"class_labels": (B,)}. Class `num_embeds_ada_norm` (1000 for ImageNet) is unconditional.

    The pipeline's call takes a number of steps and no timesteps: students are exported with a scheduler whose own grid is theirs.
    """

    name: ClassVar = "dit"
    pipelines: ClassVar = ("DiTPipeline",)
    component: ClassVar = "transformer"
    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        _keep_labels(model)
        output: Tensor = model(x_t, timestep=t, class_labels=cond["class_labels"], return_dict=False)[0]
        return without_variance(output, x_t)

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return middle_and_late(model.transformer_blocks)  # type: ignore[arg-type]

    def called_alone(self, model: nn.Module) -> list[nn.Module]:
        """The embedding of time and class; the network takes the first block's for its last layer too."""
        return [model.transformer_blocks[0].norm1.emb]  # type: ignore[index, union-attr]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        side, scale = pipe.transformer.config.sample_size, self._scale(pipe)
        if resolution not in (None, side * scale):
            raise reject("resolution", resolution, f"the pipeline draws {side * scale} pixels and nothing else")
        return (pipe.transformer.config.in_channels, side, side)

    def image_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, int]:
        return 3, self.sample_shape(pipe, resolution)[-1] * self._scale(pipe)

    @staticmethod
    def _scale(pipe: Any) -> int:
        """Pixels to a latent; this pipeline does not say it itself."""
        halvings: int = len(pipe.vae.config.block_out_channels) - 1
        return 1 << halvings

    def num_classes(self, pipe: Any) -> int | None:
        return int(pipe.transformer.config.num_embeds_ada_norm)

    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        classes = pipe.transformer.config.num_embeds_ada_norm
        for label in conditions:
            if not str(label).isdecimal() or int(label) >= classes:
                raise reject("class label", label, f"the teacher has classes 0 to {classes - 1}")
        return {"class_labels": torch.tensor([int(label) for label in conditions], device=pipe.device)}

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return {"class_labels": torch.full((batch_size,), pipe.transformer.config.num_embeds_ada_norm, device=pipe.device)}

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        config: Any = model.config
        return F.one_hot(cond["class_labels"], config.num_embeds_ada_norm + 1).float()

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        x0: Tensor = posterior_mean(pipe.vae, images) * pipe.vae.config.scaling_factor
        return x0

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        return decode_unscaled(pipe.vae, x0 / pipe.vae.config.scaling_factor)

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        return {"num_inference_steps": len(timesteps), "guidance_scale": 1.0}

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"class_labels": [int(label) for label in conditions]}


def _keep_labels(model: Any) -> None:
    """Every block of a network in training mode would replace a tenth of its labels by the unconditional one, each block others."""
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
