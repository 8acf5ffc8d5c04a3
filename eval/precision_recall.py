"""Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797): fidelity and variety of generated images apart.

    accelerate launch eval/precision_recall.py FOLDER --reference REFERENCE --features dinov2

All four depend on the number of images; of larger sets the first `max_samples` are compared. Errors are standard errors of the mean
over the points of one set, the other held fixed.
"""

from dataclasses import dataclass

from common.command_line import reject, run
from common.measurement import AgainstReferenceConfig, Estimates, Inputs, mean_estimate, measure
from common.neighbours import NEIGHBOURS, manifold


@dataclass(frozen=True, kw_only=True)
class PrecisionRecallConfig(AgainstReferenceConfig):
    """Precision, recall, density, coverage."""

    neighbours: int = NEIGHBOURS
    """Which neighbour a ball reaches: 5 as in `prdc`; the paper of precision and recall and torch-fidelity take 3."""
    max_samples: int = 10_000
    """Largest number of images of either set."""

    def check(self) -> None:
        super().check()
        for name in ("neighbours", "max_samples"):
            if getattr(self, name) < 1:
                raise reject(name, getattr(self, name), "at least 1")


def precision_recall_density_coverage(inputs: Inputs, config: PrecisionRecallConfig) -> Estimates:
    """The four shares; the reference must hold features or images."""
    real, fake = (features[: config.max_samples] for features in (inputs.reference.needed_features(), inputs.features))
    found = manifold(real, fake, config.neighbours)
    return {name: mean_estimate(getattr(found, name)) for name in ("precision", "recall", "density", "coverage")}


if __name__ == "__main__":
    run(PrecisionRecallConfig, lambda config: measure(config, precision_recall_density_coverage), "many")
