"""Kernel distance of generated images to real ones (KID, arXiv:1801.01401), which a small number of images does not bias.

    accelerate launch eval/kid.py FOLDER --reference REFERENCE

Mean and standard deviation over random subsets, drawn as torch-fidelity draws them.
"""

from dataclasses import dataclass

from common.command_line import reject, run
from common.distances import KID_SUBSET_SIZE, KID_SUBSETS, kernel_distance
from common.measurement import AgainstReferenceConfig, Estimate, Estimates, Inputs, measure


@dataclass(frozen=True, kw_only=True)
class KidConfig(AgainstReferenceConfig):
    """Kernel distance."""

    subsets: int = KID_SUBSETS
    """Number of random subsets."""
    subset_size: int = KID_SUBSET_SIZE
    """Images of each set in a subset; at most as many as either has."""

    def check(self) -> None:
        super().check()
        if self.subsets < 1:
            raise reject("subsets", self.subsets, "at least 1")


def kid(inputs: Inputs, config: KidConfig) -> Estimates:
    """Kernel distance; the reference must hold features or images."""
    mean, deviation = kernel_distance(inputs.reference.needed_features(), inputs.features, config.subsets, config.subset_size)
    return {"kernel_distance": Estimate(mean, len(inputs.features), deviation, f"subsets of {config.subset_size:,}")}


if __name__ == "__main__":
    run(KidConfig, lambda config: measure(config, kid), "many")
