"""torch-fidelity as a reference in tests, without torchvision, which it imports and needs for other features only."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REFERENCES = Path(sys.prefix) / "references"  # where the Makefile puts it, away from what torchmetrics would find and import
STAND_INS = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


def fidelity(module: str) -> Any:
    """A module of torch-fidelity; the test is skipped where it is not installed."""
    if importlib.util.find_spec("torchvision") and importlib.util.find_spec("torch_fidelity"):
        return importlib.import_module(f"torch_fidelity.{module}")
    if not (REFERENCES / "torch_fidelity").is_dir():
        pytest.skip(f"torch-fidelity is missing: pip install --no-deps --target {REFERENCES} torch-fidelity==0.4.0")
    return _without_torchvision(module)


def _without_torchvision(module: str) -> Any:
    """Import with empty modules in torchvision's place, and leave no trace of them."""
    package = ModuleType("torch_fidelity")
    package.__path__ = [str(REFERENCES / "torch_fidelity")]  # its own __init__ imports every feature network
    package.GenerativeModelModuleWrapper = object  # type: ignore[attr-defined]
    stand_ins: dict[str, Any] = {name: ModuleType(name) for name in STAND_INS} | {"torch_fidelity": package}
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(stand_ins["torchvision.datasets"], name, object)
    stand_ins["torchvision.transforms"].functional = stand_ins["torchvision.transforms.functional"]
    before = set(sys.modules)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("torch_fidelity", "torchvision"):
                del sys.modules[name]
