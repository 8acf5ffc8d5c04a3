"""The text encoder of the emoji pipeline: a small `CLIPModel`, trained on images and their captions, with a tokenizer of whole words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from emoji_training import CaptionedImages
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

TOKENS = 16
ATTRIBUTES = ("object", "colour", "background")


@dataclass(frozen=True)
class ClipSize:
    """What tells one small CLIP from another."""

    width: int
    text_layers: int
    vision_layers: int
    patch: int
    embedding: int


PIPELINE_CLIP = ClipSize(width=96, text_layers=3, vision_layers=3, patch=8, embedding=64)
JUDGE_CLIP = ClipSize(width=80, text_layers=2, vision_layers=4, patch=4, embedding=48)


def word_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A byte-level `CLIPTokenizer` in which every word of `captions` is one token; other words fall into pieces, and none is unknown."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = letters + [letter + "</w>" for letter in letters]
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    model.train_from_iterator(sorted(set(captions)), trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=TOKENS)


def new_clip(tokenizer: CLIPTokenizer, size: ClipSize) -> CLIPModel:
    """The untrained model for 32x32 images."""
    tower = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_attention_heads": 4, "projection_dim": size.embedding}
    text = tower | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": size.text_layers,
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"num_hidden_layers": size.vision_layers, "image_size": 32, "patch_size": size.patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.embedding))


def image_processor() -> CLIPImageProcessorPil:
    """Pixels to [-1, 1]; 32x32 images are not resized."""
    half = [0.5, 0.5, 0.5]
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return CLIPImageProcessorPil(image_mean=half, image_std=half, **sides)


def tokens_of(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers (B, `TOKENS`), padded as the pipelines do."""
    ids: Tensor = tokenizer(list(captions), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
    return ids


class ClipTraining(nn.Module):
    """A CLIP model with the heads that help to train it: each attribute of the caption, read from either embedding."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, images: CaptionedImages):
        super().__init__()
        self.clip = clip
        words = [sorted({row[attribute] for row in images.rows}) for attribute in ATTRIBUTES]
        self.heads = nn.ModuleList(nn.Linear(clip.config.projection_dim, len(each)) for each in words)
        distinct = sorted(set(images.captions))
        rows = {caption: i for i, caption in enumerate(distinct)}
        self.images, self.tokens = images, tokens_of(tokenizer, distinct)
        self.caption = torch.tensor([rows[caption] for caption in images.captions])
        self.labels = [torch.tensor([each.index(row[a]) for row in images.rows]) for a, each in zip(ATTRIBUTES, words, strict=True)]

    def loss(self, index: list[int], generator: torch.Generator) -> Tensor:
        """Contrastive loss in both directions (arXiv:2103.00020), plus the cross-entropy of the attributes.

        Images are blurred and get noise, so that the model can read what a small autoencoder draws.
        """
        pixels = degrade(self.images.batch(index), generator)
        caption = self.caption[index]
        images = self.clip.get_image_features(pixel_values=pixels).pooler_output
        texts = self.clip.get_text_features(input_ids=self.tokens[caption]).pooler_output
        own = torch.arange(len(index))
        logits = self.clip.logit_scale.exp().clamp(max=100) * F.normalize(images) @ F.normalize(texts).T
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        for head, labels in zip(self.heads, self.labels, strict=True):
            loss = loss + (F.cross_entropy(head(images), labels[index]) + F.cross_entropy(head(texts), labels[index])) / 6
        return loss


def degrade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], each mixed with its blur by a random share, with noise of a random strength up to .1."""
    share, strength = torch.rand(2, len(pixels), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.randn(pixels.shape, generator=generator)
    return (torch.lerp(pixels, blurred, share) + 0.1 * strength * noise).clamp(-1, 1)


@torch.no_grad()
def matching_share(clip: CLIPModel, tokenizer: CLIPTokenizer, images: CaptionedImages, captions: Sequence[str]) -> float:
    """Share of images whose nearest caption among `captions` is their own."""
    texts = F.normalize(clip.get_text_features(input_ids=tokens_of(tokenizer, captions)).pooler_output)
    nearest = [
        (F.normalize(clip.get_image_features(pixel_values=images.batch(rows)).pooler_output) @ texts.T).argmax(1)
        for rows in torch.arange(len(images.rows)).split(128)
    ]
    own = torch.tensor([captions.index(caption) for caption in images.captions])
    return (torch.cat(nearest) == own).double().mean().item()
