"""Judge one exported pipeline folder and write evaluation.json.

    python eval/evaluate.py STUDENT --trust_remote_code
    python eval/evaluate.py TEACHER --num_inference_steps 8 16 50 --trust_remote_code

5,000 samples for each of 5 noise seeds by default; the noise of a distance over fewer samples hides what methods differ by. The
file is written after every seed, and a later run with the same protocol goes on from there.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import tyro
from command_line import InputError, reject, run
from feature_networks import load_feature_network
from generate import balanced_labels, generate, load_pipeline
from metrics import NEIGHBOURS, Judge
from reference_data import load_reference_data
from statistics_over_seeds import summary

MANIFOLD_METRICS = ("precision", "recall")
DEFAULT_NETWORK = "digits"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What evaluations of several models share."""

    samples: int = 5000
    """Images for each noise seed, the same number for every class."""
    noise_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the noise; the metrics are given as mean and standard deviation over them."""
    guidance_scale: float | None = None
    """Classifier-free guidance; None takes the folder's own."""
    dataset: str = "digits"
    """Real data: digits."""
    feature_network: str = DEFAULT_NETWORK
    """A registered feature network (digits, digits_second) or a .safetensors file with its record."""
    batch_size: int = 250
    """Images in one pipeline call; it changes the time, not the images."""
    device: str = "auto"
    """Where the pipeline runs; auto takes CUDA where there is some."""
    trust_remote_code: bool = False
    """Run the pipeline.py that a folder brings."""
    overwrite: bool = False
    """Start anew, whatever the evaluation file holds; without it, a file of another protocol or model is an error."""

    def check(self) -> None:
        """Raise `InputError` for a value that no evaluation can serve."""
        if self.batch_size < 1:
            raise reject("batch_size", self.batch_size, "at least 1")
        if not self.noise_seeds or min(self.noise_seeds) < 0 or len(set(self.noise_seeds)) < len(self.noise_seeds):
            raise reject("noise_seeds", self.noise_seeds, "one or more different whole numbers from 0")

    @property
    def file_name(self) -> str:
        """Name of the evaluation file: one for each feature network."""
        return "evaluation.json" if self.feature_network == DEFAULT_NETWORK else f"evaluation_{Path(self.feature_network).stem}.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """Judge one exported pipeline folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a diffusers pipeline that takes class labels."""
    num_inference_steps: tuple[int, ...] = ()
    """Step counts to evaluate, one after another. None given: the folder's own steps."""
    output: Path | None = None
    """File to write; None is evaluation.json in the folder (evaluation_NETWORK.json for another feature network)."""

    def check(self) -> None:
        super().check()
        if any(steps < 1 for steps in self.num_inference_steps):
            raise reject("num_inference_steps", self.num_inference_steps, "at least 1 each")

    @property
    def step_counts(self) -> tuple[int | None, ...]:
        return tuple(dict.fromkeys(self.num_inference_steps)) or (None,)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The content of the evaluation file, complete for the step counts asked for; `results` may hold more of them.

    Raises:
        InputError: for a wrong setting, folder or file, and for samples that cannot be measured.
    """
    config.check()
    judge = load_judge(config.dataset, config.feature_network)
    _check_samples(config.samples, judge.data.classes)
    pipe = load_pipeline(config.folder, config.trust_remote_code, config.device)
    path = config.output or config.folder / config.file_name
    report = _open_report(path, config, judge)
    labels = balanced_labels(config.samples, judge.data.classes)
    for steps, seed in _missing(report, config):
        progress = f"{config.folder.name}, {'own' if steps is None else steps} steps, seed {seed}"
        drawn = generate(pipe, labels, seed, config.batch_size, steps, config.guidance_scale, progress)
        values = judge.measure(drawn.images, drawn.labels)
        values |= {
            "network_evaluations_per_image": drawn.network_evaluations,
            "seconds_per_image": drawn.seconds,
            "cpu_seconds_per_image": drawn.cpu_seconds,
        }
        result = _result(report, steps)
        _add_seed(result, seed, values, report["protocol"])
        result["environment"] = _environment(pipe, config.batch_size)
        _write(path, report)
    return report


@cache
def load_judge(dataset: str, feature_network: str) -> Judge:
    """The judge for a data set and a feature network, loaded once."""
    return Judge(load_reference_data(dataset), load_feature_network(feature_network))


def complete_results(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The report's results that have all noise seeds, by number of network evaluations."""
    seeds = len(report["protocol"]["noise_seeds"])
    done = [result for result in report["results"] if len(result["metrics"].get("frechet_distance", {"per_seed": ()})["per_seed"]) == seeds]
    return sorted(done, key=lambda result: result["metrics"]["network_evaluations_per_image"]["mean"])


def fingerprint(folder: Path) -> str:
    """SHA-256 over the files that decide what a pipeline folder draws: weights, configurations and code."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        record = name == "distillation.json" or (name.startswith("evaluation") and name.endswith(".json"))
        if path.suffix in (".json", ".py", ".safetensors") and not record:
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _check_samples(samples: int, classes: int) -> None:
    if samples < 2 * classes or samples % classes:
        raise reject("samples", samples, f"a multiple of the {classes} classes, at least {2 * classes}")


def _protocol(config: EvaluateConfig, judge: Judge) -> dict[str, Any]:
    return {
        "samples_per_seed": config.samples,
        "noise_seeds": list(config.noise_seeds),
        "guidance_scale": config.guidance_scale,
        "dataset": config.dataset,
        "training_images": len(judge.data.train_images),
        "copy_threshold": round(judge.copy_threshold, 6),
        "feature_network": judge.network.name,
        "feature_network_sha256": judge.network.sha256,
        "precision_recall_neighbours": NEIGHBOURS,
        "precision_recall_samples": judge.manifold_samples(config.samples),
    }


def _open_report(path: Path, config: EvaluateConfig, judge: Judge) -> dict[str, Any]:
    report: dict[str, Any] = {
        "model": config.folder.resolve().name,
        "model_sha256": fingerprint(config.folder),
        "distillation": _distillation(config.folder),
        "protocol": _protocol(config, judge),
        "results": [],
    }
    if not path.is_file() or config.overwrite:
        return report
    earlier = _read(path)
    different = _differences(earlier, report)
    if different:
        raise InputError(f"output: {path} holds another evaluation ({different}); pass another output or --overwrite")
    return report | {"results": earlier["results"]}


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    if earlier.get("model_sha256") != now["model_sha256"]:
        return "the model has changed since"
    before, after = earlier.get("protocol", {}), now["protocol"]
    return ", ".join(f"{key}: {before.get(key)} there, {value} now" for key, value in after.items() if before.get(key) != value)


def _distillation(folder: Path) -> dict[str, Any] | None:
    path = folder / "distillation.json"
    return _read(path) if path.is_file() else None


def _environment(pipe: Any, batch_size: int) -> dict[str, Any]:
    """What the measured time depends on."""
    device = pipe.device
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "cpu_threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }


def _missing(report: dict[str, Any], config: EvaluateConfig) -> Iterator[tuple[int | None, int]]:
    for steps in config.step_counts:
        done = _result(report, steps)["metrics"].get("frechet_distance", {"per_seed": {}})["per_seed"]
        for seed in config.noise_seeds:
            if str(seed) not in done:
                yield steps, seed


def _result(report: dict[str, Any], steps: int | None) -> dict[str, Any]:
    for result in report["results"]:
        if result["num_inference_steps"] == steps:
            return result
    report["results"].append({"num_inference_steps": steps, "metrics": {}})
    return report["results"][-1]


def _add_seed(result: dict[str, Any], seed: int, values: dict[str, float], protocol: dict[str, Any]) -> None:
    for name, value in values.items():
        per_seed = result["metrics"].get(name, {"per_seed": {}})["per_seed"] | {str(seed): value}
        samples = protocol["precision_recall_samples" if name in MANIFOLD_METRICS else "samples_per_seed"]
        result["metrics"][name] = {**summary(per_seed), "samples": samples}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise reject(str(path), type(content).__name__, "a JSON object is needed")
    return content


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)


def describe(result: dict[str, Any]) -> str:
    """One line on a result: every metric as mean ± standard deviation."""
    numbers = (
        f"{name} {plus_minus(metric)} ({metric['samples']:,} x {len(metric['per_seed'])})" for name, metric in result["metrics"].items()
    )
    return f"{result['num_inference_steps'] or 'own'} steps: " + ", ".join(numbers)


def plus_minus(metric: dict[str, Any], digits: int = 3) -> str:
    """`mean ± standard deviation` of a metric, the mean alone after a single seed."""
    return f"{metric['mean']:.{digits}f}" + ("" if metric["std"] is None else f" ± {metric['std']:.{digits}f}")


def main(config: EvaluateConfig) -> None:
    for result in complete_results(evaluate(config)):
        print(describe(result))


if __name__ == "__main__":
    run(EvaluateConfig, main)
