"""Share of images that a classifier puts into the class that they were drawn for.

    accelerate launch eval/accuracy.py FOLDER --samples 5000 --weights CLASSIFIER_FOLDER
    accelerate launch eval/accuracy.py FOLDER --samples 1000 --features digits --trust_remote_code

Class means score 1 here: read it beside a distance and a measure of variety.
"""

from dataclasses import dataclass

import torch
from common.command_line import reject, run
from common.measurement import Estimates, FeatureConfig, Inputs, mean_estimate, measure


@dataclass(frozen=True, kw_only=True)
class AccuracyConfig(FeatureConfig):
    """Class accuracy."""

    features: str = "classifier"
    """classifier (a transformers image classifier), a registered small network, or FILE.py:NAME with a method `classify`."""


@torch.no_grad()
def accuracy(inputs: Inputs, config: AccuracyConfig) -> Estimates:
    """Share of images whose largest logit is at their label; the images must have labels."""
    if inputs.extractor.classify is None:
        raise reject("features", inputs.extractor.name, "a network that classifies is needed")
    if inputs.images.labels is None:
        raise reject("labels", None, f"{inputs.images.folder} needs a prompts.jsonl with a label for every image")
    logits = inputs.extractor.classify(inputs.features.float().to(inputs.extractor.device)).cpu()
    labels = torch.tensor(inputs.images.labels)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise reject("labels", f"{labels.min()} to {labels.max()}", f"the classifier knows 0 to {logits.shape[1] - 1}")
    return {"accuracy": mean_estimate((logits.argmax(1) == labels).double(), keep=True)}


if __name__ == "__main__":
    run(AccuracyConfig, lambda config: measure(config, accuracy), "many")
