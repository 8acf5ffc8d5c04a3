"""Tiny pipelines of the large flow-matching transformers: FLUX.1, Qwen-Image, Z-Image."""

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from .parts import TEXT_WIDTH, clip_config, clip_tokenizer, ready, seeded, t5_encoder, t5_tokenizer, vae


def flux(guidance: bool = True, seed: int = 0) -> FluxPipeline:
    """FLUX.1 dev, whose network sees a guidance and whose shift depends on the size, or schnell, with neither: latents (4, 8, 8)."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True) if guidance else FlowMatchEulerDiscreteScheduler()
    with seeded(seed):
        tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
        pipe = FluxPipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=t5_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
        )
        return ready(pipe, pipe.transformer)
