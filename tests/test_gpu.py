"""What only a CUDA device can show. Run with `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import pytest
import torch
from test_trainer import IMAGE_FREE, assert_equal, final_weights, trainer

from diffusion_distill import DMD2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resuming_on_the_gpu_is_bit_exact(tmp_path: Path, precision: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        trainer(tmp_path / "whole", IMAGE_FREE, mixed_precision=precision).train()
        first = trainer(tmp_path / "parts", IMAGE_FREE, mixed_precision=precision)
        micro_batches = first._data()
        for _ in range(3):
            first.train_step(first._prepare(next(micro_batches)))
        first.save()
        trainer(tmp_path / "parts", IMAGE_FREE, mixed_precision=precision, resume_from_checkpoint="latest").train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts"))


def test_every_network_is_on_the_gpu_and_the_teacher_in_bf16(tmp_path: Path) -> None:
    run = trainer(tmp_path, DMD2(gan_weight=0.1, guidance_scale=2.0), max_train_steps=2, mixed_precision="bf16")
    run.train()
    assert all(p.is_cuda for role in ("teacher", *run.trained) for p in getattr(run.nets, role).parameters())
    assert next(run.nets.teacher.parameters()).dtype == torch.bfloat16
    assert torch.cuda.max_memory_allocated() > 0
