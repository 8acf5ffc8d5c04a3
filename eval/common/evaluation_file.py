"""The file that an evaluation writes: what was measured (`protocol`), on which model, and `results`, one for each number of steps.

It is written after every seed; a later evaluation of the same model under the same protocol goes on from there.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
from common.command_line import InputError, reject


def open_report(path: Path, header: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """`header` (model, model_sha256, distillation, protocol) with the results that `path` holds already.

    Raises:
        InputError: where the file belongs to another model or protocol and `overwrite` is off.
    """
    if not path.is_file() or overwrite:
        return header | {"results": []}
    earlier = read_report(path)
    different = _differences(earlier, header)
    if different:
        raise InputError(f"output: {path} holds another evaluation ({different}); pass another output or --overwrite")
    return header | {"results": earlier["results"]}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)


def read_report(path: Path) -> dict[str, Any]:
    """The object in a JSON file. InputError where there is none."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise reject(str(path), type(content).__name__, "a JSON object is needed")
    return content


def result_of(report: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The report's result for a number of steps, new where there is none."""
    for result in report["results"]:
        if result["num_inference_steps"] == steps:
            return result
    report["results"].append({"num_inference_steps": steps, "metrics": {}})
    return report["results"][-1]


def complete_results(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The report's results that have all noise seeds, by number of network evaluations."""
    seeds = len(report["protocol"]["noise_seeds"])
    done = [r for r in report["results"] if r["metrics"] and all(len(metric["per_seed"]) == seeds for metric in r["metrics"].values())]
    return sorted(done, key=lambda result: result["metrics"].get("network_evaluations_per_image", {"mean": 0})["mean"])


def distillation_record(folder: Path) -> dict[str, Any] | None:
    """What an exported student's distillation.json says; None for other folders."""
    path = folder / "distillation.json"
    return read_report(path) if path.is_file() else None


def environment(device: torch.device, batch_size: int) -> dict[str, Any]:
    """What the measured time depends on."""
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "cpu_threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }


def describe(result: dict[str, Any]) -> str:
    """One line on a result: every metric as mean ± standard deviation."""
    numbers = (
        f"{name} {plus_minus(metric)} ({metric['samples']:,} x {len(metric['per_seed'])})" for name, metric in result["metrics"].items()
    )
    return f"{result['num_inference_steps'] or 'own'} steps: " + ", ".join(numbers)


def plus_minus(metric: dict[str, Any], digits: int = 3) -> str:
    """`mean ± standard deviation` of a metric, the mean alone after a single seed."""
    return f"{metric['mean']:.{digits}f}" + ("" if metric["std"] is None else f" ± {metric['std']:.{digits}f}")


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    if earlier.get("model_sha256") != now["model_sha256"]:
        return "the model has changed since"
    before, after = earlier.get("protocol", {}), now["protocol"]
    return ", ".join(f"{key}: {before.get(key)} there, {value} now" for key, value in after.items() if before.get(key) != value)
