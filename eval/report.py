"""What a comparison found, as plain data: models at their step counts, images, prompts, what was run. It reads and writes no file."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import scipy.stats
from PIL import Image
from report_metrics import METRICS, Metric, metric_named

REFERENCE_STEPS = 8  # a teacher's reference is its best value at so many steps or more
SIGNIFICANCE = 0.05
Verdict = Literal["reference", "better", "worse", "within noise", "one seed", "not comparable"]


@dataclass(frozen=True)
class Value:
    """One metric of one model: mean and sample standard deviation over noise seeds (None after a single one)."""

    mean: float
    std: float | None
    samples: int  # for each seed
    per_seed: Mapping[str, float]

    @property
    def count(self) -> str:
        """`5,000 × 5`: samples, times noise seeds."""
        return f"{self.samples:,} × {len(self.per_seed)}"


@dataclass(frozen=True)
class Entry:
    """A model at one number of sampling steps: one row of the report."""

    model: str
    steps: int
    values: Mapping[str, Value]  # by the name that the evaluation gives to the metric
    environment: str  # device, threads, batch size: what its times depend on
    images: tuple[Image.Image, ...] = ()  # one for each column of the report, or none
    more_images: Image.Image | None = None  # a grid of further samples

    @property
    def name(self) -> str:
        return f"{self.model}, {self.steps} step{'' if self.steps == 1 else 's'}"


@dataclass(frozen=True)
class Model:
    """One pipeline folder and its entries, in the order of their steps."""

    label: str
    folder: str
    sha256: str
    about: str  # in words: the method that trained it, where a record says so
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Column:
    """What one column of the grid shares: the prompt or label, and the seed of the image."""

    caption: str
    seed: int


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt, with the CLIP score and the image of every entry, in the report's order; all at one seed."""

    text: str
    seed: int
    scores: tuple[float, ...]
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Report:
    """Everything that a report says."""

    teacher: Model
    students: tuple[Model, ...]
    protocol: Mapping[str, str]  # what the evaluations share, in words
    commands: tuple[str, ...]
    commit: str
    versions: str
    columns: tuple[Column, ...] = ()
    worst_prompts: tuple[ScoredPrompt, ...] = ()
    best_prompts: tuple[ScoredPrompt, ...] = ()
    failures: tuple[str, ...] = ()  # models without an evaluation, and why

    @property
    def title(self) -> str:
        return f"{self.teacher.label} and its students"

    @property
    def models(self) -> tuple[Model, ...]:
        return (self.teacher, *self.students)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(entry for model in self.models for entry in model.entries)

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that any entry has, quality before cost; names that nobody described come last."""
        found = dict.fromkeys(name for entry in self.entries for name in entry.values)
        known = [metric for metric in METRICS if metric.key in found]
        return (*known, *(metric_named(name) for name in found if name not in {metric.key for metric in known}))

    @cached_property
    def main_metric(self) -> Metric:
        """What distances are stated in: the first quality metric, in the order of the registry, that every entry has.

        Raises:
            ValueError: where no quality metric is common to all entries.
        """
        for metric in self.metrics:
            if metric.kind == "quality" and all(metric.key in entry.values for entry in self.entries):
                return metric
        raise ValueError("no quality metric is common to all models")

    @cached_property
    def reference(self) -> Entry:
        """The teacher's best entry, by the main metric, over its step counts of 8 or more."""
        long = [entry for entry in self.teacher.entries if entry.steps >= REFERENCE_STEPS]
        return min(long or self.teacher.entries, key=lambda entry: self.main_metric.loss(entry.values[self.main_metric.key].mean))

    @property
    def environments(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.environment for entry in self.entries))

    def ratio(self, entry: Entry, key: str) -> float | None:
        """The entry's mean over the reference's; None where one of them is missing or not positive."""
        if key not in entry.values or key not in self.reference.values:
            return None
        ours, theirs = entry.values[key].mean, self.reference.values[key].mean
        return ours / theirs if ours > 0 and theirs > 0 else None

    def verdict(self, entry: Entry, metric: Metric) -> Verdict | None:
        """How `entry` stands to the reference; None where that has no meaning.

        Times are comparable only where they were taken in the same environment.
        """
        ours, theirs = entry.values.get(metric.key), self.reference.values.get(metric.key)
        if ours is None or theirs is None or metric.better is None:
            return None
        if entry is self.reference:
            return "reference"
        if metric.depends_on_device and entry.environment != self.reference.environment:
            return "not comparable"
        return judged(metric, list(ours.per_seed.values()), list(theirs.per_seed.values()))

    def speed_up(self, entry: Entry) -> float | None:
        """How many times faster than the reference `entry` draws an image; None where the times are not comparable."""
        ratio = self.ratio(entry, "seconds_per_image")
        return 1 / ratio if ratio and entry.environment == self.reference.environment else None


def value_from(record: Mapping[str, Any]) -> Value:
    """A metric as evaluation files hold it: `mean`, `std`, `per_seed`, `samples`."""
    return Value(record["mean"], record["std"], record["samples"], record["per_seed"])


def judged(metric: Metric, ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
    """Whether values over noise seeds differ by more than their noise: Welch's t-test at 5 %, on how far each is from ideal."""
    if min(len(ours), len(theirs)) < 2:
        return "one seed"
    a, b = [metric.loss(value) for value in ours], [metric.loss(value) for value in theirs]
    if _probability(a, b) >= SIGNIFICANCE:
        return "within noise"
    return "better" if statistics.fmean(a) < statistics.fmean(b) else "worse"


def _probability(a: list[float], b: list[float]) -> float:
    """Of a difference at least as large between seeds of one and the same model."""
    deviations = statistics.stdev(a), statistics.stdev(b)
    if not any(deviations):  # without noise, as the number of network evaluations is
        return float(a[0] == b[0])
    moments = statistics.fmean(a), deviations[0], len(a), statistics.fmean(b), deviations[1], len(b)
    return float(scipy.stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)
