"""From evaluation files to the data of a report."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluate import complete_results
from report import Entry, Model, value_from


def served_steps(folder: Path) -> tuple[int, ...]:
    """The numbers of steps that an exported student was trained to serve, its default first; none for other folders."""
    record = folder / "distillation.json"
    return tuple(len(sampler["timesteps"]) for sampler in json.loads(record.read_text())["samplers"]) if record.is_file() else ()


def model_from(evaluation: Mapping[str, Any], folder: Path, label: str) -> Model:
    """A model and its complete results, by number of steps, without images."""
    own_steps = next(iter(served_steps(folder)), None)
    entries = [entry_from(result, label, own_steps) for result in complete_results(dict(evaluation))]
    about = _about(evaluation.get("distillation") or {})
    return Model(label, str(folder), evaluation["model_sha256"], about, tuple(sorted(entries, key=lambda entry: entry.steps)))


def entry_from(result: Mapping[str, Any], label: str, own_steps: int | None = None) -> Entry:
    """One result of an evaluation file. Its steps: those asked for, those on record, or else the network evaluations of an image."""
    values = {name: value_from(metric) for name, metric in result["metrics"].items()}
    steps = result["num_inference_steps"] or own_steps or round(values["network_evaluations_per_image"].mean)
    return Entry(label, steps, values, _environment(result["environment"]))


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
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def _environment(record: Mapping[str, Any]) -> str:
    return f"{record['device']}, {record['cpu_threads']} CPU thread(s), batches of {record['batch_size']}"


def _about(distillation: Mapping[str, Any]) -> str:
    told = [f"{name} {distillation[name]}" for name in ("method", "commit") if distillation.get(name)]
    return ", ".join(told)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "the model's own" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
