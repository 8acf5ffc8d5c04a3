"""How much images of the same prompt (or class) differ: mean pairwise distance within each, and the mean over prompts.

    accelerate launch eval/diversity.py FOLDER --prompts_file prompts.txt --samples 500        # 10 images each for 50 prompts
    accelerate launch eval/diversity.py FOLDER --prompts_file prompts.txt --samples 500 --features lpips

The distance is 1 - cosine of features, for lpips LPIPS itself. A student that lost variety falls below its teacher here, whatever
its Fréchet distance. Images without prompts or labels count as of one.
"""

from dataclasses import dataclass

import torch
from common.command_line import reject, run
from common.measurement import Estimate, Estimates, FeatureConfig, Inputs, mean_estimate, measure
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DiversityConfig(FeatureConfig):
    """Diversity within prompts."""

    features: str = "dinov2"
    """dinov2, clip, inception, lpips, pixels, a registered small network, or FILE.py:NAME."""


def diversity(inputs: Inputs, config: DiversityConfig) -> Estimates:
    """Mean over prompts of the mean distance of two of its images.

    Raises:
        InputError: where no prompt has two images.
    """
    groups = list(inputs.images.groups().values()) or [list(range(len(inputs.images)))]
    several = [group for group in groups if len(group) > 1]
    if not several:
        raise reject("samples", len(inputs.images), f"at least two images of a prompt are needed; there are {len(groups)} prompts")
    values = torch.tensor([mean_pair_distance(inputs.features[group], inputs.extractor.distance) for group in several])
    found = mean_estimate(values)
    return {"diversity": Estimate(found.value, sum(map(len, several)), found.error, f"standard error over {len(several)} prompts")}


def mean_pair_distance(features: Tensor, distance: str = "cosine") -> float:
    """Mean over all pairs of 1 - cosine, or of the squared Euclidean distance, of features (N, D), N at least 2."""
    if distance == "cosine":
        features = torch.nn.functional.normalize(features.double(), dim=1)
    features = features.double()
    total = features.sum(0)
    count = len(features)
    squares = (count * features.square().sum() - total @ total) / (count * (count - 1) / 2)
    return float(squares / 2 if distance == "cosine" else squares)


if __name__ == "__main__":
    run(DiversityConfig, lambda config: measure(config, diversity), "many")
