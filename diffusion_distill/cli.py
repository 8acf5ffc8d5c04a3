"""`diffusion-distill METHOD --flags`, and the same for the scripts in train/."""

import sys
from collections.abc import Sequence

from .config import TeacherConfig, parse, run_cli
from .data import DataConfig
from .distill import run
from .errors import reject
from .methods import METHODS
from .train_config import TrainConfig


def train(name: str, argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None) -> None:
    """Parse flags (None: the process's own) for the method called `name`, train, export."""
    kind = METHODS[name]
    groups = (TeacherConfig, kind, DataConfig, TrainConfig)
    teacher, method, data, config = parse(argv, *groups, prog=prog or f"{name}.py", description=description or kind.__doc__ or name)
    run(method, teacher, data, config)


def main() -> None:
    """Console entry point."""
    run_cli(_main)


def _main() -> None:
    names = ", ".join(METHODS)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: diffusion-distill METHOD --pretrained_model_name_or_path ...\nMETHOD: {names}; METHOD --help lists its flags")
        return
    if sys.argv[1] not in METHODS:
        raise reject("METHOD", sys.argv[1], f"accepted: {names}")
    train(sys.argv[1], sys.argv[2:], prog=f"diffusion-distill {sys.argv[1]}")
