"""Networks by role: `nets.student`, `nets.teacher`, `nets.fake_score`, ... A method reads them and never builds or freezes one."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .adapters import adapter_parameters
from .denoiser import Denoiser


class Networks:
    """`teacher` is frozen for good; every other role trains in the turns that name it.

    A role may be an adapter on the weights of another: a `Denoiser` with that one's model and an `adapter` of its own.
    """

    def __init__(self, **roles: nn.Module):
        self._roles = roles
        self._trainable = {role: _trainable(net) for role, net in roles.items() if role != "teacher"}
        for net in roles.values():
            net.requires_grad_(False)

    def add(self, **roles: nn.Module) -> None:
        """Further roles that never train on their own account: copies that follow another role, and views of others."""
        for role, net in roles.items():
            net.requires_grad_(False)
            self._roles[role] = net

    def __getattr__(self, role: str) -> Any:
        if role.startswith("_") or role not in self._roles:
            raise AttributeError(f"no network plays the role {role!r}; there are {', '.join(self._roles)}")
        return self._roles[role]

    def __contains__(self, role: str) -> bool:
        return role in self._roles

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return tuple(self._trainable)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters that training moves in `role`, by name: all of them, or its LoRA adapter's."""
        return self._trainable[role]

    def keep(self, roles: Iterable[str]) -> None:
        """Let go of every other network."""
        self._roles = {role: self._roles[role] for role in roles}
        self._trainable = {role: p for role, p in self._trainable.items() if role in self._roles}

    @contextmanager
    def only_trains(self, roles: Iterable[str]) -> Iterator[None]:
        """Gradients land in `roles` alone; they still pass through the other networks to their inputs."""
        moved = [p for role in roles for p in self._trainable[role].values()]
        for p in moved:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in moved:
                p.requires_grad_(False)


def _trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    shared = isinstance(net, Denoiser) and net.adapter
    own = adapter_parameters(net, net.adapter) if shared else dict(net.named_parameters())  # type: ignore[arg-type]
    return {name: p for name, p in own.items() if p.requires_grad}


def trainable_copy(teacher: nn.Module) -> nn.Module:
    """A float32 copy of `teacher` in training mode with every parameter trainable."""
    return copy.deepcopy(teacher).float().requires_grad_(True).train()
