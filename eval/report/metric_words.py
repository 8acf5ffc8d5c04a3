"""The metrics that a report knows: name, direction, one plain sentence each, and how their numbers are written."""

import re
from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher", "one"]  # "one": the nearer to 1 the better
ARROWS: dict[Direction | None, str] = {"lower": "↓", "higher": "↑", "one": "→ 1", None: ""}
DIRECTIONS: dict[Direction | None, str] = {
    "lower": "lower is better",
    "higher": "higher is better",
    "one": "closer to 1 is better",
    None: "no direction is better",
}


@dataclass(frozen=True)
class Metric:
    """How one number of an evaluation is named, explained, written and compared."""

    key: str  # as in the evaluation file
    name: str
    meaning: str
    better: Direction | None
    kind: Literal["quality", "cost", "other", "count"] = "quality"  # counts stand in the table of all numbers alone
    factor: float = 1.0  # what is shown is the stored value times this
    digits: int = 3
    depends_on_device: bool = False
    exact: bool = False  # without noise: the same at every noise seed

    @property
    def title(self) -> str:
        """Name and arrow, which no line break parts."""
        return f"{self.name}\N{NO-BREAK SPACE}{ARROWS[self.better]}".rstrip()

    @property
    def direction(self) -> str:
        """The arrow in words."""
        return DIRECTIONS[self.better]

    def loss(self, value: float) -> float:
        """A number that is smaller where the metric is better."""
        return abs(value - 1) if self.better == "one" else -value if self.better == "higher" else value

    def number(self, value: float | None) -> str:
        """The value as it is shown; a dash for None."""
        if value is None:
            return "–"
        text = f"{self.factor * value:.4g}" if self.kind == "other" else f"{self.factor * value:,.{self.digits}f}"
        return text.removeprefix("-") if not float(text.replace(",", "")) else text

    def plus_minus(self, mean: float, std: float | None) -> str:
        """Mean ± standard deviation; the mean alone after a single seed."""
        return self.number(mean) + ("" if std is None else f" ± {self.number(std)}")


def _cost(key: str, name: str, meaning: str, factor: float = 1.0, digits: int = 2) -> Metric:
    return Metric(key, name, meaning, "lower", "cost", factor, digits, depends_on_device=True)


METRICS = (
    Metric(
        "frechet_distance",
        "Fréchet distance",
        "How far the generated images are from the real ones in all, as an image network sees them; 0 is alike; more samples read lower.",
        "lower",
    ),
    Metric(
        "kernel_distance",
        "KID",
        "Another distance to the real images (kernel distance); unlike the Fréchet distance it has no bias at few samples.",
        "lower",
        digits=5,
    ),
    Metric("clip_score", "CLIP score", "How well an image fits its prompt, by CLIP: 100 times the cosine of the two.", "higher", digits=2),
    Metric("accuracy", "accuracy", "Share of images that a classifier recognises as the class that was asked for.", "higher"),
    Metric("inception_score", "Inception score", "How sure a classifier is of each image, and how varied its answers are.", "higher"),
    Metric("precision", "precision", "Share of generated images that lie among the real ones: how believable they are.", "higher"),
    Metric(
        "recall", "recall", "Share of real images that lie among the generated ones: how much of the real variety is reached.", "higher"
    ),
    Metric("density", "density", "As precision, but counting how many real images surround each generated one.", "higher"),
    Metric("coverage", "coverage", "Share of real images with a generated one in their own neighbourhood.", "higher"),
    Metric(
        "within_class_spread",
        "within-class spread",
        "How varied the images of one class are, relative to the real ones; below 1 they are too alike, above 1 too scattered.",
        "one",
    ),
    Metric("diversity", "diversity", "How different the images of one prompt (or class) are from each other.", "higher"),
    Metric(
        "copy_rate",
        "copy rate, %",
        "Share of images that are nearly copies of a training image; of real images that were held out, 1 % are at most.",
        "lower",
        factor=100,
        digits=2,
    ),
    Metric("nearest_distance", "distance to training images", "Mean distance of an image to the nearest training image.", None, "other"),
    Metric(
        "network_evaluations_per_image",
        "network evaluations / image",
        "How often the denoising network runs for one image; guidance counts twice.",
        "lower",
        "cost",
        digits=2,
        exact=True,
    ),
    _cost("seconds_per_image", "ms / image", "Wall time for one image, in whole batches, decoding included.", 1000),
    _cost("cpu_seconds_per_image", "CPU ms / image", "Processor time for one image: comparable on a busy machine too.", 1000),
    Metric(
        "peak_memory_bytes",
        "peak memory, MiB",
        "The most memory that the device (on a CPU: the process) has held so far; models that are measured in one process share it.",
        None,
        "cost",
        factor=1 / 2**20,
        digits=0,
        depends_on_device=True,
    ),
    Metric("timed_images", "timed images", "How many images the costs are averaged over.", None, "count"),
)
BY_KEY = {metric.key: metric for metric in METRICS}


def metric_named(key: str) -> Metric:
    """The metric that an evaluation calls `key`; for an unknown one its name alone, without direction."""
    unknown = Metric(key, re.sub(r"[_\s]+", " ", key), "A metric that this report has no description of.", None, "other")
    return BY_KEY.get(key, unknown)
