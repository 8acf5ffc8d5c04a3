"""Train, export and evaluate DMD2 students on the digits test-bed, and write one row a run: the tables of docs/results.md.

    python benchmarks/digits_results.py --table tuning --training_seeds 0 --noise_seeds 0 1
    python benchmarks/digits_results.py --table final

Runs that are there already are not repeated. Seconds are CPU seconds of the whole training process on one thread.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]
RECIPE = ["--config", "train/recipes/digits_dmd2.yaml"]
GAN = ["--config", "train/recipes/digits_dmd2_gan.yaml"]
STEPS = "--num_inference_steps"
FINAL = {
    "1 step, image-free": [*RECIPE, STEPS, "1"],
    "2 steps, image-free": [*RECIPE, STEPS, "2"],
    "4 steps, image-free": [*RECIPE, STEPS, "4"],
    "1 step, GAN on real images": [*GAN, STEPS, "1"],
}
SHORT = [*FINAL["1 step, image-free"], "--max_train_steps", "1000"]
GAN_SHORT = [*FINAL["1 step, GAN on real images"], "--max_train_steps", "1000"]


def rates(student: str, fake_score: str) -> list[str]:
    return ["--learning_rate", student, "--fake_score_learning_rate", fake_score]


TUNING = {
    "recipe": SHORT,
    "learning rates 5e-5, 2e-4": [*SHORT, *rates("5e-5", "2e-4")],
    "learning rates 5e-5, 2e-4; beta1 0.9": [*SHORT, *rates("5e-5", "2e-4"), "--adam_beta1", "0.9"],
    "learning rates 5e-5, 4e-4; beta1 0.9": [*SHORT, *rates("5e-5", "4e-4"), "--adam_beta1", "0.9"],
    "learning rates 1e-4, 1e-4 (equal: the paper)": [*SHORT, *rates("1e-4", "1e-4")],
    "student at every 5th step (the paper), 1,700 steps": [*SHORT, "--student_update_interval", "5", "--max_train_steps", "1700"],
    "beta2 0.999 (the paper)": [*SHORT, "--adam_beta2", "0.999"],
    "constant learning rate (the paper)": [*SHORT, "--lr_scheduler", "constant_with_warmup"],
    "no EMA (the paper)": [*SHORT, "--ema_decay", "0"],
    "levels 0.02 to 0.8": [*SHORT, "--max_level", "0.8"],
    "levels 0.2 to 0.98": [*SHORT, "--min_level", "0.2"],
    "GAN recipe": GAN_SHORT,
    "GAN, heads on the fake score (the paper)": [*GAN_SHORT, "--discriminator", "fake_score", "--max_gan_level", "1.0"],
    "2 steps, recipe": [*RECIPE, STEPS, "2"],
    "2 steps, last step 0.8": [*RECIPE, STEPS, "2", "--last_step_share", "0.8"],
    "2 steps, last step 1.0": [*RECIPE, STEPS, "2", "--last_step_share", "1.0"],
    "2 steps, all steps equally (the paper)": [*RECIPE, STEPS, "2", "--last_step_share", "0.5"],
}
TABLES = {"final": FINAL, "tuning": TUNING}


@dataclass
class Results:
    table: str = "final"
    """Which rows: final or tuning."""
    teacher: str = "outputs/teacher-flow"
    """Folder that train/digits_teacher.py wrote."""
    only: tuple[str, ...] = ()
    """Rows whose name contains one of these. Empty: all."""
    training_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the training runs."""
    noise_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Noise seeds of the evaluation, 5,000 samples each."""
    workers: int = 2
    """Runs at a time, one thread each."""
    runs: str = "outputs/results"
    """Folder of the runs."""
    output: str = "benchmarks/results/digits_dmd2.jsonl"
    """Rows are appended here."""


def command(script: str, *flags: str) -> float:
    """Run a script of the project on one thread; CPU seconds it took."""
    tail: list[str] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, script, *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: tail.append(process.stderr.read()[-2000:].decode(errors="replace")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    reader.join()
    if status:
        raise RuntimeError(f"{script} {' '.join(flags)} failed: {tail[0]}")
    return usage.ru_utime + usage.ru_stime


def one_run(config: Results, name: str, flags: list[str], seed: int) -> dict[str, Any]:
    """Train (unless done) and evaluate one run; its row."""
    folder = ROOT / config.runs / f"{Path(config.teacher).name}-{''.join(c if c.isalnum() else '_' for c in name)}-seed{seed}"
    record = folder / "cpu_seconds.json"
    where = ["--pretrained_model_name_or_path", config.teacher, "--trust_remote_code", "--output_dir", str(folder), "--seed", str(seed)]
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a run that was cut off: its CPU time would be incomplete
        cpu_seconds = command("train/dmd2.py", *flags, *where)
        record.write_text(json.dumps(cpu_seconds))
    noise = ["--noise_seeds", *map(str, config.noise_seeds)]
    command("eval/evaluate.py", str(folder / "student"), "--trust_remote_code", "--overwrite", *noise)
    result = json.loads((folder / "student" / "evaluation.json").read_text())["results"][0]
    metrics = {metric: (value["mean"], value["std"]) for metric, value in result["metrics"].items()}
    run = json.loads((folder / "run.json").read_text())
    row = {"table": config.table, "name": name, "teacher": Path(config.teacher).name, "seed": seed, "flags": flags}
    return row | {
        "cpu_seconds": json.loads(record.read_text()),
        "noise_seeds": list(config.noise_seeds),
        "commit": run["commit"],
        "metrics": metrics,
    }


def main(config: Results) -> None:
    rows = [(n, f) for n, f in TABLES[config.table].items() if not config.only or any(part in n for part in config.only)]
    output = ROOT / config.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(config.workers) as pool:
        jobs = [pool.submit(one_run, config, name, flags, seed) for seed in config.training_seeds for name, flags in rows]
        for job in jobs:
            row = job.result()
            with output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            distance, accuracy = row["metrics"]["frechet_distance"], row["metrics"]["accuracy"]
            print(f"{row['name']:45} seed {row['seed']}  {distance[0]:.3f} ± {distance[1]:.3f}  accuracy {accuracy[0]:.3f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Results, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
