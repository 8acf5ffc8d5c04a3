"""Real diffusers pipelines of at most 300k parameters with random weights, built offline and the same at every call."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

TEXT_WIDTH, TEXT_LENGTH = 16, 16
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """SD 1.x (epsilon) or 2.x (v_prediction) with DDIM: 16-pixel images, latents (4, 8, 8)."""
    scheduler = DDIMScheduler(**SD_BETAS, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    with _seeded(seed):
        tokenizer = _clip_tokenizer()
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip_config(tokenizer)),
            tokenizer=tokenizer,
            unet=_conditional_unet(cross_attention_dim=TEXT_WIDTH),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return _ready(pipe, pipe.unet)


def stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL with Euler, as it ships (zeros for the empty prompt): 16-pixel images, latents (4, 8, 8)."""
    with _seeded(seed):
        tokenizers = [_clip_tokenizer(), _clip_tokenizer()]
        unet = _conditional_unet(
            cross_attention_dim=2 * TEXT_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        )
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip_config(tokenizers[0])),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizers[1])),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
            add_watermarker=False,
        )
        return _ready(pipe, pipe.unet)


def stable_diffusion_3(seed: int = 0) -> StableDiffusion3Pipeline:
    """SD 3.5 (dual attention in block 0, RMS-normalised queries and keys): 16-pixel images, latents (4, 8, 8), shift 3."""
    with _seeded(seed):
        tokenizers = [_clip_tokenizer(), _clip_tokenizer()]
        t5_tokenizer = _t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=2 * TEXT_WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizers[0])),
            tokenizer=tokenizers[0],
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizers[1])),
            tokenizer_2=tokenizers[1],
            text_encoder_3=_t5_encoder(t5_tokenizer),
            tokenizer_3=t5_tokenizer,
        )
        return _ready(pipe, pipe.transformer)


def class_conditional(
    process: Literal["flow", "v_prediction", "epsilon"] = "flow",
    classes: int = 10,
    size: int = 8,
    channels: tuple[int, int] = (8, 16),
    seed: int = 0,
) -> DiffusionPipeline:
    """Class-conditional grey pixels of `size` x `size`: flow matching with Euler, or a cosine VP process with trailing DDIM."""
    from pipelines.class_conditional import ClassConditionalPipeline

    with _seeded(seed):
        unet = UNet2DModel(
            sample_size=size,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=classes + 1,
        )
        return _ready(ClassConditionalPipeline(unet=unet, scheduler=_pixel_scheduler(process)), unet)


PIPELINES: dict[str, Callable[[], Any]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_v": partial(stable_diffusion, "v_prediction"),
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "class_conditional_flow": class_conditional,
    "class_conditional_v": partial(class_conditional, "v_prediction"),
    "class_conditional_epsilon": partial(class_conditional, "epsilon"),
}


def example_conditions(pipe: Any, count: int = 2) -> list[Any]:
    """`count` different prompts, or class labels where the pipeline takes those."""
    labelled = type(pipe).__name__ == "ClassConditionalPipeline"
    return [i if labelled else f"a photo of {i}" for i in range(count)]


@contextmanager
def _seeded(seed: int):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _ready(pipe: Any, denoiser: nn.Module) -> Any:
    """Evaluation mode, no progress bar, and small random numbers where the denoiser has only zeros and so ignores its input."""
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pixel_scheduler(process: str) -> Any:
    if process == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=process,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def _conditional_unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **config,
    )


def _vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=0.7,
        **config,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    """Bytes as tokens, no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TEXT_LENGTH)


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_tokenizer() -> T5Tokenizer:
    """Printable ASCII characters as tokens."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=special + [(chr(c), -3.0) for c in range(33, 127)], extra_ids=0, model_max_length=TEXT_LENGTH)


def _t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=2 * TEXT_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=4,
            relative_attention_num_buckets=8,
            feed_forward_proj="gated-gelu",
        )
    )
