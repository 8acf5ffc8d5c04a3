"""Tiny pipelines around a transformer on the latents of an autoencoder: PixArt, Sana, DiT, Wan."""

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

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
