"""Which kernel computes attention: one setting for all networks of a run, verified, and undone when the run ends.

diffusers has two generations of attention layers. Newer ones look up a backend by name at each call; older ones ignore diffusers' own
switch without a word. Here every layer gets a processor of its own for the time of the run, so the pipeline's stays as it was.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import InputError, reject

BACKENDS = tuple(backend.value for backend in AttentionBackendName)
NATIVE = AttentionBackendName.NATIVE.value
TORCH_KERNELS = {
    "_native_math": SDPBackend.MATH,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
}
_XFORMERS = {AttnProcessor2_0: XFormersAttnProcessor, JointAttnProcessor2_0: XFormersJointAttnProcessor}
_LARGEST_DIFFERENCE = 0.05  # of a network's output to that with the native kernel, in the norm: bfloat16 in every layer, and no wrong mask


@dataclass(frozen=True)
class Switch:
    """An attention layer with the processor it had and the one it has during the run."""

    layer: Any
    plain: Any
    chosen: Any


_switched: list[Switch] = []  # what `in_use` has switched, for `plain_attention`


def switches(models: dict[str, nn.Module], backend: str | None) -> list[Switch]:
    """A switch to `backend` for every attention layer of the networks, by role; none for None, which leaves diffusers its own choice.

    Raises:
        InputError: when the package of the backend is missing, or a layer cannot take it, naming network, layer and what is accepted.
    """
    if backend is None:
        return []
    if backend not in BACKENDS:
        raise reject("attention_backend", backend, "accepted: " + ", ".join(BACKENDS))
    try:
        with attention_backend(backend):  # its check of packages
            pass
    except Exception as error:  # packages, versions, downloads of kernels: whatever is in the way
        raise reject("attention_backend", backend, " ".join(str(error).split())) from error
    distinct = {id(model): (role, model) for role, model in reversed(models.items())}
    return [
        Switch(layer, layer.processor, _chosen(layer, backend, role, model))
        for role, model in distinct.values()
        for layer in _layers(model)
    ]


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "processor")]  # as diffusers finds them


def _chosen(layer: Any, backend: str, role: str, model: nn.Module) -> Any:
    plain = layer.processor
    if hasattr(plain, "_attention_backend"):  # by which diffusers, too, tells a layer that looks its backend up
        chosen = copy.copy(plain)
        chosen._attention_backend = AttentionBackendName(backend)
        return chosen
    if backend == NATIVE:
        return plain
    if backend in TORCH_KERNELS:
        return _on_kernel(plain, TORCH_KERNELS[backend])
    if backend == "xformers" and type(plain) in _XFORMERS:
        return _XFORMERS[type(plain)]()
    accepted = [NATIVE, *TORCH_KERNELS, *(["xformers"] if type(plain) in _XFORMERS else [])]
    where = f"the {role}, a {type(model).__name__}, has layers of an older kind ({type(plain).__name__})"
    raise reject("attention_backend", backend, f"{where}, which take {', '.join(accepted)}")


def _on_kernel(plain: Any, kernel: SDPBackend) -> Any:
    """A processor as `plain` that allows torch's scaled dot product one kernel alone; another attention than that stays what it is."""
    call: Callable[..., Any] = type(plain).__call__

    @functools.wraps(call)  # diffusers reads the signature
    def on_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kernel):
            return call(self, *args, **kwargs)

    chosen = copy.copy(plain)
    chosen.__class__ = type(type(plain).__name__, (type(plain),), {"__call__": on_kernel, "kernel": kernel})
    return chosen


@contextmanager
def in_use(chosen: Iterable[Switch]) -> Iterator[None]:
    """Inside the block the layers compute as chosen; afterwards they have their own processors again."""
    chosen = list(chosen)
    try:
        for switch in chosen:
            switch.layer.set_processor(switch.chosen)
        _switched.extend(chosen)
        yield
    finally:
        for switch in chosen:
            switch.layer.set_processor(switch.plain)
        del _switched[len(_switched) - len(chosen) :]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Inside the block every layer has its own processor: fast kernels have no forward-mode derivative."""
    chosen = list(_switched)
    for switch in chosen:
        switch.layer.set_processor(switch.plain)
    try:
        yield
    finally:
        for switch in chosen:
            switch.layer.set_processor(switch.chosen)


def prepared(networks: dict[str, Any], backend: str | None, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> list[Switch]:
    """The switches of networks that are called as a `Denoiser` is, by role; each has then run at (x_t, t, cond), forward and back.

    Raises:
        InputError: when the backend is not there, a layer cannot take it, or a network cannot run with it or gives something else.
    """
    chosen = switches({role: network.model for role, network in networks.items()}, backend)
    distinct = {id(network.model): (role, network) for role, network in reversed(networks.items())}
    for role, network in reversed(distinct.values()) if chosen else ():
        _check(chosen, lambda network=network: network(x_t.detach().requires_grad_(), t, cond).x0, backend, role)  # type: ignore[misc]
    return chosen


def _check(chosen: list[Switch], run: Callable[[], Tensor], backend: str | None, role: str) -> None:
    plain = run().detach()
    try:
        with in_use(chosen):
            output = run()
            output.square().mean().backward()
        difference = float((output.detach() - plain).norm() / plain.norm())
    except Exception as error:  # each kernel has its own way to say what devices, dtypes, head sizes and masks it does not take
        raise _refused(backend, role, " ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
    if not difference <= _LARGEST_DIFFERENCE:
        raise _refused(backend, role, f"its output differs from the native one by {difference:.1%}")


def _refused(backend: str | None, role: str, why: str) -> InputError:
    return reject("attention_backend", backend, f"the {role} cannot run with it here ({why})")
