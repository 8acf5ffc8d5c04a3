"""Images from a class-conditional diffusers pipeline, each determined by its noise seed and index alone."""

import contextlib
import inspect
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.command_line import InputError, reject
from diffusers import DiffusionPipeline
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

DENOISERS = re.compile(r"(unet|transformer)(_\d+)?")  # components that can hold a pipeline's denoising networks


@dataclass(frozen=True)
class Samples:
    """Images (N, C, H, W) in [0, 1] on the CPU for labels (N,), and what one image cost."""

    images: Tensor
    labels: Tensor
    network_evaluations: float  # rows that went through the denoising network, for each image; guidance counts twice
    seconds: float  # wall time for each image, decoding included
    cpu_seconds: float  # CPU time of this process for each image: what a busy machine leaves comparable


def load_pipeline(folder: Path, trust_remote_code: bool, device: str = "auto") -> Any:
    """The class-conditional pipeline in `folder`, on `device` ("auto": CUDA where there is some).

    Raises:
        InputError: for a folder without a pipeline, one that brings its own code while `trust_remote_code` is off, or a
            pipeline that takes no class labels.
    """
    pipe = open_pipeline(folder, trust_remote_code)
    if "class_labels" not in inspect.signature(pipe.__call__).parameters:
        raise reject("pipeline", type(pipe).__name__, "a pipeline that takes class_labels is needed")
    denoising_networks(pipe)
    return pipe.to(find_device(device))


def open_pipeline(folder: Path, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Any:
    """The diffusers pipeline in `folder`, of whatever kind, on the CPU, in `dtype` (None: float32), without progress bars.

    Raises:
        InputError: for a folder without a pipeline, or one that brings its own code while `trust_remote_code` is off.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise reject("folder", str(folder), "a diffusers pipeline folder with a model_index.json is needed")
    name = json.loads(index.read_text())["_class_name"]
    if isinstance(name, list) and not trust_remote_code:
        raise InputError(f"folder: {folder} brings its own pipeline code ({name[0]}.py); read it and pass --trust_remote_code")
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    # diffusers copies a folder's own code into a cache that all processes share: another could read half of it
    with FileLock(Path(HF_MODULES_CACHE, "loading.lock")):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=trust_remote_code)
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype is None else pipe.to(dtype)


def denoising_networks(pipe: Any) -> list[nn.Module]:
    """The network that a pipeline calls at every step, or those among which it chooses.

    Raises:
        InputError: where the pipeline has none under a known name.
    """
    found = [part for name, part in pipe.components.items() if DENOISERS.fullmatch(name) and isinstance(part, nn.Module)]
    if not found:
        raise reject("pipeline components", sorted(pipe.components), "a network named unet or transformer is needed")
    return found


def balanced_labels(samples: int, classes: int) -> list[int]:
    """Label i % classes for image i: the classes differ by at most one image, and a shorter list is a prefix of a longer one."""
    return [i % classes for i in range(samples)]


def image_seed(seed: int, index: int) -> int:
    """Seed of image `index` under noise seed `seed`: 32 well-mixed bits, as many as torch's CPU generator takes."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def generate(
    pipe: Any,
    labels: list[int],
    seed: int,
    batch_size: int = 250,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    progress: str | None = None,
) -> Samples:
    """One image for each label; image i starts from its own generator, so that the batch size leaves the images alone.

    None for `num_inference_steps` or `guidance_scale` takes the pipeline's own. `progress` names the progress bar; None shows none.

    Raises:
        InputError: for a batch size below 1, or what the pipeline refuses.
    """
    if batch_size < 1:
        raise reject("batch_size", batch_size, "at least 1")
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    given = {name: value for name, value in settings.items() if value is not None}
    images: list[Tensor] = []
    with count_rows(denoising_networks(pipe)) as rows, tqdm(total=len(labels), desc=progress, unit="img", disable=progress is None) as bar:
        start, cpu_start = time.perf_counter(), time.process_time()
        for first in range(0, len(labels), batch_size):
            batch = labels[first : first + batch_size]
            generators = [torch.Generator().manual_seed(image_seed(seed, first + i)) for i in range(len(batch))]
            images.append(_call(pipe, batch, generators, given))
            bar.update(len(batch))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    count = len(labels)
    return Samples(torch.cat(images), torch.tensor(labels), sum(rows) / count, seconds / count, cpu_seconds / count)


def _call(pipe: Any, labels: list[int], generators: list[torch.Generator], given: dict[str, Any]) -> Tensor:
    try:
        output = pipe(class_labels=labels, generator=generators, output_type="pt", **given)
    except ValueError as error:  # how diffusers reports arguments that a pipeline cannot serve
        raise InputError(f"pipeline: {error}") from error
    return output.images.float().cpu()


@contextlib.contextmanager
def count_rows(networks: list[nn.Module]) -> Iterator[list[int]]:
    """A list that collects the rows of every call of `networks` meanwhile."""
    rows: list[int] = []
    handles = [network.register_forward_hook(lambda module, args, output: rows.append(len(output[0]))) for network in networks]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def find_device(name: str) -> str:
    """The device called `name`; "auto" is CUDA where there is some. InputError for one that is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say: unknown, or not on this machine
        raise reject("device", name, "accepted: auto, cpu, or a device that torch finds here") from error
