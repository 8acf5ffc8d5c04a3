"""What a distillation method is: which networks it needs, and which losses train which of them in which order."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from ..adapters import Adapter
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
    x0: Tensor | None = None  # (B, ...) encoded images, or the teacher's samples, where the method asks for images or pairs
    noise: Tensor | None = None  # (B, ...) the noise from which the teacher drew x0, where the method asks for pairs
    carried: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Everything of the batch that is data, by name."""
        named = {f"cond.{name}": value for name, value in self.cond.items()} | {"x0": self.x0, "noise": self.noise}
        return {name: value for name, value in named.items() if value is not None}


Space = Literal["network", "sample", "epsilon", "v_prediction", "flow_prediction"]  # of a loss: the network's own, or what it says
Loss = tuple[Tensor, dict[str, Tensor]]  # scalar to minimise, scalars to log
Update = tuple[tuple[str, ...], Callable[[Networks, Batch], Loss]]


def check_choices(method: object) -> None:
    """Raise InputError for a `Literal` field of a dataclass that holds none of its values; Python does not look."""
    hints = get_type_hints(type(method))
    for f in fields(method):  # type: ignore[arg-type]
        choices, value = get_args(hints[f.name]), getattr(method, f.name)
        if get_origin(hints[f.name]) is Literal and value not in choices:
            raise reject(f.name, value, "accepted: " + ", ".join(map(repr, choices)))


def check_numbers(
    method: object,
    *,
    zero_or_more: Sequence[str] = (),
    above_zero: Sequence[str] = (),
    at_least_one: Sequence[str] = (),
    below_one: Sequence[str] = (),
    fraction: Sequence[str] = (),
) -> None:
    """Raise InputError for a named field that is out of its range, infinite or not a number. None, where a field allows it, passes."""
    for names, fits, accepted in (
        (zero_or_more, lambda value: 0 <= value < math.inf, "0 or more"),
        (above_zero, lambda value: 0 < value < math.inf, "a number above 0"),
        (at_least_one, lambda value: 1 <= value < math.inf, "at least 1"),
        (below_one, lambda value: 0 <= value < 1, "0 or more and below 1"),
        (fraction, lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ):
        for name in names:
            value = getattr(method, name)
            if value is not None and not fits(value):
                raise reject(name, value, accepted)


def check_levels(method: object, lowest: str, highest: str) -> None:
    """Raise InputError unless two fields, by name, are ascending fractions of the noise levels."""
    low, high = getattr(method, lowest), getattr(method, highest)
    if not 0 <= low < high <= 1:
        raise reject(f"{lowest}, {highest}", (low, high), f"0 <= {lowest} < {highest} <= 1")


def draw_step(random: SampleRandom, steps: int, last_share: float | None) -> int:
    """Which of `steps` steps trains in this turn, the same on every rank: all equally often, or the last one with its share."""
    if last_share is None or steps == 1:
        return random.shared_integer(steps)
    if random.shared_integer(10**6) < last_share * 10**6:
        return steps - 1
    return random.shared_integer(steps - 1)


@dataclass
class Method(ABC):
    """A dataclass of hyper-parameters. It never calls backward, steps, freezes, moves or saves anything."""

    copies: ClassVar[tuple[str, ...]] = ("student",)  # trained roles that start as a copy of the teacher

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Trained roles that are a LoRA adapter on the teacher's own weights; they cost no copy of it."""
        return {}

    @property
    def student_roles(self) -> tuple[str, ...]:
        """The trained roles that together are the student, each with a moving average of its own."""
        return ("student",)

    @property
    def followers(self) -> dict[str, float]:
        """Roles that are a moving average of the student, by constant decay; frozen, for targets without gradient."""
        return {}

    @property
    def needs_images(self) -> bool:
        """Whether `Batch.x0` holds encoded images."""
        return False

    @property
    def needs_pairs(self) -> bool:
        """Whether `Batch.noise` and `Batch.x0` hold stored pairs of the teacher."""
        return False

    @property
    def expected_pairs(self) -> dict[str, float]:
        """Settings with which stored pairs should have been drawn, by their names in `pairs.json`."""
        return {}

    @abstractmethod
    def updates(self, step: int) -> Iterator[Update]:
        """The turns of one step: (roles that train, loss). Each is its own backward pass and optimizer step."""

    @abstractmethod
    def sampler(self, schedule: NoiseSchedule) -> FewStepSampler:
        """How the student is sampled, in training and after."""

    def samplers(self, schedule: NoiseSchedule) -> tuple[FewStepSampler, ...]:
        """Every sampler that the one student serves, the default first; all of one kind, with different numbers of steps."""
        return (self.sampler(schedule),)

    def student_model(self, model: nn.Module) -> nn.Module:
        """The diffusers network that the student trains, from a copy of the teacher's: the copy itself, unless a method changes it."""
        return model

    def views(self, nets: Networks) -> dict[str, nn.Module]:
        """Roles that have no weights of their own, made from the others."""
        return {}

    def finished(self, step: int) -> tuple[str, ...]:
        """Student roles that `step` trained for the last time: they hold their moving average, what is exported, from then on."""
        return ()

    def extra_networks(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, nn.Module]:
        """Trained networks that are not copies of the teacher, sized by one example input."""
        return {}

    def learning_rate(self, role: str) -> float | None:
        """Learning rate of `role` where it differs from the trainer's."""
        return None
