"""README.md of an exported student."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

SAVING = {  # by the field of the pipeline's output
    "images": ("images = pipe({}).images", 'images[0].save("sample.png")'),
    "frames": (
        'video = pipe({}, output_type="pil").frames[0]',
        'video[0].save("sample.gif", save_all=True, append_images=video[1:], duration=62)  # or diffusers.utils.export_to_video',
    ),
}


_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " ", **{mark: "\\" + mark for mark in "\\`[]|*"}})


def escaped(value: object) -> str:
    """Text that Markdown shows as it is, in one line of prose or one cell of a table: captions and names come from anywhere."""
    return str(value).translate(_MARKUP)


def usage(call: Mapping[str, Any], condition: Mapping[str, Any], custom_pipeline: bool, output: str = "images") -> str:
    """Python code that samples the student as it was trained; it runs as it stands inside the exported folder.

    `output` is the field of the pipeline's output: "images", or "frames" for videos.
    """
    options = ", trust_remote_code=True" if custom_pipeline else ""
    return "\n".join(
        [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("."{options})  # "." is this folder; its name on the Hub works as well',
            *_sampled(call, condition, output),
        ]
    )


def lora_usage(
    teacher: str | None, scheduler: str, folder: str, call: Mapping[str, Any], condition: Mapping[str, Any], output: str = "images"
) -> str:
    """Python code that puts the student's adapter, in `folder` of the exported one, onto the teacher and samples it."""
    return "\n".join(
        [
            f"from diffusers import DiffusionPipeline, {scheduler}",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({teacher or 'the teacher'!r})",
            f'pipe.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")',
            f'pipe.load_lora_weights("{folder}")',
            *_sampled(call, condition, output),
        ]
    )


def _sampled(call: Mapping[str, Any], condition: Mapping[str, Any], output: str) -> list[str]:
    arguments = ", ".join(f"{name}={value!r}" for name, value in [*condition.items(), *call.items()])
    return [line.replace("{}", arguments) for line in SAVING[output]]


def model_card(
    record: Mapping[str, Any], code: str, samples: str | None = None, captions: Sequence[Any] = (), lora_code: str | None = None
) -> str:
    """The text of the card.

    Args:
        record: what `distillation.json` holds.
        code: what `usage` returned.
        samples: file name of the picture of samples, if there is one.
        captions: its conditions, row by row.
        lora_code: what `lora_usage` returned, where the adapter is there by itself too.
    """
    teacher = str(record["teacher"]) if record.get("teacher") else None
    local = teacher is not None and (Path(teacher).exists() or teacher.count("/") != 1)
    data = ModelCardData(
        base_model=None if local else teacher,
        library_name="diffusers",
        license=record.get("license"),
        pipeline_tag=("text-to-video" if ".frames" in code else "text-to-image") if "prompt" in code else None,
        tags=["diffusion-distill", "distillation", "few-step"],
    )
    name = Path(teacher).name if teacher and local else teacher
    counts = [len(sampler["timesteps"]) for sampler in record["samplers"]]
    steps = "/".join(map(str, sorted(counts)))
    calls = "one network call" if counts == [1] else f"{steps} network calls"
    method = f" with {record['method']}" if record.get("method") else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {steps}-step student of {escaped(name or 'a diffusion model')}",
        f"Distilled{method} by diffusion-distill. An image takes {calls} and no guidance.",
        f"## Use\n```python\n{code}\n```",
        f"The adapter alone, on the teacher as it is:\n```python\n{lora_code}\n```" if lora_code else "",
        "These arguments belong to the model: other timesteps, step counts or guidance are not what it was trained for.",
        _sampling(record),
        _table("Metrics", record.get("metrics")),
        _table("Training", record.get("hyper_parameters")),
        f"## Samples\n![samples]({samples})\n\n{_captions(captions)}".rstrip() if samples else "",
        _versions(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sampling(record: Mapping[str, Any]) -> str:
    words = {"sde": "predict x0, then add fresh noise", "ode": "deterministic", "tcd": "deterministic, then fresh noise: the share `eta`"}
    rows = "\n".join(_sampler_row(sampler) for sampler in record["samplers"])
    kind = f"{record['sampling']} ({words[record['sampling']]}); scheduler `{record['scheduler']}`"
    return f"## Sampling\n{kind}.\n\n| steps | timesteps | arguments of the call |\n|---|---|---|\n{rows}"


def _sampler_row(sampler: Mapping[str, Any]) -> str:
    grid = ", ".join(f"{t:g}" for t in sampler["timesteps"])
    call = ", ".join(f"{name}={value!r}" for name, value in sampler["call"].items())
    return f"| {len(sampler['timesteps'])} | {grid} | {f'`{call}`' if call else 'none: the defaults'} |"


def _captions(captions: Sequence[Any]) -> str:
    return "From left to right, top to bottom: " + "; ".join(map(escaped, captions)) if captions else ""


def _table(title: str, values: Mapping[str, Any] | None) -> str:
    if not values:
        return ""
    rows = "\n".join(f"| {escaped(name)} | {escaped(value)} |" for name, value in values.items())
    return f"## {title}\n| | |\n|---|---|\n{rows}"


def _versions(record: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in (record.get("packages") or {}).items() if version)
    commit = f"Commit {record['commit']}. " if record.get("commit") else ""
    return f"## Versions\n{commit}{packages}".rstrip() if commit or packages else ""
