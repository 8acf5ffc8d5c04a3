"""Networks that wait in the CPU's memory while nothing calls them. Where a tensor lies changes no result."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .networks import Networks
from .train_config import TrainConfig

CPU = torch.device("cpu")


class OnCall:
    """Modules that are on `device` inside `needed()` alone, such as text encoders and the VAE."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device):
        self.modules, self.device, self.present, self.moves = list(modules), device, True, 0

    def rest(self) -> None:
        """Let them wait on the CPU."""
        self._move(CPU, present=False)

    def stay(self) -> None:
        """They are on the device, for good."""
        self._move(self.device, present=True)

    @contextmanager
    def needed(self) -> Iterator[None]:
        """Inside the block they are on the device; afterwards where they were before."""
        before = self.present
        self._move(self.device, present=True)
        try:
            yield
        finally:
            if not before:
                self.rest()

    def _move(self, device: torch.device, present: bool) -> None:
        if present != self.present:
            self.present, self.moves = present, self.moves + 1
            for module in self.modules:
                module.to(device)


class Rotation:
    """The networks of a run, of which those alone are on the device that the turn needs; the others wait on the CPU.

    Those that train in a turn are there from its beginning, with the states of their optimizers. Any other comes when it is called. Called
    without gradient it is a guest, and there is one guest at a time; called with gradient it stays to the end of the turn, for the backward
    pass needs its weights. Roles that share weights come together.
    """

    def __init__(self, nets: Networks, optimizers: Mapping[str, torch.optim.Optimizer], device: torch.device, rest: torch.device = CPU):
        self.nets, self.optimizers, self.device, self.rest = nets, optimizers, device, rest
        self.unit = {role: unit for role in nets if (unit := _unit(nets, role)) is not None}
        self.units = list(dict.fromkeys(self.unit.values()))
        self.present: set[nn.Module] = set(self.units)
        self.peak = 0  # bytes of weights on the device at a time, since the last turn began
        self._guest: nn.Module | None = None
        self._hooks = [unit.register_forward_pre_hook(self._called) for unit in self.units]

    def begin(self, roles: Sequence[str]) -> None:
        """A turn begins in which `roles` train."""
        wanted = {self.unit[role] for role in roles if role in self.unit}
        for unit in self.units:
            if unit in self.present - wanted:
                self._leave(unit)
        self._guest, self.peak = None, 0
        for unit in self.units:
            if unit in wanted:
                self._come(unit)

    def call(self, role: str) -> None:
        """The weights of `role` are needed for a moment."""
        if role in self.unit:
            self._invite(self.unit[role], stays=False)

    def stay(self) -> None:
        """All are on the device again, for good."""
        for hook in self._hooks:
            hook.remove()
        for unit in self.units:
            self._come(unit)

    def _called(self, unit: nn.Module, args: object) -> None:
        self._invite(unit, stays=torch.is_grad_enabled())

    def _invite(self, unit: nn.Module, stays: bool) -> None:
        if unit not in self.present:
            if self._guest is not None:
                self._leave(self._guest)
            self._guest = unit
            self._come(unit)
        if stays and unit is self._guest:
            self._guest = None

    def _come(self, unit: nn.Module) -> None:
        if unit not in self.present:
            self.present.add(unit)
            self._move(unit, self.device)
        self.peak = max(self.peak, sum(map(bytes_of, self.present)))

    def _leave(self, unit: nn.Module) -> None:
        self.present.discard(unit)
        self._move(unit, self.rest)

    def _move(self, unit: nn.Module, device: torch.device) -> None:
        unit.to(device)
        for role, optimizer in self.optimizers.items():
            if self.unit.get(role) is unit:
                for state in optimizer.state.values():
                    state.update({name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)})


def _unit(nets: Networks, role: str) -> nn.Module | None:
    """What moves with a role: its network; None for a view, whose weights are those of others."""
    net = getattr(nets, role)
    if isinstance(net, Denoiser):
        return net.model
    return net if role in nets.trained_roles else None


def bytes_of(unit: nn.Module) -> int:
    """Bytes of the parameters and buffers of a network."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*unit.parameters(), *unit.buffers()))


class Offload:
    """What a run keeps off its device: encoders between their calls, and networks that a turn does not need, each if it is asked for."""

    def __init__(
        self,
        encoders: Iterable[nn.Module],
        nets: Networks,
        optimizers: Mapping[str, torch.optim.Optimizer],
        device: torch.device,
        config: TrainConfig,
    ):
        self.encoders = OnCall(encoders, device)
        if config.offload_encoders:
            self.encoders.rest()
        self.rotation = Rotation(nets, optimizers, device) if config.offload_idle_roles else None

    def begin(self, roles: Sequence[str]) -> None:
        """A turn begins in which `roles` train."""
        if self.rotation:
            self.rotation.begin(roles)

    def call(self, role: str) -> None:
        """The weights of `role` are needed for a moment, and not by a call of its network."""
        if self.rotation:
            self.rotation.call(role)

    @contextmanager
    def brought_back_after_errors(self) -> Iterator[None]:
        """An error inside leaves everything on the device, as the pipeline came."""
        try:
            yield
        except BaseException:
            self.bring_back()
            raise

    def bring_back(self) -> None:
        """Everything is on the device again, for good."""
        self.encoders.stay()
        if self.rotation:
            self.rotation.stay()
