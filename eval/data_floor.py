"""What the metrics read for real images: the floor below which no generator can be told from the data.

    python eval/data_floor.py

The held-out split is compared with the training split, then other stratified splits of the same sizes give the spread. The
feature network saw the first training split alone. A Fréchet distance falls with the number of samples, so this one (500
held-out images) is not on the scale of a model's (5,000).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common.command_line import reject, run
from common.feature_networks import FeatureNetwork, load_feature_network
from common.metrics import Judge, frechet_distance
from common.reference_data import ReferenceData, load_reference_data
from common.statistics_over_seeds import summary
from sklearn.model_selection import train_test_split


@dataclass(frozen=True)
class FloorConfig:
    """Real against real."""

    dataset: str = "digits"
    """Real data: digits."""
    feature_network: str = "digits"
    """A registered feature network (digits, digits_second) or a .safetensors file with its record."""
    splits: int = 20
    """Further stratified splits that give the spread."""
    output: Path | None = None
    """JSON file to write besides the print."""


def resplit(data: ReferenceData, seed: int) -> ReferenceData:
    """Another stratified split of the same images, into as many training and held-out ones."""
    images, labels = torch.cat([data.train_images, data.test_images]), torch.cat([data.train_labels, data.test_labels])
    train, test = train_test_split(range(len(labels)), test_size=len(data.test_labels), stratify=labels, random_state=seed)
    return replace(data, train_images=images[train], train_labels=labels[train], test_images=images[test], test_labels=labels[test])


def data_floor(data: ReferenceData, network: FeatureNetwork, splits: int = 20) -> dict[str, object]:
    """Every metric of the held-out split, and the Fréchet distance over `splits` others as mean and standard deviation."""
    others = {seed: resplit(data, seed) for seed in range(1, splits + 1)}
    distances = {
        str(seed): frechet_distance(network.features(other.train_images), network.features(other.test_images))
        for seed, other in others.items()
    }
    return {
        "held_out_images": len(data.test_images),
        "training_images": len(data.train_images),
        "feature_network": network.name,
        "feature_network_sha256": network.sha256,
        "held_out": Judge(data, network).measure(data.test_images, data.test_labels),
        "other_splits": {"frechet_distance": summary(distances)},
    }


def main(config: FloorConfig) -> None:
    if config.splits < 1:
        raise reject("splits", config.splits, "at least 1")
    report = data_floor(load_reference_data(config.dataset), load_feature_network(config.feature_network), config.splits)
    text = json.dumps(report, indent=2)
    print(text)
    if config.output:
        config.output.write_text(text + "\n")


if __name__ == "__main__":
    run(FloorConfig, main)
