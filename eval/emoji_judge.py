"""Train the network that judges pictures of emoji: it reads object, colour and background, and its features make the Fréchet distance.

    python eval/emoji_judge.py --data_dir outputs/emoji --autoencoder outputs/emoji-teacher/pipeline/vae

`--features eval/emoji_judge.py:judge` names it in the other scripts. It shares nothing with the pipeline that it judges: it has another
architecture, seed and loss. It is trained on all captions, held-out ones too, and on images as a small pipeline may draw them: blurred,
with noise, a quarter of them through the pipeline's autoencoder. One image in 16 is kept for its own test.
"""

import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common.command_line import InputError, reject, run
from common.feature_networks import FeatureNetwork, save_feature_network, sha256_of
from common.image_files import read_jsonl
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "emoji_judge.safetensors"
ATTRIBUTES = ("object", "colour", "background")
DATA_LICENCE = "pictures of Noto Color Emoji (Google LLC), a font under the SIL Open Font License 1.1, recoloured by train/emoji_data.py"
KEPT_FOR_TEST = 16  # every 16th image


@dataclass(frozen=True)
class Recipe:
    """How the judge is trained."""

    data_dir: Path = Path("outputs/emoji")
    """Folder that train/emoji_data.py wrote."""
    autoencoder: Path = Path("outputs/emoji-teacher/pipeline/vae")
    """Folder of the pipeline's autoencoder."""
    output: Path = WEIGHTS
    """Weights to write; a JSON with the recipe, the accuracy and the SHA-256 goes beside them."""
    seed: int = 7
    """Seed of the initial weights, the order of the images and what is done to them."""
    width: int = 24
    """Channels of the first convolution; the others have twice, three and four times as many."""
    num_features: int = 64
    """Length of a feature vector."""
    steps: int = 700
    """Optimizer steps of 64 images."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule of AdamW."""
    blur: float = 1.0
    """Largest share of the 3x3 mean in a blurred image."""
    noise: float = 0.06
    """Largest standard deviation of Gaussian noise on pixels in [0, 1]."""

    def check(self) -> None:
        """Raise `InputError` for a value that cannot be used."""
        if self.output.suffix != ".safetensors":
            raise reject("output", str(self.output), "a file that ends in .safetensors")
        for name in ("width", "num_features", "steps"):
            if getattr(self, name) < 1:
                raise reject(name, getattr(self, name), "at least 1")


class EmojiJudge(FeatureNetwork):
    """Four convolutions and two linear layers for 32x32 RGB; uint8 is taken too, as values of 255."""

    def __init__(self, words: dict[str, list[str]], width: int = 24, num_features: int = 64):
        super().__init__()
        self.words, self.num_features, self.image_shape = words, num_features, (3, 32, 32)
        sizes = [3, width, 2 * width, 3 * width, 4 * width]
        stages = [_stage(a, b, 1 if a == 3 else 2) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Dropout(0.1))
        self.embed = nn.Linear(4 * width * 16, num_features)
        self.last = nn.Linear(num_features, sum(map(len, words.values())))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images if images.is_floating_point() else images.float() / 255
        return F.silu(self.embed(self.body(2 * pixels - 1)))

    def classify(self, features: Tensor) -> Tensor:
        logits: Tensor = self.last(features.to(self.last.weight.dtype))
        return logits

    def read(self, features: Tensor) -> dict[str, list[str]]:
        """The most likely word of each attribute, for features (B, num_features)."""
        parts = self.classify(features).split([len(words) for words in self.words.values()], 1)
        return {name: [words[i] for i in part.argmax(1)] for (name, words), part in zip(self.words.items(), parts, strict=True)}


def _stage(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU())


@cache
def judge() -> EmojiJudge:
    """The judge of this repository, frozen, in evaluation mode. InputError where its weights are not the recorded ones."""
    record = json.loads(WEIGHTS.with_suffix(".json").read_text())
    if sha256_of(WEIGHTS) != record["sha256"]:
        raise InputError(f"{WEIGHTS.name}: SHA-256 {sha256_of(WEIGHTS)}, its record says {record['sha256']}")
    network = EmojiJudge(**record["arguments"])
    network.load_state_dict(load_file(WEIGHTS))
    network.name, network.sha256 = WEIGHTS.stem, record["sha256"]
    return network.eval().requires_grad_(False)


def read_images(folder: Path) -> tuple[Tensor, list[dict[str, str]]]:
    """Images (N, 3, 32, 32) uint8 of both splits, and the rows of their metadata.jsonl."""
    pixels, rows = [], []
    for split in ("train", "held_out"):
        found = read_jsonl(folder / split / "metadata.jsonl")
        pixels += [np.array(Image.open(folder / split / row["file_name"]).convert("RGB")) for row in found]
        rows += found
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), rows


def degrade(images: Tensor, vae: AutoencoderKL, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [0, 1]: the first quarter through the autoencoder, all with blur and noise of random strength."""
    quarter = len(images) // 4
    with torch.no_grad():
        through = vae.decode(vae.encode(2 * images[:quarter] - 1).latent_dist.mean).sample / 2 + 0.5
    images = torch.cat([through, images[quarter:]])
    blur, noise = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    grain = recipe.noise * noise * torch.randn(images.shape, generator=generator)
    return (torch.lerp(images, smooth, recipe.blur * blur) + grain).clamp(0, 1)


def train(recipe: Recipe, pixels: Tensor, labels: dict[str, Tensor], words: dict[str, list[str]]) -> EmojiJudge:
    """A judge trained on images (N, 3, 32, 32) uint8 with labels (N,) for each attribute, in evaluation mode."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    network = EmojiJudge(words, recipe.width, recipe.num_features)
    vae = AutoencoderKL.from_pretrained(recipe.autoencoder, torch_dtype=torch.float32).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
    for _ in range(recipe.steps):
        rows = torch.randint(len(pixels), (64,), generator=generator)
        images = degrade(pixels[rows].float() / 255, vae, recipe, generator)
        parts = network.classify(network(images)).split([len(each) for each in words.values()], 1)
        losses = [F.cross_entropy(part, labels[name][rows], label_smoothing=0.05) for name, part in zip(words, parts, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracies(network: EmojiJudge, pixels: Tensor, rows: list[dict[str, str]]) -> dict[str, float]:
    """Share of images of which each attribute is read right."""
    read = network.read(network.features(pixels.float() / 255))
    return {name: float(np.mean([word == row[name] for word, row in zip(read[name], rows, strict=True)])) for name in ATTRIBUTES}


def main(recipe: Recipe) -> None:
    recipe.check()
    pixels, rows = read_images(recipe.data_dir)
    words = {name: sorted({row[name] for row in rows}) for name in ATTRIBUTES}
    labels = {name: torch.tensor([words[name].index(row[name]) for row in rows]) for name in ATTRIBUTES}
    kept, test = torch.arange(len(rows)) % KEPT_FOR_TEST != 0, range(0, len(rows), KEPT_FOR_TEST)
    start = time.process_time()
    network = train(recipe, pixels[kept], {name: label[kept] for name, label in labels.items()}, words)
    record = {
        "recipe": {name: value for name, value in asdict(recipe).items() if not isinstance(value, Path)},
        "test_accuracy": accuracies(network, pixels[::KEPT_FOR_TEST], [rows[i] for i in test]),
        "test_images": len(test),
        "training_images": int(kept.sum()),
        "cpu_seconds": round(time.process_time() - start, 1),
        "torch": torch.__version__,
        "data": DATA_LICENCE,
    }
    arguments = {"words": words, "width": recipe.width, "num_features": recipe.num_features}
    save_feature_network(network, recipe.output, "emoji_judge", arguments, record)
    print(f"{recipe.output}: {record['test_accuracy']} of {len(test)} images, {record['cpu_seconds']} CPU s")


if __name__ == "__main__":
    run(Recipe, main)
