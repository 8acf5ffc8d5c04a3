"""What ends a run, what it has saved by then, and what may continue it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import end
from forked import start as start_child
from safetensors import safe_open
from test_checkpoint import largest_file
from test_trainer import ENVIRONMENT, IMAGE_FREE, assert_equal, config, final_weights, in_a_process, trainer
from tiny_pipelines import class_conditional
from torch.utils.data import Dataset

from diffusion_distill import InputError, NonFiniteError, Trainer
from diffusion_distill.checkpoint import latest_checkpoint, load_checkpoint
from diffusion_distill.config import run_cli
from diffusion_distill.data import ConditionDataset
from diffusion_distill.stops import Signals

LONG = {"max_train_steps": 40, "checkpointing_steps": 0}


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def start(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import test_trainer as t, torch; torch.set_num_threads(1); t.trainer(t.Path({str(folder)!r}), **{LONG}).train()",
        ],
        cwd=Path(__file__).parent,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while steps_done(folder) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_sigterm_saves_the_step_and_the_resumed_run_is_bit_exact(tmp_path: Path) -> None:
    process = start(tmp_path / "parts")
    os.kill(process.pid, signal.SIGTERM)
    seen = steps_done(tmp_path / "parts")
    assert process.wait(60) == 128 + signal.SIGTERM
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    saved = int(checkpoint.name.split("-")[1])
    assert seen <= saved < LONG["max_train_steps"]
    assert (
        process.stderr is not None
        and f"SIGTERM: step {saved} is saved; go on with --resume_from_checkpoint latest" in process.stderr.read()
    )
    for folder, changes in (("whole", {}), ("parts", {"resume_from_checkpoint": "latest"})):
        subprocess.run(
            [sys.executable, *in_a_process(tmp_path / folder, **LONG, **changes)], check=True, capture_output=True, env=ENVIRONMENT
        )
    assert_equal(final_weights(tmp_path / "whole", 40), final_weights(tmp_path / "parts", 40))


def test_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(120) == 0
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2 and (tmp_path / "checkpoint-40").is_dir()


def test_a_second_interrupt_does_not_wait() -> None:
    with Signals().caught() as signals:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.agreed(torch.device("cpu")) == (signal.SIGINT, False, False)


def test_handlers_come_back_and_other_threads_catch_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals().caught():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) is before
    entered = []

    def run() -> None:
        with Signals().caught() as signals:
            entered.append(signals.agreed(torch.device("cpu")))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert entered == [(0, False, False)]


@pytest.mark.parametrize("role", ["teacher", "student", "fake_score"])
def test_the_offending_batch_is_kept(tmp_path: Path, role: str) -> None:
    run = trainer(tmp_path, logging_steps=1)
    with torch.no_grad():
        next(getattr(run.nets, role).parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 0: .* is nan \(terms that are no number: student/"):
        run.train()
    with safe_open(tmp_path / "nonfinite-step-0-rank-0.safetensors", "pt") as kept:
        assert "0/cond.class_labels" in kept.keys() and kept.get_tensor("0/cond.class_labels").shape == (8,)  # noqa: SIM118
        assert kept.metadata()["student/loss"] == "nan"
    assert not list(tmp_path.glob("checkpoint-*"))


# ---------------------------------------------------------------------- checkpoints beside the steps

ONE_PICTURE = {"num_validation_images": 1, "train_batch_size": 2}


def test_a_checkpoint_holds_its_own_step_while_training_goes_on(tmp_path: Path) -> None:
    trainer(tmp_path / "run", max_train_steps=4, checkpointing_steps=1, **ONE_PICTURE).train()
    slow = trainer(tmp_path / "slow", max_train_steps=4, **ONE_PICTURE)
    data = slow._data()
    for step in range(1, 5):
        slow.train_step(slow._prepare(next(data)))
        slow.save()
        assert_equal(final_weights(tmp_path / "run", step), final_weights(tmp_path / "slow", step))


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_checkpoint_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, max_train_steps=6, checkpointing_steps=2, **ONE_PICTURE)
    run.save()
    with largest_file(5000), pytest.raises(SystemExit) as stop:
        run_cli(run.train)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 4 and line.startswith("error: step 2: ") and "checkpoint-2 was not written" in line
    assert line.endswith("the checkpoint before is as it was") and run.step == 3  # seen at the end of the step that followed
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-0" and load_checkpoint(tmp_path / "checkpoint-0")


@pytest.mark.parametrize("where", ["weight", "average", "optimizer"])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, where: str) -> None:
    run = trainer(tmp_path, max_train_steps=1, checkpointing_steps=0, **ONE_PICTURE)
    run.train()
    name, parameter = next(iter(run.nets.parameters("student").items()))
    with torch.no_grad():
        tensor = {"weight": parameter, "average": run.emas["student"].average[name]}.get(
            where, run.optimizers["student"].state[parameter]["exp_avg"]
        )
        tensor.view(-1)[1] = float("inf")
    run.step = 2
    with pytest.raises(
        NonFiniteError, match=rf"step 2: '(exp_avg/)?{name}' of 'student.*' is no longer finite; checkpoint-2 is not written"
    ):
        run.save()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


# ---------------------------------------------------------------------- what continues


def test_killed_in_an_accumulation_window_and_before_the_first_checkpoint(tmp_path: Path) -> None:
    """The child kills itself in the second of two micro-batches of step 0, then of step 3; what it had accumulated is done again."""
    changes = {"gradient_accumulation_steps": 2, "checkpointing_steps": 1, "max_train_steps": 5} | ONE_PICTURE

    def killed_at(step: int) -> None:
        begun = (tmp_path / "parts" / "run.json").exists()
        run = trainer(tmp_path / "parts", resume_from_checkpoint="latest" if begun else None, **changes)
        calls: list[int] = []

        def die(*call: object) -> None:
            calls.extend([1] * (run.step == step))
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        run.nets.fake_score.model.register_forward_hook(die)
        run.train()

    for step in (0, 3):
        log = tmp_path / f"log-{step}"
        assert end(start_child(lambda: killed_at(step), log), log) == -signal.SIGKILL  # noqa: B023
        assert (latest_checkpoint(tmp_path / "parts") is None) == (step == 0)
    last = trainer(tmp_path / "parts", resume_from_checkpoint="latest", **changes)
    assert last.step in (2, 3)  # the write of step 3 may have been cut
    last.train()
    trainer(tmp_path / "whole", **changes).train()
    assert_equal(final_weights(tmp_path / "whole", 5), final_weights(tmp_path / "parts", 5))


def test_a_line_of_metrics_that_was_cut_is_dropped(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_train_steps=2, logging_steps=1, **ONE_PICTURE)
    run.train()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "student/lo')
    trainer(tmp_path, max_train_steps=3, logging_steps=1, resume_from_checkpoint="latest", **ONE_PICTURE).train()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert not list(tmp_path.glob(".writing*"))


def test_other_data_does_not_continue_a_run(tmp_path: Path) -> None:
    def run(count: int, first: int = 0, **changes: object) -> Trainer:
        labels = [(first + i) % 10 for i in range(count)]
        return Trainer(
            class_conditional("flow"), IMAGE_FREE, config(tmp_path, max_train_steps=1, **ONE_PICTURE | changes), ConditionDataset(labels)
        )

    run(8).train()
    assert run(8, resume_from_checkpoint="latest").step == 1
    with pytest.raises(InputError, match=r"samples of the data set: stored 8, now 9; SHA-256 of the data set: stored '\w+', now '\w+'"):
        run(9, resume_from_checkpoint="latest")
    with pytest.raises(InputError, match="other settings \\(SHA-256 of the data set: stored"):
        run(8, first=1, resume_from_checkpoint="latest")


class OwnData(Dataset[Any]):
    """A data set of the caller's own class, whose images are augmented at random."""

    def __init__(self, labels: list[int]):
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"condition": self.labels[index], "image": torch.rand(1, 8, 8)}


def test_other_data_of_the_callers_own_class_does_not_continue_a_run(tmp_path: Path) -> None:
    def run(labels: list[int], **changes: object) -> Trainer:
        return Trainer(class_conditional("flow"), IMAGE_FREE, config(tmp_path, max_train_steps=1, **ONE_PICTURE | changes), OwnData(labels))

    run([0, 1, 2]).train()
    before = torch.get_rng_state()
    assert run([0, 1, 2], resume_from_checkpoint="latest").step == 1
    assert torch.equal(torch.get_rng_state(), before)  # looking at augmented images draws nothing from it
    with pytest.raises(InputError, match="other settings \\(SHA-256 of the data set: stored"):
        run([0, 2, 1], resume_from_checkpoint="latest")


def test_a_teacher_that_was_trained_anew_under_its_old_name_does_not_continue_a_run(tmp_path: Path) -> None:
    def run(shift: float, **changes: object) -> Trainer:
        pipe = class_conditional("flow")
        with torch.no_grad():
            next(pipe.unet.parameters()).add_(shift)
        return Trainer(pipe, IMAGE_FREE, config(tmp_path, max_train_steps=1, **ONE_PICTURE | changes), ConditionDataset([0, 1]))

    run(0.0, mixed_precision="bf16").train()
    assert run(0.0, mixed_precision="bf16", resume_from_checkpoint="latest").step == 1
    with pytest.raises(InputError, match="SHA-256 of the teacher's weights: stored"):
        run(0.1, mixed_precision="bf16", resume_from_checkpoint="latest")
