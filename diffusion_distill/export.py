"""A student leaves as a folder that plain diffusers loads and samples exactly as it was trained, and this is proved."""

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapters import switched_on
from .counted_scheduler import counted_scheduler
from .errors import InputError, reject
from .experts import Experts, Student, denoisers, expert_number, with_models
from .families import Family
from .images import save_grid
from .lora_export import FOLDER as LORA
from .lora_export import save_lora
from .model_card import lora_usage, model_card, usage
from .sampler import FewStepSampler
from .student_scheduler import student_scheduler

MARKER = "distillation.json"
SAMPLES = "samples.png"
CPU_TOLERANCE = 1e-6
GPU_TOLERANCE = 1e-4  # kernels there may choose another order of summation in another process


def check_exportable(pipe: Any, student: Student, samplers: Sequence[FewStepSampler], family: Family) -> None:
    """Raise InputError where no stock scheduler or no pipeline can sample the student: better known before training than after."""
    accepted = inspect.signature(type(pipe).__init__).parameters
    if len(samplers) > 1 and "num_inference_steps" in accepted and "grids" not in accepted:
        served = [len(sampler.timesteps) for sampler in samplers]
        accepts = f"one number of steps, for the teacher's own pipeline code ({type(pipe).__name__}) has no `grids`; save the teacher anew"
        raise reject("num_inference_steps", served, accepts)
    _scheduler(pipe, student, samplers)
    _components(family, student, pipe)


def export_student(
    pipe: Any,
    student: Student,
    samplers: Sequence[FewStepSampler],
    folder: str | Path,
    *,
    family: Family,
    info: Mapping[str, Any],
    conditions: Sequence[Any],
    images: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    resolution: int | None = None,
) -> Path:
    """Write a complete pipeline folder: the teacher's pipeline with the student's network and scheduler, a record and a model card.

    The folder appears whole or not at all; a previous export in its place is replaced.

    Args:
        pipe: the teacher's pipeline; it is left as it is.
        student: LoRA adapters are merged in a copy, and written beside it where the pipeline can load them. Several experts need a
            pipeline that switches between networks.
        samplers: every sampler that the student serves, the default first.
        info: what `distillation.json` and the model card tell besides the sampling: teacher, method, hyper_parameters, metrics,
            license, commit, packages (each may be missing).
        conditions: prompts or class labels of `images`; the first ones are the example of the model card.
        images: samples (B, C, H, W) in [-1, 1] for a picture in the model card.
        dtype: of the saved network.
        resolution: pixels of the student's images. None: the pipeline's own.

    Raises:
        InputError: when the folder holds something else, or no stock scheduler or no pipeline can sample the student.
    """
    folder = Path(folder).absolute()
    _refuse_foreign(folder)
    scheduler = _scheduler(pipe, student, samplers)
    exported = _student_pipeline(pipe, family, student, dtype, scheduler, samplers)
    served: list[dict[str, Any]] = [
        {"timesteps": list(s.timesteps), "call": _call(pipe, family, s, scheduler, resolution)} for s in samplers
    ]
    if len(served) > 1:
        for sampler in served:  # one way to ask for all of them; pipelines with defaults of their own need no more
            sampler["call"] = {"num_inference_steps": len(sampler["timesteps"])} | sampler["call"]
    record: dict[str, Any] = {**info, "samplers": served, "sampling": samplers[0].kind, "guidance_scale": samplers[0].guidance_scale}
    record |= {"scheduler": type(scheduler).__name__, "pipeline": type(pipe).__name__}
    record |= {"dtype": str(dtype).removeprefix("torch."), "resolution": resolution}
    example = served[0]["call"], family.condition_argument(conditions[:2])
    code = usage(*example, _is_custom(exported), family.output)

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    temporary.mkdir(parents=True)
    try:
        exported.save_pretrained(temporary)
        if images is not None:
            save_grid(images, temporary / SAMPLES)
        lora_code = None
        if save_lora(pipe, student, family, temporary / LORA):
            lora_code = lora_usage(record.get("teacher"), record["scheduler"], LORA, *example, family.output)
        card = model_card(record, code, SAMPLES if images is not None else None, conditions, lora_code)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _scheduler(pipe: Any, student: Student, samplers: Sequence[FewStepSampler]) -> SchedulerMixin:
    call = inspect.signature(type(pipe).__call__).parameters
    build = student_scheduler if "timesteps" in call or "sigmas" in call else counted_scheduler
    scheduler = build(student.schedule, samplers, student.prediction_type, pipe.scheduler)
    if samplers[0].kind == "tcd" and "eta" not in {*call, *inspect.signature(type(pipe).__init__).parameters}:
        eta = inspect.signature(scheduler.step).parameters["eta"].default
        if samplers[0].gamma != eta:
            raise reject("gamma", samplers[0].gamma, f"{eta}, the scheduler's own: a {type(pipe).__name__} hands it no other")
    return scheduler


def merged(model: nn.Module, dtype: torch.dtype, adapter: str | None = None) -> nn.Module:
    """`model` in `dtype` with its LoRA adapters merged into the weights; a copy, unless it is already that.

    Of adapters that rest, only the one called `adapter` is merged.
    """
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if not adapted and all(p.dtype == dtype for p in model.parameters()):
        return model
    model = copy.deepcopy(model).float()  # a sum with weights in bfloat16 would round the adapter away
    with switched_on(model, adapter):
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
    whole: nn.Module = recurse_remove_peft_layers(model) if adapted else model
    return whole.to(dtype)


def _components(family: Family, student: Student, pipe: Any) -> tuple[str, ...]:
    """The pipeline's attributes that hold the student's networks, from noise to data."""
    components, count = (family.component, *_expert_components(family, pipe)), len(denoisers(student))
    if count > len(components):
        raise reject("experts", count, f"this {type(pipe).__name__} takes {len(components)} network(s) at most")
    return components[:count]


def _expert_components(family: Family, pipe: Any) -> list[str]:
    """Those that the class of `pipe` knows: a folder may bring an older file of its own."""
    return [name for name in family.expert_components if name in inspect.signature(type(pipe).__init__).parameters]


def _student_pipeline(
    pipe: Any, family: Family, student: Student, dtype: torch.dtype, scheduler: SchedulerMixin, samplers: Sequence[FewStepSampler]
) -> Any:
    """A pipeline of the class of `pipe` that shares every other component with it."""
    networks = dict.fromkeys(_expert_components(family, pipe)) | {
        component: merged(denoiser.model, dtype, denoiser.adapter)
        for component, denoiser in zip(_components(family, student, pipe), denoisers(student), strict=True)
    }
    accepted = inspect.signature(type(pipe).__init__).parameters
    options = {name: pipe.config[name] for name in accepted if name in pipe.config and name not in pipe.components}
    grids = [list(sampler.timesteps) for sampler in samplers]
    trained = {"grids": grids, "num_inference_steps": len(grids[0]), "guidance_scale": 1.0, "eta": samplers[0].gamma}
    options |= {name: value for name, value in trained.items() if name in accepted}  # pipelines that carry their call's defaults
    if _expert_components(family, pipe):
        boundaries = student.boundaries if isinstance(student, Experts) else ()
        options |= family.expert_options(boundaries, scheduler.config.num_train_timesteps)
    return type(pipe)(**{**pipe.components, **networks, "scheduler": scheduler}, **options)


def _is_custom(pipe: Any) -> bool:
    """Whether the pipeline's class is not diffusers' own, so that its file travels in the folder and must be trusted on loading."""
    module: str = type(pipe).__module__
    return module.split(".")[0] != "diffusers"


def _call(pipe: Any, family: Family, sampler: FewStepSampler, scheduler: Any, resolution: int | None) -> dict[str, Any]:
    call = family.pipeline_call(sampler.timesteps, scheduler.config.num_train_timesteps, resolution)
    call |= family.size_arguments(pipe, resolution)
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        call.pop("timesteps", None)  # DDIM takes the number of steps alone, and `student_scheduler` saw to it that they are these
    if sampler.guidance_embedding is not None:
        call["guidance_scale"] = sampler.guidance_embedding  # an input of the network: pipelines then run no second half of the batch
    if sampler.kind == "tcd" and "eta" in inspect.signature(type(pipe).__call__).parameters:
        call["eta"] = sampler.gamma
    return call


def _refuse_foreign(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file()):
        raise reject("output folder", str(folder), f"an empty or new folder, or a previous export (with {MARKER}), is needed")


def _require_export(folder: Path) -> None:
    if not (folder / MARKER).is_file():
        raise reject("folder", str(folder), f"an exported student (with {MARKER}) is needed")


def _put_in_place(temporary: Path, folder: Path) -> None:
    previous = temporary.with_suffix(".previous")
    if folder.exists():
        folder.rename(previous)
    temporary.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def verify_export(
    folder: str | Path,
    *,
    student: Student,
    samplers: Sequence[FewStepSampler],
    family: Family,
    pipe: Any,
    conditions: Sequence[Any],
    seed: int = 0,
    atol: float | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Sample the folder with plain diffusers in a fresh process and compare with each of `samplers` on `student`, at the same noise.

    All noise comes from the global generator after `torch.manual_seed(seed)`, because some pipelines (SD3) do not hand theirs
    to the scheduler. The fresh process runs in float32 and cannot import this package.

    Args:
        student: the network that was exported; its LoRA adapters may be unmerged.
        atol: largest difference accepted, of images in [0, 1], and of x0 relative to its largest magnitude where that is over 1.
            None: 1e-6 on the CPU, `GPU_TOLERANCE` elsewhere.
            x0 is compared besides because clamping hides differences: an untrained epsilon network amplifies its rounding
            by 1 / alpha (about 15 at t = 999 of Stable Diffusion) into an x0 of that size.
        trust_remote_code: needed where the folder holds its own `pipeline.py`, whose code then runs.

    Returns:
        {"max_difference", "x0_difference", "timesteps"}: the largest of each difference, and for each sampler the timesteps that the
        network saw.

    Raises:
        InputError: when the folder does not load or run.
        RuntimeError: with the numbers, when timesteps, network calls or results are not those of the samplers.
    """
    folder = Path(folder).absolute()
    accepted = atol if atol is not None else (CPU_TOLERANCE if pipe.device.type == "cpu" else GPU_TOLERANCE)
    _require_export(folder)
    request = {"folder": str(folder), "trust_remote_code": trust_remote_code, "seed": seed}
    request |= {"components": _components(family, student, pipe)}
    request |= {"condition": family.condition_argument(conditions), "device": str(pipe.device), "threads": torch.get_num_threads()}
    results, foreign = _fresh_process(request)
    if foreign:
        raise RuntimeError(f"export: the fresh process imported {foreign}")
    differences = [0.0, 0.0]
    for sampler, (x0, images, calls) in zip(samplers, results, strict=True):
        _check_calls(calls, student, sampler, len(conditions))
        wanted_x0, wanted = _own_samples(folder, student, sampler, family, pipe, conditions, seed)
        difference, x0_difference = _largest(images - wanted), _largest(x0 - wanted_x0) / max(1.0, _largest(wanted_x0))
        if not (difference <= accepted and x0_difference <= accepted):  # true of NaN as well
            raise RuntimeError(f"export: images differ by {difference:.3g}, x0 by {x0_difference:.3g} of its size; accepted: {accepted:g}")
        differences = [max(differences[0], difference), max(differences[1], x0_difference)]
    visited = [[call["timestep"] for call in calls] for _, _, calls in results]
    return {"max_difference": differences[0], "x0_difference": differences[1], "timesteps": visited}


def _check_calls(calls: Sequence[Mapping[str, Any]], student: Student, sampler: FewStepSampler, images: int) -> None:
    timesteps = [call["timestep"] for call in calls]
    # sigmas travel in float32: a timestep such as 333.33 comes back with an error in its last place
    if len(timesteps) != len(sampler.timesteps) or not np.allclose(timesteps, sampler.timesteps, rtol=1e-6, atol=0):
        raise RuntimeError(f"export: the network was called at {timesteps}; the student was trained at {list(sampler.timesteps)}")
    experts, trained = [call["expert"] for call in calls], [expert_number(student, t) for t in sampler.timesteps]
    if experts != trained:
        raise RuntimeError(f"export: the experts {experts} were called at {timesteps}; trained there: {trained}")
    batches = [call["batch"] for call in calls]
    if any(batch != images for batch in batches):
        raise RuntimeError(f"export: the network saw batches of {batches} for {images} images; guidance is on")


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


@torch.no_grad()
def _own_samples(
    folder: Path, student: Student, sampler: FewStepSampler, family: Family, pipe: Any, conditions: Sequence[Any], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """x0 in the scheduler's layout and images in [0, 1], both (B, ...), drawn by the toolkit's sampler."""
    record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    dtype, resolution = getattr(torch, record["dtype"]), record["resolution"]
    models = [
        d.model if dtype == torch.float32 and not d.adapter else merged(d.model, dtype, d.adapter).float() for d in denoisers(student)
    ]
    training = [model.training for model in models]
    plain: Any = with_models(student, models).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        noise = torch.randn(len(conditions), *family.sample_shape(pipe, resolution), device=pipe.device)
        cond = family.encode_conditions(pipe, conditions, resolution)
        x0 = sampler.sample(plain, noise, cond, lambda x: family.unpack(torch.randn_like(family.pack(x)), x))
    for model, was_training in zip(models, training, strict=True):
        model.train(was_training)
    images = family.decode(pipe, x0).div(2).add(0.5).clamp(0, 1)
    return family.pack(x0).float().cpu().numpy(), images.float().cpu().numpy()


def _fresh_process(request: dict[str, Any]) -> "_Results":
    script = Path(__file__).with_name("export_child.py")
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        (output / "request.json").write_text(json.dumps(request | {"output": name}))
        environment = os.environ | {"HF_MODULES_CACHE": str(output / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", str(script), str(output / "request.json")]
        done = subprocess.run(command, cwd=output, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise InputError(f"export: {request['folder']!r} does not run with plain diffusers: {reason}")
        return read_results(output)


_Results = tuple[list[tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]], list[str]]


def read_results(output: Path) -> _Results:
    """(x0, images, network calls) for each sampler of the folder's record, and the modules of this package that were imported."""
    record = json.loads((output / "record.json").read_text())
    arrays = [(np.load(output / f"x0_{i}.npy"), np.load(output / f"images_{i}.npy")) for i in range(len(record["calls"]))]
    return [(*pair, calls) for pair, calls in zip(arrays, record["calls"], strict=True)], record["foreign"]


def push_to_hub(folder: str | Path, repo_id: str) -> str:
    """Upload an exported folder to the Hugging Face Hub, creating the repository where it is missing; its address.

    Raises:
        InputError: when the folder is not an export, or nobody is logged in.
    """
    _require_export(Path(folder))
    token = huggingface_hub.get_token()
    if token is None:
        raise InputError("push_to_hub: no Hugging Face token found; run `hf auth login` or set HF_TOKEN")
    api = huggingface_hub.HfApi(token=token)
    address = api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=str(folder))
    return str(address)
