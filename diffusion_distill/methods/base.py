"""What a distillation method is: which networks it needs, and which losses train which of them in which order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import reject
from ..families import Cond
from ..networks import Networks
from ..random import SampleRandom
from ..sampler import FewStepSampler
from ..schedule import NoiseSchedule


@dataclass
class Batch:
    """One micro-batch of B samples. `carried` hands tensors from one turn to the next turns of the same step."""

    cond: Cond
    uncond: Cond
    sample_shape: tuple[int, ...]  # of one sample, without the batch dimension
    random: SampleRandom
    x0: Tensor | None = None  # (B, ...) encoded images, where the method asks for images
    carried: dict[str, Tensor] = field(default_factory=dict)


Loss = tuple[Tensor, dict[str, Tensor]]  # scalar to minimise, scalars to log
Update = tuple[tuple[str, ...], Callable[[Networks, Batch], Loss]]


def check_choices(method: object) -> None:
    """Raise InputError for a `Literal` field of a dataclass that holds none of its values; Python does not look."""
    hints = get_type_hints(type(method))
    for f in fields(method):  # type: ignore[arg-type]
        choices, value = get_args(hints[f.name]), getattr(method, f.name)
        if get_origin(hints[f.name]) is Literal and value not in choices:
            raise reject(f.name, value, "accepted: " + ", ".join(map(repr, choices)))


@dataclass
class Method(ABC):
    """A dataclass of hyper-parameters. It never calls backward, steps, freezes, moves or saves anything."""

    copies: ClassVar[tuple[str, ...]] = ("student",)  # trained roles that start as a copy of the teacher

    @property
    def needs_images(self) -> bool:
        """Whether `Batch.x0` is read."""
        return False

    @abstractmethod
    def updates(self, step: int) -> Iterator[Update]:
        """The turns of one step: (roles that train, loss). Each is its own backward pass and optimizer step."""

    @abstractmethod
    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        """How the student is sampled, in training and after."""

    def extra_networks(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, nn.Module]:
        """Trained networks that are not copies of the teacher, sized by one example input."""
        return {}

    def learning_rate(self, role: str) -> float | None:
        """Learning rate of `role` where it differs from the trainer's."""
        return None
