"""Put the trained emoji pipeline and what judges it into assets/, in half precision, with the captions and the SHA-256 of every file.

    python train/emoji_assets.py --data_dir outputs/emoji --teacher_dir outputs/emoji-teacher
    python train/emoji_assets.py --flow_dir outputs/emoji-flow        # the flow-matching pipeline alone

The judge (eval/emoji_judge.py) must have been trained before: its features' statistics of the real pictures are part of the assets.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPModel, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from diffusion_distill.config import parse, run_cli
from diffusion_distill.errors import InputError, reject

SPLITS = ("train", "held_out")
JUDGE = "eval/emoji_judge.py:judge"  # relative: the name goes into the statistics


@dataclass
class Assets:
    data_dir: str = "outputs/emoji"
    """Folder that emoji_data.py wrote."""
    teacher_dir: str = "outputs/emoji-teacher"
    """Folder that emoji_teacher.py wrote."""
    flow_dir: str | None = None
    """Folder that emoji_flow.py wrote; its pipeline is packed, and nothing else."""
    output_dir: str = "assets"
    """Folder for emoji-stable-diffusion and emoji-evaluation, or emoji-stable-diffusion-3, which must not exist."""


def save_in_half(model: torch.nn.Module, folder: Path) -> None:
    """Weights in float16 with a configuration that asks for float32: transformers would otherwise run the file's own precision."""
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_statistics(images: Path, output: Path) -> None:
    """Mean and covariance of the judge's features of a folder of images."""
    command = [
        sys.executable,
        "eval/reference_statistics.py",
        str(images.resolve()),
        "--features",
        JUDGE,
        "--output",
        str(output.resolve()),
    ]
    if subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode:
        raise InputError(f"{images}: no statistics; {' '.join(command)}")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "sha256.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pack_pipeline(source: Path, record: Path, folder: Path) -> None:
    """The pipeline of `source` with the record of its training."""
    pipe = DiffusionPipeline.from_pretrained(source)
    pipe.to(torch.float16).save_pretrained(folder)
    for name, part in pipe.components.items():
        if isinstance(part, PreTrainedModel):
            save_in_half(part, folder / name)
    shutil.copyfile(record, folder / "training.json")


def pack_evaluation(data: Path, clip: Path, folder: Path) -> None:
    """The CLIP that scores, the captions, and the judge's statistics of the pictures."""
    shutil.copytree(clip, folder / "clip")
    save_in_half(CLIPModel.from_pretrained(clip), folder / "clip")
    for split in SPLITS:
        shutil.copyfile(data / split / "prompts.txt", folder / f"{split}.txt")
        write_statistics(data / split, folder / f"{split}.npz")


def main() -> None:
    (config,) = parse(None, Assets, prog="emoji_assets.py", description=__doc__ or "")
    teacher, output = Path(config.teacher_dir), Path(config.output_dir)
    packers = {
        "emoji-stable-diffusion": partial(pack_pipeline, teacher / "pipeline", teacher / "teacher.json"),
        "emoji-evaluation": partial(pack_evaluation, Path(config.data_dir), teacher / "clip"),
    }
    if config.flow_dir is not None:
        flow = Path(config.flow_dir)
        packers = {"emoji-stable-diffusion-3": partial(pack_pipeline, flow / "pipeline", flow / "flow.json")}
    for name in packers:
        if (output / name).exists():
            raise reject("output_dir", str(output / name), "a folder that does not exist yet is needed")
    for name, pack in packers.items():
        folder = output / name
        pack(folder)
        (folder / "sha256.json").write_text(json.dumps(hashes(folder), indent=2) + "\n")
        print(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes")


if __name__ == "__main__":
    run_cli(main)
