"""CLIP score of images and their prompts (arXiv:2104.08718): 100 max(cosine, 0), the mean and every image's own.

    accelerate launch eval/clip_score.py FOLDER --prompts_file prompts.txt            # a text-to-image pipeline
    accelerate launch eval/clip_score.py IMAGES --weights CLIP_FOLDER --output clip_score.json

A folder of images needs a prompts.jsonl or metadata.jsonl. Any checkpoint of `CLIPModel` does, PickScore's among them. Prompts are cut
to what the text encoder reads, and counted where that happens.
"""

import logging
from dataclasses import dataclass

import torch
from common.command_line import InputError, reject, run
from common.extractors import Extractor
from common.measurement import Estimates, FeatureConfig, Inputs, mean_estimate, measure
from torch import Tensor

TEXT_BATCH = 64

log = logging.getLogger("eval")


@dataclass(frozen=True, kw_only=True)
class ClipScoreConfig(FeatureConfig):
    """CLIP score."""

    features: str = "clip"
    """clip alone: a network that reads images and text."""


def clip_score(inputs: Inputs, config: ClipScoreConfig) -> Estimates:
    """Mean CLIP score, with each image's."""
    if inputs.extractor.model is None:
        raise reject("features", inputs.extractor.name, "clip: a network that reads images and text is needed")
    if inputs.images.prompts is None:
        raise reject("prompts", None, f"{inputs.images.folder} needs a prompts.jsonl with a prompt for every image")
    distinct = list(dict.fromkeys(inputs.images.prompts))
    rows = {prompt: i for i, prompt in enumerate(distinct)}
    texts = text_features(inputs.extractor, distinct)[[rows[prompt] for prompt in inputs.images.prompts]]
    cosines = torch.nn.functional.cosine_similarity(inputs.features, texts)
    return {"clip_score": mean_estimate(100 * cosines.clamp_min(0), keep=True)}


@torch.no_grad()
def text_features(extractor: Extractor, prompts: list[str]) -> Tensor:
    """Text embeddings (N, D), float64, of prompts.

    Raises:
        InputError: where the model's folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(extractor.source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"weights: {extractor.source} needs a tokenizer ({str(error).splitlines()[0]})") from error
    length = extractor.model.config.text_config.max_position_embeddings
    too_long = sum(len(tokens) > length for tokens in tokenizer(prompts, verbose=False)["input_ids"])
    if too_long:
        log.warning(
            "%d of %d prompts are longer than the %d tokens that the text encoder reads, and were cut", too_long, len(prompts), length
        )
    found = []
    for k in range(0, len(prompts), TEXT_BATCH):
        batch = tokenizer(prompts[k : k + TEXT_BATCH], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found.append(extractor.model.get_text_features(**batch.to(extractor.device)).pooler_output.double().cpu())
    return torch.cat(found)


if __name__ == "__main__":
    run(ClipScoreConfig, lambda config: measure(config, clip_score), "many")
