"""Tiny pipelines around a transformer on the latents of an autoencoder: PixArt, Sana, DiT, Wan."""

from diffusers import (
    AutoencoderDC,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffusion_distill.families.wan import Wan

from .parts import TEXT_WIDTH, ready, seeded, t5_encoder, t5_tokenizer, vae

LINEAR_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
DEPTH = 5  # blocks; the taps of a discriminator are in the third and the fourth


def pixart_alpha(seed: int = 0) -> PixArtAlphaPipeline:
    """PixArt-alpha of 1024 pixels (`sample_size` 128, which alone sees the size of the image), to be drawn at 16: latents (4, 8, 8).

    DDIM, because the pipeline's one-step call needs a scheduler that gives two outputs.
    """
    scheduler = DDIMScheduler(**LINEAR_BETAS, clip_sample=False, timestep_spacing="trailing")
    return _pixart(PixArtAlphaPipeline, scheduler, seed, sample_size=128, num_attention_heads=3, cross_attention_dim=24)


def pixart_sigma(seed: int = 0) -> PixArtSigmaPipeline:
    """PixArt-Sigma with second-order DPM-Solver++, as it ships: 16-pixel images, latents (4, 8, 8)."""
    scheduler = DPMSolverMultistepScheduler(**LINEAR_BETAS)
    return _pixart(PixArtSigmaPipeline, scheduler, seed, sample_size=8, num_attention_heads=2, cross_attention_dim=16)


def _pixart(pipeline, scheduler, seed: int, **config):  # type: ignore[no-untyped-def]
    with seeded(seed):
        tokenizer = t5_tokenizer()
        transformer = PixArtTransformer2DModel(
            attention_head_dim=8,
            num_layers=DEPTH,
            in_channels=4,
            out_channels=8,
            patch_size=2,
            norm_num_groups=1,
            caption_channels=2 * TEXT_WIDTH,
            **config,
        )
        pipe = pipeline(tokenizer=tokenizer, text_encoder=t5_encoder(tokenizer), vae=vae(), transformer=transformer, scheduler=scheduler)
        return ready(pipe, transformer)


def sana(seed: int = 0) -> SanaPipeline:
    """Sana with second-order DPM-Solver++ on shifted sigmas, as it ships: 32-pixel images, latents (4, 8, 8) without patches."""
    with seeded(seed):
        tokenizer = gemma_tokenizer()
        transformer = SanaTransformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=DEPTH,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=TEXT_WIDTH,
            caption_channels=TEXT_WIDTH,
            mlp_ratio=1.0,
        )
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        pipe = SanaPipeline(
            tokenizer=tokenizer, text_encoder=_gemma(tokenizer), vae=_deep_compression(), transformer=transformer, scheduler=scheduler
        )
        return ready(pipe, transformer)


def gemma_tokenizer() -> GemmaTokenizer:
    """Bytes and printable ASCII characters as tokens, no merges."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *map(chr, range(33, 127))]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def _gemma(tokenizer: GemmaTokenizer) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _deep_compression() -> AutoencoderDC:
    """A quarter of the side, with the attention of the deep layers."""
    blocks = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8, 8)}
    blocks |= {"qkv_multiscales": ((), (), (5,)), "layers_per_block": (1, 1, 1)}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **sides)


def dit(seed: int = 0) -> DiTPipeline:
    """DiT with DDIM: 16-pixel images, latents (4, 8, 8). The pipeline's code has 1000 classes."""
    with seeded(seed):
        transformer = DiTTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=DEPTH,
            num_attention_heads=2,
            attention_head_dim=8,
            norm_num_groups=4,
            num_embeds_ada_norm=1000,
        )
        scheduler = DDIMScheduler(**LINEAR_BETAS, clip_sample=False, timestep_spacing="trailing")
        return ready(DiTPipeline(transformer=transformer, vae=vae(), scheduler=scheduler, id2label={0: "tench, Tinca tinca"}), transformer)


def wan(seed: int = 0) -> WanPipeline:
    """Wan 2.1 with second-order UniPC on shifted sigmas, as it ships; draws 5 frames of 16 pixels: latents (4, 2, 4, 4)."""
    with seeded(seed):
        tokenizer = t5_tokenizer()
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=2 * TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=32,
            num_layers=DEPTH,
            rope_max_seq_len=32,
        )
        video_vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.6, 1.2, 0.9, 1.0],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        pipe = WanPipeline(tokenizer=tokenizer, text_encoder=_umt5(tokenizer), vae=video_vae, transformer=transformer, scheduler=scheduler)
        Wan().set_video_size(pipe, frames=5, height=16, width=16)
        return ready(pipe, transformer)


def _umt5(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
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
