"""Text to image in minutes: distil the small emoji pipeline of this repository to one and to four steps, and judge teacher and students.

    python train/demo_t2i.py --output_dir outputs/demo-t2i

The pipeline is a stock `StableDiffusionPipeline` that draws "a green banana on a red background" (docs/text_to_image.md). The
students learn from the teacher and the captions alone. Every part is a command of its own, printed before it runs.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]
from demo import COMMANDS, Job, follow, foreground

from diffusion_distill.config import parse, run_cli
from diffusion_distill.errors import reject

TEACHER = "assets/emoji-stable-diffusion"
RECIPE = "train/recipes/emoji_dmd2.yaml"
PICTURES = 10  # of each model in the overview


@dataclass
class TextToImageDemo:
    output_dir: str = "outputs/demo-t2i"
    """Folder of the demo; table.md and overview.png are its result."""
    max_train_steps: int = 280
    """Optimizer steps of each student."""
    teacher_num_inference_steps: tuple[int, ...] = (1, 4, 8)
    """Step counts of the teacher in the table."""


def overview(folders: list[Path], path: Path) -> None:
    """A picture of a row for each folder of images: the same captions and noise in every column."""
    rows = [[Image.open(folder / f"{77 * i:06d}.png") for i in range(PICTURES)] for folder in folders]
    side, zoom, gap = rows[0][0].width, 4, 4
    cell = side * zoom + gap
    sheet = Image.new("RGB", (PICTURES * cell, len(rows) * cell), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image.resize((side * zoom, side * zoom), Image.Resampling.NEAREST), (x * cell, y * cell))
    sheet.save(path)


def main() -> None:
    (config,) = parse(None, TextToImageDemo, prog="demo_t2i.py", description=__doc__ or "")
    folder = Path(config.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise reject("output_dir", str(folder), "an empty or new folder is needed; remove it or name another")
    started = time.monotonic()

    print("1/2  Distil it with DMD2, from captions alone, to one step and to four steps (side by side).")
    jobs = {}
    for count in (1, 4):
        run = folder / f"dmd2-{count}step"
        arguments = ["train/dmd2.py", "--config", RECIPE, "--pretrained_model_name_or_path", TEACHER]
        arguments += ["--num_inference_steps", str(count), "--max_train_steps", str(config.max_train_steps), "--output_dir", str(run)]
        jobs[f"{count}-step student"] = (Job(arguments, folder / "logs" / f"dmd2-{count}step.log"), run)
    follow(jobs, config.max_train_steps)

    print("\n2/2  Judge teacher and students: distance, CLIP score, and whether object, colour and background are what the caption says.")
    students = [str(run / "student") for _, run in jobs.values()]
    counts = config.teacher_num_inference_steps
    table = ["eval/emoji_table.py", TEACHER, *students, "--output_dir", str(folder)]
    foreground([*table, "--teacher_num_inference_steps", *map(str, counts)])
    pictures = folder / "images"
    drawn = [pictures / Path(TEACHER).name / "train" / f"steps-{count}_seed-0" for count in counts]
    drawn += [pictures / f"dmd2-{count}step" / "train" / "steps-own_seed-0" for count in (1, 4)]
    overview(drawn, folder / "overview.png")

    (folder / "commands.txt").write_text("\n".join(COMMANDS) + "\n")
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"Look at  {folder}/table.md, {folder}/overview.png (rows: teacher at {counts} steps, then the students)")
    print(f"Load     what {students[0]}/README.md says, in plain diffusers")


if __name__ == "__main__":
    run_cli(main)
