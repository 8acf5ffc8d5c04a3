"""A pipeline from its configuration files alone: its networks on the meta device, with shapes and without weights."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from .build import load_pipeline
from .config import TeacherConfig
from .errors import InputError

_SMALL = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*.py", "*/*.jinja"]  # of a repository on the Hub: everything but weights


def pipeline_on_meta(teacher: TeacherConfig) -> Any:
    """The pipeline of a folder, or of a name on the Hub, whose networks are on the meta device. No weights are read or downloaded.

    Raises:
        InputError: when the configuration cannot be read, with the reason in one line.
    """
    name = teacher.pretrained_model_name_or_path
    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, revision=teacher.revision, allow_patterns=_SMALL))
        index = json.loads((folder / DiffusionPipeline.config_name).read_text())
        networks = {part: _on_meta(folder / part, *value) for part, value in index.items() if _is_network(value)}
        with tempfile.TemporaryDirectory() as other:
            _without(networks, folder, index, Path(other))
            return load_pipeline(teacher, networks, other)
    except InputError:
        raise
    except Exception as error:  # a damaged folder, no network, a class that this version does not have
        raise InputError(f"pretrained_model_name_or_path: cannot plan for {name!r}: {' '.join(str(error).split())[:300]}") from error


def _without(networks: Iterable[str], folder: Path, index: dict[str, Any], other: Path) -> None:
    """The same pipeline folder in `other`, by links, with an index without `networks`: diffusers would load some all the same."""
    for path in folder.resolve().iterdir():
        if path.name != DiffusionPipeline.config_name:
            (other / path.name).symlink_to(path)
    named = index | {name: [None, None] for name in networks}
    (other / DiffusionPipeline.config_name).write_text(json.dumps(named))


def _is_network(value: Any) -> bool:
    named = isinstance(value, list) and len(value) == 2 and value[0] in ("diffusers", "transformers")
    kind = getattr(diffusers if named and value[0] == "diffusers" else transformers, value[1], None) if named else None
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _on_meta(folder: Path, library: str, name: str) -> nn.Module:
    with torch.device("meta"):
        if library == "diffusers":
            kind = getattr(diffusers, name)
            model: nn.Module = kind.from_config(kind.load_config(folder))
            return model.eval()
        kind = getattr(transformers, name)
        config = kind.config_class.from_pretrained(folder)
        built: nn.Module = kind._from_config(config, dtype=config.dtype or torch.float32)
    return built.eval()
