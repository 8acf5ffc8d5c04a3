"""Train, export and evaluate students on the digits test-bed, and write one row a run: the tables of docs/results.md.

    python benchmarks/digits_results.py --table final --teacher outputs/teacher-flow
    python benchmarks/digits_results.py --table tuning --training_seeds 0 --noise_seeds 0 1
    python benchmarks/digits_results.py --print                       # the table of all rows there are

A row is a chain of the project's own commands; the last one writes `{run}/student`. Runs that are there already are not repeated.
Seconds are CPU seconds of each whole command on one thread.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]
REFERENCE = {"teacher-flow": 0.511, "teacher-v_prediction": 0.519, "teacher-epsilon": 0.737}  # docs/results.md, Teachers


@dataclass(frozen=True)
class Row:
    """Commands of one run; `{teacher}`, `{seed}`, `{run}` and `{shared}` (one folder a teacher) stand for the places."""

    commands: tuple[str, ...]
    steps: tuple[int, ...] = ()  # numbers of steps to evaluate; empty: the student's own

    def with_flags(self, flags: str) -> "Row":
        """The same with more flags on the last command."""
        return replace(self, commands=(*self.commands[:-1], f"{self.commands[-1]} {flags}"))


def train(script: str, recipe: str, flags: str = "", *, teacher: str = "{teacher}", folder: str = "{run}") -> str:
    """The command that trains `recipe`."""
    where = f"--pretrained_model_name_or_path {teacher} --trust_remote_code --output_dir {folder} --seed {{seed}}"
    return f"train/{script}.py --config train/recipes/{recipe}.yaml {where} {flags}"


def dmd2(flags: str, recipe: str = "digits_dmd2") -> Row:
    return Row((train("dmd2", recipe, flags),))


def phased(steps: str, flags: str = "") -> Row:
    return Row((train("phased_dmd", "digits_phased_dmd", f"--steps_per_phase {steps} {flags}"),))


def pairs(folder: str, flags: str, teacher: str = "{teacher}") -> str:
    """The command that draws the pairs of `teacher`; in {shared}, once for all runs."""
    source = f"--pretrained_model_name_or_path {teacher} --trust_remote_code --dataset digits"
    return f"train/make_pairs.py {source} {flags} --batch_size 250 --output_dir {folder}"


def reflow(folder: str, drawn: str, flags: str = "", teacher: str = "{teacher}") -> str:
    return train("reflow", "digits_reflow", f"--pairs_dir {drawn} {flags}", teacher=teacher, folder=folder)


def distilled(teacher: str, drawn: str, flags: str = "") -> str:
    return train("reflow_distillation", "digits_reflow_distillation", f"--pairs_dir {drawn} {flags}", teacher=teacher)


DRAWN = "{shared}/pairs-16-steps"
DRAW = pairs(DRAWN, "--num_pairs 10000 --num_inference_steps 16")
REFLOW = Row((DRAW, reflow("{run}/reflow", DRAWN), distilled("{run}/reflow/student", DRAWN)), (1, 2, 4))
REFLOW_TWICE = Row(
    (
        DRAW,
        reflow("{run}/reflow", DRAWN),
        pairs("{run}/pairs", "--num_pairs 10000 --num_inference_steps 16", "{run}/reflow/student"),
        reflow("{run}/reflow-2", "{run}/pairs", teacher="{run}/reflow/student"),
        distilled("{run}/reflow-2/student", "{run}/pairs"),
    ),
    (1, 2, 4),
)
SMALLER = '--student_config {{"block_out_channels":[16,32]}} --annealing cosine --annealing_steps 600 --learning_rate 2e-3'
SLIMFLOW = Row(
    (DRAW, reflow("{run}/reflow", DRAWN, SMALLER), distilled("{run}/reflow/student", DRAWN, "--two_step_weight 0.5")),
    (1, 2, 4),
)
FINAL = {
    "DMD2, 1 step, image-free": dmd2("--num_inference_steps 1"),
    "DMD2, 2 steps, image-free": dmd2("--num_inference_steps 2"),
    "DMD2, 4 steps, image-free": dmd2("--num_inference_steps 4"),
    "DMD2, 1 step, GAN on real images": dmd2("--num_inference_steps 1", "digits_dmd2_gan"),
    "DMD2, 2 steps, GAN on real images": dmd2("--num_inference_steps 2", "digits_dmd2_gan"),
    "DMD2, 4 steps, GAN on real images": dmd2("--num_inference_steps 4", "digits_dmd2_gan"),
    "DMD, 1 step": Row(
        (
            pairs("{shared}/pairs-25-steps", "--num_pairs 5000 --num_inference_steps 25"),
            train("dmd", "digits_dmd", "--pairs_dir {shared}/pairs-25-steps"),
        )
    ),
    "phased DMD, 2 steps": phased("1 1"),
    "phased DMD, 4 steps": phased("2 2"),
    "VSD, 1 step": Row((train("vsd", "digits_vsd"),)),
    "adversarial self-distillation": Row((train("adversarial_self_distillation", "digits_adversarial_self_distillation"),), (1, 2, 4)),
    "LCM": Row((train("lcm", "digits_lcm"),), (1, 2, 4)),
    "LCM-LoRA": Row((train("lcm", "digits_lcm", "--lora_rank 32 --lora_alpha 32"),), (1, 2, 4)),
    "TCD": Row((train("tcd", "digits_tcd"),), (1, 2, 4)),
    "PCM, 1 phase": Row((train("pcm", "digits_pcm", "--phases 1"),)),
    "PCM, 2 phases": Row((train("pcm", "digits_pcm", "--phases 2"),)),
    "PCM, 4 phases": Row((train("pcm", "digits_pcm", "--phases 4"),)),
    "sCM": Row((train("scm", "digits_scm"),), (1, 2, 4)),
    "consistency training (ECT)": Row((train("consistency", "digits_consistency"),), (1, 2, 4)),
    "reflow, then distilled": REFLOW,
    "reflow twice, then distilled": REFLOW_TWICE,
    "SlimFlow, 45 % of the weights": SLIMFLOW,
}
COSINE = "--lr_scheduler cosine"  # what the recipe had when these were run
SHORT = dmd2(f"--num_inference_steps 1 --max_train_steps 1000 {COSINE}")
GAN_SHORT = dmd2(f"--num_inference_steps 1 --max_train_steps 1000 {COSINE}", "digits_dmd2_gan")
TWO_STEPS = dmd2(f"--num_inference_steps 2 --max_train_steps 1600 {COSINE}")


def rates(student: str, fake_score: str) -> str:
    return f"--learning_rate {student} --fake_score_learning_rate {fake_score}"


TUNING = {
    "cosine": SHORT,
    "learning rates 5e-5, 2e-4": SHORT.with_flags(rates("5e-5", "2e-4")),
    "learning rates 5e-5, 2e-4; beta1 0.9": SHORT.with_flags(rates("5e-5", "2e-4") + " --adam_beta1 0.9"),
    "learning rates 5e-5, 4e-4; beta1 0.9": SHORT.with_flags(rates("5e-5", "4e-4") + " --adam_beta1 0.9"),
    "learning rates 1e-4, 1e-4 (equal: the paper)": SHORT.with_flags(rates("1e-4", "1e-4")),
    "student at every 5th step (the paper), 1,700 steps": SHORT.with_flags("--student_update_interval 5 --max_train_steps 1700"),
    "beta2 0.999 (the paper)": SHORT.with_flags("--adam_beta2 0.999"),
    "constant learning rate (the paper)": SHORT.with_flags("--lr_scheduler constant_with_warmup"),
    "no EMA (the paper)": SHORT.with_flags("--ema_decay 0"),
    "levels 0.02 to 0.8": SHORT.with_flags("--max_level 0.8"),
    "levels 0.2 to 0.98": SHORT.with_flags("--min_level 0.2"),
    "GAN, cosine": GAN_SHORT,
    "GAN, heads on the fake score (the paper)": GAN_SHORT.with_flags("--discriminator fake_score --max_gan_level 1.0"),
    "2 steps, cosine": TWO_STEPS,
    "2 steps, last step 0.8": TWO_STEPS.with_flags("--last_step_share 0.8"),
    "2 steps, last step 1.0": TWO_STEPS.with_flags("--last_step_share 1.0"),
    "2 steps, all steps equally (the paper)": TWO_STEPS.with_flags("--last_step_share 0.5"),
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
    output: str = "benchmarks/results/digits.jsonl"
    """Rows are appended here."""
    print: bool = False
    """Train nothing; print the rows of `output` as a table."""


def command(line: list[str]) -> float:
    """Run a script of the project on one thread; CPU seconds it took."""
    tail: list[str] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *line], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: tail.append(process.stderr.read()[-2000:].decode(errors="replace")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    reader.join()
    if status:
        raise RuntimeError(f"{' '.join(line)} failed: {tail[0]}")
    return usage.ru_utime + usage.ru_stime


def one_run(config: Results, name: str, row: Row, seed: int) -> list[dict[str, Any]]:
    """Train (unless done) and evaluate one run; a record for each number of steps."""
    teacher = Path(config.teacher)
    runs = ROOT / config.runs
    folder = runs / f"{teacher.name}-{''.join(c if c.isalnum() else '_' for c in name)}-seed{seed}"
    places = {"teacher": str(teacher), "seed": seed, "run": str(folder), "shared": str(runs / f"{teacher.name}-shared")}
    record = folder / "cpu_seconds.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a run that was cut off: its CPU time would be incomplete
        seconds = [command(line.format(**places).split()) for line in row.commands]
        record.write_text(json.dumps(seconds))
    steps = ["--num_inference_steps", *map(str, row.steps)] if row.steps else []
    noise = ["--noise_seeds", *map(str, config.noise_seeds)]
    command(["eval/evaluate.py", str(folder / "student"), "--trust_remote_code", "--overwrite", *noise, *steps])
    results = json.loads((folder / "student" / "evaluation.json").read_text())["results"]
    run = json.loads((folder / "run.json").read_text())
    common = {"table": config.table, "name": name, "teacher": teacher.name, "seed": seed, "commands": list(row.commands)}
    common |= {"cpu_seconds": json.loads(record.read_text()), "noise_seeds": list(config.noise_seeds), "commit": run["commit"]}
    return [common | {"steps": result["num_inference_steps"], "metrics": _metrics(result)} for result in results]


def _metrics(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {metric: (value["mean"], value["std"]) for metric, value in result["metrics"].items()}


def as_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each student and number of steps, means over the training seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["teacher"], row["name"], row.get("steps") or round(row["metrics"]["network_evaluations_per_image"][0]))
        groups.setdefault(key, []).append(row)
    lines = [
        "| teacher | student | steps | distance (each training seed) | ratio | accuracy | precision | recall | spread | copy rate | CPU s |"
    ]
    lines.append("|" + "---|" * 11)
    for (teacher, name, steps), group in sorted(groups.items(), key=lambda item: _place(*item[0])):
        group.sort(key=lambda row: row["seed"])
        mean = {m: statistics.mean(row["metrics"][m][0] for row in group) for m in group[0]["metrics"]}
        distance = mean["frechet_distance"]
        each = ", ".join("{:.3f} ± {:.3f}".format(*row["metrics"]["frechet_distance"]) for row in group)
        values = [f"**{distance:.3f}** ({each})", f"**{distance / REFERENCE[teacher]:.2f}**"]
        values += [f"{mean[m]:.3f}" for m in ("accuracy", "precision", "recall")]
        values += [f"{mean['within_class_spread']:.2f}", f"{100 * mean['copy_rate']:.2f} %"]
        values.append(", ".join("+".join(f"{s:.0f}" for s in row["cpu_seconds"]) for row in group))
        lines.append(f"| {teacher.removeprefix('teacher-')} | {name} | {steps} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _place(teacher: str, name: str, steps: int) -> tuple[int, int, str, int]:
    """Where a student stands in a table: in the order of FINAL, other settings (", ...") behind the recipe's."""
    order = [i for i, known in enumerate(FINAL) if name == known or name.startswith(known + ",")]
    return list(REFERENCE).index(teacher), order[-1] if order else len(FINAL), name, steps


def main(config: Results) -> None:
    output = ROOT / config.output
    if config.print:
        print(as_table([json.loads(line) for line in output.read_text().splitlines()]))
        return
    rows = [(n, r) for n, r in TABLES[config.table].items() if not config.only or any(part in n for part in config.only)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(config.workers) as pool:
        jobs = [pool.submit(one_run, config, name, row, seed) for seed in config.training_seeds for name, row in rows]
        for job in jobs:
            for record in job.result():
                with output.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            print(as_table(job.result()).splitlines()[2], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Results, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
