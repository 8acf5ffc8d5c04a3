"""The whole toolkit in minutes: teach a small network to draw digits, distil it to one and to four steps, compare.

    python train/demo.py --output_dir outputs/demo

Every part is a command of its own, printed before it runs; outputs/demo/report.md repeats them.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from diffusion_distill.config import parse, run_cli
from diffusion_distill.errors import InputError, reject

RECIPE = "train/recipes/digits_dmd2.yaml"


@dataclass
class Demo:
    output_dir: str = "outputs/demo"
    """Folder of the demo; report.md is its result."""
    max_train_steps: int = 1000
    """Optimizer steps of each student; the recipe itself takes 1,200."""
    teacher_steps: int = 1600
    """Optimizer steps of the teacher."""
    samples: int = 5000
    """Images for each noise seed of the evaluation."""
    noise_seeds: tuple[int, ...] = (0, 1)
    """Noise seeds of the evaluation."""


COMMANDS: list[str] = []


def show(arguments: list[str]) -> None:
    """Print a command before it runs, and remember it for the report."""
    COMMANDS.append(shlex.join(["python", *arguments]))
    print("\n$ " + COMMANDS[-1], flush=True)


class Job:
    """A command that runs in the background on one thread, with what it prints in a log file."""

    def __init__(self, arguments: list[str], log: Path):
        show(arguments)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(ROOT)}
        with log.open("wb") as file:
            self.process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file)

    def check(self) -> bool:
        """Whether it has finished. InputError with the last line of its log when it failed."""
        code = self.process.poll()
        if code:
            lines = self.log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
            raise InputError(f"{shlex.join(map(str, self.process.args))}: {lines[-1]} (log: {self.log})")  # type: ignore[arg-type]
        return code is not None


def foreground(arguments: list[str]) -> None:
    """Run a command with its own progress bars."""
    show(arguments)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise InputError(f"{arguments[0]} ended with exit code {done.returncode}")


def follow(jobs: dict[str, tuple[Job, Path]], steps: int) -> None:
    """Progress bars of training runs in the background, read from their metrics.jsonl."""
    bars = {name: tqdm(total=steps, desc=name, position=i) for i, name in enumerate(jobs)}
    running = dict(jobs)
    try:
        while running:
            time.sleep(0.5)
            for name, (job, folder) in list(running.items()):
                last = _last_line(folder / "metrics.jsonl")
                if last:
                    bars[name].update(last["step"] - bars[name].n)
                    bars[name].set_postfix({"fake-score gap": f"{last.get('student/gap', float('nan')):.3f}"})
                if job.check():
                    del running[name]
    finally:
        for job, _ in jobs.values():
            if job.process.poll() is None:
                job.process.terminate()
        for bar in bars.values():
            bar.close()


def _last_line(path: Path) -> dict[str, Any] | None:
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return json.loads(lines[-1]) if lines else None  # type: ignore[no-any-return]
    except json.JSONDecodeError:  # the line is being written
        return None


def main() -> None:
    (config,) = parse(None, Demo, prog="demo.py", description=__doc__ or "")
    folder = Path(config.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise reject("output_dir", str(folder), "an empty or new folder is needed; remove it or name another")
    started = time.monotonic()
    steps, teacher = config.max_train_steps, folder / "teacher"

    print("1/3  Train the teacher: flow matching on scikit-learn's digits.")
    foreground(["train/digits_teacher.py", "--output_dir", str(teacher), "--max_train_steps", str(config.teacher_steps)])

    print("\n2/3  Distil it with DMD2, image-free, to one step and to four steps (side by side).")
    jobs = {}
    for count in (1, 4):
        run = folder / f"dmd2-{count}step"
        arguments = ["train/dmd2.py", "--config", RECIPE, "--pretrained_model_name_or_path", str(teacher), "--trust_remote_code"]
        arguments += ["--num_inference_steps", str(count), "--max_train_steps", str(steps), "--output_dir", str(run)]
        jobs[f"{count}-step student"] = (Job(arguments, folder / "logs" / f"dmd2-{count}step.log"), run)
    follow(jobs, steps)
    students = [run / "student" for _, run in jobs.values()]
    for student in students:
        proof = json.loads((student / "verification.json").read_text())
        print(f"{student}: plain diffusers visits {proof['timesteps']}, largest image difference {proof['max_difference']:.1e}")

    print("\n3/3  Evaluate teacher and students on the same noise.")
    compare = ["eval/compare.py", str(teacher), *map(str, students), "--output_dir", str(folder)]
    compare += ["--teacher_num_inference_steps", "1", "4", "8", "--samples", str(config.samples), "--trust_remote_code"]
    foreground([*compare, "--noise_seeds", *map(str, config.noise_seeds)])

    with (folder / "report.md").open("a") as report:
        report.write("\n## The whole demo, command by command\n\n```\n" + "\n".join(COMMANDS) + "\n```\n")

    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"Look at  {folder}/report.html (or report.md), {folder}/dmd2-1step/samples/")
    print(f"Load     what {students[0]}/README.md says, in plain diffusers")
    print("Next     add the GAN term, then take a pipeline of your own:")
    print("         python train/dmd2.py --config train/recipes/digits_dmd2_gan.yaml --num_inference_steps 1 --trust_remote_code \\")
    print(f"             --pretrained_model_name_or_path {teacher} --output_dir outputs/dmd2-gan")


if __name__ == "__main__":
    run_cli(main)
