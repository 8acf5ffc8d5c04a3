"""AdamW with moments of eight bits: near AdamW, exact to resume, and one line where its package is missing."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import METHODS, assert_equal, final_weights, trainer
from torch import nn

from diffusion_distill import InputError, TrainConfig
from diffusion_distill.optim import build_optimizer, state_bytes

EIGHT = TrainConfig(optimizer="adamw_8bit", adam_weight_decay=0.1)


def trained(config: TrainConfig) -> tuple[torch.Tensor, Any]:
    """A weight matrix after 50 steps towards another, and its optimizer."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 100, generator=generator)
    weights = nn.Parameter(torch.zeros(64, 100))
    optimizer = build_optimizer([weights], 0.02, config)
    for _ in range(50):
        (weights - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights.detach(), optimizer


def test_moments_of_eight_bits_go_where_adamw_goes() -> None:
    pytest.importorskip("bitsandbytes")
    (exact, plain), (near, small) = trained(replace(EIGHT, optimizer="adamw")), trained(EIGHT)
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.05
    held = [sum(v.nbytes for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)) for o in (plain, small)]
    parameters = [nn.Parameter(torch.zeros(64, 100))]
    assert held == [state_bytes(parameters, config) for config in (replace(EIGHT, optimizer="adamw"), EIGHT)]
    assert held[1] < 0.35 * held[0]


@pytest.mark.parametrize("name", ["gan", "lcm"])
def test_resuming_is_bit_exact(tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    changes = {"optimizer": "adamw_8bit", "offload_idle_roles": True}
    trainer(tmp_path / "whole", METHODS[name], optimizer="adamw_8bit").train()
    first = trainer(tmp_path / "parts", METHODS[name], **changes)
    micro_batches = first._data()
    for _ in range(3):
        first.train_step(first._prepare(next(micro_batches)))
    first.save()
    trainer(tmp_path / "parts", METHODS[name], resume_from_checkpoint="latest", **changes).train()
    whole = final_weights(tmp_path / "whole")
    assert any(value.dtype == torch.uint8 for group in whole.values() for value in group.values())
    assert_equal(whole, final_weights(tmp_path / "parts"))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"optimizer: got 'adamw_8bit'; it needs bitsandbytes: pip install 'diffusion-distill\[8bit\]'"):
        build_optimizer([nn.Parameter(torch.zeros(2))], 1e-3, EIGHT)
    with pytest.raises(InputError, match="optimizer: got 'adamw_8bit'; 'adamw' with parallelism 'shard'"):
        replace(EIGHT, parallelism="shard")
