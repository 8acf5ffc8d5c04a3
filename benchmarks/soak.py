"""Kills training with SIGKILL at random moments, again and again, and looks at what is left; and what frequent checkpoints cost.

    make soak                     # about five CPU minutes; writes benchmarks/results/soak_cpu.json
    make soak SOAK_KILLS=5000     # longer

`training`: the real trainer on tiny networks, a checkpoint every step, killed in a forked child. After each kill the newest visible
checkpoint must be sound and no older than the last one seen, the next child must go on from it, and the finished run must be
identical to one that was never interrupted, file by file. `saving`: the same with nothing but saves, so that nearly every kill
falls into one. `cost`: steps of the digits recipe (DMD2, four steps, 368k parameters a network) with and without a checkpoint begun
before them, in turn.
"""

import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from tqdm.auto import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from diffusion_distill import DMD2, LCM, VSD, DataConfig, TrainConfig, Trainer, build_dataset
from diffusion_distill.checkpoint import MANIFEST, SAVING, checkpoints_in, latest_checkpoint, load_checkpoint, save_checkpoint
from diffusion_distill.config import from_mapping, parse, read_yaml, run_cli
from diffusion_distill.methods import Method
from diffusion_distill.provenance import provenance, write_json
from pipelines.class_conditional import ClassConditionalPipeline
from train.digits_teacher import digits_pipeline

ROOT = Path(__file__).parents[1]
RUNS: tuple[tuple[str, Method, dict[str, Any]], ...] = (
    ("DMD2, moving average", DMD2(1, guidance_scale=1.0, gan_weight=0.0, student_update_interval=2), {"ema_decay": 0.9}),
    (
        "LCM, target, accumulation",
        LCM((2, 1), guidance="fixed", target_decay=0.8),
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    ("DMD2, LoRA", DMD2(2, guidance_scale=1.0, gan_weight=0.0), {"lora_rank": 2, "ema_decay": 0.9}),
    ("VSD, adapter on the teacher", VSD(guidance_scale=2.0, fake_score_rank=2, fake_score_alpha=4), {}),
)


@dataclass
class Soak:
    output: str = "benchmarks/results/soak_cpu.json"
    """JSON file of the results."""
    kills: int = 200
    """Kills of training runs, and as many of processes that only save."""
    steps: int = 16
    """Optimizer steps of a training run; when one is finished, the next begins."""
    repeats: int = 30
    """Measured steps of the demo with a checkpoint, and as many without. 0: none."""
    seed: int = 0
    """Of the moments of the kills."""
    folder: str | None = None
    """Where the runs stand. None: in memory where there is a file system for it, for a kill leaves the same there."""


@dataclass
class Child:
    """A forked process; what it prints goes to a file."""

    process: int
    started: float
    log: Path

    @classmethod
    def start(cls, work: Callable[[], object], log: Path) -> "Child":
        process = os.fork()
        if not process:
            _work_and_exit(work, log)
        return cls(process, time.monotonic(), log)

    def wait(self) -> float:
        """Wall seconds of a run to its end, which must be a good one."""
        _, status = os.waitpid(self.process, 0)
        self._check(status)
        return time.monotonic() - self.started

    def killed_after(self, seconds: float) -> bool:
        """Kill -9 after so long; whether it was still running. One that has ended by itself must have ended well."""
        deadline = self.started + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                self._check(status)
                return False
            time.sleep(min(0.02, max(0.0, deadline - time.monotonic())))
        os.kill(self.process, signal.SIGKILL)
        _, status = os.waitpid(self.process, 0)
        if os.WIFSIGNALED(status):
            return True
        self._check(status)
        return False

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"a run did not go on: {self.log.read_text(errors='replace')[-2000:]}")


def _work_and_exit(work: Callable[[], object], log: Path) -> None:
    tqdm.set_lock(threading.RLock())  # its own is shared between processes: a killed one would keep it for ever
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def tiny_pipeline() -> ClassConditionalPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=11,
    )
    return ClassConditionalPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=1.0))


def train(folder: Path, run: int, settings: Soak, **changes: Any) -> None:
    """One run of the table, from its newest checkpoint where it has begun."""
    _, method, own = RUNS[run % len(RUNS)]
    begun = (folder / "run.json").exists()
    options: dict[str, Any] = {"train_batch_size": 4, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "num_validation_images": 1}
    options |= {"max_train_steps": settings.steps, "learning_rate": 1e-3, "logging_steps": 1, "seed": run} | own | changes
    options |= {"output_dir": str(folder), "resume_from_checkpoint": "latest" if begun else None}
    data = build_dataset(DataConfig(dataset="digits"), needs_images=method.needs_images, channels=1, resolution=8)
    Trainer(tiny_pipeline(), replace(method), TrainConfig(**options), data).train()


def newest_step(folder: Path) -> int:
    """Step of the newest visible checkpoint, which must be sound; 0 where there is none yet."""
    if not checkpoints_in(folder):
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # latest_checkpoint warns of a damaged one before it takes an older
        newest = latest_checkpoint(folder)
    assert newest is not None
    return int(load_checkpoint(newest)[1]["step"])


def training_kills(root: Path, settings: Soak) -> dict[str, Any]:
    """SIGKILL at random moments of training runs, `settings.kills` times; every run is finished and compared in the end."""
    generator, kills, inside, finished = random.Random(settings.seed), 0, 0, []
    while kills < settings.kills:
        run = len(finished)
        whole, parts = root / f"whole-{run}", root / f"parts-{run}"
        usual = Child.start(lambda: train(whole, run, settings, checkpointing_steps=0), root / "log").wait()  # noqa: B023
        own, step, running = 0, 0, True
        while running:
            child = Child.start(lambda: train(parts, run, settings), root / "log")  # noqa: B023
            if kills < settings.kills:
                running = child.killed_after(generator.uniform(0, usual / 2))
                kills, own = kills + running, own + running
            else:
                child.wait()
                running = False
            inside += any(parts.glob(SAVING + "*"))
            now = newest_step(parts)
            assert now >= step, f"{parts}: the newest checkpoint was of step {step}, now {now}"
            step = now
        hashes = [json.loads((path / f"checkpoint-{settings.steps}" / MANIFEST).read_text()) for path in (whole, parts)]
        different = [name for name in hashes[0] if name.endswith(".safetensors") and hashes[0][name] != hashes[1].get(name)]
        lines = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
        assert not different and lines == sorted(set(lines)), (parts, different, lines)
        finished.append({"run": RUNS[run % len(RUNS)][0], "kills": own, "identical_files": len(hashes[0]) - 1})
        print(f"{kills} kills: {finished[-1]}", flush=True)
        shutil.rmtree(whole)
        shutil.rmtree(parts)
    return {"kills": kills, "resumed": kills, "inside_a_save": inside, "runs": finished}


def saving_kills(root: Path, settings: Soak) -> dict[str, Any]:
    """SIGKILL of processes that save back to back, each step twice."""
    generator, inside = random.Random(settings.seed + 1), 0

    def save(folder: Path, step: int) -> None:
        tensors = {role: {"w": torch.full((4000,), float(step))} for role in ("student", "student.optimizer", "student.ema")}
        save_checkpoint(folder, step, tensors, {"step": step}, keep=2)

    def save_on(folder: Path, first: int) -> None:
        for step in range(first, first + 10**6):
            save(folder, step)
            save(folder, step)

    folder, step = root / "saves", 1
    save(folder, step)
    for _ in range(settings.kills):
        child = Child.start(lambda: save_on(folder, step), root / "log")  # noqa: B023
        if not child.killed_after(generator.uniform(0, 0.2)):
            raise RuntimeError("a process that saves without end has ended")
        inside += any(path.name.startswith(".") for path in folder.iterdir())
        now = newest_step(folder)
        loaded, _ = load_checkpoint(folder / f"checkpoint-{now}") if (folder / f"checkpoint-{now}").exists() else ({}, {})
        assert now >= step and all(t["w"].eq(now).all() for t in loaded.values()), (step, now)
        step = now
    return {"kills": settings.kills, "sound": settings.kills, "inside_a_save": inside}


def demo_trainer(folder: Path) -> Trainer:
    values = read_yaml(ROOT / "train/recipes/digits_dmd2.yaml") | {"output_dir": str(folder), "num_inference_steps": 4}
    method, data, config = from_mapping((DMD2, DataConfig, TrainConfig), values, "recipe")
    dataset = build_dataset(data, needs_images=False, channels=1, resolution=8)
    return Trainer(digits_pipeline("flow"), method, config, dataset)


def clocks() -> tuple[float, ...]:
    """Wall, CPU of this thread, CPU of the process, all in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), time.thread_time(), usage.ru_utime + usage.ru_stime


def save_cost(folder: Path, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds of a step alone, and of one beside which a checkpoint is written."""
    run = demo_trainer(folder)
    steps = map(run._prepare, run._data())
    rows: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
    for i in range(2 * repeats + 2):
        before = clocks()
        if i % 2:
            run.checkpoints.start_save(run.step)
        run.train_step(next(steps))
        stepped = clocks()
        if i % 2:
            run.checkpoints._writer.wait()
        written = clocks()
        rows[bool(i % 2)].append((stepped[0] - before[0], stepped[1] - before[1], written[2] - before[2]))
    names = ("wall_of_the_step", "cpu_of_the_stepping_thread", "cpu_of_the_process")
    medians = {save: [1000 * statistics.median(column) for column in zip(*found[1:])] for save, found in rows.items()}
    result: dict[str, Any] = {"repeats": repeats, "checkpoint_bytes": sum(f.stat().st_size for f in folder.glob("checkpoint-*/*"))}
    for i, name in enumerate(names):
        alone, beside = medians[False][i], medians[True][i]
        result[name] = {"alone_ms": alone, "with_save_ms": beside, "share_every_25_steps": (beside - alone) / (25 * alone)}
    return result


def main() -> None:
    (settings,) = parse(None, Soak, prog="soak.py", description=__doc__ or "")
    torch.set_num_threads(1)  # several would not survive the fork
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    result: dict[str, Any] = {"seed": settings.seed, "steps": settings.steps, **provenance()}
    with tempfile.TemporaryDirectory(dir=settings.folder or memory) as name:
        result["saving"] = saving_kills(Path(name), settings)
        print(result["saving"], flush=True)
        result["training"] = training_kills(Path(name), settings)
    if settings.repeats:
        with tempfile.TemporaryDirectory(dir=settings.folder) as name:  # on a disk, where fsync costs something
            result["cost"] = save_cost(Path(name), settings.repeats)
            print(json.dumps(result["cost"], indent=1))
    write_json(Path(settings.output), result)
    print("written:", settings.output)


if __name__ == "__main__":
    run_cli(main)
