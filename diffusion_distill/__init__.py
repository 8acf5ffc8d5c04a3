"""Distil any pretrained diffusers pipeline into a student that samples in one to eight steps."""

from .config import TeacherConfig
from .data import DataConfig, build_dataset
from .distill import distill, run
from .errors import InputError, NonFiniteError
from .methods import ASD, DMD, DMD2, LCM, METHODS, PCM, SCM, TCD, VSD, Consistency, PhasedDMD, Reflow, ReflowDistillation
from .pair_writer import PairConfig, write_pairs
from .sampler import FewStepSampler
from .train_config import TrainConfig
from .trainer import Trainer

__version__ = "0.1.0"

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
    "Consistency",
    "DataConfig",
    "FewStepSampler",
    "InputError",
    "NonFiniteError",
    "PairConfig",
    "PhasedDMD",
    "Reflow",
    "ReflowDistillation",
    "TeacherConfig",
    "TrainConfig",
    "Trainer",
    "build_dataset",
    "distill",
    "run",
    "write_pairs",
]
