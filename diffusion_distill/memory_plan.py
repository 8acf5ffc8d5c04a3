"""What a run will hold on its device, from configurations alone: weights, gradients, optimizer states, averages, activations.

Networks are built on PyTorch's meta device by the same code that builds them for training, and every turn of the method runs there
once, forward and back (planning.py). Nothing is loaded and nothing allocated, whatever the size.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapter_parameters
from .build import build_networks
from .cached import encoders
from .denoiser import Denoiser
from .errors import InputError
from .families import Cond, family_of
from .methods import Batch, Method
from .networks import Networks
from .offload import Rotation, bytes_of
from .optim import state_bytes
from .planning import MetaRandom, SavedTensors, Valueless
from .train_config import TrainConfig

GIB, META = 2**30, torch.device("meta")
FIRST_STEPS = 100  # in which every turn of a method that is not scheduled by phases comes once
ADVICE: tuple[dict[str, Any], ...] = (  # in the order in which they cost least
    {"mixed_precision": "bf16"},
    {"gradient_checkpointing": True},
    {"offload_encoders": True},
    {"train_batch_size": 1},
    {"optimizer": "adamw_8bit"},
    {"offload_idle_roles": True},
    {"lora_rank": 64, "sharing": "shared"},
    {"ema_decay": 0.0},
)


@dataclass(frozen=True)
class Holding:
    """Bytes of one kind that one role, or component of the pipeline, holds between steps."""

    owner: str
    kind: str  # weights, optimizer, average
    bytes: int


@dataclass(frozen=True)
class Turn:
    """What a turn holds besides: the gradients of its roles, and at most so much for the backward pass.

    `away` bytes of what is held otherwise wait on the CPU meanwhile.
    """

    roles: tuple[str, ...]
    gradients: int
    activations: int
    away: int = 0

    @property
    def change(self) -> int:
        """Bytes by which this turn holds more than is held between turns without offloading."""
        return self.gradients + self.activations - self.away


@dataclass(frozen=True)
class MemoryPlan:
    """What one process holds. `advice` are settings, in order, each with the total that it and those before it lead to."""

    holdings: tuple[Holding, ...]
    turns: tuple[Turn, ...]
    device_memory: int | None = None
    advice: tuple[tuple[dict[str, Any], int], ...] = field(default=())

    @property
    def resident(self) -> int:
        """Bytes held between turns, without the offloading of idle roles."""
        return sum(holding.bytes for holding in self.holdings)

    @property
    def total(self) -> int:
        """Bytes at the worst turn; the allocator's own and the kernels' working space come on top."""
        return self.resident + max(turn.change for turn in self.turns)

    @property
    def fits(self) -> bool | None:
        """Whether the total is within the device's memory; None where that is not known."""
        return None if self.device_memory is None else self.total <= self.device_memory

    def bytes_of(self, kind: str) -> int:
        """Bytes of one kind over all owners; "gradients" and "activations" are those of the worst turn."""
        if kind in ("gradients", "activations"):
            worst = max(self.turns, key=lambda turn: turn.change)
            return int(getattr(worst, kind))
        return sum(holding.bytes for holding in self.holdings if holding.kind == kind)


def plan(
    pipe: Any,
    method: Method,
    config: TrainConfig,
    *,
    resolution: int | None = None,
    device_memory: int | None = None,
    world_size: int = 1,
) -> MemoryPlan:
    """What a run of `method` under `config` will hold on each of `world_size` devices.

    Args:
        pipe: a pipeline on the meta device (`pipeline_on_meta`).
        resolution: pixels of the samples. None: the pipeline's own.
        device_memory: bytes of the device. With it, settings that make the run fit are looked for.

    Raises:
        InputError: for a pipeline whose prompts cannot be encoded without weights.
    """
    found = _measured(pipe, method, config, resolution, world_size)
    found = replace(found, device_memory=device_memory)
    advice: list[tuple[dict[str, Any], int]] = []
    changes: dict[str, Any] = {}
    total = found.total
    for change in ADVICE if device_memory is not None else ():
        if total <= (device_memory or 0):
            break
        try:
            changed = replace(config, **changes | change)
            now = _measured(pipe, method, changed, resolution, world_size).total
        except InputError:  # a method that cannot be trained so
            continue
        if now < total:
            total, changes = now, changes | change
            advice.append((change, now))
    return replace(found, advice=tuple(advice))


def _measured(pipe: Any, method: Method, config: TrainConfig, resolution: int | None, world_size: int) -> MemoryPlan:
    family = family_of(pipe)
    shape, bf16 = family.sample_shape(pipe, resolution), config.mixed_precision == "bf16"
    parts = 1 if config.parallelism == "replicate" else world_size
    with Valueless():
        uncond = _unconditional(pipe, resolution)
        nets = _networks(pipe, method, config, resolution, uncond)
    kept = _weights(pipe, nets, config, parts) + _states(nets, method, config, parts)
    size = config.train_batch_size
    batch_of = lambda: Batch(_expanded(uncond, size), _expanded(uncond, size), shape, MetaRandom(size), *_data(method, size, shape))  # noqa: E731
    turns = []
    for step in _steps(method, config):
        turns += list(_turns(nets, method, step, batch_of(), bf16, parts))
    if config.offload_idle_roles:
        turns = [replace(turn, away=turn.away + _states_away(kept, nets, turn.roles)) for turn in turns]
    else:
        turns = [replace(turn, away=0) for turn in turns]
    return MemoryPlan(tuple(kept), tuple(turns))


def _unconditional(pipe: Any, resolution: int | None) -> Cond:
    try:
        return family_of(pipe).unconditional(pipe, 1, resolution)
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"plan: prompts of a {type(pipe).__name__} cannot be encoded without weights ({reason})") from error


def _networks(pipe: Any, method: Method, config: TrainConfig, resolution: int | None, uncond: Cond) -> Networks:
    """As for training; the frozen teacher is made bfloat16 afterwards, for the meta device has no autocast."""
    with torch.device("meta"):
        whole = replace(config, mixed_precision="no", parallelism="replicate", attention_backend=None)
        nets = build_networks(pipe, method, whole, resolution, uncond)
    if config.mixed_precision == "bf16":
        own = {name: p for name, p in nets.teacher.model.named_parameters() if "lora_" not in name}
        for tensor in (*own.values(), *nets.teacher.model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.bfloat16)
    return nets


def _weights(pipe: Any, nets: Networks, config: TrainConfig, parts: int) -> list[Holding]:
    """Each tensor once, under the first that holds it: an adapter under its role, shared weights under the teacher."""
    seen: set[int] = set()
    holders: dict[str, Iterable[Tensor]] = {}
    for role in nets:
        net = getattr(nets, role)
        adapter = net.adapter if isinstance(net, Denoiser) else None
        holders[role] = adapter_parameters(net, adapter).values() if adapter else ()
    found = [Holding(role, "weights", sum(map(_bytes, _fresh(tensors, seen)))) for role, tensors in holders.items()]
    rest = {role: _fresh(_tensors(getattr(nets, role)), seen) for role in nets}
    found = [replace(held, bytes=held.bytes + sum(map(_bytes, rest[held.owner])) // parts) for held in found]
    family = family_of(pipe)
    encoding = {} if config.offload_encoders else encoders(pipe, family)
    found += [Holding(name, "weights", sum(map(_bytes, _fresh(_tensors(part), seen)))) for name, part in encoding.items()]
    return [held for held in found if held.bytes]


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


def _fresh(tensors: Iterable[Tensor], seen: set[int]) -> list[Tensor]:
    fresh = [tensor for tensor in tensors if id(tensor) not in seen]
    seen |= {id(tensor) for tensor in fresh}
    return fresh


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _states(nets: Networks, method: Method, config: TrainConfig, parts: int) -> list[Holding]:
    found = []
    for role in nets.trained_roles:
        trained = list(nets.parameters(role).values())
        found.append(Holding(role, "optimizer", state_bytes(trained, config) // parts))
        if config.ema_decay and role in method.student_roles:
            found.append(Holding(role, "average", 4 * sum(p.numel() for p in trained) // parts))
    return found


def _steps(method: Method, config: TrainConfig) -> list[int]:
    """Steps that together have every combination of trained roles once."""
    seen: set[tuple[str, ...]] = set()
    found = []
    last = config.max_train_steps - 1
    for step in sorted({*range(min(FIRST_STEPS, last + 1)), last // 4, last // 2, 3 * last // 4, last}):
        roles = {names for names, _ in method.updates(step)}
        if not roles <= seen:
            found.append(step)
            seen |= roles
    return found


def _turns(nets: Networks, method: Method, step: int, batch: Batch, bf16: bool, parts: int) -> Iterator[Turn]:
    rotation = Rotation(nets, {}, META, rest=META)
    for roles, loss_fn in method.updates(step):
        batch.random = MetaRandom(len(batch.random.slots))
        rotation.begin(roles)
        counter = SavedTensors(getattr(nets, role) for role in nets)
        with nets.only_trains(roles), Valueless(bf16), counter:
            loss, _ = loss_fn(nets, batch)
            loss.backward()
            del loss
        trained = [p for role in roles for p in nets.parameters(role).values()]
        for p in trained:
            p.grad = None
        away = sum(map(bytes_of, rotation.units)) - rotation.peak
        yield Turn(roles, sum(map(_bytes, trained)) // parts, counter.peak, away)
    rotation.stay()


def _states_away(kept: Iterable[Holding], nets: Networks, roles: tuple[str, ...]) -> int:
    """Bytes of optimizer states that wait elsewhere while `roles` train: those on weights that none of them shares."""
    here = {id(getattr(nets, role).model) if isinstance(getattr(nets, role), Denoiser) else role for role in roles}

    def is_here(role: str) -> bool:
        net = getattr(nets, role)
        return (id(net.model) if isinstance(net, Denoiser) else role) in here

    return sum(held.bytes for held in kept if held.kind == "optimizer" and not is_here(held.owner))


def _expanded(cond: Cond, size: int) -> Cond:
    return {name: value.to("meta").expand(size, *value.shape[1:]) for name, value in cond.items()}


def _data(method: Method, size: int, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """x0 and noise, where the method asks for them."""
    sample = torch.empty(size, *shape, device="meta")
    return sample if method.needs_images or method.needs_pairs else None, sample if method.needs_pairs else None


def table(found: MemoryPlan, owners: Mapping[str, str] | None = None) -> str:
    """The plan as lines of text."""
    lines = [f"{'':28}{'GiB':>9}"]
    lines += [f"{holding.owner + ' ' + holding.kind:28}{holding.bytes / GIB:9.2f}" for holding in found.holdings]
    for turn in found.turns:
        named = "turn of " + ", ".join(turn.roles)
        lines += [f"{named}", f"{'  gradients':28}{turn.gradients / GIB:9.2f}", f"{'  kept for backward':28}{turn.activations / GIB:9.2f}"]
    lines.append(f"{'total at the worst turn':28}{found.total / GIB:9.2f}")
    if found.device_memory is not None:
        verdict = "fits" if found.fits else "does not fit"
        lines.append(f"{'memory of the device':28}{found.device_memory / GIB:9.2f}  {verdict}")
    for change, total in found.advice:
        flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items())
        lines.append(f"with {flags}: {total / GIB:.2f}")
    return "\n".join(lines)
