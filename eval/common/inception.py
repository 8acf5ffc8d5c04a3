"""The Inception network of the Fréchet inception distance, with the weights that torch-fidelity converted from TensorFlow's.

This classifier of 2015 (arXiv:1512.00567) differs from later Inception-v3 networks: average pools leave padded zeros out, the last
block pools with a maximum, and there are 1,008 classes. Module names are those of the weights' file.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common.command_line import InputError
from torch import Tensor, nn

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
SIDE, FEATURES, CLASSES = 299, 2048, 1008
UNREADABLE = (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError, AttributeError, TypeError)  # of a damaged archive


class Convolution(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Any, stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def wide(inputs: int, outputs: int, length: int) -> Convolution:
    """A 1 x `length` convolution that keeps the size."""
    return Convolution(inputs, outputs, (1, length), padding=(0, length // 2))


def tall(inputs: int, outputs: int, length: int) -> Convolution:
    """A `length` x 1 convolution that keeps the size."""
    return Convolution(inputs, outputs, (length, 1), padding=(length // 2, 0))


def mean_pool(x: Tensor) -> Tensor:
    """Mean over 3 x 3 neighbours, at the border over those that exist."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


class MixedA(nn.Module):
    """35 x 35: kernels of 1, 5 and twice 3."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Convolution(inputs, 48, 1), Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 64, 1), Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(mean_pool(x))], 1)


class MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 64, 1), Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class MixedC(nn.Module):
    """17 x 17: factorised kernels of 7 and twice 7, `width` channels inside."""

    def __init__(self, width: int):
        super().__init__()
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Convolution(768, width, 1), wide(width, width, 7), tall(width, 192, 7)
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = (
            Convolution(768, width, 1),
            tall(width, width, 7),
            wide(width, width, 7),
        )
        self.branch7x7dbl_4, self.branch7x7dbl_5 = tall(width, width, 7), wide(width, 192, 7)
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(mean_pool(x))], 1)


class MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Convolution(768, 192, 1), Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3 = Convolution(768, 192, 1), wide(192, 192, 7), tall(192, 192, 7)
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """8 x 8: kernels of 3 split in two directions, `pool` before the last branch."""

    def __init__(self, inputs: int, pool: Any):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Convolution(inputs, 384, 1), wide(384, 384, 3), tall(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 448, 1), Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = wide(384, 384, 3), tall(384, 384, 3)
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        split = [self.branch3x3_2a(single), self.branch3x3_2b(single), self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *split, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Features (B, 2048) of images (B, 3, 299, 299) in [0, 255]; `classify` gives logits without bias, as the inception score takes."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Convolution(32, 32, 3), Convolution(32, 64, 3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Convolution(64, 80, 1), Convolution(80, 192, 3)
        self.MaxPool_2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = MixedC(128), MixedC(160), MixedC(160), MixedC(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = MixedD(), MixedE(1280, mean_pool), MixedE(2048, max_pool)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - 128) / 128
        for name, layer in self.named_children():
            x = x if name == "fc" else layer(x)
        return x.mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, 1008) of features (B, 2048)."""
        return features.to(self.fc.weight) @ self.fc.weight.T


def load_inception(path: Path) -> Inception:
    """The network with the weights of `path`, frozen, in evaluation mode.

    Raises:
        InputError: for a file that holds other weights, or is damaged.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network = Inception()
        network.load_state_dict(weights)
    except UNREADABLE as error:
        raise InputError(f"weights: {path} holds no Inception weights ({str(error).splitlines()[0]}); {WEIGHTS_FILE} is needed") from error
    return network.eval().requires_grad_(False)


def resize_like_tensorflow(image: Tensor, side: int = SIDE) -> Tensor:
    """An image (C, H, W) resized as TensorFlow 1 did it: bilinear, without half-pixel centres and without smoothing; float32.

    Pixel i of the result lies at i * H / side of the image. The values keep their range.
    """
    image = image.float()
    low, high, share = _neighbours(image.shape[2], side)
    image = image[:, :, low] + (image[:, :, high] - image[:, :, low]) * share
    low, high, share = _neighbours(image.shape[1], side)
    return image[:, low] + (image[:, high] - image[:, low]) * share[:, None]


def _neighbours(length: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    place = torch.arange(side, dtype=torch.float32) * torch.tensor(length / side, dtype=torch.float32)
    low = place.long()
    return low, (low + 1).clamp_max(length - 1), place - low
