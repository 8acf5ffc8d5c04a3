"""Precision, recall, density, coverage and nearest neighbours: how two sets of points lie among each other."""

from dataclasses import dataclass

import torch
from common.command_line import reject
from torch import Tensor

NEIGHBOURS = 5


@dataclass(frozen=True)
class Manifold:
    """Per-point values whose means are the metrics: of every fake point (M,) or of every real one (N,), float64."""

    precision: Tensor  # (M,)
    recall: Tensor  # (N,)
    density: Tensor  # (M,)
    coverage: Tensor  # (N,)


def nearest_distances(images: Tensor, references: Tensor, chunk: int = 500) -> Tensor:
    """Euclidean distance in pixels, (N,) in float64, of each image (N, ...) to the nearest of the references (M, ...)."""
    flat = references.flatten(1).double()
    return torch.cat([distances(part.flatten(1).double(), flat).amin(1) for part in images.split(chunk)])


def nearest(points: Tensor, references: Tensor, chunk: int = 500) -> tuple[Tensor, Tensor]:
    """Distance (N,) of each point (N, D) to the nearest reference (M, D), and which one it is (N,)."""
    found = [distances(part, references.double()).min(1) for part in points.double().split(chunk)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def nearest_of_the_others(points: Tensor, chunk: int = 500) -> Tensor:
    """Distance (N,) of each point (N, D) to the nearest of the other points."""
    return _radii(points.double(), 1, chunk)


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991, eq. 1 and 2) of features (N, D) and (M, D).

    Precision is the share of fake features inside the union of balls around the real ones that reach their k-th neighbour;
    recall is the share of real features inside the same union around the fake ones.

    Raises:
        InputError: where a set has no k-th neighbour.
    """
    _check_neighbours(real, fake, neighbours)
    return _share_inside(fake, real, neighbours), _share_inside(real, fake, neighbours)


def manifold(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS, chunk: int = 500) -> Manifold:
    """Precision and recall as `precision_recall`, and density and coverage (arXiv:2002.09797, eq. 3 and 4), point by point.

    Density counts, for a fake point, the real balls that hold it, divided by k; coverage asks of a real ball whether it holds a fake
    point. Balls are closed for the first two, as in their paper, and open for the others, as in the reference code `prdc`.

    Raises:
        InputError: where a set has no k-th neighbour.
    """
    _check_neighbours(real, fake, neighbours)
    real, fake = real.double(), fake.double()
    real_radii, fake_radii = _radii(real, neighbours, chunk), _radii(fake, neighbours, chunk)
    precision, density, recall, coverage = [], [], [], []
    for part in fake.split(chunk):
        between = distances(part, real)
        precision.append((between <= real_radii).any(1))
        density.append((between < real_radii).sum(1) / neighbours)
    for part, radii in zip(real.split(chunk), real_radii.split(chunk), strict=True):
        between = distances(part, fake)
        recall.append((between <= fake_radii).any(1))
        coverage.append(between.amin(1) < radii)
    return Manifold(*(torch.cat(parts).double() for parts in (precision, recall, density, coverage)))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M) of points (N, D) and (M, D)."""
    # The faster expansion a^2 - 2ab + b^2 leaves an error of about 1e-7 where the distance is 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check_neighbours(real: Tensor, fake: Tensor, neighbours: int) -> None:
    for name, features in (("real features", real), ("features", fake)):
        if len(features) <= neighbours:
            raise reject(name, len(features), f"more than {neighbours} samples are needed")


def _radii(centres: Tensor, neighbours: int, chunk: int) -> Tensor:
    # the first neighbour is the point itself
    return torch.cat([distances(part, centres).kthvalue(neighbours + 1, 1).values for part in centres.split(chunk)])


def _share_inside(points: Tensor, centres: Tensor, neighbours: int, chunk: int = 500) -> float:
    points, centres = points.double(), centres.double()
    radii = _radii(centres, neighbours, chunk)
    inside = [(distances(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return torch.cat(inside).double().mean().item()
