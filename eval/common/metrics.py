"""What generated images are judged by: pure functions on features, pixels and labels, and `Judge`, which applies all of them.

Distance, accuracy, diversity and copies belong together: class means score an accuracy of 1, and a memorising model a distance of 0.
"""

import logging
from collections.abc import Iterator

import torch
from common.checks import NotFiniteError as NotFiniteError
from common.checks import check_finite
from common.command_line import reject
from common.feature_networks import FeatureNetwork
from common.neighbours import nearest_distances, precision_recall
from common.reference_data import ReferenceData
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

MAXIMUM_MANIFOLD_SAMPLES = 2000

log = logging.getLogger("eval")


class _GivenFeatures(nn.Module):
    """Stands for a feature network in torchmetrics where features are at hand already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance (arXiv:1706.08500) between Gaussians fitted to features (N, D) and (M, D), in float64.

    Warns where N or M is at most D: the covariance is singular then, and the distance mostly bias.

    Raises:
        InputError: for features that are not finite, or fewer than two samples.
    """
    for name, features in (("real features", real), ("features", fake)):
        check_finite(name, features)
        if len(features) < 2:
            raise reject(name, len(features), "at least 2 samples are needed")
        if len(features) <= features.shape[1]:
            log.warning("%s: %d samples for %d dimensions; the Fréchet distance is unreliable", name, *features.shape)
    metric = FrechetInceptionDistance(feature=_GivenFeatures(real.shape[1]), normalize=True)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of logits (N, classes) whose largest entry is at labels (N,)."""
    return (logits.argmax(1) == labels).double().mean().item()


def copy_threshold(held_out: Tensor, train: Tensor) -> float:
    """First percentile of the distances from held-out images to their nearest training image.

    A sample closer than that counts as a copy: at most 1 % of the held-out images do, and all samples of a memorising model.
    """
    return nearest_distances(held_out, train).quantile(0.01, interpolation="lower").item()


def copy_rate(images: Tensor, train: Tensor, threshold: float) -> float:
    """Share of images strictly closer than `threshold` to a training image (see `copy_threshold`)."""
    return (nearest_distances(images, train) < threshold).double().mean().item()


def within_class_spread(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> float:
    """Mean over classes of the trace of the within-class feature covariance, divided by the real one's; 1 is the real variety.

    Raises:
        InputError: where a class of the real data has fewer than two samples.
    """
    classes = sorted(set(real_labels.tolist()))
    return _mean_trace(fake, fake_labels, classes) / _mean_trace(real, real_labels, classes)


class Judge:
    """Real data as a feature network sees it; `measure` compares generated images with it."""

    def __init__(self, data: ReferenceData, network: FeatureNetwork):
        self.data, self.network = data, network
        self.real_features = network.features(data.train_images)
        self.copy_threshold = copy_threshold(data.test_images, data.train_images)

    def manifold_samples(self, samples: int) -> int:
        """Number of features of either set that precision and recall compare, when so many images are measured."""
        return min(MAXIMUM_MANIFOLD_SAMPLES, len(self.real_features), samples)

    def measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Every metric for images (N, C, H, W) in [0, 1] that were generated for labels (N,).

        Raises:
            InputError: for images of another shape, too few of them, or not finite.
        """
        check_finite("images", images)
        features = self.network.features(images)
        count = self.manifold_samples(len(features))
        precision, recall = precision_recall(_subset(self.real_features, count), _subset(features, count))
        return {
            "frechet_distance": frechet_distance(self.real_features, features),
            "accuracy": accuracy(self.network.classify(features), labels),
            "precision": precision,
            "recall": recall,
            "within_class_spread": within_class_spread(self.real_features, self.data.train_labels, features, labels),
            "copy_rate": copy_rate(images, self.data.train_images, self.copy_threshold),
        }


def _subset(features: Tensor, count: int) -> Tensor:
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:count]]


def _mean_trace(features: Tensor, labels: Tensor, classes: list[int]) -> float:
    return sum(_traces(features, labels, classes)) / len(classes)


def _traces(features: Tensor, labels: Tensor, classes: list[int]) -> Iterator[float]:
    for label in classes:
        members = features[labels == label].double()
        if len(members) < 2:
            raise reject(f"samples of class {label}", len(members), "at least 2 are needed")
        yield members.var(0).sum().item()
