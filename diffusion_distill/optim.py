"""Optimizers and learning-rate schedules."""

from collections.abc import Callable, Iterable

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from .train_config import TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], learning_rate: float, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, fused where every parameter is floating point on CPU or CUDA."""
    return torch.optim.AdamW(
        list(parameters),
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


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
    """Bytes of an optimizer's state after its first step: two moments as large as each weight, and a step count of four bytes a tensor."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)
