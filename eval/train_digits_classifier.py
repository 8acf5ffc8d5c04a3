"""Train the digits classifier whose features the evaluation compares.

    python eval/train_digits_classifier.py
    python eval/train_digits_classifier.py --seed 1 --width 16 --output eval/digits_classifier_second.safetensors

The settings were chosen by three-fold cross-validation inside the training split (accuracy .9946). Nothing is selected on the
held-out images: the final weights are kept. About 10 CPU seconds on one thread.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common.command_line import reject, run
from common.feature_networks import DigitsClassifier, save_feature_network, sha256_of
from common.reference_data import ReferenceData, digits
from torch import Tensor

DATA_LICENCE = (
    "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, UCI), used as package data of scikit-learn, "
    "which is distributed under BSD-3-Clause terms"
)


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained."""

    output: Path = Path(__file__).resolve().parent / "digits_classifier.safetensors"
    """Weights to write; a JSON with the recipe, the accuracy and the SHA-256 goes beside them."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    width: int = 24
    """Channels of the first convolution; the others have twice as many."""
    num_features: int = 32
    """Length of a feature vector."""
    epochs: int = 60
    """Passes over the training split."""
    batch_size: int = 64
    """Images in an optimizer step."""
    learning_rate: float = 6e-3
    """Peak of the one-cycle schedule of AdamW."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW."""
    label_smoothing: float = 0.05
    """Share of the target probability that is spread over all classes."""
    rotation: float = 10.0
    """Largest random rotation, degrees."""
    stretch: float = 0.1
    """Largest random change of width and of height, as a fraction."""
    shift: float = 1.0
    """Largest random shift of an image in each direction, pixels."""
    noise: float = 0.05
    """Standard deviation of Gaussian noise on pixels in [0, 1]."""

    def check(self) -> None:
        if self.output.suffix != ".safetensors":
            raise reject("output", str(self.output), "a file that ends in .safetensors")
        for name in ("width", "num_features", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise reject(name, getattr(self, name), "at least 1")


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Images (B, 1, H, W), each rotated, stretched, shifted (zeros move in) and given Gaussian noise, clamped to [0, 1]."""

    def uniform(limit: float, *shape: int) -> Tensor:
        return limit * (2 * torch.rand(len(images), *shape, generator=generator) - 1)

    angle, stretch = torch.deg2rad(uniform(recipe.rotation)), 1 + uniform(recipe.stretch, 1, 2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * stretch
    offset = uniform(2 * recipe.shift / images.shape[-1], 2, 1)  # the grid is 2 wide
    grid = F.affine_grid(torch.cat([turn, offset], 2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved + recipe.noise * torch.randn(moved.shape, generator=generator)).clamp(0, 1)


def train(recipe: Recipe, data: ReferenceData) -> DigitsClassifier:
    """A classifier trained on the training split of `data`, in evaluation mode."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    network = DigitsClassifier(recipe.width, recipe.num_features, data.classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    batches = len(data.train_images) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.epochs * batches)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(data.train_images), generator=generator)
        for rows in order[: batches * recipe.batch_size].view(batches, -1):
            images = augment(data.train_images[rows], recipe, generator)
            loss = F.cross_entropy(network.classify(network(images)), data.train_labels[rows], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main(recipe: Recipe) -> None:
    recipe.check()
    data, start = digits(), time.process_time()
    network = train(recipe, data)
    seconds = time.process_time() - start
    correct = network.classify(network.features(data.test_images)).argmax(1) == data.test_labels
    settings = {name: value for name, value in asdict(recipe).items() if name != "output"}
    record = {
        "recipe": settings,
        "test_accuracy": correct.double().mean().item(),
        "test_images": len(data.test_images),
        "training_images": len(data.train_images),
        "cpu_seconds": round(seconds, 1),
        "torch": torch.__version__,
        "data": DATA_LICENCE,
    }
    arguments = {"width": recipe.width, "num_features": recipe.num_features, "classes": data.classes}
    save_feature_network(network, recipe.output, "digits_classifier", arguments, record)
    size = recipe.output.stat().st_size
    print(f"{recipe.output}: test accuracy {record['test_accuracy']:.4f} of {len(correct)}, {seconds:.1f} CPU s, {size} bytes")
    recipe.output.chmod(0o644)
    print(f"SHA-256 {sha256_of(recipe.output)}")


if __name__ == "__main__":
    run(Recipe, main)
