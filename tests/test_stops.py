"""Signals and numbers that are none: what a run saves before it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_trainer import ENVIRONMENT, assert_equal, final_weights, in_a_process, trainer

from diffusion_distill import NonFiniteError
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
