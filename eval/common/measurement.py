"""What all metric scripts share: the settings, the features that a metric reads, and how a number is printed and kept.

A metric is a function of `Inputs` and its own settings that returns named `Estimate`s; the first process alone calls it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from common.extractors import Extractor, load_extractor
from common.image_files import ImageSet, open_folder
from common.processes import Team, join
from common.references import Reference, load_reference
from common.sampling import SamplingConfig, open_images, sampling_cost
from common.set_features import set_features
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number, what it was estimated from, and how uncertain it is."""

    value: float
    samples: int
    error: float | None = None  # one standard deviation; None where it was not estimated
    error_from: str = ""  # how: bootstrap, subsets, splits, standard error
    per_image: list[float] | None = None  # the images' own values, where the number is their mean
    details: dict[str, Any] | None = None  # what else is worth a look

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.2g} ({self.error_from})"
        return f"{self.value:.6g}{spread}, {self.samples:,} images"


Estimates = dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(SamplingConfig):
    """Settings of a metric that reads features."""

    features: str = "inception"
    """inception, inception_clean, dinov2, clip, pixels, a registered small network, or FILE.py:NAME."""
    weights: Path | None = None
    """Weights of the feature network (file or folder); None takes them from torch's or Hugging Face's cache."""
    cache_dir: Path | None = None
    """Where features are kept for the next metric; None is a folder in the user's cache."""
    output: Path | None = None
    """JSON file to write besides the print."""

    def further_sets(self) -> dict[str, Path]:
        """Other folders of images whose features the metric reads, by name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class AgainstReferenceConfig(FeatureConfig):
    """Settings of a metric that compares with real images."""

    reference: Path
    """Real images: a folder, or an .npz with mu and sigma (EDM, ADM, clean-fid) or with images."""


@dataclass(frozen=True)
class Inputs:
    """What a metric reads: the images, their features (N, D) in float64, and the reference in the same features."""

    images: ImageSet
    extractor: Extractor
    features: Tensor
    given_reference: Reference | None = None
    further: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reference(self) -> Reference:
        assert self.given_reference is not None, "a metric without AgainstReferenceConfig asks for a reference"
        return self.given_reference


Config = TypeVar("Config", bound=FeatureConfig)
Metric = Callable[[Inputs, Any], Estimates]


def collect(config: FeatureConfig, team: Team, images: ImageSet | None = None) -> Inputs:
    """Sample what is to be sampled and compute the features; every process must call this.

    Args:
        images: the set to measure, where it is open already.

    Raises:
        InputError: see `open_images`, `load_extractor`, `load_reference`.
    """
    extractor = load_extractor(config.features, config.weights, team.device)
    reference: Reference | None = None
    if isinstance(config, AgainstReferenceConfig):
        reference = load_reference(config.reference, extractor, config.cache_dir, team)
    images = images or open_images(config, team)
    features = set_features(images, extractor, config.cache_dir, team)
    further = {
        name: set_features(open_folder(path), extractor, config.cache_dir, team, name) for name, path in config.further_sets().items()
    }
    return Inputs(images, extractor, features, reference, further)


def measure(config: Config, metric: Callable[[Inputs, Config], Estimates]) -> None:
    """Measure, print a line for each number and write `output`: what a metric's script does."""
    team = join(config.device)
    inputs = collect(config, team)
    if team.rank == 0:
        estimates = metric(inputs, config)
        for name, estimate in estimates.items():
            print(f"{name}: {estimate}, features {inputs.extractor.name}")
        if config.output:
            write_json(config.output, record(config, inputs, estimates))
    team.leave()


def record(config: FeatureConfig, inputs: Inputs, estimates: Estimates) -> dict[str, Any]:
    """The estimates with all that they belong to."""
    extractor, reference = inputs.extractor, inputs.given_reference
    return {
        "metrics": {name: asdict(estimate) for name, estimate in estimates.items()},
        "images": {"folder": str(inputs.images.folder), "count": len(inputs.images), "sha256": inputs.images.sha256()},
        "reference": reference and {"path": reference.name, "count": reference.statistics.samples, "sha256": reference.sha256},
        "features": {"name": extractor.name, "sha256": extractor.sha256, "preprocessing": extractor.preprocessing},
        "cost": sampling_cost(inputs.images.folder),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        "torch": torch.__version__,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def mean_estimate(values: Tensor, keep: bool = False) -> Estimate:
    """Mean of values (N,) with its standard error; `keep` the values, one an image."""
    error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(values.double().mean().item(), len(values), error, "standard error", values.tolist() if keep else None)
