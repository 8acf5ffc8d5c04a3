"""Fréchet distance of generated images to real ones (arXiv:1706.08500): FID on Inception features, FD-DINOv2 on DINOv2's.

    accelerate launch eval/fid.py FOLDER --reference REFERENCE
    accelerate launch eval/fid.py FOLDER --reference REFERENCE.npz --features dinov2

FOLDER is a folder of images or of any diffusers pipeline. A distance falls with the number of images: compare equal numbers, 50,000 where
others publish figures. The error is of a bootstrap over the generated images and tells nothing of that bias.
"""

from dataclasses import dataclass

from common.command_line import reject, run
from common.distances import frechet, frechet_bootstrap_error, statistics_of, warn_if_few
from common.measurement import AgainstReferenceConfig, Estimate, Estimates, Inputs, measure


@dataclass(frozen=True, kw_only=True)
class FidConfig(AgainstReferenceConfig):
    """Fréchet distance."""

    bootstrap: int = 10
    """Resamples for the error; each costs a distance. 0: none."""

    def check(self) -> None:
        super().check()
        if self.bootstrap < 0:
            raise reject("bootstrap", self.bootstrap, "at least 0")


def fid(inputs: Inputs, config: FidConfig) -> Estimates:
    """Fréchet distance. Warns where either set has no more images than the features have dimensions."""
    real, fake = inputs.reference.statistics, statistics_of(inputs.features)
    warn_if_few("reference", real)
    warn_if_few("images", fake)
    error = frechet_bootstrap_error(real, inputs.features, config.bootstrap)
    return {"frechet_distance": Estimate(frechet(real, fake), len(inputs.features), error, "bootstrap")}


if __name__ == "__main__":
    run(FidConfig, lambda config: measure(config, fid), "many")
