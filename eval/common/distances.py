"""Distances between two sets of features: Fréchet (FID, FD-DINOv2, ...), kernel (KID) and the inception score, in float64."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from common.checks import check_finite
from common.command_line import reject
from torch import Tensor

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SUBSET_SEED = 2020  # torch-fidelity's, so that equal features give its numbers

log = logging.getLogger("eval")


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64; `samples` is None where a file does not tell."""

    mean: Tensor
    covariance: Tensor
    samples: int | None


def statistics_of(features: Tensor) -> Statistics:
    """Mean and unbiased covariance of features (N, D).

    Raises:
        InputError: for fewer than two samples, or some that are not finite.
    """
    check_finite("features", features)
    if len(features) < 2:
        raise reject("features", len(features), "at least 2 samples are needed")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return Statistics(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet(real: Statistics, fake: Statistics) -> float:
    """Fréchet distance of two Gaussians (arXiv:1706.08500): |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    With S1 = A A^T the trace of the root is the sum of the roots of the eigenvalues of the symmetric A^T S2 A.

    Raises:
        InputError: where the two come from feature networks of different size.
    """
    if real.mean.shape != fake.mean.shape:
        raise reject("features", len(fake.mean), f"the reference has {len(real.mean)} dimensions: another feature network made it")
    factor = _factor(real.covariance)
    eigenvalues = torch.linalg.eigvalsh(factor.T @ fake.covariance @ factor)
    root_trace = eigenvalues.clamp_min(0).sqrt().sum()
    difference = real.mean - fake.mean
    return float(difference @ difference + real.covariance.trace() + fake.covariance.trace() - 2 * root_trace)


def warn_if_few(name: str, statistics: Statistics) -> None:
    """Warn where the covariance cannot have full rank: the Fréchet distance is then mostly bias."""
    dimensions = len(statistics.mean)
    if statistics.samples is not None and statistics.samples <= dimensions:
        log.warning("%s: %d samples for %d dimensions; the Fréchet distance is unreliable", name, statistics.samples, dimensions)


def frechet_bootstrap_error(real: Statistics, fake: Tensor, resamples: int, seed: int = 0) -> float | None:
    """Standard deviation of the Fréchet distance over `resamples` draws of features (M, D) with replacement; None for fewer than 2.

    It tells how much other samples of the same model would differ, and nothing of the bias that a small M brings.
    """
    if resamples < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    draws = (fake[torch.randint(len(fake), (len(fake),), generator=generator)] for _ in range(resamples))
    return float(np.std([frechet(real, statistics_of(draw)) for draw in draws], ddof=1))


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE) -> tuple[float, float]:
    """Kernel distance (arXiv:1801.01401) of features (N, D) and (M, D): mean and standard deviation over random subsets of each.

    The unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3, over the subsets that torch-fidelity draws.

    Raises:
        InputError: where a set is smaller than a subset, the two have different dimensions, or are not finite.
    """
    for name, features in (("reference features", real), ("features", fake)):
        check_finite(name, features)
        if not 2 <= subset_size <= len(features):
            raise reject("subset_size", subset_size, f"from 2 to the {len(features)} {name}")
    if real.shape[1] != fake.shape[1]:
        raise reject("features", fake.shape[1], f"the reference has {real.shape[1]} dimensions: another feature network made it")
    random = np.random.RandomState(SUBSET_SEED)
    values = []
    for _ in range(subsets):
        chosen = [random.choice(len(features), subset_size, replace=False) for features in (fake, real)]
        values.append(_squared_discrepancy(fake[chosen[0]].double(), real[chosen[1]].double()))
    return float(np.mean(values)), float(np.std(values))


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Inception score (arXiv:1606.03498) of logits (N, classes): mean and standard deviation over splits, shuffled as in torch-fidelity.

    The score of a split is exp of the mean Kullback-Leibler divergence of its images' class probabilities from their mean.

    Raises:
        InputError: for fewer samples than splits, or some that are not finite.
    """
    check_finite("logits", logits)
    if not 1 <= splits <= len(logits):
        raise reject("splits", splits, f"from 1 to the {len(logits)} samples")
    count, order = len(logits), np.random.RandomState(SUBSET_SEED).permutation(len(logits))
    logarithms = logits.double()[order].log_softmax(1)
    scores = []
    for i in range(splits):
        part = logarithms[i * count // splits : (i + 1) * count // splits]
        marginal = part.exp().mean(0, keepdim=True).log()
        scores.append(float((part.exp() * (part - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _factor(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance: Cholesky's, or, for a singular one, eigenvectors times roots of eigenvalues (several times slower)."""
    triangle, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return triangle
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp_min(0).sqrt()


def _squared_discrepancy(a: Tensor, b: Tensor) -> float:
    count = len(a)
    within = [_kernel(x, x) for x in (a, b)]
    unbiased = sum((kernel.sum() - kernel.trace()) / (count * (count - 1)) for kernel in within)
    return float(unbiased - 2 * _kernel(a, b).mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
