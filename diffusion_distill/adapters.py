"""Named LoRA adapters on one frozen network, so that a role costs an adapter and not a copy.

An adapter rests, switched off, and works inside `switched_on` alone. peft's own switches (`set_adapter`, `enable_adapters`) decide
`requires_grad` as well; here that belongs to `Networks.only_trains`, so the layers' two state fields are set directly.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from .errors import reject

_OWN = "role_adapters"  # attribute of a model: the names that `add_adapter` put there
_FOUND = "role_adapter_layers"  # attribute of a model: the layers of an adapter, by its name, once looked up
_State = list[tuple[BaseTunerLayer, bool, list[str]]]


@dataclass(frozen=True)
class Adapter:
    """Size of a LoRA adapter (arXiv:2106.09685): W x + alpha / rank B A x, with B = 0 at the start."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()  # peft `target_modules`; empty: the family's


def add_adapter(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Put a resting adapter, in float32 whatever the dtype of `model`, on the layers of `model` that `adapter.targets` names.

    An adapter of that name is replaced. Layers and adapters that were there stay as they were.

    Raises:
        InputError: when no layer has one of these names.
    """
    remove_adapter(model, name)
    before, trainable = _states(model), {id(p) for p in model.parameters() if p.requires_grad}
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the purpose
            inject_adapter_in_model(config, model, name)
    except ValueError as error:
        raise reject("lora targets", list(adapter.targets), f"of {type(model).__name__}: {' '.join(str(error).split())}") from error
    for layer in _layers(model):
        layer._disable_adapters = True
    _restore(before)
    for p in model.parameters():
        p.requires_grad_(id(p) in trainable)
    for p in adapter_parameters(model, name).values():
        p.data = p.data.float()
        p.requires_grad_(True)
    vars(model).setdefault(_OWN, []).append(name)
    vars(model).pop(_FOUND, None)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take the adapter off again, if there is one; a layer left without any is the plain layer that it was."""
    vars(model).pop(_FOUND, None)
    for path, layer in [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer) and name in m.lora_A]:
        resting = layer._disable_adapters, [other for other in layer.active_adapters if other != name]
        _restore([(layer, *resting)])  # first: peft would switch on another in the place of an active one
        layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    for known in (vars(model).get("peft_config", {}), vars(model).get(_OWN, [])):
        if name in known:
            known.pop(name) if isinstance(known, dict) else known.remove(name)


def remove_adapters(model: nn.Module) -> None:
    """Take off what `add_adapter` put on, and nothing else."""
    for name in list(vars(model).get(_OWN, [])):
        remove_adapter(model, name)


def adapter_parameters(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the adapter `name` in `module`, by their full names."""
    return {full: p for full, p in module.named_parameters() if name in full.split(".") and "lora_" in full}


@contextmanager
def switched_on(model: nn.Module, name: str | None) -> Iterator[None]:
    """The adapter `name` works on top of whatever else works in `model`; None changes nothing."""
    before = _states(_layers_of(model, name)) if name else []
    try:
        for layer, disabled, active in before:
            _restore([(layer, False, ([] if disabled else active) + [str(name)])])
        yield
    finally:
        _restore(before)


def checkpointed(block: Callable[..., Any], *args: Any) -> Any:
    """A `gradient_checkpointing_func` for diffusers: in the backward pass `block` runs with the adapters of its forward pass."""
    before = _states(block) if isinstance(block, nn.Module) else []
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _held(before)))


@contextmanager
def _held(states: _State) -> Iterator[None]:
    now = _states([layer for layer, _, _ in states])
    try:
        _restore(states)
        yield
    finally:
        _restore(now)


def _layers_of(model: nn.Module, name: str) -> list[Any]:
    """The layers of `model` that have the adapter `name`: a walk over all modules costs a small network a hundredth of its pass."""
    found: dict[str, list[Any]] = vars(model).setdefault(_FOUND, {})
    if name not in found:
        found[name] = [layer for layer in _layers(model) if name in layer.lora_A]
    return found[name]


def _layers(modules: nn.Module | Iterable[nn.Module]) -> list[Any]:
    found = modules.modules() if isinstance(modules, nn.Module) else modules
    return [module for module in found if isinstance(module, BaseTunerLayer)]


def _states(modules: nn.Module | Iterable[nn.Module]) -> _State:
    return [(layer, layer._disable_adapters, list(layer.active_adapters)) for layer in _layers(modules)]


def _restore(states: _State) -> None:
    for layer, disabled, active in states:
        layer._disable_adapters, layer._active_adapter = disabled, active
