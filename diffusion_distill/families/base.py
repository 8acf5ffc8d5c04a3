"""What the toolkit must know about one family of diffusers pipelines, and nothing that belongs to a training method."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..errors import reject

Cond = dict[str, Tensor]  # network inputs besides x_t and t, batch dimension first


class Family(ABC):
    """Adapter of one family: one small file, one line in the registry, one row in the tests."""

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # pipeline class names that this adapter serves
    component: ClassVar[str]  # attribute of the pipeline that holds the denoising network
    expert_components: ClassVar[tuple[str, ...]] = ()  # attributes for the networks of later steps, where a pipeline can switch
    lora_targets: ClassVar[tuple[str, ...]]  # peft `target_modules`
    output: ClassVar[Literal["images", "frames"]] = "images"  # field of the pipeline's output

    @abstractmethod
    def call(self, model: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Raw network output (B, ...) at x_t (B, ...) and t (B,), in the pipeline's convention of time and sign."""

    @abstractmethod
    def taps(self, model: nn.Module) -> list[nn.Module]:
        """Modules whose outputs serve a discriminator, in the order in which the network runs them."""

    def called_alone(self, model: nn.Module) -> list[nn.Module]:
        """Modules inside a block that the network also calls by themselves, outside of the block."""
        return []

    def feature(self, output: Any, x_t: Tensor) -> Tensor:
        """What a discriminator sees of a tapped module's `output` when the network runs on x_t (B, ...): a map or tokens of the image."""
        feature: Tensor = output[0] if isinstance(output, tuple) else output
        return feature

    def pack(self, x0: Tensor) -> Tensor:
        """x0 (B, ...) in the layout in which the pipeline's scheduler steps it and draws noise."""
        return x0

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """Inverse of `pack` for an x0 of the shape of `like`."""
        return packed

    @abstractmethod
    def sample_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, ...]:
        """Shape of one x0 without the batch dimension, for images of `resolution` pixels (None: the pipeline's own)."""

    def image_shape(self, pipe: Any, resolution: int | None = None) -> tuple[int, int]:
        """(channels, pixels of a side) of the images that `encode_images` takes; latent families take RGB."""
        return 3, self.sample_shape(pipe, resolution)[-1] * pipe.vae_scale_factor

    def set_video_size(self, pipe: Any, frames: int, height: int, width: int) -> None:
        """Let teacher and student draw videos of this size, in frames and pixels.

        Raises:
            InputError: for a pipeline that draws no videos, and a size that it cannot draw.
        """
        raise reject("video_size", (frames, height, width), f"none: a {type(pipe).__name__} draws no videos")

    def num_classes(self, pipe: Any) -> int | None:
        """Number of class labels; None for a pipeline of prompts."""
        return None

    @abstractmethod
    def encode_conditions(self, pipe: Any, conditions: Sequence[Any], resolution: int | None = None) -> Cond:
        """Network inputs for a list of prompts or class labels; some networks see the `resolution` in pixels too."""

    @abstractmethod
    def unconditional(self, pipe: Any, batch_size: int, resolution: int | None = None) -> Cond:
        """Network inputs for classifier-free guidance, as the teacher was trained with them."""

    @abstractmethod
    def condition_vector(self, model: nn.Module, cond: Cond) -> Tensor:
        """One float vector a sample, (B, D), for a conditional discriminator."""

    @abstractmethod
    def encode_images(self, pipe: Any, images: Tensor) -> Tensor:
        """x0 (B, ...) of images (B, C, H, W) in [-1, 1]."""

    @abstractmethod
    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        """Images (B, C, H, W), or the frames (B, F, C, H, W) of videos, in [-1, 1], unclamped, from x0 (B, ...)."""

    @abstractmethod
    def pipeline_call(self, timesteps: Sequence[float], schedule_length: int, resolution: int | None = None) -> dict[str, Any]:
        """Keyword arguments with which the exported pipeline visits exactly `timesteps` at `resolution`, guidance off."""

    def size_arguments(self, pipe: Any, resolution: int | None = None) -> dict[str, Any]:
        """More of these, where the pipeline would draw another size than `sample_shape` without them whatever the resolution."""
        return {}

    @abstractmethod
    def condition_argument(self, conditions: Sequence[Any]) -> dict[str, Any]:
        """The same prompts or class labels as the pipeline's own keyword argument."""

    def with_guidance(self, model: nn.Module, cond: Cond, scale: Tensor) -> Cond:
        """`cond` with the guidance scales (B,) for a network that sees them.

        Raises:
            InputError: for a family whose networks see none.
        """
        raise reject("guidance", "embedded", f"'fixed': networks of the family {self.name!r} see no guidance scale")

    def expert_options(self, boundaries: Sequence[float], schedule_length: int) -> dict[str, Any]:
        """Constructor options of a pipeline with a network for the timesteps from each of `boundaries` on, and one for those below."""
        return {}
