"""A set of metrics on any pipeline or folder of images: what `evaluate.py --metrics ...` does.

Each number of steps and noise seed is sampled once into a folder of its own; all metrics read it, and share the features that they
have in common.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accuracy import AccuracyConfig, accuracy
from clip_score import ClipScoreConfig, clip_score
from common.command_line import reject
from common.evaluation_file import distillation_record, environment, open_report, result_of, write_report
from common.fingerprints import fingerprint
from common.image_files import ImageSet, file_sha256, open_folder
from common.measurement import AgainstReferenceConfig, Estimates, FeatureConfig, Inputs, collect
from common.processes import Team, join
from common.sampling import SamplingConfig, open_images, sampling_cost
from common.statistics_over_seeds import summary
from diversity import DiversityConfig, diversity
from fid import FidConfig, fid
from inception_score import InceptionScoreConfig, score
from kid import KidConfig, kid
from memorization import MemorizationConfig, memorization
from precision_recall import PrecisionRecallConfig, precision_recall_density_coverage

if TYPE_CHECKING:
    from evaluate import EvaluateConfig

FILE_NAME = "evaluation_set.json"
FOLDER_SEED = 0  # under which a folder of images, which has none, is filed


@dataclass(frozen=True)
class Metric:
    """A metric's settings and its function."""

    config: type[FeatureConfig]
    compute: Callable[[Inputs, Any], Estimates]


METRICS = {
    "fid": Metric(FidConfig, fid),
    "kid": Metric(KidConfig, kid),
    "inception_score": Metric(InceptionScoreConfig, score),
    "precision_recall": Metric(PrecisionRecallConfig, precision_recall_density_coverage),
    "clip_score": Metric(ClipScoreConfig, clip_score),
    "diversity": Metric(DiversityConfig, diversity),
    "accuracy": Metric(AccuracyConfig, accuracy),
    "memorization": Metric(MemorizationConfig, memorization),
}


def evaluate_set(config: "EvaluateConfig") -> dict[str, Any]:
    """The content of the evaluation file for `config.metrics`; every process must call this, the first one writes.

    Raises:
        InputError: for a wrong setting, folder or file, and for samples that cannot be measured.
    """
    configs = {name: metric_config(name, config) for name in config.metrics}
    team = join(config.device)
    is_pipeline = SamplingConfig(folder=config.folder).is_pipeline
    seeds = config.noise_seeds if is_pipeline else (FOLDER_SEED,)
    path = config.output or config.folder / FILE_NAME
    report = open_report(path, _header(config, seeds, is_pipeline), config.overwrite)
    team.wait()  # all have read the file before the first one writes it
    for steps in config.step_counts if is_pipeline else (None,):
        for seed in seeds:
            _add_missing(report, config, configs, steps, seed, team)
            if team.rank == 0:
                write_report(path, report)
    team.leave()
    return report


def metric_config(name: str, config: "EvaluateConfig") -> FeatureConfig:
    """The settings of one metric under those of the evaluation.

    Raises:
        InputError: where the metric needs a reference and there is none.
    """
    kind = METRICS[name].config
    known = {field.name for field in fields(kind)} - {"weights", "features", "images_dir", "num_inference_steps", "output"}
    given = {key: getattr(config, key) for key in known if hasattr(config, key)}
    if issubclass(kind, AgainstReferenceConfig) and config.reference is None:
        raise reject("reference", None, f"{name} compares with real images: a folder of them, or an .npz")
    plain = kind(**given)
    network = config.features.get(name, plain.features)
    found = kind(**given, features=network, weights=config.weights.get(network))
    found.check()
    return found


def _add_missing(
    report: dict[str, Any], config: "EvaluateConfig", configs: dict[str, FeatureConfig], steps: int | None, seed: int, team: Team
) -> None:
    result = result_of(report, steps)
    missing = [name for name in configs if str(seed) not in result.setdefault("measured", {}).get(name, ())]
    if not missing:
        return
    images = open_images(_sampling(config, steps, seed), team)
    for name in missing:
        inputs = collect(configs[name], team, images)
        if team.rank == 0:
            for key, estimate in METRICS[name].compute(inputs, configs[name]).items():
                _add(result, key, seed, estimate.value, estimate.samples)
                metric, network = result["metrics"][key], {"name": inputs.extractor.name, "sha256": inputs.extractor.sha256}
                if metric.setdefault("feature_network", network) != network:
                    raise reject("weights", network, f"{key} of earlier seeds is of {metric['feature_network']}; --overwrite starts anew")
                metric.setdefault("error_per_seed", {})[str(seed)] = estimate.error
                metric["error_from"] = estimate.error_from
                if estimate.per_image is not None:
                    metric.setdefault("per_image", {})[str(seed)] = estimate.per_image
        result["measured"].setdefault(name, []).append(str(seed))
    for key, value in sampling_cost(images.folder).items():
        _add(result, key, seed, value, len(images))
    result.setdefault("images", {})[str(seed)] = {"folder": str(images.folder), "count": len(images), "sha256": images.sha256()}
    result["environment"] = environment(torch.device(team.device), config.batch_size)


def _add(result: dict[str, Any], key: str, seed: int, value: float, samples: int) -> None:
    earlier = result["metrics"].get(key, {"per_seed": {}})
    result["metrics"][key] = {**earlier, **summary(earlier["per_seed"] | {str(seed): value}), "samples": samples}


def _sampling(config: "EvaluateConfig", steps: int | None, seed: int) -> SamplingConfig:
    images_dir = config.images_dir and config.images_dir / f"steps-{steps or 'own'}_seed-{seed}"
    is_pipeline = SamplingConfig(folder=config.folder).is_pipeline
    return SamplingConfig(
        folder=config.folder,
        samples=config.samples if is_pipeline else None,
        prompts_file=config.prompts_file,
        images_dir=images_dir,
        num_inference_steps=steps,
        guidance_scale=config.guidance_scale,
        resolution=config.resolution,
        noise_seed=seed,
        dtype=config.dtype,
        batch_size=config.batch_size,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _header(config: "EvaluateConfig", seeds: tuple[int, ...], is_pipeline: bool) -> dict[str, Any]:
    folder = config.folder.resolve()
    images: ImageSet | None = None if is_pipeline else open_folder(config.folder)
    protocol = {
        "samples_per_seed": config.samples if images is None else len(images),
        "noise_seeds": list(seeds),
        "guidance_scale": config.guidance_scale,
        "resolution": config.resolution,
        "dtype": config.dtype,
        "prompts_sha256": config.prompts_file and _hash(config.prompts_file),
        "reference": config.reference and config.reference.name,
        "features": {name: config.features[name] for name in sorted(config.features)},
    }
    return {
        "model": folder.name,
        "model_sha256": fingerprint(config.folder) if images is None else images.sha256(),
        "distillation": distillation_record(config.folder),
        "protocol": protocol,
    }


def _hash(path: Path) -> str:
    if not path.is_file():
        raise reject("prompts_file", str(path), "no such file")
    return file_sha256(path)
