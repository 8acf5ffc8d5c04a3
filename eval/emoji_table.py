"""Judge the emoji pipeline and its students on training and held-out captions: distance, CLIP score, accuracy of what was asked for.

    python eval/emoji_table.py assets/emoji-stable-diffusion STUDENT... --output_dir outputs/emoji-table

The teacher's reference is its best distance over its step counts of 8 or more, guidance included; the other numbers of the reference are of
that step count. table.md and table.json hold all numbers, images/ the pictures. Stopped, the same command goes on.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from common.command_line import reject, run
from common.measurement import collect
from common.processes import join
from emoji_accuracy import EmojiAccuracyConfig, emoji_accuracy
from emoji_judge import HERE
from evaluate import EvaluateConfig, evaluate
from report.data import REFERENCE_STEPS
from report.reading import served_steps

SPLITS = {"train": 1, "held_out": 4}  # and the images of each caption
NUMBERS = {
    "frechet_distance": "distance",
    "clip_score": "CLIP score",
    "object_accuracy": "object",
    "colour_accuracy": "colour",
    "background_accuracy": "background",
    "all_accuracy": "all three",
}


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Compare the emoji pipeline with its students."""

    teacher: Annotated[Path, tyro.conf.Positional]
    """Folder of the teacher."""
    students: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of the students, each drawn with every number of steps that it serves."""
    output_dir: Path = Path("outputs/emoji-table")
    """Folder of table.md, table.json and the pictures."""
    evaluation: Path = HERE.parent / "assets" / "emoji-evaluation"
    """Folder of captions, statistics of real pictures, and the CLIP that scores."""
    teacher_num_inference_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Step counts of the teacher."""
    guidance_scale: float = 2.0
    """Classifier-free guidance of the teacher; the students are drawn without."""
    noise_seeds: tuple[int, ...] = (0,)
    """Seeds of the noise; the numbers are means over them."""
    batch_size: int = 64
    """Images in one pipeline call."""
    device: str = "auto"
    """Where the networks run; auto takes CUDA where there is some."""

    def check(self) -> None:
        """Raise `InputError` for settings without a reference, and for models that cannot be told apart."""
        if max(self.teacher_num_inference_steps, default=0) < REFERENCE_STEPS:
            raise reject("teacher_num_inference_steps", self.teacher_num_inference_steps, f"at least one of {REFERENCE_STEPS} or more")
        if len(set(self.names.values())) < 1 + len(self.students):
            raise reject("students", sorted(self.names.values()), "folders of different names, none of them the teacher's")
        for folder in self.students:
            if not served_steps(folder):
                raise reject("students", str(folder), "a folder with the distillation.json of an exported student is needed")

    @property
    def names(self) -> dict[Path, str]:
        """What the table calls each model: the folder's name, or its parent's for a student that a training run left in student/."""
        folders = (self.teacher, *self.students)
        return {each: each.resolve().parent.name if each.name == "student" else each.resolve().name for each in folders}


def rows(config: TableConfig) -> Iterator[dict[str, Any]]:
    """A row for each split, model and number of steps; measured when it is asked for."""
    for split, repeats in SPLITS.items():
        prompts = config.evaluation / f"{split}.txt"
        samples = repeats * len(prompts.read_text().splitlines())
        for folder, name in config.names.items():
            steps = config.teacher_num_inference_steps if folder == config.teacher else served_steps(folder)
            found = evaluate(
                EvaluateConfig(
                    folder=folder,
                    num_inference_steps=steps if len(steps) > 1 else (),
                    guidance_scale=config.guidance_scale if folder == config.teacher else None,
                    metrics=("fid", "clip_score"),
                    reference=config.evaluation / f"{split}.npz",
                    features={"fid": f"{HERE}/emoji_judge.py:judge"},
                    weights={"clip": config.evaluation / "clip"},
                    prompts_file=prompts,
                    samples=samples,
                    noise_seeds=config.noise_seeds,
                    batch_size=config.batch_size,
                    device=config.device,
                    output=config.output_dir / f"{name}-{split}.json",
                    images_dir=config.output_dir / "images" / name / split,
                )
            )
            for result in found["results"]:
                yield {"split": split, "model": name, "steps": result["num_inference_steps"] or steps[0], **_numbers(result, config.device)}


def _numbers(result: dict[str, Any], device: str) -> dict[str, float]:
    """Means over the noise seeds of one result, the accuracies measured on its pictures now."""
    means = {name: metric["mean"] for name, metric in result["metrics"].items() if name in (*NUMBERS, "network_evaluations_per_image")}
    seeds = [_accuracies(Path(images["folder"]), device) for images in result["images"].values()]
    return means | {name: float(np.mean([each[name] for each in seeds])) for name in seeds[0]}


def _accuracies(folder: Path, device: str) -> dict[str, float]:
    team = join(device)
    config = EmojiAccuracyConfig(folder=folder)
    estimates = emoji_accuracy(collect(config, team), config)
    team.leave()
    return {name: estimate.value for name, estimate in estimates.items()}


def reference_of(found: list[dict[str, Any]], teacher: str, split: str) -> dict[str, Any]:
    """The teacher's row with the best distance among those of enough steps."""
    candidates = [row for row in found if row["model"] == teacher and row["split"] == split and row["steps"] >= REFERENCE_STEPS]
    return min(candidates, key=lambda row: row["frechet_distance"])


def markdown(found: list[dict[str, Any]], teacher: str) -> str:
    """The table, the distance also as a multiple of the teacher's reference."""
    lines = ["| captions | model | steps | distance | of the reference | " + " | ".join(list(NUMBERS.values())[1:]) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for row in found:
        ratio = row["frechet_distance"] / reference_of(found, teacher, row["split"])["frechet_distance"]
        numbers = [f"{row['frechet_distance']:.2f}", f"{ratio:.2f}", f"{row['clip_score']:.1f}"]
        numbers += [f"{row[name]:.3f}" for name in list(NUMBERS)[2:]]
        lines.append(" | ".join([f"| {row['split'].replace('_', ' ')}", row["model"], str(row["steps"]), *numbers]) + " |")
    return "\n".join(lines) + "\n"


def main(config: TableConfig) -> None:
    config.check()
    found = list(rows(config))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "table.json").write_text(json.dumps(found, indent=2) + "\n")
    table = markdown(found, config.names[config.teacher])
    (config.output_dir / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    run(TableConfig, main)
