"""Class-conditional pixel-space `UNet2DModel` (pipelines/class_conditional.py). Class `num_class_embeds - 1` is unconditional."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import reject
from .base import Cond, Family


class ClassConditionalUNet2D(Family):
    name: ClassVar = "unet2d"
    pipelines: ClassVar = ("ClassConditionalPipeline",)
    component: ClassVar = "unet"
    expert_components: ClassVar = ("unet_2", "unet_3", "unet_4")
    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj")

    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        output: Tensor = model(x_t, t, class_labels=cond["class_labels"], return_dict=False)[0]
        return output

    def taps(self, model: nn.Module) -> list[nn.Module]:
        return [model.mid_block]  # type: ignore[list-item]

    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        size = pipe.unet.config.sample_size
        if resolution not in (None, size):
            raise reject("resolution", resolution, f"the teacher draws {size} pixels and nothing else")
        return (pipe.unet.config.in_channels, size, size)

    def image_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, int]:
        channels, _, size = self.sample_shape(pipe, resolution)
        return channels, size

    def num_classes(self, pipe: Any) -> int | None:
        return int(pipe.unet.config.num_class_embeds) - 1

    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        classes = pipe.unet.config.num_class_embeds - 1
        for label in conditions:
            if not str(label).isdecimal() or int(label) >= classes:
                raise reject("class label", label, f"the teacher has classes 0 to {classes - 1}")
        return {"class_labels": torch.tensor([int(label) for label in conditions], device=pipe.device)}

    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        return {"class_labels": torch.full((batch_size,), pipe.unet.config.num_class_embeds - 1, device=pipe.device)}

    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        config: Any = model.config
        return F.one_hot(cond["class_labels"], config.num_class_embeds).float()

    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        return images

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        return x0

    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        return {}  # the grid and the guidance are the exported pipeline's own defaults

    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        return {"class_labels": [int(label) for label in conditions]}

    def expert_options(self, boundaries: Sequence[float], schedule_length: int) -> dict[str, Any]:
        return {"boundaries": list(boundaries)}
