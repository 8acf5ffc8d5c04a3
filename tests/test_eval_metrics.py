"""Metrics against scipy, brute-force numpy and cases with a known answer; the feature networks' files."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from common import feature_networks as fn
from common import metrics
from common.command_line import InputError
from common.reference_data import digits, load_reference_data
from data_floor import data_floor, resplit
from train_digits_classifier import Recipe, augment, train


def normal(rows: int, columns: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix + shift


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.parametrize("shift", [0.0, 1.0, 1000.0])
def test_frechet_distance_is_scipys(shift: float) -> None:
    # A mean far from 0 is where float32 statistics would lose every digit.
    real, fake = normal(400, 12, 0, shift), normal(300, 12, 1, shift)
    assert metrics.frechet_distance(real, fake) == pytest.approx(scipy_frechet(real.numpy(), fake.numpy()), rel=1e-6)


def test_frechet_distance_of_float32_features_has_float64_statistics() -> None:
    real, fake = normal(400, 12, 0).float(), normal(300, 12, 1).float()
    expected = scipy_frechet(real.double().numpy(), fake.double().numpy())
    assert metrics.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)


def test_torchmetrics_keeps_float64_states() -> None:
    metric = metrics.FrechetInceptionDistance(feature=metrics._GivenFeatures(12), normalize=True)
    metric.update(normal(20, 12, 0).float(), real=True)
    assert {metric.real_features_sum.dtype, metric.real_features_cov_sum.dtype} == {torch.float64}


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift() -> None:
    features = normal(500, 6, 0)
    assert metrics.frechet_distance(features, features + 2) == pytest.approx(24, rel=1e-6)


def test_few_samples_warn_and_bad_ones_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "eval"):
        metrics.frechet_distance(normal(100, 12, 0), normal(12, 12, 1))
    assert [record.getMessage() for record in caplog.records] == [
        "features: 12 samples for 12 dimensions; the Fréchet distance is unreliable"
    ]
    broken = normal(100, 12, 1)
    broken[3, 5], broken[7, 0] = float("nan"), float("inf")
    with pytest.raises(metrics.NotFiniteError, match="features: 2 of 100 hold NaN or infinity"):
        metrics.frechet_distance(normal(100, 12, 0), broken)
    with pytest.raises(InputError, match="features: got 1; at least 2"):
        metrics.frechet_distance(normal(100, 12, 0), normal(1, 12, 1))


def brute_force_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(c - other) for j, other in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points]
        return float(np.mean(inside))

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 5])
def test_precision_and_recall_are_the_definition(k: int) -> None:
    both = normal(160, 3, 0)
    real, fake = both[:90], 0.6 * both[90:] + 0.7
    expected = brute_force_precision_recall(real.numpy(), fake.numpy(), k)
    assert metrics.precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-12)
    assert 0.05 < expected[0] < 0.95 and 0.05 < expected[1] < 0.95


def test_precision_and_recall_at_the_extremes() -> None:
    real = normal(600, 4, 0)
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 1e3) == (0, 0)
    one_mode = real[:1] + 1e-3 * normal(600, 4, 1)
    precision, recall = metrics.precision_recall(real, one_mode)
    assert precision > 0.9 and recall < 0.01
    with pytest.raises(InputError, match="features: got 5; more than 5"):
        metrics.precision_recall(real, real[:5])


def test_accuracy_is_exact() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    assert metrics.accuracy(logits, torch.tensor([0, 1, 2, 3, 3, 3])) == 4 / 6


def test_within_class_spread_is_a_ratio_of_variances() -> None:
    real, labels = normal(400, 5, 0), torch.arange(400) % 4
    centres = 50 * labels[:, None]
    assert metrics.within_class_spread(real, labels, 0.5 * real + centres, labels) == pytest.approx(0.25)
    traces = [np.trace(np.cov(real[labels == c].numpy(), rowvar=False)) for c in range(4)]
    ones = torch.arange(8).double().view(2, 4).T.reshape(8, 1).expand(8, 5)  # pairs that are 4 apart: variance 8
    two_each = torch.arange(4).repeat_interleave(2)
    assert metrics.within_class_spread(real, labels, ones, two_each) == pytest.approx(5 * 8 / np.mean(traces))
    with pytest.raises(InputError, match="samples of class 3: got 0"):
        metrics.within_class_spread(real, labels, real[labels < 3], labels[labels < 3])


def test_nearest_distances_are_brute_force() -> None:
    images, references = torch.rand(7, 1, 3, 3), torch.rand(11, 1, 3, 3)
    expected = [min(float((image - other).double().norm()) for other in references) for image in images]
    assert metrics.nearest_distances(images, references, chunk=3).tolist() == pytest.approx(expected, rel=1e-6)
    assert metrics.nearest_distances(references + 100, references + 100).max() == 0  # the expanded square leaves about 1e-6


def test_copy_rate_separates_memories_from_held_out_images() -> None:
    data = digits()
    threshold = metrics.copy_threshold(data.test_images, data.train_images)
    assert 0 < metrics.copy_rate(data.test_images, data.train_images, threshold) <= 0.01
    memories = (data.train_images + 0.02 * torch.randn(data.train_images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert metrics.copy_rate(memories, data.train_images, threshold) > 0.999
    class_means = torch.stack([data.train_images[data.train_labels == c].mean(0) for c in range(10)])
    assert metrics.copy_rate(class_means, data.train_images, threshold) == 0


def test_digits_are_the_stratified_split() -> None:
    values, labels = load_digits(return_X_y=True)
    train, test, train_labels, _ = train_test_split(values / 8 - 1, labels, test_size=500, stratify=labels, random_state=0)
    data = digits()
    assert (data.train_images.shape, data.test_images.shape) == ((1297, 1, 8, 8), (500, 1, 8, 8))
    assert np.array_equal(2 * data.train_images.flatten(1).numpy() - 1, train.astype(np.float32))
    assert np.array_equal(2 * data.test_images.flatten(1).numpy() - 1, test.astype(np.float32))
    assert data.train_labels.tolist() == train_labels.tolist()
    assert (data.classes, data.image_shape) == (10, (1, 8, 8))
    with pytest.raises(InputError, match="dataset: got 'letters'; accepted: digits"):
        load_reference_data("letters")


@pytest.mark.parametrize(("name", "least"), [("digits", 0.995), ("digits_second", 0.99)])
def test_shipped_classifiers(name: str, least: float) -> None:
    network, data, path = fn.load_feature_network(name), digits(), fn.FEATURE_NETWORKS[name]
    measured = metrics.accuracy(network.classify(network.features(data.test_images)), data.test_labels)
    record = json.loads(path.with_suffix(".json").read_text())
    assert measured == record["test_accuracy"] >= least
    assert network.sha256 == record["sha256"]
    assert path.stat().st_size < 400_000
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_features_do_not_depend_on_the_batch_size() -> None:
    network, images = fn.load_feature_network("digits"), digits().test_images
    features = network.features(images, batch_size=500)
    assert (features.shape, features.dtype) == ((500, 32), torch.float64)
    assert torch.allclose(features, network.features(images, batch_size=7), atol=1e-5)
    with pytest.raises(InputError, match=r"image shape: got \(3, 8, 8\); feature network digits_classifier reads \(1, 8, 8\)"):
        network.features(images.expand(-1, 3, -1, -1))


def test_feature_network_files(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    network = fn.DigitsClassifier(width=4, num_features=6).eval()
    fn.save_feature_network(network, path, "digits_classifier", {"width": 4, "num_features": 6}, {"note": "untrained"})
    images = digits().test_images[:9]
    assert torch.equal(fn.load_feature_network(path).features(images), network.features(images))
    record = json.loads(path.with_suffix(".json").read_text())

    def with_record(**changes: object) -> None:
        path.with_suffix(".json").write_text(json.dumps({k: v for k, v in (record | changes).items() if v is not None}))

    with_record(architecture="inception")
    with pytest.raises(InputError, match="architecture: got 'inception'; accepted: digits_classifier"):
        fn.load_feature_network(path)
    with_record(sha256=None)
    with pytest.raises(InputError, match="these keys are missing: sha256"):
        fn.load_feature_network(path)
    with_record(sha256="0" * 64)
    with pytest.raises(InputError, match="its record says 0000"):
        fn.load_feature_network(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="record beside the weights is missing"):
        fn.load_feature_network(path)


def test_pickles_and_unknown_names_are_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "network.pt"
    torch.save({}, pickled)
    for name in (str(pickled), "inception", str(tmp_path / "missing.safetensors")):
        with pytest.raises(InputError, match="feature_network: got .*accepted: digits, digits_second, or a .safetensors file"):
            fn.load_feature_network(name)


def test_recipe_learns() -> None:
    data = digits()
    network = train(Recipe(epochs=4, width=8), data)
    assert metrics.accuracy(network.classify(network.features(data.test_images)), data.test_labels) > 0.9


def test_augmentation_is_gentle_and_its_identity_exact() -> None:
    images, generator = digits().train_images[:50], torch.Generator().manual_seed(0)
    still = augment(images, Recipe(rotation=0, stretch=0, shift=0, noise=0), generator)
    assert torch.allclose(still, images, atol=1e-6)
    moved = augment(images, Recipe(rotation=0, stretch=0, shift=1, noise=0), generator)
    columns = torch.arange(8.0)
    centre = [(x.sum((1, 2)) * columns).sum(1) / x.sum((1, 2, 3)) for x in (images, moved)]
    difference = (centre[0] - centre[1]).abs()
    assert 0.5 < difference.max() < 1.2


def test_judge_ranks_real_images_above_noise_and_means() -> None:
    data = digits()
    judge = metrics.Judge(data, fn.load_feature_network("digits"))
    real = judge.measure(data.test_images, data.test_labels)
    assert real["frechet_distance"] < 1 and real["accuracy"] >= 0.995 and real["recall"] > 0.9 and real["precision"] > 0.8
    assert real["within_class_spread"] == pytest.approx(1, abs=0.3) and real["copy_rate"] <= 0.01

    labels = torch.arange(500) % 10
    noise = judge.measure(torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels)
    assert noise["frechet_distance"] > 10 * real["frechet_distance"] and noise["accuracy"] < 0.3

    means = torch.stack([data.train_images[data.train_labels == c].mean(0) for c in range(10)])
    blur = judge.measure((means[labels] + 0.01 * torch.rand(500, 1, 8, 8)).clamp(0, 1), labels)
    assert blur["accuracy"] == 1 and blur["recall"] < 0.05 and blur["within_class_spread"] < 0.05
    assert judge.manifold_samples(5000) == 1297 and judge.manifold_samples(40) == 40


def test_second_classifier_keeps_the_order() -> None:
    data = digits()
    judge = metrics.Judge(data, fn.load_feature_network("digits_second"))
    generator = torch.Generator().manual_seed(0)
    noisy = [(data.test_images + s * torch.randn(data.test_images.shape, generator=generator)).clamp(0, 1) for s in (0, 0.1, 0.2, 0.4)]
    distances = [judge.measure(images, data.test_labels)["frechet_distance"] for images in noisy]
    assert distances == sorted(distances) and distances[-1] > 10 * distances[0]


def test_floor_reports_the_official_split_and_the_spread_of_others() -> None:
    data, network = digits(), fn.load_feature_network("digits_second")
    report = data_floor(data, network, splits=3)
    judged = metrics.Judge(data, network).measure(data.test_images, data.test_labels)
    assert report["held_out"] == judged
    others = report["other_splits"]["frechet_distance"]  # type: ignore[index]
    assert list(others["per_seed"]) == ["1", "2", "3"]
    assert others["std"] == pytest.approx(np.std(list(others["per_seed"].values()), ddof=1))
    other = resplit(data, 1)
    assert other.train_images.shape == data.train_images.shape and not torch.equal(other.train_images, data.train_images)
    assert (torch.bincount(other.test_labels) - torch.bincount(data.test_labels)).abs().max() <= 1
