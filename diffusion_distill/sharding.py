"""Networks whose weights, gradients and optimizer states are spread over the ranks: `fully_shard` of PyTorch (FSDP2).

Between two passes every rank holds its part of each tensor (a `DTensor`) and nothing else; a unit, such as one transformer block, is
gathered while it runs, forwards or backwards, and let go of again. LoRA adapters are small and stay whole on every rank.

What `fully_shard` asks of its users is settled here, so that methods and families need not know: which modules are units, that a
module inside of one may be tapped or called alone, and how a network becomes whole again when training is over.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from . import parallel
from .checkpoint import TensorGroups
from .denoiser import Denoiser

_HOLLOW = "hollow"  # attribute of a sharded network: the same network, whose sharded weights have a shape and no values


def shard(model: nn.Module, inner: Iterable[nn.Module], tapped: Iterable[nn.Module], device: torch.device) -> None:
    """Spread the weights of `model` over all ranks, each part on `device`; every rank holds the same weights before.

    Args:
        model: on any device; every rank calls it alike afterwards.
        inner: modules inside a unit that `model` calls from outside of it.
        tapped: modules whose outputs enter a loss.
    """
    whole = {p for name, p in model.named_parameters() if "lora_" in name or p.ndim == 0}
    vars(model)[_HOLLOW] = _hollow(model, whole)
    for p in whole:
        p.data = p.data.to(device)
    # on units that return views: gradients of every family are compared with those of whole networks (tests/test_sharding.py)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in (*inner, *_units(model), model):
        if module is model or any(p not in whole and not isinstance(p, DTensor) for p in module.parameters()):
            fully_shard(module, mesh=_mesh(device.type), reshard_after_forward=True, ignored_params=whole)
            module.register_forward_pre_hook(_contiguous_tokens, with_kwargs=True)
    for module in tapped:
        _gather_before_backward(model, module)


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time, from the inside out: the blocks that diffusers calls repeated, and all that the network calls itself."""
    repeated = {*(getattr(model, "_repeated_blocks", None) or ())}
    for child in model.children():
        for module in _called(child):
            yield from (inner for inner in module.modules() if inner is not module and type(inner).__name__ in repeated)
            yield module


def _called(child: nn.Module) -> Iterator[nn.Module]:
    """`child`, or the modules in it where it is a mere list of them."""
    if not isinstance(child, nn.ModuleList | nn.ModuleDict):
        yield child
        return
    for module in child.children():
        yield from _called(module)


def _contiguous_tokens(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The inputs, sequences of tokens (B, L, D) without gaps.

    `fully_shard` hands a unit views of its inputs, which at B = 1 changes the strides of transposed ones, and leaves that out when
    a checkpointed unit runs again: matrix products would then save other shapes than the first time.
    """
    return tree_map_only(Tensor, lambda x: x.contiguous() if x.ndim == 3 else x, (args, kwargs))


def _gather_before_backward(model: nn.Module, tapped: nn.Module) -> None:
    """A gradient may enter a unit in its midst, past the outputs by which it would know that its weights are needed again."""
    around = [unit for unit in model.modules() if isinstance(unit, FSDPModule) and any(m is tapped for m in unit.modules())]

    def gather(gradient: Tensor) -> None:
        for unit in around:
            unit.unshard()

    def watch(module: nn.Module, args: object, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(gather)

    tapped.register_forward_hook(watch)


@cache
def _mesh(kind: str) -> DeviceMesh:
    return init_device_mesh(kind, (parallel.world_size(),))


def _hollow(model: nn.Module, kept: Iterable[nn.Parameter]) -> nn.Module:
    """A copy of `model` in which the `kept` parameters and all buffers are the same tensors, and the others have no values."""
    shared: dict[int, Any] = {id(value): value for value in (*kept, *model.buffers())}
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters() if id(p) not in shared}
    return copy.deepcopy(model, shared | shapes)


def gather(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Give the denoisers of `networks` models that are as before `shard`, with the weights of now, whole on `device` of rank 0.

    Every rank calls it. On the others the models hold no values from then on.
    """
    found = [module for net in networks for module in net.modules() if isinstance(module, Denoiser)]
    sharded: list[nn.Module] = [m for m in dict.fromkeys(denoiser.model for denoiser in found) if isinstance(m, FSDPModule)]
    whole = {model: _gathered(model) for model in sharded}
    for denoiser in found:
        denoiser.model = whole.get(denoiser.model, denoiser.model)
    if parallel.rank() == 0:
        for model in whole.values():
            model.to(device)


def _gathered(model: nn.Module) -> nn.Module:
    hollow: nn.Module = vars(model)[_HOLLOW]
    for name, p in model.named_parameters():
        if isinstance(p, DTensor) and (value := _on_rank_0(p)) is not None:
            path, _, own = name.rpartition(".")
            setattr(hollow.get_submodule(path), own, nn.Parameter(value, p.requires_grad))
    return hollow


def is_spread(groups: TensorGroups) -> bool:
    """Whether any of the tensors is spread over ranks."""
    return any(isinstance(value, DTensor) for group in groups.values() for value in group.values())


def whole_on_rank_0(groups: TensorGroups) -> TensorGroups:
    """The same groups on rank 0, with tensors in main memory for those that are spread over ranks; without these elsewhere.

    Every rank calls it with the same names. One tensor at a time is whole on every rank.
    """
    return {
        name: {key: whole for key, value in group.items() if (whole := _on_rank_0(value)) is not None} for name, group in groups.items()
    }


def _on_rank_0(value: Tensor) -> Tensor | None:
    if not isinstance(value, DTensor):
        return value
    whole: Tensor = value.full_tensor().detach()
    return whole.cpu() if parallel.rank() == 0 else None


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Of the whole `value`, what this rank holds of `like`; the value itself where that is not spread over ranks."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Norm of the gradients over all ranks, before they are scaled down to `max_norm`; those of whole parameters are averaged first."""
    everything = list(parameters)
    whole = [p for p in everything if not isinstance(p, DTensor)]
    parallel.average_gradients(whole)
    if len(whole) == len(everything):
        return torch.nn.utils.clip_grad_norm_(whole, max_norm)
    parts = [p.grad.to_local() for p in everything if isinstance(p.grad, DTensor)]
    rest = [p.grad for p in whole if p.grad is not None]
    squares = torch.stack([torch.nn.utils.get_total_norm(each).to(everything[0].device).square() for each in (parts, rest)])
    dist.all_reduce(squares[:1])
    norm = squares.sum().sqrt()
    torch._foreach_mul_([*parts, *rest], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
