"""Runs an exported folder with plain diffusers in a process of its own, and records what happened.

A script, started by `export.verify_export` as `python -I export_child.py request.json`. The request holds: folder,
trust_remote_code, components (names of the denoising networks), condition (keyword arguments), seed, device, threads, output (folder).
"""

import copy
import functools
import importlib.abc
import inspect
import json
import sys
from pathlib import Path
from typing import Any

FORBIDDEN = "diffusion_distill"


class _Blocked(importlib.abc.MetaPathFinder):
    """Makes importing the toolkit fail, so that nothing of it can be behind a result."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] == FORBIDDEN:
            raise ImportError(f"an exported folder must work without {FORBIDDEN}")


def record_network(network: Any, expert: int, calls: list[dict[str, Any]]) -> None:
    """Append {"expert", "timestep": None, "batch"} to `calls` whenever `network` runs."""
    signature = inspect.signature(network.forward)

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(*args, **kwargs).arguments
        calls.append({"expert": expert, "timestep": None, "batch": len(next(iter(given.values())))})

    network.register_forward_pre_hook(note, with_kwargs=True)


def record_steps(scheduler: Any, calls: list[dict[str, Any]], last: dict[str, Any]) -> None:
    """Give the calls made for a step of `scheduler` its timestep, and keep the last step's output, the final x0, in `last`.

    What a network is handed instead may be 1 - t / 1000; whether it is the right number shows in the images.
    """
    step = scheduler.step
    signature = inspect.signature(step)

    @functools.wraps(step)  # pipelines look at the signature
    def recorded(*args: Any, **kwargs: Any) -> Any:
        timestep = signature.bind(*args, **kwargs).arguments["timestep"]
        for call in calls:
            if call["timestep"] is None:
                call["timestep"] = float(timestep)
        result = step(*args, **kwargs)
        last["x0"] = result[0]
        return result

    scheduler.step = recorded


def main(request: dict[str, Any]) -> None:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(request["threads"])
    folder = request["folder"]
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=request["trust_remote_code"])
    pipe.to(request["device"], torch.float32)
    pipe.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    for expert, component in enumerate(request["components"]):
        record_network(getattr(pipe, component), expert, calls)
    record_steps(pipe.scheduler, calls, last)
    output, all_calls = Path(request["output"]), []
    for i, sampler in enumerate(json.loads(Path(folder, "distillation.json").read_text())["samplers"]):
        calls.clear()
        torch.manual_seed(request["seed"])
        condition = copy.deepcopy(request["condition"])  # Z-Image's pipeline writes into the list of prompts
        images = pipe(**condition, **sampler["call"], output_type="pt", return_dict=False)[0]  # of videos, the frames
        np.save(output / f"images_{i}.npy", images.float().cpu().numpy())
        np.save(output / f"x0_{i}.npy", last["x0"].float().cpu().numpy())
        all_calls.append(list(calls))
    foreign = [name for name in sys.modules if name.split(".")[0] == FORBIDDEN]
    (output / "record.json").write_text(json.dumps({"calls": all_calls, "foreign": foreign}))


if __name__ == "__main__":
    sys.meta_path.insert(0, _Blocked())
    main(json.loads(Path(sys.argv[1]).read_text()))
