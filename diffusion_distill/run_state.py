"""What training moves in a run, as a checkpoint holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters import adapter_parameters
from .checkpoint import TensorGroups, load_optimizer_tensors, optimizer_tensors
from .ema import EMA
from .errors import NonFiniteError
from .networks import Networks
from .sharding import part_of


@dataclass
class RunState:
    """Weights, optimizers, moving averages and followers. No random state: it derives from the step."""

    nets: Networks
    optimizers: Mapping[str, torch.optim.Optimizer]
    emas: Mapping[str, EMA]
    followers: Mapping[str, float]

    def follower(self, role: str) -> dict[str, Tensor]:
        """What moves in a follower, by the names of the parameters that train in the student."""
        net = getattr(self.nets, role)
        if net.adapter:
            moved = adapter_parameters(net, net.adapter).values()
            return {name: p.detach() for name, p in zip(self.nets.parameters("student"), moved, strict=True)}
        own = dict(net.named_parameters())
        return {name: own[name].detach() for name in self.nets.parameters("student")}

    def collect(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group (not copies; of networks that are spread over ranks, the parts), and a JSON part."""
        tensors: dict[str, dict[str, Tensor]] = {}
        scalars = {}
        for role, optimizer in self.optimizers.items():
            parameters = self.nets.parameters(role)
            tensors[role] = {name: p.detach() for name, p in parameters.items()}
            tensors[f"{role}.optimizer"], scalars[role] = optimizer_tensors(optimizer, list(parameters))
        tensors |= {f"{role}.ema": ema.average for role, ema in self.emas.items()}
        tensors |= {role: self.follower(role) for role in self.followers}
        return tensors, {"optimizers": scalars, "ema_updates": {role: ema.updates for role, ema in self.emas.items()}}

    @torch.no_grad()
    def restore(self, tensors: TensorGroups, state: Mapping[str, Any]) -> None:
        """Undo `collect`."""
        for role, optimizer in self.optimizers.items():
            parameters = self.nets.parameters(role)
            for name, p in parameters.items():
                p.copy_(part_of(tensors[role][name], p))
            moments = {path: part_of(value, parameters[path.split("/", 1)[1]]) for path, value in tensors[f"{role}.optimizer"].items()}
            load_optimizer_tensors(optimizer, list(parameters), moments, state["optimizers"][role])
        for role, ema in self.emas.items():
            ema.updates = state["ema_updates"][role]
            for name, average in ema.average.items():
                average.copy_(part_of(tensors[f"{role}.ema"][name], average))
        for role in self.followers:
            for name, value in self.follower(role).items():
                value.copy_(part_of(tensors[role][name], value))


def check_finite(tensors: TensorGroups, step: int) -> None:
    """Raise NonFiniteError, naming group and tensor, for a value that is no number: such a checkpoint is of no use."""
    named = {(group, name): value for group, values in tensors.items() for name, value in values.items()}
    floating = {key: value for key, value in named.items() if value.is_floating_point() and value.numel()}
    finite = torch.stack([norm.double() for norm in torch._foreach_norm(list(floating.values()), torch.inf)]).isfinite()
    if not finite.all():
        group, name = list(floating)[int(finite.int().argmin())]
        raise NonFiniteError(
            f"step {step}: {name!r} of {group!r} is no longer finite; checkpoint-{step} is not written, the one before is sound. "
            "Lower the learning rate, or raise the precision."
        )
