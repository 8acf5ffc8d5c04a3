"""Compare a teacher with its students and write one report: report.md with pictures beside it, and report.html, which holds all.

    python eval/compare.py TEACHER STUDENT_A STUDENT_B --output_dir COMPARISON --trust_remote_code

Each model is judged by `evaluate.py` into its own folder. What stands there under the same protocol is read instead, so that a
comparison that was stopped goes on where it was.
"""

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from command_line import reject, run
from evaluate import EvaluateConfig, Settings, evaluate, load_judge
from generate import balanced_labels, generate, image_seed, load_pipeline
from metrics import NotFiniteError
from pictures import grid, to_pil
from report import REFERENCE_STEPS, Column, Entry, Model, Report
from report_html import write_html
from report_markdown import write_markdown
from report_reading import commit, model_from, protocol_from, served_steps, versions_from
from tqdm import tqdm

GRID_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Compare a teacher with its students."""

    teacher: Annotated[Path, tyro.conf.Positional]
    """Folder of the teacher."""
    students: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of the students, each sampled with every number of steps that it serves."""
    output_dir: Path = Path("outputs/comparison")
    """Folder for report.md, report.html and the pictures."""
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


def compare(config: CompareConfig) -> Path:
    """Evaluate what has no evaluation yet, write the folder and return the path of report.md.

    A student whose samples are not finite gets a line in the report instead of a row.

    Raises:
        InputError: for a wrong setting or folder, and for a teacher whose samples are not finite.
    """
    config.check()
    evaluations, failures = _evaluations(config)
    labels = _labels([config.teacher, *config.students])
    models = [_with_images(config, evaluation, folder, labels[folder]) for folder, evaluation in evaluations.items()]
    report = Report(
        teacher=models[0],
        students=tuple(models[1:]),
        protocol=protocol_from(evaluations[config.teacher]),
        commands=tuple(_commands(config)),
        commit=commit(),
        versions=versions_from(list(evaluations.values())),
        columns=tuple(_columns(config)),
        failures=tuple(f"{labels[folder]} was not evaluated: {error}." for folder, error in failures.items()),
    )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_html(report, config.output_dir)
    return write_markdown(report, config.output_dir)


def _evaluations(config: CompareConfig) -> tuple[dict[Path, dict[str, Any]], dict[Path, NotFiniteError]]:
    """The evaluation files of all models, and the students that have none because they diverged."""
    found: dict[Path, dict[str, Any]] = {}
    failures: dict[Path, NotFiniteError] = {}
    for folder in tqdm((config.teacher, *config.students), desc="models", unit="model"):
        try:
            found[folder] = evaluate(config.evaluation(folder))
        except NotFiniteError as error:
            if folder == config.teacher:
                raise
            failures[folder] = error
    return found, failures


def _labels(folders: list[Path]) -> dict[Path, str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = {folder: folder.resolve().parts for folder in folders}
    depth = 1
    while len({path[-depth:] for path in parts.values()}) < len(parts):
        depth += 1
    return {folder: "/".join(path[-depth:]) for folder, path in parts.items()}


def _with_images(config: CompareConfig, evaluation: dict[str, Any], folder: Path, label: str) -> Model:
    model = model_from(evaluation, folder, label)
    pipe = load_pipeline(folder, config.trust_remote_code, config.device)
    return replace(model, entries=tuple(_drawn(config, pipe, folder, entry) for entry in model.entries))


def _drawn(config: CompareConfig, pipe: Any, folder: Path, entry: Entry) -> Entry:
    classes = load_judge(config.dataset, config.feature_network).data.classes
    labels = balanced_labels(GRID_ROWS * classes, classes)
    steps = entry.steps if config.evaluation(folder).num_inference_steps else None
    drawn = generate(pipe, labels, config.noise_seeds[0], config.batch_size, steps, config.guidance_scale)
    images = [to_pil(image) for image in drawn.images]
    return replace(entry, images=tuple(images[:classes]), more_images=grid(images, [str(label) for label in range(classes)]))


def _columns(config: CompareConfig) -> list[Column]:
    classes = load_judge(config.dataset, config.feature_network).data.classes
    return [Column(str(label), image_seed(config.noise_seeds[0], label)) for label in range(classes)]


def _commands(config: CompareConfig) -> list[str]:
    shared = ["--samples", str(config.samples), "--noise_seeds", *map(str, config.noise_seeds)]
    shared += [] if config.guidance_scale is None else ["--guidance_scale", str(config.guidance_scale)]
    shared += ["--dataset", config.dataset, "--feature_network", config.feature_network, "--batch_size", str(config.batch_size)]
    shared += ["--device", config.device] + (["--trust_remote_code"] if config.trust_remote_code else [])
    steps = ["--num_inference_steps", *map(str, config.teacher_num_inference_steps)]
    lines = [["evaluate.py", str(config.teacher), *steps, *shared]]
    for folder in config.students:
        served = config.evaluation(folder).num_inference_steps
        lines.append(["evaluate.py", str(folder), *(["--num_inference_steps", *map(str, served)] if served else []), *shared])
    folders = map(str, (config.teacher, *config.students))
    own = ["--output_dir", str(config.output_dir), "--teacher_num_inference_steps", *steps[1:]]
    lines.append(["compare.py", *folders, *own, *shared])
    return [shlex.join(["python", f"eval/{line[0]}", *line[1:]]) for line in lines]


def main(config: CompareConfig) -> None:
    path = compare(config)
    print(f"{path}\n{path.with_suffix('.html')}")


if __name__ == "__main__":
    run(CompareConfig, main)
