"""From evaluation files to the data of a report."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.evaluation_file import complete_results
from PIL import Image
from report.data import Entry, Model, value_from


@dataclass(frozen=True)
class Pictures:
    """The images of one entry: one for each column of the grid, and a grid of more."""

    images: tuple[Image.Image, ...]
    more_images: Image.Image | None = None


def served_steps(folder: Path) -> tuple[int, ...]:
    """The numbers of steps that an exported student was trained to serve, its default first; none for other folders."""
    record = folder / "distillation.json"
    return tuple(len(sampler["timesteps"]) for sampler in json.loads(record.read_text())["samplers"]) if record.is_file() else ()


def model_from(evaluation: Mapping[str, Any], folder: Path, label: str, pictures: Callable[[Mapping[str, Any]], Pictures]) -> Model:
    """A model and its complete results, by number of steps; `pictures` gives the images of each."""
    found = [replace(entry_from(result, label, folder), **vars(pictures(result))) for result in ordered_results(evaluation, folder)]
    return Model(label, str(folder), evaluation["model_sha256"], _about(evaluation.get("distillation") or {}), tuple(found))


def ordered_results(evaluation: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The complete results of an evaluation, by number of steps: those asked for, those on record, or else the network evaluations."""
    return sorted(complete_results(dict(evaluation)), key=lambda result: _steps(result, folder))


def entry_from(result: Mapping[str, Any], label: str, folder: Path) -> Entry:
    """One result of the evaluation file of `folder`, without images."""
    values = {name: value_from(metric) for name, metric in result["metrics"].items()}
    return Entry(label, _steps(result, folder), values, _environment(result["environment"]))


def protocol_from(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What evaluations share, each setting in words."""
    return {name: _words(value) for name, value in evaluation["protocol"].items()}


def versions_from(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Versions of the libraries that the evaluations ran on."""
    found = [result["environment"] for evaluation in evaluations for result in evaluation["results"] if "environment" in result]
    return "; ".join(dict.fromkeys(", ".join(f"{name} {e[name]}" for name in ("python", "torch", "diffusers") if name in e) for e in found))


def commit() -> str:
    """Commit of this checkout, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def _steps(result: Mapping[str, Any], folder: Path) -> int:
    own = next(iter(served_steps(folder)), None)
    return int(result["num_inference_steps"] or own or round(result["metrics"]["network_evaluations_per_image"]["mean"]))


def _environment(record: Mapping[str, Any]) -> str:
    return f"{record['device']}, {record['cpu_threads']} CPU thread(s), batches of {record['batch_size']}"


def _about(distillation: Mapping[str, Any]) -> str:
    told = [f"{name} {distillation[name]}" for name in ("method", "commit") if distillation.get(name)]
    return ", ".join(told)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {of}" for key, of in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
