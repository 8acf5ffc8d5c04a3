"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from .errors import reject
from .train_config import TrainConfig

_LARGE, _BLOCK = 4096, 256  # weights: of a tensor that gets moments of eight bits, and to a scale


def build_optimizer(parameters: Iterable[nn.Parameter], learning_rate: float, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, fused where every parameter is floating point on CPU or CUDA; or with moments of eight bits (arXiv:2110.02861).

    Raises:
        InputError: when the package of the eight-bit one is missing.
    """
    options: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw_8bit":
        return _eight_bit(list(parameters), options)
    return torch.optim.AdamW(list(parameters), **options, fused=True)


def _eight_bit(parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise reject("optimizer", "adamw_8bit", "it needs bitsandbytes: pip install 'diffusion-distill[8bit]'") from error

    class Flat(AdamW8bit):
        """Whose state is a tensor or a number by its name, as every optimizer's; the package nests some of them for FSDP."""

        state_dict = torch.optim.Optimizer.state_dict

    built: torch.optim.Optimizer = Flat(parameters, **options)
    return built


def learning_rate_factor(config: TrainConfig) -> Callable[[int], float]:
    """Step -> multiplier of the peak learning rate, as diffusers' `get_scheduler` defines it. A function: nothing to resume."""
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        config.lr_scheduler,
        unused,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def state_bytes(parameters: Iterable[nn.Parameter], config: TrainConfig) -> int:
    """Bytes of an optimizer's state after its first step.

    AdamW: two moments as large as each weight, and a step count of four bytes a tensor. With eight bits: two bytes a weight and two
    scales a block, two tables for all; tensors below a size keep moments of four bytes.
    """
    if config.optimizer == "adamw":
        return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)
    sizes = [p.numel() for p in parameters]
    large = [size for size in sizes if size >= _LARGE]
    blocks = sum(math.ceil(size / _BLOCK) for size in large)
    return 2 * sum(large) + 8 * blocks + (2 * 256 * 4 if large else 0) + 8 * sum(size for size in sizes if size < _LARGE)
