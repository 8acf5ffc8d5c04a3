"""Random numbers that depend on (seed, step, turn, slot in the global batch) and on nothing else.

Because no generator state is carried along, a resumed run draws what the uninterrupted one would have drawn, and the same
global batch gets the same numbers whether it is one batch, several accumulated ones, or spread over ranks.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def derive_seed(*keys: int) -> int:
    """Mix integers into one 63-bit seed with splitmix64 (Steele et al., 2014)."""
    return functools.reduce(_mix, keys, 0) >> 1


def _mix(state: int, key: int) -> int:
    state = (state + (key & _MASK) + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


class SampleRandom:
    """Draws for one micro-batch. `slots` are the positions of its samples in the global batch of this optimizer step."""

    def __init__(self, keys: Sequence[int], slots: Sequence[int], device: torch.device | str = "cpu"):
        self.keys, self.slots = tuple(keys), tuple(slots)
        self._generator = torch.Generator(device)
        self._draws = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal noise of `shape` (B, ...), one independent stream for each sample."""
        return self._fill(torch.randn, shape)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise (B, ...), float32 whatever the dtype of `x`."""
        return self.normal(x.shape)

    def uniform(self) -> Tensor:
        """One number in [0, 1) a sample, (B,) float32."""
        return self._fill(torch.rand, (len(self.slots),))

    def shared_integer(self, high: int) -> int:
        """One integer in [0, high), the same for every sample, micro-batch and rank of this step."""
        return derive_seed(*self.keys, self._next_draw(), -1) % high

    def _fill(self, draw, shape: Sequence[int]) -> Tensor:  # type: ignore[no-untyped-def]
        if shape[0] != len(self.slots):
            raise ValueError(f"shape {tuple(shape)} does not start with the batch size {len(self.slots)}")
        out = torch.empty(tuple(shape), device=self._generator.device)
        common = functools.reduce(_mix, (*self.keys, self._next_draw()), 0)
        for i, slot in enumerate(self.slots):
            self._generator.manual_seed(_mix(common, slot) >> 1)  # derive_seed(*keys, draw, slot)
            draw(tuple(shape[1:]), generator=self._generator, out=out[i])
        return out

    def _next_draw(self) -> int:
        self._draws += 1
        return self._draws
