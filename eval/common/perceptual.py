"""LPIPS (arXiv:1801.03924, AlexNet) as a feature vector: the squared distance of two images' vectors is their LPIPS.

LPIPS is a weighted sum of squared differences of normalised activations, so the weights' roots can go into the features once. The
trunk has the weights of torchvision's AlexNet; the layer weights travel with torchmetrics.
"""

from pathlib import Path

import torch
import torchmetrics.functional.image as torchmetrics_image
from common.command_line import InputError
from common.inception import UNREADABLE
from torch import Tensor, nn

WEIGHTS_FILE = "alexnet-owt-7be5be79.pth"
WEIGHTS_URL = f"https://download.pytorch.org/models/{WEIGHTS_FILE}"
LAYER_WEIGHTS = Path(torchmetrics_image.__file__).parent / "lpips_models" / "alex.pth"
ACTIVATIONS = (1, 4, 7, 9, 11)  # places in the trunk that are compared
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SIDE = 224


def alexnet_trunk() -> nn.Sequential:
    """AlexNet's convolutions, with torchvision's numbering."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


class Lpips(nn.Module):
    """Vectors (B, D) of images (B, 3, H, W) in [0, 255]; D grows with the size of the images."""

    def __init__(self, trunk: nn.Sequential):
        super().__init__()
        self.trunk = trunk
        weights = torch.load(LAYER_WEIGHTS, map_location="cpu", weights_only=True)
        for i in range(len(ACTIVATIONS)):
            self.register_buffer(f"root_{i}", weights[f"lin{i}.model.1.weight"].clamp_min(0).sqrt())
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        x = (images / 127.5 - 1 - self.shift) / self.scale
        vectors = []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in ACTIVATIONS:
                direction = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
                root = self.get_buffer(f"root_{len(vectors)}")
                vectors.append((direction * root / (x.shape[2] * x.shape[3]) ** 0.5).flatten(1))
        return torch.cat(vectors, 1)


def load_lpips(path: Path) -> Lpips:
    """The network with torchvision's AlexNet weights of `path`, frozen, in evaluation mode.

    Raises:
        InputError: for a file that holds other weights, or is damaged.
    """
    trunk = alexnet_trunk()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        trunk.load_state_dict({name.removeprefix("features."): w for name, w in weights.items() if name.startswith("features.")})
    except UNREADABLE as error:
        raise InputError(f"weights: {path} holds no AlexNet weights ({str(error).splitlines()[0]}); {WEIGHTS_FILE} is needed") from error
    return Lpips(trunk).eval().requires_grad_(False)
