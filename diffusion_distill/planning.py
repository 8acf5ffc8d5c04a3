"""Running networks without values: what they hold and what they keep for the backward pass, on PyTorch's meta device.

A tensor there has a shape, a dtype and a storage of so many bytes that are never allocated. What reads a value gets the one of the
longest prompt. Attention counts as a fused kernel, which keeps its inputs, its output and one number a query; the plain one of the
meta device would keep all scores. The functions stand in for torch's own while a `Valueless` block lasts; modes of torch, which would
do it for one thread, are left while a checkpoint recomputes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as meta_config
from torch.utils._python_dispatch import TorchDispatchMode

from .random import SampleRandom

LONGEST = 512  # what a count of tokens reads
_LOWER_PRECISION = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d")  # of torch.nn.functional
_LOWER_PRODUCTS = ("matmul", "bmm", "baddbmm", "addmm", "mm")  # of torch


class MetaRandom(SampleRandom):
    """Draws without values."""

    def __init__(self, count: int):
        self.keys, self.slots, self._draws = (0,), tuple(range(count)), 0

    def _fill(self, draw: object, shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), device="meta")


class Valueless(ExitStack):
    """Inside the block, what runs on the meta device may read values, and attention is fused; with `bf16`, as under autocast."""

    def __init__(self, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16

    def __enter__(self) -> "Valueless":
        self.enter_context(meta_config.patch(meta_nonzero_assume_all_nonzero=True))  # type: ignore[attr-defined]
        self.enter_context(_Readable())
        self.enter_context(patch.object(F, "scaled_dot_product_attention", self._attention))
        for module, names in ((F, _LOWER_PRECISION), (torch, _LOWER_PRODUCTS)) if self.bf16 else ():
            for name in names:
                self.enter_context(patch.object(module, name, _lowered(getattr(module, name))))
        return self

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        query, key, value = inputs = [_lower(x) if self.bf16 else x for x in (query, key, value)]
        if not torch.is_grad_enabled():  # under forward-mode differentiation perhaps, of which the kernel knows nothing
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs)[0]
        return attended


class _Readable(TorchDispatchMode):
    """Reading a tensor of the meta device gives `LONGEST`, or True."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else LONGEST
        out_of_it = func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") not in (None, torch.device("meta"))
        return torch.full(args[0].shape, LONGEST, dtype=kwargs.get("dtype", args[0].dtype)) if out_of_it else func(*args, **kwargs)


def _lowered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` as under autocast; without gradient, what is in float32 throughout may lie outside of autocast."""

    def lowered(*args: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in (*args, *options.values())):
            args, options = tuple(map(_lower, args)), {name: _lower(value) for name, value in options.items()}
        return function(*args, **options)

    return lowered


def _lower(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_meta and value.dtype == torch.float32 else value


class SavedTensors(ExitStack):
    """Counts what autograd keeps inside the block: `peak` is the most bytes at a time, each storage once, weights aside.

    What gradient checkpointing computes anew, one block at a time, is not seen.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        super().__init__()
        self._weights = [p.untyped_storage() for net in networks for p in net.parameters()]
        self._aside = {storage._cdata for storage in self._weights}
        self._users: dict[int, int] = {}
        self.live = self.peak = 0

    def __enter__(self) -> "SavedTensors":
        self.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: _Saved(self, x), lambda saved: saved.tensor))
        return self

    def take(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._aside:
            self._users[key] = self._users.get(key, 0) + 1
            self.live += storage.nbytes() if self._users[key] == 1 else 0
            self.peak = max(self.peak, self.live)

    def leave(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._aside:
            self._users[key] -= 1
            self.live -= 0 if self._users[key] else storage.nbytes()


class _Saved:
    def __init__(self, counter: SavedTensors, tensor: Tensor):
        self.counter, self.tensor, self.storage = counter, tensor, tensor.untyped_storage()
        counter.take(self.storage)

    def __del__(self) -> None:
        self.counter.leave(self.storage)
