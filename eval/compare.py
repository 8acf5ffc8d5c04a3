"""Compare a teacher with its students: one table, the pictures and the commands that made them, in one folder.

    python eval/compare.py --teacher TEACHER --students STUDENT_A STUDENT_B --output_dir COMPARISON --trust_remote_code

Each model is judged by `evaluate.py` into its own folder; evaluations with the same protocol that stand there are read instead.
"""

import json
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from command_line import reject, run
from evaluate import EvaluateConfig, Settings, complete_results, evaluate, load_judge, plus_minus
from generate import balanced_labels, generate, load_pipeline
from metrics import NotFiniteError
from pictures import Curve, save_grid, save_quality_curve

GRID_ROWS = 8
REFERENCE_STEPS = 8  # a teacher's reference is its best distance at so many steps or more
COLUMNS = (
    "model",
    "steps",
    "network evaluations / image",
    "Fréchet distance",
    "ratio to reference",
    "accuracy",
    "recall",
    "within-class spread",
    "copy rate",
    "ms / image",
    "CPU ms / image",
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Compare a teacher with its students."""

    teacher: Path
    """Folder of the teacher."""
    students: tuple[Path, ...] = ()
    """Folders of the students, each sampled with every number of steps that it serves."""
    output_dir: Path
    """Folder for report.md and the pictures."""
    teacher_num_inference_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)
    """Step counts of the teacher. Its reference is the best distance at 8 steps or more."""

    def check(self) -> None:
        super().check()
        if max(self.teacher_num_inference_steps, default=0) < REFERENCE_STEPS:
            raise reject("teacher_num_inference_steps", self.teacher_num_inference_steps, f"at least one of {REFERENCE_STEPS} or more")
        if len({folder.resolve() for folder in (self.teacher, *self.students)}) < 1 + len(self.students):
            raise reject("students", [str(folder) for folder in self.students], "different folders, none of them the teacher's")

    def evaluation(self, folder: Path) -> EvaluateConfig:
        """The evaluation of one of the models under the shared settings."""
        shared = {field.name: getattr(self, field.name) for field in fields(Settings)}
        served = served_steps(folder)
        steps = self.teacher_num_inference_steps if folder == self.teacher else served if len(served) > 1 else ()
        return EvaluateConfig(folder=folder, num_inference_steps=steps, **shared)


def served_steps(folder: Path) -> tuple[int, ...]:
    """The numbers of steps that an exported student was trained to serve, its default first; none for other folders."""
    record = folder / "distillation.json"
    return tuple(len(sampler["timesteps"]) for sampler in json.loads(record.read_text())["samplers"]) if record.is_file() else ()


@dataclass(frozen=True)
class Row:
    """One model at one step count."""

    label: str
    folder: Path
    result: dict[str, Any]
    own_steps: int | None  # steps of the folder's own grid, where the record beside it names them

    @property
    def steps(self) -> int:
        """Sampling steps: those asked for, those on record, or else the network evaluations of an image."""
        asked = self.result["num_inference_steps"]
        return int(asked or self.own_steps or round(self.mean("network_evaluations_per_image")))

    def mean(self, metric: str) -> float:
        """Mean of a metric over noise seeds."""
        return float(self.result["metrics"][metric]["mean"])

    def text(self, metric: str, digits: int = 3) -> str:
        """Mean ± standard deviation of a metric."""
        return plus_minus(self.result["metrics"][metric], digits)

    @property
    def picture(self) -> str:
        """File name of the grid of samples."""
        return re.sub(r"[^\w.-]+", "_", f"samples_{self.label}_{self.steps}_steps.png")


def compare(config: CompareConfig) -> Path:
    """Evaluate what has no evaluation yet, write the folder and return the path of report.md.

    A student whose samples are not finite gets a line in the report instead of a row.

    Raises:
        InputError: for a wrong setting or folder, and for a teacher whose samples are not finite.
    """
    config.check()
    labels = _labels([config.teacher, *config.students])
    teacher = _rows(config, config.teacher, labels[config.teacher])
    students: list[list[Row]] = []
    failures: list[str] = []
    for folder in config.students:
        try:
            students.append(_rows(config, folder, labels[folder]))
        except NotFiniteError as error:
            failures.append(f"{labels[folder]} was not evaluated: {error}.")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for rows in (teacher, *students):
        _draw(config, rows)
    samples = f"{config.samples:,} samples × {len(config.noise_seeds)} noise seeds"
    save_quality_curve(_curve(teacher), [_curve(rows) for rows in students], samples, config.output_dir / "quality_vs_steps.png")
    report = config.output_dir / "report.md"
    report.write_text(_report(config, teacher, students, failures), encoding="utf-8")
    return report


def reference_distance(teacher: list[Row]) -> float:
    """The teacher's best Fréchet distance over its evaluated step counts of 8 or more."""
    return min(row.mean("frechet_distance") for row in teacher if row.steps >= REFERENCE_STEPS)


def _labels(folders: list[Path]) -> dict[Path, str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = {folder: folder.resolve().parts for folder in folders}
    depth = 1
    while len({path[-depth:] for path in parts.values()}) < len(parts):
        depth += 1
    return {folder: "/".join(path[-depth:]) for folder, path in parts.items()}


def _rows(config: CompareConfig, folder: Path, label: str) -> list[Row]:
    report = evaluate(config.evaluation(folder))
    own_steps = next(iter(served_steps(folder)), None)
    return [Row(label, folder, result, own_steps) for result in complete_results(report)]


def _draw(config: CompareConfig, rows: list[Row]) -> None:
    classes = load_judge(config.dataset, config.feature_network).data.classes
    pipe = load_pipeline(rows[0].folder, config.trust_remote_code, config.device)
    for row in rows:
        labels = balanced_labels(GRID_ROWS * classes, classes)
        steps = row.result["num_inference_steps"]
        images = generate(pipe, labels, config.noise_seeds[0], config.batch_size, steps, config.guidance_scale).images
        save_grid(images, [str(label) for label in range(classes)], config.output_dir / row.picture)


def _curve(rows: list[Row]) -> Curve:
    rows = sorted(rows, key=lambda row: row.steps)
    deviations = [row.result["metrics"]["frechet_distance"]["std"] or 0.0 for row in rows]
    return Curve(rows[0].label, [row.steps for row in rows], [row.mean("frechet_distance") for row in rows], deviations)


def _report(config: CompareConfig, teacher: list[Row], students: list[list[Row]], failures: list[str]) -> str:
    reference = reference_distance(teacher)
    rows = [*teacher, *(row for group in students for row in group)]
    pictures = [f"### {row.label}, {row.steps} steps\n\n![samples of {row.label}]({row.picture})\n" for row in rows]
    return "\n".join(
        [
            f"# {teacher[0].label} and its students\n",
            _protocol_text(config, rows),
            "",
            f"Reference: {reference:.3f}, the teacher's best over its step counts of {REFERENCE_STEPS} or more.\n",
            *_table(rows, reference),
            "",
            *failures,
            "",
            "![Fréchet distance over sampling steps](quality_vs_steps.png)\n",
            "## Samples\n",
            f"Noise seed {config.noise_seeds[0]}, the same initial noise for every model; one column for each class, nothing selected.\n",
            *pictures,
            "## Commands\n",
            "```",
            *_commands(config),
            "```\n",
        ]
    )


def _protocol_text(config: CompareConfig, rows: list[Row]) -> str:
    judge = load_judge(config.dataset, config.feature_network)
    metrics = rows[0].result["metrics"]
    return (
        f"Mean ± standard deviation over noise seeds {', '.join(map(str, config.noise_seeds))}, class-balanced samples: "
        f"{metrics['frechet_distance']['samples']:,} for each seed, {metrics['recall']['samples']:,} for recall. "
        f"Features: {judge.network.name} (SHA-256 {judge.network.sha256[:12]}), against {len(judge.data.train_images):,} training "
        f"images of {config.dataset}. Times: {_environments(rows)}. "
        "Within-class spread is relative to the real images; held-out images have a copy rate of at most 1 %."
    )


def _environments(rows: list[Row]) -> str:
    found = (row.result["environment"] for row in rows)
    return "; ".join(dict.fromkeys(f"{e['device']}, {e['cpu_threads']} CPU thread(s), batches of {e['batch_size']}" for e in found))


def _table(rows: list[Row], reference: float) -> list[str]:
    lines = [" | ".join(COLUMNS), " | ".join("---" if i == 0 else "--:" for i in range(len(COLUMNS)))]
    return [f"| {line} |" for line in (*lines, *(" | ".join(_cells(row, reference)) for row in rows))]


def _cells(row: Row, reference: float) -> list[str]:
    return [
        row.label.replace("|", r"\|"),
        str(row.steps),
        f"{row.mean('network_evaluations_per_image'):g}",
        row.text("frechet_distance"),
        f"{row.mean('frechet_distance') / reference:.2f}",
        row.text("accuracy"),
        row.text("recall"),
        row.text("within_class_spread"),
        row.text("copy_rate", 4),
        _milliseconds(row, "seconds_per_image"),
        _milliseconds(row, "cpu_seconds_per_image"),
    ]


def _milliseconds(row: Row, metric: str) -> str:
    values = {name: row.result["metrics"][metric][name] for name in ("mean", "std")}
    return plus_minus({name: None if value is None else 1000 * value for name, value in values.items()}, 2)


def _commands(config: CompareConfig) -> list[str]:
    shared = ["--samples", str(config.samples), "--noise_seeds", *map(str, config.noise_seeds)]
    shared += [] if config.guidance_scale is None else ["--guidance_scale", str(config.guidance_scale)]
    shared += ["--dataset", config.dataset, "--feature_network", config.feature_network, "--batch_size", str(config.batch_size)]
    shared += ["--device", config.device] + (["--trust_remote_code"] if config.trust_remote_code else [])
    steps = list(map(str, config.teacher_num_inference_steps))
    students = list(map(str, config.students))
    lines = [["evaluate.py", str(config.teacher), "--num_inference_steps", *steps, *shared]]
    lines += [["evaluate.py", folder, *shared] for folder in students]
    together = ["compare.py", "--teacher", str(config.teacher), *(["--students", *students] if students else [])]
    lines += [[*together, "--output_dir", str(config.output_dir), "--teacher_num_inference_steps", *steps, *shared]]
    return [shlex.join(["python", f"eval/{line[0]}", *line[1:]]) for line in lines]


def main(config: CompareConfig) -> None:
    print(compare(config))


if __name__ == "__main__":
    run(CompareConfig, main)
