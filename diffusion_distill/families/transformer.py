"""What the families around a diffusion transformer share."""

from torch import Tensor, nn


def without_variance(output: Tensor, x_t: Tensor) -> Tensor:
    """The prediction (B, C, h, w) of an output (B, C or 2 C, h, w) for x_t (B, C, h, w); the second half of the channels, where there is
    one, interpolates the variance of DDPM's reverse step (arXiv:2102.09672, eq. 15), which no few-step sampler draws from."""
    return output[:, : x_t.shape[1]]


def middle_and_late(blocks: nn.ModuleList) -> list[nn.Module]:
    """A middle and a late block (the places of LADD's heads, arXiv:2403.12015); their outputs are the image tokens (B, N, D)."""
    return [blocks[i] for i in sorted({len(blocks) // 2, 3 * len(blocks) // 4})]
