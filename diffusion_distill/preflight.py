"""What is wrong in an input and can be known before a model is loaded."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .checkpoint import checkpoints_in, resolve_checkpoint
from .config import TeacherConfig
from .data import DataConfig, check_sources
from .errors import InputError, reject
from .families import FAMILIES
from .run_record import claim
from .train_config import TrainConfig

INDEX: str = DiffusionPipeline.config_name


def check_input(
    teacher: TeacherConfig, data: DataConfig, config: TrainConfig | None = None, *, needs_images: bool = False, needs_pairs: bool = False
) -> None:
    """Look at the teacher's folder, the data and, with `config`, the folder of the run.

    Raises:
        InputError: naming the field or file and what is accepted.
    """
    check_teacher(teacher)
    check_sources(data, needs_images, needs_pairs)
    if config is not None:
        _check_resume(Path(config.output_dir), config.resume_from_checkpoint)


def check_teacher(teacher: TeacherConfig) -> None:
    """Look at the index of a pipeline in a local folder; a name on the Hub is looked up by diffusers."""
    name = teacher.pretrained_model_name_or_path
    folder = Path(name).expanduser()
    if not folder.exists() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise reject("pretrained_model_name_or_path", name, "no such folder; a diffusers pipeline is needed")
    if not folder.exists():
        return
    if not (folder / INDEX).is_file():
        raise reject("pretrained_model_name_or_path", name, f"a folder with the {INDEX} of a diffusers pipeline is needed")
    index = _read_index(folder / INDEX)
    kind = index["_class_name"]
    if kind not in FAMILIES:
        raise reject(f"{folder / INDEX}: pipeline class (_class_name)", kind, "supported: " + ", ".join(sorted(FAMILIES)))
    for component, value in index.items():
        if _is_component(value) and not (folder / component).is_dir():
            raise reject("pretrained_model_name_or_path", name, f"the folder of its component {component!r} ({value[1]}) is missing")


def _read_index(path: Path) -> dict[str, Any]:
    """`model_index.json` with the name of the pipeline's class as text; as [file, class], the file travels with the weights."""
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        named = index["_class_name"]
        index["_class_name"] = named[1] if isinstance(named, list) else named
        if isinstance(index["_class_name"], str):
            return index
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        pass
    raise InputError(f"pretrained_model_name_or_path: {path} is not the index that diffusers writes: a JSON object with _class_name")


def _is_component(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _check_resume(folder: Path, value: str | None) -> None:
    begun = claim(folder, value)
    if value and not (value == "latest" and (begun or checkpoints_in(folder))):  # the newest is read in full, later
        resolve_checkpoint(folder, value)
