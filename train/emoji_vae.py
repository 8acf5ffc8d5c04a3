"""The autoencoder of the emoji pipeline: an `AutoencoderKL` from 32x32 RGB to whitened 4x8x8 latents."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from emoji_training import CaptionedImages
from torch import Tensor

KL_WEIGHT = 1e-6
LATENT_NOISE = 0.05  # of the latents' own deviation: the decoder must bear what a denoiser gets wrong


def new_autoencoder() -> AutoencoderKL:
    """The untrained autoencoder, 0.77 million parameters."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32,
        scaling_factor=1.0,
        force_upcast=False,
    )


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Absolute and squared error of pixels, absolute error of edges, and a faint KL term, for images (B, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    z = posterior.sample(generator) + LATENT_NOISE * posterior.mean.detach().std() * noise
    decoded = vae.decode(z).sample
    edges = sum(F.l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images) + 0.5 * edges + KL_WEIGHT * posterior.kl().mean()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: CaptionedImages) -> Tensor:
    """Posterior means (N, 4, h, w) of all images."""
    return torch.cat([vae.encode(images.batch(rows)).latent_dist.mean for rows in torch.arange(len(images.rows)).split(128)])


@torch.no_grad()
def fold_whitening(vae: AutoencoderKL, latents: Tensor) -> None:
    """Shift and scale the channels of `latents` (N, C, h, w) to zero mean and unit deviation inside the 1x1 convolutions around them.

    What the autoencoder as a whole does to an image stays the same. `StableDiffusionPipeline` knows one factor for all channels and
    no shift.
    """
    channels = latents.shape[1]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # the other half are logarithms of variances


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: CaptionedImages) -> float:
    """Peak signal-to-noise ratio, dB, of the reconstructions of all images, from the mean of their squared errors in [0, 1]."""
    errors = []
    for rows in torch.arange(len(images.rows)).split(128):
        pixels = images.batch(rows)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - pixels).square().mean((1, 2, 3)) / 4)
    return -10 * torch.cat(errors).mean().log10().item()
