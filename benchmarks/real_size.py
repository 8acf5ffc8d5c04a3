"""Pipelines of the size of SD 1.5, SDXL and FLUX.1, written out as configurations, with no weights: for benchmarks/memory.py.

The values are those of the published `config.json` files; what diffusers has as a default is left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def clip_tokenizer() -> CLIPTokenizer:
    """Bytes and their ends of words: the size of the vocabulary does not matter, the number of tokens does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(token + "</w>" for token in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((chr(i), -3.0) for i in range(33, 127))]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def clip_large() -> CLIPTextConfig:
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
    return CLIPTextConfig(**size)


def sd15(device: str) -> Any:
    with torch.device(device):
        networks = {"unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768), "vae": AutoencoderKL(**VAE, sample_size=512)}
        networks["text_encoder"] = CLIPTextModel(clip_large())
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**networks, tokenizer=clip_tokenizer(), scheduler=DDPMScheduler(**LINEAR), **none)


def sdxl(device: str) -> Any:
    big = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        networks = {"unet": unet, "vae": AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025)}
        networks["text_encoder"] = CLIPTextModel(clip_large())
        networks["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**big, hidden_act="gelu"))
    rest = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "scheduler": EulerDiscreteScheduler(**LINEAR)}
    return StableDiffusionXLPipeline(**networks, **rest)


def flux(device: str) -> Any:
    """Text encoders in bfloat16, as they are published."""
    t5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
    with torch.device(device):
        vae = AutoencoderKL(**VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159)
        networks = {"transformer": FluxTransformer2DModel(guidance_embeds=True), "vae": vae}
        networks["text_encoder"] = CLIPTextModel(clip_large()).bfloat16()
        networks["text_encoder_2"] = T5EncoderModel(T5Config(**t5)).bfloat16()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(**networks, tokenizer=clip_tokenizer(), tokenizer_2=t5_tokenizer(), scheduler=scheduler)


PIPELINES: dict[str, tuple[Callable[[str], Any], int]] = {"sd15": (sd15, 512), "sdxl": (sdxl, 1024), "flux": (flux, 1024)}
"""By name: what builds the pipeline on a device (random weights; on "meta", none), and the pixels of a side."""
