"""Who may import whom, and who may know which name. A new module of the package is one word in `LAYERS`."""

import ast
import re
import sys
from pathlib import Path

import pytest

from diffusion_distill.families import FAMILIES
from diffusion_distill.methods import METHODS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffusion_distill"

# A module imports from the lines above its own, and a folder (families, methods) from itself too.
LAYERS = (
    ("errors", "redaction"),
    ("attention", "pair_settings", "random", "shards"),
    ("pairs",),
    ("schedule",),
    ("prediction",),
    ("adversarial", "losses", "time_laws"),
    ("adapters", "families", "jvp", "trigflow"),
    ("cached", "denoiser"),
    ("experts", "networks", "sampler"),
    ("consistency", "discriminators", "score_distillation", "solver_grid"),
    ("methods",),
    ("checkpoint", "config", "data", "ema", "images", "parallel", "provenance", "train_config"),
    ("sharding",),
    ("background", "batches", "build", "diagnostics", "divergence", "offload", "optim", "planning", "stops"),
    ("run_record", "run_state", "shard_writer"),
    ("cache_writer", "memory_plan", "meta_pipeline", "pair_writer"),
    ("checkpointing", "preflight"),
    ("lora_export", "model_card", "student_scheduler"),
    ("counted_scheduler",),
    ("export", "export_child"),
    ("trainer",),
    ("distill",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}
PIPELINE_IMPORTS = {"diffusers", "torch", "numpy", "PIL", *sys.stdlib_module_names}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(source: str, package: tuple[str, ...]) -> set[str]:
    """Absolute dotted names of everything that a module of `package` imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *([node.module] if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def own_layers(source: str, package: tuple[str, ...]) -> set[str]:
    """First parts of the package's own modules that a module imports; `__init__` for a name of the package itself."""
    parts = [name.split(".") for name in imported_names(source, package)]
    return {own[1] if len(own) > 1 and own[1] in RANK else "__init__" for own in parts if own[0] == PACKAGE.name}


def wrong_imports(source: str, layer: str, package: tuple[str, ...]) -> set[str]:
    """Layers that `source` imports and that do not stand above `layer`."""
    return {other for other in own_layers(source, package) if RANK[other] >= RANK[layer] and not (other == layer and len(package) > 1)}


def test_every_module_has_a_layer() -> None:
    unplaced = {layer_of(path) for path in sources(PACKAGE)} - RANK.keys()
    assert not unplaced, f"place in LAYERS: {sorted(unplaced)}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_lower_layers(path: Path) -> None:
    package = path.relative_to(ROOT).parent.parts
    assert not wrong_imports(path.read_text(), layer_of(path), package)


@pytest.mark.parametrize(
    ("source", "layer", "package", "expected"),
    [
        ("from .trainer import Trainer", "sampler", (PACKAGE.name,), {"trainer"}),
        ("from ..trainer import Trainer", "methods", (PACKAGE.name, "methods"), {"trainer"}),
        ("from . import trainer", "export", (PACKAGE.name,), {"trainer"}),
        ("def f():\n    import diffusion_distill.cli as c", "build", (PACKAGE.name,), {"cli"}),
        ("from diffusion_distill import Trainer", "data", (PACKAGE.name,), {"__init__"}),
        ("from .sampler import FewStepSampler", "networks", (PACKAGE.name,), {"sampler"}),
        ("from .base import Method\nfrom ..methods import base", "methods", (PACKAGE.name, "methods"), set()),
        ("import torch\nfrom .errors import reject", "cli", (PACKAGE.name,), set()),
    ],
)
def test_wrong_imports_are_seen(source: str, layer: str, package: tuple[str, ...], expected: set[str]) -> None:
    assert wrong_imports(source, layer, package) == expected


def mentioned(names: set[str], path: Path) -> set[str]:
    """Which of `names` stand in a file as whole words, prose included."""
    return names.intersection(re.findall(r"\w+", path.read_text()))


def test_pipeline_classes_are_named_in_families_alone() -> None:
    names = set(FAMILIES) | {type(family).__name__ for family in FAMILIES.values()}
    assert mentioned(names, PACKAGE / "families" / "unet2d.py"), "the search finds nothing where there is something"
    found = {str(p.relative_to(ROOT)): mentioned(names, p) for p in sources(PACKAGE) if layer_of(p) != "families"}
    assert not {path: names for path, names in found.items() if names}


def test_the_trainer_names_no_method() -> None:
    names = {*METHODS, *map(str.upper, METHODS), *map(str.capitalize, METHODS)} | {method.__name__ for method in METHODS.values()}
    assert mentioned(names, PACKAGE / "methods" / "dmd2.py") >= {"DMD2"}
    assert not mentioned(names, PACKAGE / "trainer.py")


def top_level_imports(path: Path) -> set[str]:
    names = imported_names(path.read_text(), path.relative_to(ROOT).parent.parts)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sources(ROOT / "eval"), ids=lambda path: path.name)
def test_evaluation_never_imports_the_package(path: Path) -> None:
    assert PACKAGE.name not in top_level_imports(path)


@pytest.mark.parametrize("path", sources(ROOT / "pipelines"), ids=lambda path: path.name)
def test_pipelines_travel_alone(path: Path) -> None:
    """A pipeline file is copied into exported folders, where there is diffusers and nothing of ours."""
    assert top_level_imports(path) <= PIPELINE_IMPORTS
