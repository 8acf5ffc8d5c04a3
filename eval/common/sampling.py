"""Draw a set of images from any diffusers pipeline into a folder: sharded over processes, and continued where it stopped.

Image i of a noise seed has its own generator and condition i modulo their number, so that neither the batch size nor the number of
processes changes what is drawn, and a smaller set is the beginning of a larger one. The folder holds, beside the images, prompts.jsonl
(file, prompt or label, seed), samples.json (what decides the images) and costs-*.jsonl (what they cost).
"""

import hashlib
import inspect
import json
import logging
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import numpy as np
import torch
import tyro
from common.checks import check_finite
from common.command_line import InputError, reject
from common.fingerprints import fingerprint
from common.generate import count_rows, denoising_networks, image_seed, open_pipeline
from common.image_files import ImageSet, open_folder, read_jsonl, write_jsonl, write_png
from common.processes import Team
from tqdm import tqdm

MANIFEST = "samples.json"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger("eval")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which images are measured."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder of images (with prompts.jsonl or metadata.jsonl, or without), or of a diffusers pipeline, which is sampled."""
    samples: int | None = None
    """Number of images. None: all of a folder, or one for each prompt."""
    prompts_file: Path | None = None
    """Prompts for a text-to-image pipeline: a line each, or .jsonl with `prompt` or `text`."""
    images_dir: Path | None = None
    """Where a pipeline's images are kept. None: a folder beside the pipeline's, one for each setting."""
    num_inference_steps: int | None = None
    """Sampling steps. None: the pipeline's own, or those that distillation.json names."""
    guidance_scale: float | None = None
    """Classifier-free guidance. None: the pipeline's own."""
    resolution: int | None = None
    """Side of the images in pixels. None: the pipeline's own."""
    noise_seed: int = 0
    """Every image has a generator of its own, from this seed and its index."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the pipeline's networks."""
    batch_size: int = 16
    """Images in one pipeline call. It changes the images by rounding alone: a few pixels by one level of 255."""
    exact: bool = False
    """Call the pipeline for one image at a time, so that not even rounding depends on the batch size; slower."""
    device: str = "auto"
    """Where networks run; auto takes CUDA where there is some."""
    trust_remote_code: bool = False
    """Run the pipeline.py that a folder brings."""

    def check(self) -> None:
        """Raise `InputError` for a value that no folder can serve."""
        for name in ("batch_size", "samples", "num_inference_steps", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise reject(name, value, "at least 1")
        if self.noise_seed < 0:
            raise reject("noise_seed", self.noise_seed, "a whole number from 0")

    @property
    def is_pipeline(self) -> bool:
        return (self.folder / "model_index.json").is_file()


@dataclass(frozen=True)
class Plan:
    """What a pipeline is asked for: `count` images, the conditions taken in turn (as argument `name`), and `call` for all."""

    name: Literal["prompt", "class_labels", "batch_size"]
    conditions: list[Any]
    count: int
    call: dict[str, Any]

    def condition(self, index: int) -> Any:
        """Prompt or label of image `index`."""
        return self.conditions[index % len(self.conditions)]

    def arguments(self, first: int, last: int) -> dict[str, Any]:
        """Keyword arguments for the images `first` ... `last` - 1."""
        value = last - first if self.name == "batch_size" else [self.condition(i) for i in range(first, last)]
        return {self.name: value} | self.call


def open_images(config: SamplingConfig, team: Team) -> ImageSet:
    """The images to measure: those of a folder, or samples of a pipeline, drawn now as far as they are missing.

    Raises:
        InputError: for a wrong setting or folder, for a pipeline that refuses, and for images that belong to other settings.
        NotFiniteError: for samples that hold NaN or infinity.
    """
    config.check()
    if not config.is_pipeline:
        return open_folder(config.folder, config.samples)
    pipe = open_pipeline(config.folder, config.trust_remote_code, DTYPES[config.dtype])
    plan = make_plan(pipe, config)
    target = config.images_dir or default_images_dir(config)
    if team.rank == 0:
        _prepare(target, plan, config)
    team.wait()
    _draw(pipe.to(team.device), plan, target, config, team)
    team.wait()
    return open_folder(target, plan.count)


def make_plan(pipe: Any, config: SamplingConfig) -> Plan:
    """What `pipe` is to be asked for under `config`.

    Raises:
        InputError: where prompts or a number of samples are missing, or the pipeline takes neither prompts nor labels nor a batch size.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    settings = {"guidance_scale": config.guidance_scale, "num_inference_steps": config.num_inference_steps}
    settings |= {"height": config.resolution, "width": config.resolution}
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = [name for name in given if name not in accepted]
    if unknown:
        raise reject(unknown[0], given[unknown[0]], f"{type(pipe).__name__} takes no such argument")
    call = _recorded_call(config) | given
    if "class_labels" in accepted:
        return Plan("class_labels", list(range(class_count(pipe))), _sample_count(config), call)
    if "prompt" in accepted:
        prompts = read_prompts(config.prompts_file)
        return Plan("prompt", prompts, config.samples or len(prompts), call)
    if "batch_size" in accepted:
        return Plan("batch_size", [None], _sample_count(config), call)
    raise reject("pipeline", type(pipe).__name__, "a pipeline that takes prompt, class_labels or batch_size is needed")


def class_count(pipe: Any) -> int:
    """Number of classes of a class-conditional pipeline, the unconditional one aside."""
    for network in denoising_networks(pipe):
        config: Any = network.config
        if getattr(config, "num_class_embeds", None):
            return int(config.num_class_embeds) - 1
        if getattr(config, "num_embeds_ada_norm", None):  # DiT adds its unconditional class to this
            return int(config.num_embeds_ada_norm)
    raise reject("pipeline", type(pipe).__name__, "its networks tell no number of classes")


def read_prompts(path: Path | None) -> list[str]:
    """Prompts of a text file (a line each) or of a .jsonl (`prompt` or `text`).

    Raises:
        InputError: without a file, or for one without prompts.
    """
    if path is None or not path.is_file():
        raise reject("prompts_file", None if path is None else str(path), "a text-to-image pipeline needs a file of prompts")
    if path.suffix == ".jsonl":
        found = [row.get("prompt", row.get("text")) for row in read_jsonl(path)]
    else:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise reject("prompts_file", str(path), "one prompt a line, or in .jsonl the key prompt or text in every line")
    return [str(prompt) for prompt in found]


def default_images_dir(config: SamplingConfig) -> Path:
    """Folder beside the pipeline's for images under these settings."""
    parts = [f"steps-{config.num_inference_steps or 'own'}", f"seed-{config.noise_seed}"]
    parts += [f"guidance-{config.guidance_scale:g}"] if config.guidance_scale is not None else []
    parts += [f"{config.resolution}px"] if config.resolution else []
    parts += [config.prompts_file.stem] if config.prompts_file else []
    folder = config.folder.resolve()
    return folder.with_name(folder.name + "-images") / "_".join(parts)


def sampling_cost(folder: Path) -> dict[str, float]:
    """What an image of `folder` cost, over all processes and runs that drew some; empty for a folder that was not drawn here."""
    rows = [row for path in sorted(folder.glob("costs-*.jsonl")) for row in read_jsonl(path)]
    count = sum(row["images"] for row in rows)
    if not count:
        return {}
    names = ("network_evaluations", "seconds", "cpu_seconds")
    cost = {f"{name}_per_image": sum(row[name] for row in rows) / count for name in names}
    return cost | {"peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows), "timed_images": count}


def _sample_count(config: SamplingConfig) -> int:
    if config.samples is None:
        raise reject("samples", None, "a number of images is needed for a pipeline without prompts")
    return config.samples


def _recorded_call(config: SamplingConfig) -> dict[str, Any]:
    """The arguments with which a distilled student visits the timesteps that it was trained for; none without that record."""
    record = config.folder / "distillation.json"
    if not record.is_file():
        return {}
    samplers = json.loads(record.read_text())["samplers"]
    calls = {len(sampler["timesteps"]): sampler["call"] for sampler in reversed(samplers)}
    if config.num_inference_steps is None:
        return dict(samplers[0]["call"])
    if config.num_inference_steps not in calls:
        raise reject("num_inference_steps", config.num_inference_steps, f"this student serves {', '.join(map(str, sorted(calls)))}")
    return dict(calls[config.num_inference_steps])


def _settings(plan: Plan, config: SamplingConfig) -> dict[str, Any]:
    """What decides the images, the number of them aside."""
    conditions = json.dumps([plan.name, plan.conditions])
    return {
        "model": config.folder.resolve().name,
        "model_sha256": fingerprint(config.folder),
        "noise_seed": config.noise_seed,
        "call": plan.call,
        "conditions_sha256": hashlib.sha256(conditions.encode()).hexdigest(),
        "dtype": config.dtype,
        "exact": config.exact,
    }


def _prepare(target: Path, plan: Plan, config: SamplingConfig) -> None:
    settings, path = _settings(plan, config), target / MANIFEST
    if path.is_file():
        earlier = json.loads(path.read_text())["settings"]
        different = [f"{key}: {earlier.get(key)} there, {value} now" for key, value in settings.items() if earlier.get(key) != value]
        if different:
            raise InputError(f"images_dir: {target} holds images of other settings ({', '.join(different)}); remove it or name another")
    elif target.is_dir() and any(target.iterdir()):
        raise reject("images_dir", str(target), f"an empty or new folder, or one with {MANIFEST}, is needed")
    target.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    path.write_text(json.dumps({"settings": settings, "versions": versions}, indent=2) + "\n")
    known = len(read_jsonl(target / "prompts.jsonl")) if (target / "prompts.jsonl").is_file() else 0
    if known < plan.count:
        write_jsonl(target / "prompts.jsonl", (_row(plan, config.noise_seed, i) for i in range(plan.count)))


def _row(plan: Plan, seed: int, index: int) -> dict[str, Any]:
    key = {"prompt": "prompt", "class_labels": "label"}.get(plan.name)
    condition = {key: plan.condition(index)} if key else {}
    return {"file_name": file_name(index), **condition, "seed": image_seed(seed, index), "index": index}


def file_name(index: int) -> str:
    """Name of image `index` in a folder of samples."""
    return f"{index:06d}.png"


def _draw(pipe: Any, plan: Plan, target: Path, config: SamplingConfig, team: Team) -> None:
    count, size = plan.count, config.batch_size
    spans = [(first, min(first + size, count)) for first in range(0, count, size)]
    own = [spans[i] for i in team.share(len(spans))]
    missing = [span for span in own if not all((target / file_name(i)).is_file() for i in range(*span))]
    name = f"{config.folder.name}, seed {config.noise_seed}"
    with tqdm(total=sum(last - first for first, last in missing), desc=name, unit="img", disable=team.rank > 0 or not missing) as bar:
        for first, last in missing:
            cost = _draw_batch(pipe, plan, target, config, first, last)
            with (target / f"costs-{team.rank}.jsonl").open("a") as file:
                file.write(json.dumps(cost) + "\n")
            bar.update(last - first)


def _draw_batch(pipe: Any, plan: Plan, target: Path, config: SamplingConfig, first: int, last: int) -> dict[str, Any]:
    size = 1 if config.exact else last - first
    start, cpu_start = time.perf_counter(), time.process_time()
    with count_rows(_networks(pipe)) as rows:
        images = np.concatenate([_call(pipe, plan, config.noise_seed, i, min(i + size, last)) for i in range(first, last, size)])
    cost = {"images": last - first, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    for i, image in zip(range(first, last), quantise(images), strict=True):
        write_png(image, target / file_name(i))
    return {**cost, "network_evaluations": sum(rows), "peak_memory_bytes": peak_memory(str(pipe.device)), "device": str(pipe.device)}


def _networks(pipe: Any) -> list[torch.nn.Module]:
    try:
        return denoising_networks(pipe)
    except InputError:
        return []  # under another name: its calls are not counted


def _call(pipe: Any, plan: Plan, seed: int, first: int, last: int) -> np.ndarray:
    generators = [torch.Generator().manual_seed(image_seed(seed, i)) for i in range(first, last)]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(image_seed(seed, first))  # some schedulers draw from the global generator whatever they are given
            output = pipe(**plan.arguments(first, last), generator=generators, output_type="np")
    except ValueError as error:  # how diffusers reports arguments that a pipeline cannot serve
        raise InputError(f"pipeline: {error}") from error
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        log.warning("the pipeline's safety checker blackened images, which are measured as they are; load it without one")
    return np.asarray(output.images)


def quantise(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C) in [0, 1] as uint8, rounded to the nearest level as diffusers' `numpy_to_pil` does.

    Raises:
        InputError: for images that are not finite (`NotFiniteError`), of another shape, or outside [0, 1].
    """
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise reject("image shape", images.shape, "(N, H, W, 1 or 3) is needed")
    check_finite("images", torch.from_numpy(images))
    if images.min() < 0 or images.max() > 1:
        raise reject("image range", f"{images.min():.3g} to {images.max():.3g}", "values from 0 to 1 are needed")
    return (images * 255).round().astype(np.uint8)


def peak_memory(device: str) -> int:
    """Bytes: the most that torch had allocated on a CUDA device, or that this process had resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
