"""Compare a teacher with its students and write one report: report.md with pictures beside it, and report.html, which holds all.

    python eval/compare.py TEACHER STUDENT_A STUDENT_B --output_dir COMPARISON --trust_remote_code

    python eval/compare.py TEACHER STUDENT --metrics clip_score fid --prompts_file prompts.txt --reference IMAGES --samples 5000

Each model is judged by `evaluate.py` into its own folder. What stands there under the same protocol is read instead, so that a
comparison that was stopped goes on where it was. To use several GPUs, run the evaluations that the report lists under `accelerate
launch` first.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from common.checks import NotFiniteError
from common.command_line import reject, run
from common.generate import balanced_labels, generate, image_seed, load_pipeline
from evaluate import EvaluateConfig, Settings, evaluate, load_judge
from report import prompts as report_prompts
from report.data import REFERENCE_STEPS, Column, Report, ScoredPrompt
from report.html_page import write_html
from report.markdown import write_markdown
from report.pictures import grid, to_pil
from report.reading import Pictures, commit, model_from, ordered_results, protocol_from, served_steps, versions_from
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
    student_num_inference_steps: tuple[int, ...] = ()
    """Step counts of students whose folder does not record its own (distillation.json). None given: the pipeline's own."""

    def check(self) -> None:
        super().check()
        if max(self.teacher_num_inference_steps, default=0) < REFERENCE_STEPS:
            raise reject("teacher_num_inference_steps", self.teacher_num_inference_steps, f"at least one of {REFERENCE_STEPS} or more")
        if len({folder.resolve() for folder in (self.teacher, *self.students)}) < 1 + len(self.students):
            raise reject("students", [str(folder) for folder in self.students], "different folders, none of them the teacher's")
        for folder in (self.teacher, *self.students):
            if not (folder / "model_index.json").is_file():
                raise reject("folder", str(folder), "a diffusers pipeline folder with a model_index.json is needed")

    @property
    def labels(self) -> dict[Path, str]:
        """Names of the models: those of the folders, with as many parents as it takes to tell them apart."""
        parts = {folder: folder.resolve().parts for folder in (self.teacher, *self.students)}
        depth = 1
        while len({path[-depth:] for path in parts.values()}) < len(parts):
            depth += 1
        return {folder: "/".join(path[-depth:]) for folder, path in parts.items()}

    def evaluation(self, folder: Path) -> EvaluateConfig:
        """The evaluation of one of the models under the shared settings."""
        shared = {field.name: getattr(self, field.name) for field in fields(Settings)}
        shared["images_dir"] = self.images_dir and self.images_dir / self.labels[folder]
        return EvaluateConfig(folder=folder, num_inference_steps=self._steps(folder), **shared)

    def _steps(self, folder: Path) -> tuple[int, ...]:
        if folder == self.teacher:
            return self.teacher_num_inference_steps
        served = served_steps(folder)
        if len(served) == 1:
            return ()  # its own, which it takes without being asked
        return served or self.student_num_inference_steps


def compare(config: CompareConfig) -> Path:
    """Evaluate what has no evaluation yet, write the folder and return the path of report.md.

    A student whose samples are not finite gets a line in the report instead of a row.

    Raises:
        InputError: for a wrong setting or folder, and for a teacher whose samples are not finite.
    """
    config.check()
    evaluations, failures = _evaluations(config)
    labels = config.labels
    models = [model_from(found, folder, labels[folder], _pictures(config, folder)) for folder, found in evaluations.items()]
    worst, best = _prompts(config, evaluations)
    report = Report(
        teacher=models[0],
        students=tuple(models[1:]),
        protocol=protocol_from(evaluations[config.teacher]),
        commands=tuple(_commands(config)),
        commit=commit(),
        versions=versions_from(list(evaluations.values())),
        columns=_columns(config, evaluations[config.teacher]),
        worst_prompts=worst,
        best_prompts=best,
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


def _pictures(config: CompareConfig, folder: Path) -> Callable[[Mapping[str, Any]], Pictures]:
    """What gives the images of a model's results: those that the evaluation kept, or else images drawn now."""
    seed = config.noise_seeds[0]
    if config.metrics:
        return lambda result: report_prompts.pictures(result, seed)
    classes = load_judge(config.dataset, config.feature_network).data.classes
    pipe = load_pipeline(folder, config.trust_remote_code, config.device)

    def draw(result: Mapping[str, Any]) -> Pictures:
        labels, steps = balanced_labels(GRID_ROWS * classes, classes), result["num_inference_steps"]
        images = [to_pil(image) for image in generate(pipe, labels, seed, config.batch_size, steps, config.guidance_scale).images]
        return Pictures(tuple(images[:classes]), grid(images, [str(label) for label in range(classes)]))

    return draw


def _columns(config: CompareConfig, evaluation: dict[str, Any]) -> tuple[Column, ...]:
    seed = config.noise_seeds[0]
    if config.metrics:
        return report_prompts.columns(ordered_results(evaluation, config.teacher)[0], seed)
    classes = load_judge(config.dataset, config.feature_network).data.classes
    return tuple(Column(str(label), image_seed(seed, label)) for label in range(classes))


def _prompts(config: CompareConfig, evaluations: dict[Path, dict[str, Any]]) -> tuple[tuple[ScoredPrompt, ...], tuple[ScoredPrompt, ...]]:
    """The worst and the best prompts, where prompts were scored."""
    if "clip_score" not in config.metrics:
        return (), ()
    results = [ordered_results(evaluation, folder) for folder, evaluation in evaluations.items()]
    return report_prompts.worst_and_best(results, config.noise_seeds[0])


def _commands(config: CompareConfig) -> list[str]:
    """The command of each evaluation alone, and that of the comparison."""
    evaluations = [config.evaluation(folder) for folder in (config.teacher, *config.students)]
    lines = [["evaluate.py", str(each.folder), *_flags(each)] for each in evaluations]
    lines.append(["compare.py", *map(str, (config.teacher, *config.students)), *_flags(config)])
    return [shlex.join(["python", f"eval/{line[0]}", *line[1:]]) for line in lines]


def _flags(config: Settings) -> list[str]:
    """The settings that a command line must name: those without a default, or at another value; not whether to start anew."""
    flags: list[str] = []
    for field in fields(config):
        value, default = getattr(config, field.name), field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in ("folder", "teacher", "students", "overwrite") and value != default:
            flags += [f"--{field.name}", *_words(value)]
    return flags


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    pairs = value.items() if isinstance(value, dict) else [(each,) for each in value] if isinstance(value, tuple) else [(value,)]
    return [str(word) for pair in pairs for word in pair]


def main(config: CompareConfig) -> None:
    path = compare(config)
    print(f"{path}\n{path.with_suffix('.html')}")


if __name__ == "__main__":
    run(CompareConfig, main)
