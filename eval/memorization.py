"""Whether generated images are copies of training images: distance of each to its nearest neighbour among them.

    accelerate launch eval/memorization.py FOLDER --reference TRAINING_IMAGES --held_out OTHER_REAL_IMAGES
    accelerate launch eval/memorization.py FOLDER --reference TRAINING_IMAGES --features dinov2 --output memorization.json

A copy is closer to a training image than 99 % of held-out real images are (without those: than 99 % of the training images are to
their own nearest). The JSON lists the closest pairs, to look at. Pixels find exact copies; features find shifted and recoloured ones.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common.command_line import run
from common.measurement import AgainstReferenceConfig, Estimates, Inputs, mean_estimate, measure
from common.neighbours import nearest, nearest_of_the_others

COPY_QUANTILE = 0.01


@dataclass(frozen=True, kw_only=True)
class MemorizationConfig(AgainstReferenceConfig):
    """Copies of training images."""

    features: str = "pixels"
    """pixels (images of one size), dinov2, clip, inception, a registered small network, or FILE.py:NAME."""
    held_out: Path | None = None
    """Real images that were not trained on; they set what counts as a copy."""
    pairs: int = 20
    """How many of the closest pairs the JSON lists."""

    def further_sets(self) -> dict[str, Path]:
        return {"held-out images": self.held_out} if self.held_out else {}


def memorization(inputs: Inputs, config: MemorizationConfig) -> Estimates:
    """Copy rate and mean distance to the nearest training image; the reference must hold features or images."""
    train = inputs.reference.needed_features()
    threshold = copy_threshold(train, inputs.further.get("held-out images"))
    distances, neighbours = nearest(inputs.features, train)
    order = distances.argsort(stable=True)[: config.pairs].tolist()
    names = inputs.reference.files or [f"image {i}" for i in range(len(train))]
    closest = [{"file": inputs.images.files[i], "training_image": names[neighbours[i]], "distance": distances[i].item()} for i in order]
    rate = mean_estimate((distances < threshold).double())
    return {
        "copy_rate": replace(rate, details={"threshold": threshold, "closest": closest}),
        "nearest_distance": mean_estimate(distances, keep=True),
    }


def copy_threshold(train: torch.Tensor, held_out: torch.Tensor | None = None) -> float:
    """First percentile of the distances of held-out features (N, D) to the nearest of the training ones (M, D), or among the latter."""
    distances = nearest_of_the_others(train) if held_out is None else nearest(held_out, train)[0]
    return distances.quantile(COPY_QUANTILE, interpolation="lower").item()


if __name__ == "__main__":
    run(MemorizationConfig, lambda config: measure(config, memorization), "many")
