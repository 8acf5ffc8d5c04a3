"""Judge one pipeline folder by several metrics at once and write evaluation.json.

    python eval/evaluate.py STUDENT --trust_remote_code                                             # the digits test-bed
    python eval/evaluate.py TEACHER --num_inference_steps 8 16 50 --trust_remote_code
    accelerate launch eval/evaluate.py FOLDER --metrics fid clip_score --reference REFERENCE --prompts_file prompts.txt --samples 30000

5,000 samples for each of 5 noise seeds by default; the noise of a distance over fewer samples hides what methods differ by. The
file is written after every seed, and a later run with the same protocol goes on from there.

Without `--metrics`, class-conditional pipelines are judged on a data set of `reference_data` (digits). With them, any diffusers pipeline
or folder of images is, by the metrics of `evaluate_set`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from common.command_line import reject, run
from common.evaluation_file import (
    complete_results,
    describe,
    distillation_record,
    environment,
    open_report,
    result_of,
    write_report,
)
from common.evaluation_file import plus_minus as plus_minus
from common.feature_networks import load_feature_network
from common.fingerprints import fingerprint
from common.generate import balanced_labels, generate, load_pipeline
from common.metrics import Judge
from common.neighbours import NEIGHBOURS
from common.reference_data import load_reference_data
from common.statistics_over_seeds import summary

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
    metrics: tuple[
        Literal["fid", "kid", "inception_score", "precision_recall", "clip_score", "diversity", "accuracy", "memorization"], ...
    ] = ()
    """Measure these instead of the data set's own. The settings below belong to them; each takes the feature network of its script."""
    reference: Path | None = None
    """Real images: a folder, or an .npz (see fid.py)."""
    held_out: Path | None = None
    """Real images that were not trained on (see memorization.py)."""
    prompts_file: Path | None = None
    """Prompts for a text-to-image pipeline: a line each, or .jsonl with `prompt` or `text`."""
    images_dir: Path | None = None
    """Folder for the sampled images, one below it for each number of steps and seed. None: beside the pipeline's."""
    features: dict[str, str] = field(default_factory=dict)
    """Other feature networks, as pairs of metric and network: `fid dinov2`."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Weights of feature networks, as pairs of network and path: `inception FILE clip FOLDER`."""
    cache_dir: Path | None = None
    """Where features are kept; None is a folder in the user's cache."""
    resolution: int | None = None
    """Side of the images in pixels. None: the pipeline's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the pipeline's networks."""

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
    """Folder of a diffusers pipeline; with `--metrics` also a folder of images, all of which are taken."""
    num_inference_steps: tuple[int, ...] = ()
    """Step counts to evaluate, one after another. None given: the folder's own steps."""
    output: Path | None = None
    """File to write; None is evaluation.json in the folder (evaluation_NETWORK.json for another feature network, evaluation_set.json
    with `--metrics`)."""

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
    if config.metrics:
        from evaluate_set import evaluate_set

        return evaluate_set(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != 1:
        raise reject("num_processes", processes, "the protocol of a data set runs in one process; --metrics on many")
    judge = load_judge(config.dataset, config.feature_network)
    _check_samples(config.samples, judge.data.classes)
    pipe = load_pipeline(config.folder, config.trust_remote_code, config.device)
    path = config.output or config.folder / config.file_name
    report = open_report(path, _header(config, judge), config.overwrite)
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
        result = result_of(report, steps)
        _add_seed(result, seed, values, report["protocol"])
        result["environment"] = environment(pipe.device, config.batch_size)
        write_report(path, report)
    return report


@cache
def load_judge(dataset: str, feature_network: str) -> Judge:
    """The judge for a data set and a feature network, loaded once."""
    return Judge(load_reference_data(dataset), load_feature_network(feature_network))


def _check_samples(samples: int, classes: int) -> None:
    if samples < 2 * classes or samples % classes:
        raise reject("samples", samples, f"a multiple of the {classes} classes, at least {2 * classes}")


def _header(config: EvaluateConfig, judge: Judge) -> dict[str, Any]:
    return {
        "model": config.folder.resolve().name,
        "model_sha256": fingerprint(config.folder),
        "distillation": distillation_record(config.folder),
        "protocol": _protocol(config, judge),
    }


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


def _missing(report: dict[str, Any], config: EvaluateConfig) -> Iterator[tuple[int | None, int]]:
    for steps in config.step_counts:
        done = result_of(report, steps)["metrics"].get("frechet_distance", {"per_seed": {}})["per_seed"]
        for seed in config.noise_seeds:
            if str(seed) not in done:
                yield steps, seed


def _add_seed(result: dict[str, Any], seed: int, values: dict[str, float], protocol: dict[str, Any]) -> None:
    for name, value in values.items():
        per_seed = result["metrics"].get(name, {"per_seed": {}})["per_seed"] | {str(seed): value}
        samples = protocol["precision_recall_samples" if name in MANIFOLD_METRICS else "samples_per_seed"]
        result["metrics"][name] = {**summary(per_seed), "samples": samples}


def main(config: EvaluateConfig) -> None:
    report = evaluate(config)
    if os.environ.get("RANK", "0") == "0":
        for result in complete_results(report):
            print(describe(result))


if __name__ == "__main__":
    run(EvaluateConfig, main, "many")
