"""Networks in whose features images are compared: safetensors weights with a JSON record beside them, never a pickle."""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common.command_line import InputError, reject
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parents[1]


class FeatureNetwork(nn.Module, ABC):
    """`network(images)` is (B, num_features) for images (B, C, H, W) in [0, 1]; `classify` turns features into class logits."""

    name: str = "unnamed"
    sha256: str = ""  # of the weights' file; part of every evaluation protocol
    num_features: int
    image_shape: tuple[int, ...]

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Class logits (B, classes) of features (B, num_features)."""

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Features (N, num_features) of images (N, C, H, W), on the CPU in float64.

        Raises:
            InputError: for images of another shape than the network reads.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise reject("image shape", tuple(images.shape[1:]), f"feature network {self.name} reads {self.image_shape}")
        device = next(self.parameters()).device
        return torch.cat([self(batch.to(device)).double().cpu() for batch in images.float().split(batch_size)])


class DigitsClassifier(FeatureNetwork):
    """Three convolutions and two linear layers for grey 8x8 images; the features are what the last layer reads."""

    def __init__(self, width: int = 24, num_features: int = 32, classes: int = 10):
        super().__init__()
        self.num_features, self.image_shape = num_features, (1, 8, 8)
        self.body = nn.Sequential(
            *_convolution(1, width),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 2 * width),
            nn.Flatten(),
        )
        self.embed = nn.Linear(2 * width * 16, num_features)
        self.last = nn.Linear(num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return F.silu(self.embed(self.body(2 * images - 1)))

    def classify(self, features: Tensor) -> Tensor:
        logits: Tensor = self.last(features.to(self.last.weight.dtype))
        return logits


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()


ARCHITECTURES: dict[str, type[FeatureNetwork]] = {"digits_classifier": DigitsClassifier}
FEATURE_NETWORKS: dict[str, Path] = {
    "digits": HERE / "digits_classifier.safetensors",
    "digits_second": HERE / "digits_classifier_second.safetensors",
}


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_feature_network(network: FeatureNetwork, path: Path, architecture: str, arguments: dict[str, Any], record: dict[str, Any]) -> None:
    """Write `path` (.safetensors) and beside it a JSON with what rebuilds the network, the weights' SHA-256 and `record`."""
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    entry = {"architecture": architecture, "arguments": arguments, "sha256": sha256_of(path), **record}
    path.with_suffix(".json").write_text(json.dumps(entry, indent=2) + "\n")


def load_feature_network(name_or_path: str | Path) -> FeatureNetwork:
    """A registered network by name, or a .safetensors file with its JSON beside it; frozen, in evaluation mode.

    Raises:
        InputError: for an unknown name, a file of another kind (pickles included), a missing or incomplete JSON, an unknown
            architecture, or weights whose SHA-256 is not the recorded one.
    """
    path = FEATURE_NETWORKS.get(str(name_or_path), Path(name_or_path))
    accepted = f"accepted: {', '.join(FEATURE_NETWORKS)}, or a .safetensors file with its .json beside it"
    if path.suffix != ".safetensors" or not path.is_file():
        raise reject("feature_network", str(name_or_path), accepted)
    record = _read_record(path.with_suffix(".json"))
    digest = sha256_of(path)
    if digest != record["sha256"]:
        raise InputError(f"feature_network: {path.name} has SHA-256 {digest}, its record says {record['sha256']}")
    if record["architecture"] not in ARCHITECTURES:
        raise reject("architecture", record["architecture"], "accepted: " + ", ".join(ARCHITECTURES))
    network = ARCHITECTURES[record["architecture"]](**record["arguments"])
    network.load_state_dict(load_file(path))
    network.name, network.sha256 = path.stem, digest
    return network.eval().requires_grad_(False)


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise reject("feature_network", path.name, "the record beside the weights is missing")
    record: dict[str, Any] = json.loads(path.read_text())
    missing = {"architecture", "arguments", "sha256"} - set(record)
    if missing:
        raise reject(path.name, sorted(record), f"these keys are missing: {', '.join(sorted(missing))}")
    return record
