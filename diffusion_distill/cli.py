"""`diffusion-distill METHOD --flags`, and the same for the scripts in train/."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import TeacherConfig, parse, run_cli
from .data import DataConfig
from .distill import run
from .errors import reject
from .memory_plan import GIB, MemoryPlan, plan, table
from .meta_pipeline import pipeline_on_meta
from .methods import METHODS
from .preflight import check_teacher
from .train_config import TrainConfig


def train(name: str, argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> None:
    """Parse flags (None: the process's own) for the method called `name`, train, export."""
    kind = METHODS[name]
    groups = (TeacherConfig, kind, DataConfig, TrainConfig)
    teacher, method, data, config = parse(argv, *groups, prog=prog or f"{name}.py", description=description or kind.__doc__ or name)
    run(method, teacher, data, config)


@dataclass
class PlannedData(DataConfig):
    """Data of a run that is planned: of all this the resolution alone matters, so there need be none."""

    def __post_init__(self) -> None:
        if self.sources():
            super().__post_init__()


@dataclass
class PlanConfig:
    """For which machine to plan."""

    device_memory: float | None = None
    """Memory of one device in GiB. None: that of the device here, where there is one."""
    world_size: int = 1
    """Processes, each with a device of its own."""

    def __post_init__(self) -> None:
        if self.device_memory is not None and not 0 < self.device_memory < math.inf:
            raise reject("device_memory", self.device_memory, "GiB, a number above 0")
        if self.world_size < 1:
            raise reject("world_size", self.world_size, "1 or more")


def plan_run(name: str, argv: Sequence[str] | None = None) -> MemoryPlan:
    """Say what a run with these flags would hold on its device. InputError: a wrong flag, or a teacher that cannot be planned for."""
    kind = METHODS[name]
    groups = (TeacherConfig, kind, PlannedData, TrainConfig, PlanConfig)
    described = "What a run with these flags would hold on its device. Nothing is loaded."
    teacher, method, data, config, machine = parse(argv, *groups, prog=f"diffusion-distill plan {name}", description=described)
    check_teacher(teacher)
    memory = int(machine.device_memory * GIB) if machine.device_memory else _memory_here()
    found = plan(
        pipeline_on_meta(teacher),
        method,
        config,
        resolution=data.resolution,
        device_memory=memory,
        world_size=machine.world_size,
    )
    print(table(found))
    return found


def _memory_here() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def main() -> None:
    """Console entry point."""
    run_cli(_main)


def _main() -> None:
    names = ", ".join(METHODS)
    if len(sys.argv) < 2 or {"-h", "--help"} & {sys.argv[1], *(sys.argv[2:3] if sys.argv[1] == "plan" else [])}:
        print(f"usage: diffusion-distill METHOD --pretrained_model_name_or_path ...\nMETHOD: {names}; METHOD --help lists its flags")
        print("diffusion-distill plan METHOD ... says what such a run would hold in memory, and loads nothing")
        return
    planned = sys.argv[1] == "plan"
    if planned and len(sys.argv) < 3:
        raise reject("METHOD", "nothing", f"accepted: {names}")
    name = sys.argv[2] if planned else sys.argv[1]
    if name not in METHODS:
        raise reject("METHOD", name, f"accepted: {names}")
    if planned:
        plan_run(name, sys.argv[3:])
        return
    train(sys.argv[1], sys.argv[2:], prog=f"diffusion-distill {sys.argv[1]}")
