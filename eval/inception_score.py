"""Inception score of generated images (arXiv:1606.03498); with another classifier than Inception it is a score of its own scale.

accelerate launch eval/inception_score.py FOLDER
"""

from dataclasses import dataclass

import torch
from common.command_line import reject, run
from common.distances import inception_score
from common.measurement import Estimate, Estimates, FeatureConfig, Inputs, measure


@dataclass(frozen=True, kw_only=True)
class InceptionScoreConfig(FeatureConfig):
    """Inception score."""

    splits: int = 10
    """Parts over which mean and deviation are taken."""


@torch.no_grad()
def score(inputs: Inputs, config: InceptionScoreConfig) -> Estimates:
    """Inception score; the feature network must classify."""
    if inputs.extractor.classify is None:
        raise reject("features", inputs.extractor.name, "a network that classifies is needed: inception, classifier, a small network")
    logits = inputs.extractor.classify(inputs.features.float().to(inputs.extractor.device)).cpu()
    mean, deviation = inception_score(logits, config.splits)
    return {"inception_score": Estimate(mean, len(logits), deviation, f"{config.splits} splits")}


if __name__ == "__main__":
    run(InceptionScoreConfig, lambda config: measure(config, score), "many")
