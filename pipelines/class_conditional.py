"""Class-conditional image generation in pixel space with a `UNet2DModel`.

This file imports nothing beyond diffusers, so it travels as `pipeline.py` inside every folder that it saves, and
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads such a folder anywhere.
"""

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

_SOURCE = Path(__file__).read_text(encoding="utf-8")  # read now: the cache that holds a loaded copy may be rewritten later


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of given classes.

    Example:
        >>> pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        >>> images = pipe(class_labels=[3, 3, 7], generator=torch.Generator().manual_seed(0)).images

    Args:
        unet: network with `num_class_embeds` = classes + 1; the last embedding is the unconditional one. Pixels lie in [-1, 1].
        unet_2: network of the timesteps below `boundaries[0]`, where `unet` serves the noisier ones alone; `unet_3` and `unet_4` likewise.
        scheduler: a DDPM-style or flow-matching scheduler.
        grids: the timesteps that a few-step student was trained to visit, a list for each number of steps that it serves; the first is
            the default of a call. None for a many-step model.
        num_inference_steps: default number of steps where `grids` is None.
        boundaries: timesteps at which the networks change, from noise to data, one fewer than there are networks.
        eta: share of fresh noise, for the schedulers that take it (DDIM, TCD).
        guidance_scale: default classifier-free guidance, uncond + scale (cond - uncond); 1 is off and needs one network call a step.
    """

    model_cpu_offload_seq = "unet->unet_2->unet_3->unet_4"
    _optional_components: ClassVar[list[str]] = ["unet_2", "unet_3", "unet_4"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        grids: list[list[float]] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        unet_2: UNet2DModel | None = None,
        unet_3: UNet2DModel | None = None,
        unet_4: UNet2DModel | None = None,
        boundaries: list[float] | None = None,
        eta: float = 0.0,
    ):
        super().__init__()
        if not unet.config.num_class_embeds:
            raise ValueError(f"unet.num_class_embeds: got {unet.config.num_class_embeds!r}; classes + 1 is needed")
        later = [network is not None for network in (unet_2, unet_3, unet_4)]
        if later != [i < len(boundaries or ()) for i in range(3)]:
            raise ValueError(f"boundaries: got {boundaries} for {1 + sum(later)} networks; one fewer than networks is needed")
        self.register_modules(unet=unet, unet_2=unet_2, unet_3=unet_3, unet_4=unet_4, scheduler=scheduler)
        self.register_to_config(grids=grids, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        self.register_to_config(boundaries=boundaries, eta=eta)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        timesteps: Sequence[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image for each label.

        Args:
            class_labels: classes, each in 0 ... `num_class_embeds` - 2.
            num_inference_steps: visit the trained grid of so many steps; where there is none, the scheduler's own, for flow matching
                sigmas 1 - i/N.
            guidance_scale: None takes the folder's own.
            timesteps: visit exactly these, from noise to data. With neither this nor `num_inference_steps`, the folder's first grid is
                used.
            generator: one for the whole batch, or a list with one for each image.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), the latter two in [0, 1].
            return_dict: False returns a tuple.

        Raises:
            ValueError: for an unknown label, and where the scheduler cannot visit the timesteps asked for.
        """
        labels, scale = self._check_labels(class_labels), self.config.guidance_scale if guidance_scale is None else guidance_scale
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type: got {output_type!r}; accepted: 'pil', 'np', 'pt'")
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"generator: got a list of {len(generator)} for {len(labels)} labels; one for each image is needed")
        self._set_timesteps(num_inference_steps, timesteps)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), self.unet.config.in_channels, height, width)
        x_t = randn_tensor(shape, generator=generator, device=labels.device, dtype=torch.float32)
        images = self._denoise(x_t, labels, scale, generator).div(2).add(0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        output: Any = images if output_type == "pt" else images.cpu().permute(0, 2, 3, 1).numpy()
        output = self.numpy_to_pil(output) if output_type == "pil" else output
        return ImagePipelineOutput(images=output) if return_dict else (output,)

    def _denoise(self, x_t: Tensor, labels: Tensor, scale: float, generator: Any) -> Tensor:
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in {"generator": generator, "eta": self.config.eta}.items() if name in accepted}
        if not self._is_flow:
            x_t = x_t * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = x_t if self._is_flow else self.scheduler.scale_model_input(x_t, t)
            x_t = self.scheduler.step(self._predict(model_input, t, labels, scale), t, x_t, **extra, return_dict=False)[0]
        return x_t

    def _predict(self, x_t: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Network output (B, C, H, W) in float32; with guidance, both halves run as one batch."""
        unet = (self.unet, self.unet_2, self.unet_3, self.unet_4)[sum(float(t) < boundary for boundary in self.config.boundaries or ())]
        if scale == 1:
            return unet(x_t.to(unet.dtype), t, class_labels=labels, return_dict=False)[0].float()
        nothing = torch.full_like(labels, unet.config.num_class_embeds - 1)
        x_twice, both = torch.cat([x_t, x_t]).to(unet.dtype), torch.cat([nothing, labels])
        uncond, cond = unet(x_twice, t, class_labels=both, return_dict=False)[0].float().chunk(2)
        return uncond + scale * (cond - uncond)

    def _check_labels(self, class_labels: int | Sequence[int] | Tensor) -> Tensor:
        labels = torch.atleast_1d(torch.as_tensor(class_labels, device=self._execution_device))
        classes = self.unet.config.num_class_embeds - 1
        numeric = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.ndim != 1 or len(labels) == 0 or not numeric or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels: got {class_labels!r}; whole numbers from 0 to {classes - 1} are accepted")
        return labels.long()

    @property
    def _is_flow(self) -> bool:
        return type(self.scheduler).__name__.startswith("FlowMatch")

    def _set_timesteps(self, steps: int | None, timesteps: Sequence[float] | None) -> None:
        if steps is not None and timesteps is not None:
            raise ValueError("num_inference_steps and timesteps: pass one of them")
        if timesteps is None and self.config.grids:
            grids = {len(grid): grid for grid in reversed(self.config.grids)}
            timesteps = self.config.grids[0] if steps is None else grids.get(steps)
        if timesteps is not None:
            self._visit_exactly(list(timesteps))
            return
        steps = self.config.num_inference_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"num_inference_steps: got {steps}; at least 1 is needed")
        # Left alone, flow-matching schedulers space sigmas from 1 to 0.001 and waste the last step.
        grid: dict[str, Any] = {"sigmas": [i / steps for i in range(steps, 0, -1)]} if self._is_flow else {"num_inference_steps": steps}
        self.scheduler.set_timesteps(**grid, device=self._execution_device)

    def _visit_exactly(self, timesteps: list[float]) -> None:
        if self._is_flow:
            grid: dict[str, Any] = {"sigmas": [t / self.scheduler.config.num_train_timesteps for t in timesteps]}
        elif "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters:
            grid = {"timesteps": [int(t) for t in timesteps]}
        else:
            grid = {"num_inference_steps": len(timesteps)}
        self.scheduler.set_timesteps(**grid, device=self._execution_device)
        visited, asked = self.scheduler.timesteps.double().cpu(), torch.tensor(timesteps, dtype=torch.float64)
        # float32 sigmas: a grid of thirds comes back with an error of some units in the last place
        if len(visited) != len(asked) or not torch.allclose(visited, asked, rtol=1e-6, atol=0):
            name = type(self.scheduler).__name__
            raise ValueError(f"timesteps: got {timesteps}; with its configuration {name} would visit {visited.tolist()}")

    def to_json_string(self) -> str:
        """The text of `model_index.json`, which names the `pipeline.py` beside it."""
        config = json.loads(super().to_json_string()) | {"_class_name": ["pipeline", "ClassConditionalPipeline"]}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` and this file as `pipeline.py`; `save_pretrained` ends with this."""
        os.makedirs(save_directory, exist_ok=True)
        Path(save_directory, "pipeline.py").write_text(_SOURCE, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
