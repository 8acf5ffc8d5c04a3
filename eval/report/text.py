"""The words and tables of a report, the same for Markdown and HTML: both only lay out what this module says."""

from collections.abc import Iterator
from dataclasses import dataclass

from report.data import REFERENCE_STEPS, Entry, Model, Report, ScoredPrompt, Value, Verdict
from report.metric_words import BY_KEY, Metric
from report.pictures import Curve, Point

HEADINGS = {
    "summary": "In short",
    "plots": "Quality, steps and time",
    "table": "All measurements",
    "legend": "What the numbers mean",
    "samples": "The same noise for every model",
    "more": "More samples of each model",
    "run": "What was run",
    "numbers": "Every number, by noise seed",
}
PROMPTS_NOTE = "By the mean CLIP score over the students. One image for each model, in the order of the table, all from the same seed."
NOTES: dict[Verdict | None, str] = {
    "reference": "reference",
    "better": "better",
    "worse": "worse",
    "within noise": "≈ within noise",
    "one seed": "noise unknown",
    "not comparable": "other device",
    None: "",
}
SENTENCES: dict[Verdict | None, str] = {
    "better": "better than the teacher's best",
    "worse": "worse than the teacher's best",
    "within noise": "≈ the teacher's best: the difference is within noise",
    "one seed": "one noise seed: the noise is unknown",
}


@dataclass(frozen=True)
class Cell:
    """One number in the table: what it says, how it stands to the reference, and its samples where the column has no common count."""

    text: str
    verdict: Verdict | None
    samples: str = ""

    @property
    def note(self) -> str:
        return NOTES[self.verdict]


@dataclass(frozen=True)
class Heading:
    """Head of a column: name with arrow, and the samples behind each of its numbers where they are the same."""

    title: str
    samples: str


@dataclass(frozen=True)
class Plot:
    """The main metric over something that it costs; the first curve is the teacher's."""

    title: str
    file: str
    curves: list[Curve]
    cost: str
    quality: str


@dataclass(frozen=True)
class Summary:
    """One model in short: how far it is from the teacher, and what it costs."""

    name: str
    steps: int
    distance: str
    ratio: str
    verdict: Verdict | None
    sentence: str
    evaluations: str
    speed: str
    teacher: str  # the teacher's own distance at as many steps, where it was measured


def lead(report: Report) -> str:
    """What the whole report measures distances in, and against what."""
    metric, reference = report.main_metric, report.reference
    value = reference.values[metric.key]
    return (
        f"How close do the students come to {report.teacher.label}, and at what cost? Measured by {metric.name} ({metric.direction}). "
        f"The teacher's best is {metric.plus_minus(value.mean, value.uncertainty)}, at {steps(reference.steps)} "
        f"(over its step counts of {REFERENCE_STEPS} or more; {value.count} samples)."
    )


def summaries(report: Report) -> list[Summary]:
    """The students in short, each at each of its numbers of steps."""
    return [_summary(report, entry) for model in report.students for entry in model.entries]


def headings(report: Report) -> list[Heading]:
    """Heads of the table's metric columns."""
    return [Heading(metric.title, _common_samples(report, metric)) for metric in report.metrics]


def cells(report: Report, entry: Entry) -> list[Cell]:
    """One row of the table: a cell for each of the report's metrics."""
    return [_cell(report, entry, metric) for metric in report.metrics]


def legend(report: Report) -> list[tuple[str, str]]:
    """Each metric's title with one plain sentence on it and its direction."""
    return [(metric.title, " ".join(_sentences(report, metric))) for metric in report.metrics]


def notes(report: Report) -> list[str]:
    """What a reader must know before trusting the numbers."""
    seeds = min(len(value.per_seed) for entry in report.entries for value in entry.values.values())
    test = "Welch's t-test over noise seeds" if seeds > 1 else "normal test on the stated errors"
    spread = "± is the standard deviation over noise seeds" if seeds > 1 else "± is the metric's own estimate of its error, if any"
    found = [
        f"{spread}; the count is samples × noise seeds.",
        f"Better, worse: than the teacher's best ({steps(report.reference.steps)}). ≈ within noise: the measurement does not tell the two "
        f"apart ({test}, 5 %). Of many such answers about one in twenty is chance.",
        "Another training run of the same student may differ by more than the noise of sampling that is stated here.",
    ]
    if seeds == 1:
        found.append("With one noise seed, differences of numbers without ± may be chance.")
    elif seeds == 2:
        found.append("With two noise seeds only large differences can be told from noise.")
    if len(report.environments) > 1:
        found.append("Times were taken in different environments (see below); only those of the teacher's best are compared.")
    return found


def run_facts(report: Report) -> list[tuple[str, str]]:
    """What was run, on what, by which code; a dash where a setting was left to the model or the metric."""
    facts = [("commit", report.commit), ("device", "; ".join(report.environments)), ("versions", report.versions)]
    facts += [(name.replace("_", " "), text) for name, text in report.protocol.items()]
    return facts + [(f"model {model.label}", _model_facts(model)) for model in report.models]


def all_numbers(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of every number as the evaluation files hold it, by noise seed."""
    seeds = list(dict.fromkeys(seed for entry in report.entries for value in entry.values.values() for seed in value.per_seed))
    head = ["model", "steps", "number", "mean", "std", "error of a seed", "samples / seed", *(f"seed {seed}" for seed in seeds)]
    rows = []
    for entry in report.entries:
        for name, value in entry.values.items():
            numbers = [exact(value.mean), exact(value.std), exact(value.error), str(value.samples)]
            by_seed = [exact(value.per_seed.get(seed)) for seed in seeds]
            rows.append([entry.model, str(entry.steps), name, *numbers, *by_seed])
    return head, rows


def exact(value: float | None) -> str:
    """Six significant digits; a dash for None."""
    return "–" if value is None else f"{value:.6g}"


def plots(report: Report) -> list[Plot]:
    """Quality over steps, and over time where every model has a time that was taken in the same environment."""
    metric, latency = report.main_metric, BY_KEY["seconds_per_image"]
    quality = f"{metric.name} ({metric.direction})"
    found = [Plot(f"{metric.name} over sampling steps", "quality_vs_steps.png", _curves(report, None), "sampling steps", quality)]
    if len(report.environments) == 1 and all(latency.key in entry.values for entry in report.entries):
        title = f"{metric.name} over time for an image; the figures are sampling steps"
        found.append(Plot(title, "quality_vs_latency.png", _curves(report, latency), latency.name, quality))
    return found


def column_titles(report: Report) -> list[str]:
    """Captions of the grid's columns where they are short, or else their numbers."""
    captions = [column.caption for column in report.columns]
    short = all(len(caption) <= 4 for caption in captions)
    return captions if short else [str(i + 1) for i in range(len(captions))]


def numbered_captions(report: Report) -> list[tuple[int, str]]:
    """The captions that are too long to stand over their columns, with the numbers that stand there."""
    captions = [column.caption for column in report.columns]
    return [] if column_titles(report) == captions else list(enumerate(captions, 1))


def samples_note(report: Report) -> str:
    """What the columns of the grid share."""
    return "One row for each model. A column has the same prompt or label and the same initial noise throughout; nothing was selected."


def ranked_prompts(report: Report) -> Iterator[tuple[str, tuple[ScoredPrompt, ...]]]:
    """Title and prompts of the sections on the worst and the best ones, where there are any."""
    sections = (("Worst prompts", report.worst_prompts), ("Best prompts", report.best_prompts))
    return (section for section in sections if section[1])


def steps(count: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} step{'' if count == 1 else 's'}"


def _summary(report: Report, entry: Entry) -> Summary:
    metric, key = report.main_metric, "network_evaluations_per_image"
    value, ratio, verdict = entry.values[metric.key], report.ratio(entry, metric.key), report.verdict(entry, metric)
    cost, usual = entry.values.get(key), report.reference.values.get(key)
    equal = next((other.values[metric.key] for other in report.teacher.entries if other.steps == entry.steps), None)
    return Summary(
        name=entry.name,
        steps=entry.steps,
        distance=f"{metric.plus_minus(value.mean, value.uncertainty)} ({value.count})",
        ratio="–" if ratio is None else f"{ratio:.2f} ×",
        verdict=verdict,
        sentence=SENTENCES.get(verdict, ""),
        evaluations="–" if cost is None or usual is None else f"{cost.mean:g} instead of {usual.mean:g}",
        speed=_speed(report, entry),
        teacher="–" if equal is None else metric.plus_minus(equal.mean, equal.uncertainty),
    )


def _sentences(report: Report, metric: Metric) -> Iterator[str]:
    yield metric.meaning
    if metric.better:
        yield f"{metric.direction.capitalize()}."
    networks = dict.fromkeys(entry.values[metric.key].network for entry in report.entries if metric.key in entry.values)
    if any(networks):
        yield f"Features: {', '.join(filter(None, networks))}."


def _speed(report: Report, entry: Entry) -> str:
    speed, verdict = report.speed_up(entry), report.verdict(entry, BY_KEY["seconds_per_image"])
    if speed is None:
        return "–"
    if verdict == "within noise":
        return "≈ as fast (within noise)"
    return f"{speed:.1f} × faster" if speed >= 1 else f"{1 / speed:.1f} × slower"


def _curves(report: Report, cost: Metric | None) -> list[Curve]:
    return [Curve(model.label, [_point(entry, report.main_metric, cost) for entry in model.entries]) for model in report.models]


def _point(entry: Entry, quality: Metric, cost: Metric | None) -> Point:
    value, place = entry.values[quality.key], entry.values[cost.key] if cost else Value(entry.steps, None, 0, {})
    factor = cost.factor if cost else 1.0
    shown = (factor * place.mean, quality.factor * value.mean, factor * (place.std or 0.0), quality.factor * (value.uncertainty or 0.0))
    return Point(entry.steps, *shown)


def _common_samples(report: Report, metric: Metric) -> str:
    counts = {entry.values[metric.key].count for entry in report.entries if metric.key in entry.values}
    return counts.pop() if len(counts) == 1 else ""


def _cell(report: Report, entry: Entry, metric: Metric) -> Cell:
    value = entry.values.get(metric.key)
    if value is None:
        return Cell("–", None)
    samples = "" if _common_samples(report, metric) else value.count
    return Cell(metric.plus_minus(value.mean, value.uncertainty), report.verdict(entry, metric), samples)


def _model_facts(model: Model) -> str:
    return f"{model.folder} (SHA-256 {model.sha256[:12]})" + (f", {model.about}" if model.about else "")
