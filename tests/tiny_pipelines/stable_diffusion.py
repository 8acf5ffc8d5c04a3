"""Tiny pipelines around a UNet, and SD3."""

from typing import Any, Literal

from diffusers import (
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
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .parts import TEXT_WIDTH, clip_config, clip_tokenizer, ready, seeded, t5_encoder, t5_tokenizer, vae

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """SD 1.x (epsilon) or 2.x (v_prediction) with DDIM: 16-pixel images, latents (4, 8, 8)."""
    scheduler = DDIMScheduler(**SD_BETAS, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    with seeded(seed):
        tokenizer = clip_tokenizer()
        pipe = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            tokenizer=tokenizer,
            unet=_conditional_unet(cross_attention_dim=TEXT_WIDTH),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return ready(pipe, pipe.unet)


def stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL with Euler, as it ships (zeros for the empty prompt): 16-pixel images, latents (4, 8, 8)."""
    with seeded(seed):
        tokenizers = [clip_tokenizer(), clip_tokenizer()]
        unet = _conditional_unet(
            cross_attention_dim=2 * TEXT_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        )
        pipe = StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(clip_config(tokenizers[0])),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizers[1])),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
            add_watermarker=False,
        )
        return ready(pipe, pipe.unet)


def stable_diffusion_3(seed: int = 0) -> StableDiffusion3Pipeline:
    """SD 3.5 (dual attention in block 0, RMS-normalised queries and keys): 16-pixel images, latents (4, 8, 8), shift 3."""
    with seeded(seed):
        tokenizers = [clip_tokenizer(), clip_tokenizer()]
        tokenizer_3 = t5_tokenizer()
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
            vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(clip_config(tokenizers[0])),
            tokenizer=tokenizers[0],
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizers[1])),
            tokenizer_2=tokenizers[1],
            text_encoder_3=t5_encoder(tokenizer_3),
            tokenizer_3=tokenizer_3,
        )
        return ready(pipe, pipe.transformer)


def class_conditional(
    process: Literal["flow", "v_prediction", "epsilon"] = "flow",
    classes: int = 10,
    size: int = 8,
    channels: tuple[int, int] = (8, 16),
    seed: int = 0,
) -> DiffusionPipeline:
    """Class-conditional grey pixels of `size` x `size`: flow matching with Euler, or a cosine VP process with trailing DDIM."""
    from pipelines.class_conditional import ClassConditionalPipeline

    with seeded(seed):
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
        return ready(ClassConditionalPipeline(unet=unet, scheduler=_pixel_scheduler(process)), unet)


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
