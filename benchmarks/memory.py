"""Peak memory and steps per second on a GPU at the size of SD 1.5 (512 pixels), SDXL (1024) and FLUX.1 (1024), beside the plan.

Weights are random: neither number depends on them. DMD2 without images, one sample a step. One JSON line a case, with device and commit.
    python benchmarks/memory.py --pipelines sd15 sdxl --output memory.json
    python benchmarks/memory.py --plan        # the plans alone, anywhere
    python benchmarks/memory.py --tiny        # on the CPU, a minute: that the script runs; there is no peak to read
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import torch
from real_size import PIPELINES

from diffusion_distill import DMD2, TrainConfig
from diffusion_distill.data import ConditionDataset
from diffusion_distill.memory_plan import plan
from diffusion_distill.provenance import provenance
from diffusion_distill.trainer import Trainer

METHOD = DMD2(num_inference_steps=4, guidance_scale=1.75, gan_weight=0.0, student_update_interval=2)
PROMPTS = ConditionDataset(["a lighthouse at dusk", "two cats on a wall, one of them asleep", "rain"])
SHARED = {"lora_rank": 64, "sharing": "shared"}
KINDS = ("weights", "gradients", "optimizer", "average", "activations")
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "recomputed": {"gradient_checkpointing": True},
    "encoders_away": {"gradient_checkpointing": True, "offload_encoders": True},
    "eight_bit": {"gradient_checkpointing": True, "offload_encoders": True, "optimizer": "adamw_8bit"},
    "idle_roles_away": {"gradient_checkpointing": True, "offload_encoders": True, "offload_idle_roles": True},
    "lora_shared": {"gradient_checkpointing": True, "offload_encoders": True} | SHARED,
}


def measured(pipe: Any, config: TrainConfig, resolution: int | None, steps: int) -> dict[str, float]:
    """Peak bytes that tensors took, where the device counts them, and steps per second after two steps of warm-up."""
    run = Trainer(pipe, replace(METHOD), config, PROMPTS, resolution)
    data, cuda = run._data(), run.device.type == "cuda"
    for _ in range(2):
        run.train_step(run._prepare(next(data)))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        run.train_step(run._prepare(next(data)))
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"steps_per_second": steps / seconds, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0}


def record(name: str, case: str, make: Callable[[str], Any], resolution: int | None, steps: int, device: str | None) -> dict[str, Any]:
    """One line: what was planned and, where there is a device, what was measured, or why it could not be."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(output_dir=folder, train_batch_size=1, max_train_steps=steps + 2, mixed_precision="bf16", **CASES[case])
        planned = plan(make("meta"), replace(METHOD), config, resolution=resolution)
        line: dict[str, Any] = {"pipeline": name, "case": case, "planned_bytes": planned.total, "resident_bytes": planned.resident}
        line["planned_bytes_of"] = {kind: planned.bytes_of(kind) for kind in KINDS}
        try:
            line |= measured(make(device), config, resolution, steps) if device else {}
        except torch.OutOfMemoryError as error:
            line["error"] = " ".join(str(error).split())[:200]
    return line | {"device": torch.cuda.get_device_name() if device == "cuda" else device, **provenance()}


def tiny(device: str) -> Any:
    from tiny_pipelines import stable_diffusion

    pipe = stable_diffusion()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device)
    return pipe


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="+", choices=list(PIPELINES), default=list(PIPELINES))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("memory.json"))
    parser.add_argument("--tiny", action="store_true", help="a tiny pipeline on the CPU")
    parser.add_argument("--plan", action="store_true", help="plan and measure nothing")
    args = parser.parse_args(argv)
    if not (args.tiny or args.plan or torch.cuda.is_available()):
        parser.error("a CUDA device is needed; --tiny runs on the CPU, --plan anywhere")
    device = None if args.plan else "cpu" if args.tiny else "cuda"
    if args.tiny:
        todo = [("tiny", case, tiny, None) for case in args.cases]
    else:
        todo = [(name, case, *PIPELINES[name]) for name in args.pipelines for case in args.cases]
    for name, case, make, resolution in todo:
        line = record(name, case, make, resolution, args.steps, device)
        print(json.dumps(line), flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
