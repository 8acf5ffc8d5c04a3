"""Exponential moving average of a network's trained parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Float32 average with decay min(decay, 1 - 2 / (updates + 10)).

    The warm-up forgets the first weights as 1/n^2 and does not cap the decay: at n updates it averages about the last n/2.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = dict(parameters), decay, 0
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current parameters."""
        self.updates += 1
        weight = 1 - min(self.decay, 1 - 2 / (self.updates + 10))
        values = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), values, weight)

    def settle(self) -> None:
        """The parameters hold the average for good."""
        self._assign(self.average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside the block, and their own values again after it."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
