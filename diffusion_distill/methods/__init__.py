"""Distillation methods by name."""

from .adversarial_self_distillation import ASD
from .base import Batch, Loss, Method, Update
from .consistency import Consistency
from .dmd import DMD
from .dmd2 import DMD2
from .lcm import LCM
from .pcm import PCM
from .phased_dmd import PhasedDMD
from .reflow import Reflow
from .reflow_distillation import ReflowDistillation
from .scm import SCM
from .tcd import TCD
from .vsd import VSD

METHODS: dict[str, type[Method]] = {
    "adversarial_self_distillation": ASD,
    "consistency": Consistency,
    "dmd": DMD,
    "dmd2": DMD2,
    "lcm": LCM,
    "pcm": PCM,
    "phased_dmd": PhasedDMD,
    "reflow": Reflow,
    "reflow_distillation": ReflowDistillation,
    "scm": SCM,
    "tcd": TCD,
    "vsd": VSD,
}

__all__ = [
    "ASD",
    "DMD",
    "DMD2",
    "LCM",
    "METHODS",
    "PCM",
    "SCM",
    "TCD",
    "VSD",
    "Batch",
    "Consistency",
    "Loss",
    "Method",
    "PhasedDMD",
    "Reflow",
    "ReflowDistillation",
    "Update",
]
