"""What a comparison found, as plain data: models at their step counts, images, prompts, what was run. It reads and writes no file."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import scipy.stats
from PIL import Image
from report.metric_words import METRICS, Metric, metric_named

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
    error: float | None = None  # the metric's own estimate of a seed's error (bootstrap, standard error), where it gives one
    network: str = ""  # whose features it reads, where the evaluation says so

    @property
    def count(self) -> str:
        """`5,000 × 5`: samples, times noise seeds."""
        return f"{self.samples:,} × {len(self.per_seed)}"

    @property
    def uncertainty(self) -> float | None:
        """Standard deviation over seeds, or after a single one the metric's own estimate."""
        return self.error if self.std is None else self.std


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
        """Those that any entry has, counts aside: quality before cost; names that nobody described come last."""
        found = dict.fromkeys(name for entry in self.entries for name in entry.values)
        known = [metric for metric in METRICS if metric.key in found]
        unknown = [metric_named(name) for name in found if name not in {metric.key for metric in known}]
        return tuple(metric for metric in (*known, *unknown) if metric.kind != "count")

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
        return judged(metric, ours, theirs)

    def speed_up(self, entry: Entry) -> float | None:
        """How many times faster than the reference `entry` draws an image; None where the times are not comparable."""
        ratio = self.ratio(entry, "seconds_per_image")
        return 1 / ratio if ratio and entry.environment == self.reference.environment else None


def value_from(record: Mapping[str, Any]) -> Value:
    """A metric as evaluation files hold it: `mean`, `std`, `per_seed`, `samples`; `error_per_seed` and `feature_network` where known."""
    errors = [error for error in record.get("error_per_seed", {}).values() if error is not None]
    error, network = statistics.fmean(errors) if errors else None, record.get("feature_network")
    name = f"{network['name']} (SHA-256 {network['sha256'][:12]})" if network else ""
    return Value(record["mean"], record["std"], record["samples"], record["per_seed"], error, name)


def judged(metric: Metric, ours: Value, theirs: Value) -> Verdict:
    """Whether two values differ by more than their noise, at 5 %, in how far each is from ideal.

    Over several noise seeds by Welch's t-test; after a single one by the metric's own errors, taken as normal and independent.
    """
    probability = _probability(metric, ours, theirs)
    if probability is None:
        return "one seed"
    if probability >= SIGNIFICANCE:
        return "within noise"
    return "better" if _mean_loss(metric, ours) < _mean_loss(metric, theirs) else "worse"


def _mean_loss(metric: Metric, value: Value) -> float:
    return statistics.fmean(metric.loss(x) for x in value.per_seed.values())


def _probability(metric: Metric, ours: Value, theirs: Value) -> float | None:
    """Of a difference at least as large between two draws from one and the same model; None where the noise is unknown."""
    difference = _mean_loss(metric, ours) - _mean_loss(metric, theirs)
    if metric.exact:
        return float(not difference)
    counts = len(ours.per_seed), len(theirs.per_seed)
    if min(counts) >= 2:
        deviations = [statistics.stdev(metric.loss(x) for x in value.per_seed.values()) for value in (ours, theirs)]
        if not any(deviations):
            return float(not difference)
        test = scipy.stats.ttest_ind_from_stats(difference, deviations[0], counts[0], 0, deviations[1], counts[1], equal_var=False)
        return float(test.pvalue)
    if not ours.error or not theirs.error:
        return None
    return float(2 * scipy.stats.norm.sf(abs(difference) / math.hypot(ours.error, theirs.error)))
