"""Several ranks: what one of them meets ends or saves all of them, and a resumed run is the same to the bit."""

import math
import os
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from test_trainer import IMAGE_FREE, METHODS, assert_equal, final_weights, trainer
from torch.distributed.tensor import DTensor

from diffusion_distill import DMD2, InputError, NonFiniteError, parallel
from diffusion_distill.checkpoint import load_checkpoint
from diffusion_distill.errors import CheckpointError, LostRankError
from diffusion_distill.methods import Update

SMALL: dict[str, Any] = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "num_validation_images": 1}
PARALLELISM = ("replicate", "shard")
ONE_OF_EACH = list({type(method): name for name, method in METHODS.items()}.values())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def log(folder: Path, rank: int) -> str:
    return (folder / f"rank-{rank}.log").read_text(errors="replace")


def local(value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def saw(kind: type[BaseException], act: Any) -> str:
    """The message with which `act` ends."""
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_method_resumes_bit_exactly_on_two_ranks(tmp_path: Path, name: str) -> None:
    """In the middle of an epoch, with accumulation and a moving average, every other method with LoRA."""
    own = SMALL | {"max_train_steps": 3, "checkpointing_steps": 0, "lora_rank": 2 * (ONE_OF_EACH.index(name) % 2)}
    own |= {"max_train_steps": METHODS[name].phase_steps * 2, "lora_rank": 0} if name == "phased" else {}

    def work(rank: int) -> None:
        trainer(tmp_path / "whole", METHODS[name], **own).train()
        first = trainer(tmp_path / "parts", METHODS[name], **own)
        data = first._data()
        for _ in range(2):
            first.train_step(first._prepare(next(data)))
        first.save()
        trainer(tmp_path / "parts", METHODS[name], resume_from_checkpoint="latest", **own).train()

    assert on_ranks(2, work, tmp_path) == [0, 0], log(tmp_path, 0)[-3000:] + log(tmp_path, 1)[-3000:]
    assert_equal(*(final_weights(tmp_path / kind, own["max_train_steps"]) for kind in ("whole", "parts")))
    with pytest.raises(InputError, match=r"number of processes: stored 2, now 1"):
        trainer(tmp_path / "parts", METHODS[name], resume_from_checkpoint="latest", **own)


@dataclass
class InfiniteLoss(DMD2):
    """A loss that is infinite on rank 1, with the gradient of a finite one."""

    def updates(self, step: int) -> Iterator[Update]:
        for roles, loss_fn in super().updates(step):
            yield roles, lambda nets, batch, loss_fn=loss_fn: self._spoiled(*loss_fn(nets, batch))

    @staticmethod
    def _spoiled(loss: torch.Tensor, logs: dict[str, torch.Tensor]) -> Any:
        return loss + (math.inf if parallel.rank() else 0.0), logs


@pytest.mark.parametrize("parallelism", PARALLELISM)
def test_what_is_no_number_on_one_rank_stops_all_before_the_step(tmp_path: Path, parallelism: str) -> None:
    spread = {"parallelism": parallelism}
    cases = [(role, on) for role in ("teacher", "student", "fake_score") for on in (0, 1)]

    def stopped(rank: int, role: str, on: int) -> None:
        folder = tmp_path / f"{role}-{on}"
        run = trainer(folder, replace(IMAGE_FREE, student_update_interval=1), max_train_steps=3, **SMALL, **spread)
        run.train_step(run._prepare(next(run._data())))
        run.save()
        if rank == on:
            with torch.no_grad():
                next(getattr(run.nets, role).parameters()).fill_(float("nan"))
        before = [local(p).clone() for role in run.trained for p in run.nets.parameters(role).values()]
        line = saw(NonFiniteError, run.train)
        # weights that are spread over ranks reach all of them
        where = f"rank {on}" if parallelism == "replicate" else "rank 0, 1"
        assert "step 1: the gradient of 'student' is nan" in line and f"student/loss on {where}" in line, line
        after = [local(p) for role in run.trained for p in run.nets.parameters(role).values()]
        assert all(a.equal(b) or (a.isnan() & b.isnan()).any() for a, b in zip(before, after, strict=True))
        kept = list(folder.glob(f"nonfinite-step-1-rank-{rank}.safetensors"))
        assert len(kept) == 1 and kept[0].name in line
        tensors, _ = load_checkpoint(folder / "checkpoint-1")
        assert all(value.isfinite().all() for group in tensors.values() for value in group.values())

    def work(rank: int) -> None:
        for role, on in cases:
            stopped(rank, role, on)
        spoiled = InfiniteLoss(2, guidance_scale=1.0, gan_weight=0.0)
        line = saw(NonFiniteError, trainer(tmp_path / "loss", spoiled, **SMALL, **spread).train)
        assert "step 0: the gradient of 'student' is finite, its loss is not (terms that are no number: student/loss on rank 1)" in line

    assert on_ranks(2, work, tmp_path) == [0, 0], log(tmp_path, 0)[-3000:] + log(tmp_path, 1)[-3000:]


@pytest.mark.parametrize("parallelism", PARALLELISM)
def test_a_signal_to_one_rank_saves_the_step_and_ends_both(tmp_path: Path, parallelism: str) -> None:
    def work(rank: int) -> None:
        run = trainer(tmp_path / "run", IMAGE_FREE, max_train_steps=9, checkpointing_steps=0, parallelism=parallelism, **SMALL)
        if rank == 1:
            step = run.train_step
            run.train_step = lambda batches: (os.kill(os.getpid(), signal.SIGTERM) if run.step == 2 else None, step(batches))[1]  # type: ignore[method-assign]
        run.train()

    assert on_ranks(2, work, tmp_path) == [128 + signal.SIGTERM] * 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]  # the step in which it came


def test_a_rank_that_is_stuck_is_named(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        run = trainer(tmp_path / "run", IMAGE_FREE, rank_timeout=8.0, **SMALL)
        if rank == 1:
            run.nets.student.model.register_forward_hook(lambda *call: time.sleep(60) if run.step == 1 else None)
            run.train()
        line = saw(LostRankError, run.train)
        assert line.startswith("rank 0: rank 1 did not come within 8 s to where the others wait"), line

    codes = on_ranks_until(0, work, tmp_path)
    assert codes[0] == 0, log(tmp_path, 0)[-3000:]


def on_ranks_until(first: int, act: Any, folder: Path) -> list[int]:
    """As `on_ranks`, for two; the other rank is killed when rank `first` has ended."""

    def with_a_watch(rank: int) -> None:
        (folder / f"process-{rank}").write_text(str(os.getpid()))
        try:
            act(rank)
        finally:
            if rank == first:
                os.kill(int((folder / f"process-{1 - rank}").read_text()), signal.SIGKILL)

    return on_ranks(2, with_a_watch, folder)


def test_rank_0_is_missed_by_the_others(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        parallel.meet(3.0)
        if rank == 0:
            time.sleep(60)
        line = saw(LostRankError, lambda: parallel.meet(3.0))
        assert line.startswith("rank 1: rank 0, or one that rank 0 waits for, did not come within 3 s"), line

    assert on_ranks_until(1, work, tmp_path)[1] == 0, log(tmp_path, 1)[-3000:]


@pytest.mark.parametrize("parallelism", PARALLELISM)
def test_a_checkpoint_that_rank_0_cannot_write_ends_all(tmp_path: Path, parallelism: str) -> None:
    def work(rank: int) -> None:
        run = trainer(tmp_path / "run", IMAGE_FREE, max_train_steps=3, checkpointing_steps=1, parallelism=parallelism, **SMALL)
        run.save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as on a full disk
        line = saw(CheckpointError, run.train)
        assert ("checkpoint-1 was not written" if rank == 0 else "rank 0 could not write the checkpoint") in line, line

    assert on_ranks(2, work, tmp_path) == [0, 0], log(tmp_path, 0)[-3000:] + log(tmp_path, 1)[-3000:]
    assert load_checkpoint(tmp_path / "run" / "checkpoint-0")[1]["step"] == 0
