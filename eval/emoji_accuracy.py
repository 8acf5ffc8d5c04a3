"""Does the picture show what its caption asks for: the share of right objects, colours and backgrounds, as the judge reads them.

    python eval/emoji_accuracy.py assets/emoji-stable-diffusion --prompts_file PROMPTS --samples 774 --num_inference_steps 8
    python eval/emoji_accuracy.py IMAGES

Captions read "a green banana on a red background". The judge is emoji_judge.py's.
"""

import re
from dataclasses import dataclass

import torch
from common.command_line import reject, run
from common.measurement import Estimates, FeatureConfig, Inputs, mean_estimate, measure
from emoji_judge import ATTRIBUTES, HERE, judge

CAPTION = re.compile(r"an? (?P<colour>\w+) (?P<object>\w+) on an? (?P<background>\w+) background")


@dataclass(frozen=True, kw_only=True)
class EmojiAccuracyConfig(FeatureConfig):
    """Accuracy of what was asked for."""

    features: str = f"{HERE}/emoji_judge.py:judge"
    """The judge alone."""


@torch.no_grad()
def emoji_accuracy(inputs: Inputs, config: FeatureConfig) -> Estimates:
    """Share of images with the caption's object, colour, background, and with all three."""
    if inputs.images.prompts is None:
        raise reject("prompts", None, f"{inputs.images.folder} needs a prompts.jsonl with a prompt for every image")
    asked = [words_of(prompt) for prompt in inputs.images.prompts]
    read = judge().read(inputs.features.float())
    right = {name: torch.tensor([word == each[name] for word, each in zip(read[name], asked, strict=True)]) for name in ATTRIBUTES}
    right["all"] = torch.stack(list(right.values())).all(0)
    return {f"{name}_accuracy": mean_estimate(values.double(), keep=True) for name, values in right.items()}


def words_of(caption: str) -> dict[str, str]:
    """The caption's object, colour and background. InputError for one of another form."""
    found = CAPTION.fullmatch(caption.strip())
    if found is None:
        raise reject("prompt", caption, '"a COLOUR OBJECT on a BACKGROUND background"')
    return found.groupdict()


if __name__ == "__main__":
    run(EmojiAccuracyConfig, lambda config: measure(config, emoji_accuracy), "many")
