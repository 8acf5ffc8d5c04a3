"""Distillation methods by name."""

from .base import Batch, Loss, Method, Update
from .dmd2 import DMD2

METHODS: dict[str, type[Method]] = {"dmd2": DMD2}

__all__ = ["DMD2", "METHODS", "Batch", "Loss", "Method", "Update"]
