"""Distances and neighbourhood metrics against torch-fidelity, prdc and scipy, on the same features."""

import logging
import sys
from pathlib import Path

import numpy as np
import prdc
import pytest
import scipy.linalg
import scipy.stats
import torch
from fidelity_reference import fidelity
from scipy.spatial.distance import pdist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from common.checks import NotFiniteError
from common.command_line import InputError
from common.distances import Statistics, frechet, frechet_bootstrap_error, inception_score, kernel_distance, statistics_of, warn_if_few
from common.measurement import mean_estimate
from common.neighbours import manifold, nearest, precision_recall
from diversity import mean_pair_distance
from memorization import copy_threshold


def features(rows: int, columns: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix + shift


def scipy_frechet(real: Statistics, fake: Statistics) -> float:
    root = scipy.linalg.sqrtm((real.covariance @ fake.covariance).numpy()).real
    return float((real.mean - fake.mean).square().sum() + real.covariance.trace() + fake.covariance.trace() - 2 * np.trace(root))


@pytest.mark.parametrize("rows", [200, 20], ids=["full rank", "fewer images than dimensions"])
def test_frechet_is_torch_fidelitys(rows: int) -> None:
    metric = fidelity("metric_fid")
    real, fake = features(rows, 40, 0), features(rows + 10, 40, 1, 0.3)
    pair = [metric.fid_features_to_statistics(x) for x in (fake, real)]
    expected = metric.fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]
    found = frechet(statistics_of(real), statistics_of(fake))
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet(statistics_of(fake), statistics_of(real)) == pytest.approx(found, rel=1e-6)


def test_frechet_is_scipys() -> None:
    real, fake = statistics_of(features(90, 30, 0, 100.0)), statistics_of(features(80, 30, 1, 100.0))
    assert frechet(real, fake) == pytest.approx(scipy_frechet(real, fake), rel=1e-8)


def test_statistics_are_numpys_and_keep_float64_far_from_zero() -> None:
    x = features(50, 6, 0, 1e6)
    found = statistics_of(x.float().double())
    assert np.allclose(found.covariance.numpy(), np.cov(x.float().double().numpy(), rowvar=False), rtol=1e-12, atol=1e-9)
    assert found.samples == 50 and found.mean.dtype == torch.float64


def test_what_no_distance_can_be_computed_from(caplog: pytest.LogCaptureFixture) -> None:
    good = statistics_of(features(20, 6, 0))
    with pytest.raises(InputError, match="the reference has 6 dimensions: another feature network made it"):
        frechet(good, statistics_of(features(20, 5, 0)))
    broken = features(20, 6, 1)
    broken[3, 2] = float("nan")
    with pytest.raises(NotFiniteError, match="features: 1 of 20 hold NaN or infinity"):
        statistics_of(broken)
    with pytest.raises(NotFiniteError, match="reference features: 1 of 20"):
        kernel_distance(broken, features(20, 6, 0), 1, 10)
    with pytest.raises(InputError, match="features: got 1; at least 2"):
        statistics_of(features(1, 6, 0))
    with pytest.raises(InputError, match="subset_size: got 1000; from 2 to the 20 reference features"):
        kernel_distance(features(20, 6, 0), features(20, 6, 1))
    with caplog.at_level(logging.WARNING, "eval"):
        warn_if_few("images", statistics_of(features(6, 6, 0)))
        warn_if_few("images", statistics_of(features(7, 6, 0)))
    assert [r.getMessage() for r in caplog.records] == ["images: 6 samples for 6 dimensions; the Fréchet distance is unreliable"]


def test_bootstrap_error_is_the_spread_over_fresh_samples() -> None:
    real = statistics_of(features(4000, 3, 0))
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(300, 3, generator=generator, dtype=torch.float64) + 1 for _ in range(40)]
    truth = np.std([frechet(real, statistics_of(draw)) for draw in draws], ddof=1)
    assert frechet_bootstrap_error(real, draws[0], 60) == pytest.approx(truth, rel=0.35)
    assert frechet_bootstrap_error(real, draws[0], 0) is None


def test_kernel_distance_is_torch_fidelitys() -> None:
    metric = fidelity("metric_kid")
    real, fake = features(70, 16, 0), features(60, 16, 1, 0.5)
    settings = {"kid_subsets": 7, "kid_subset_size": 40, "verbose": False}
    expected = metric.kid_features_to_metric(fake, real, **settings)
    found = kernel_distance(real, fake, subsets=7, subset_size=40)
    names = ("kernel_inception_distance_mean", "kernel_inception_distance_std")
    assert found == pytest.approx([expected[name] for name in names], rel=1e-6)


def test_kernel_distance_has_no_bias() -> None:
    both = torch.randn(8000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, spread = kernel_distance(both[:4000], both[4000:], subsets=100, subset_size=40)
    assert abs(mean) < 4 * spread / 10  # of 100 nearly independent subsets


def test_inception_score_is_torch_fidelitys() -> None:
    metric = fidelity("metric_isc")
    logits = 3 * features(95, 12, 0).float()
    expected = metric.isc_features_to_metric(logits, splits=4)
    assert inception_score(logits, 4) == pytest.approx([expected["inception_score_mean"], expected["inception_score_std"]], rel=1e-6)
    alike = torch.zeros(20, 5)
    assert inception_score(alike, 2)[0] == pytest.approx(1)
    assert inception_score(100 * torch.eye(5).repeat(4, 1), 1)[0] == pytest.approx(5)
    with pytest.raises(InputError, match="splits: got 30; from 1 to the 20 samples"):
        inception_score(alike, 30)


def test_density_and_coverage_are_prdcs(capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = features(120, 4, 0), 0.7 * features(90, 4, 0) + 0.4
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    capsys.readouterr()  # prdc prints
    found = manifold(real, fake, 5, chunk=32)
    means = {name: getattr(found, name).mean().item() for name in ("precision", "recall", "density", "coverage")}
    assert means == pytest.approx(expected, rel=1e-6)
    assert 0.1 < means["coverage"] < 0.95 and means["density"] != means["precision"]
    assert (means["precision"], means["recall"]) == pytest.approx(precision_recall(real, fake, 5), abs=1e-12)
    assert [len(getattr(found, name)) for name in means] == [90, 120, 90, 120]


def test_precision_and_recall_are_torch_fidelitys() -> None:
    metric = fidelity("metric_prc")
    real, fake = features(80, 4, 0), 0.7 * features(60, 4, 0) + 0.4
    settings = {"prc_neighborhood": 3, "prc_batch_size": 50, "save_cpu_ram": False, "verbose": False}
    expected = metric.prc_features_to_metric(fake, real, **settings)
    assert precision_recall(real, fake, 3) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_pair_distances_are_scipys() -> None:
    x = features(30, 7, 0)
    assert mean_pair_distance(x) == pytest.approx(pdist(x.numpy(), "cosine").mean(), rel=1e-10)
    assert mean_pair_distance(x, "squared") == pytest.approx(pdist(x.numpy(), "sqeuclidean").mean(), rel=1e-10)
    assert mean_pair_distance(x[:1].repeat(5, 1)) == pytest.approx(0, abs=1e-12)


def test_error_of_a_mean_is_scipys() -> None:
    x = features(30, 1, 0)[:, 0]
    found = mean_estimate(x, keep=True)
    assert (found.value, found.error, found.samples) == (pytest.approx(x.mean()), pytest.approx(scipy.stats.sem(x)), 30)
    assert found.per_image == x.tolist() and mean_estimate(x[:1]).error is None


def test_copy_threshold_marks_one_percent() -> None:
    train, held_out = features(400, 5, 0), features(300, 5, 0)[:300] + 0.01
    distances = nearest(held_out, train)[0]
    assert (distances < copy_threshold(train, held_out)).sum() == 2  # strictly below the third of 300
    own = torch.cdist(train, train, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf).amin(1)
    assert copy_threshold(train) == pytest.approx(own.sort().values[3].item())
    values, indices = nearest(train[[7, 3]], train)
    assert indices.tolist() == [7, 3] and values.max() == 0
