"""Put the trained emoji pipeline and what judges it into assets/, in half precision, with the captions and the SHA-256 of every file.

    python train/emoji_assets.py --data_dir outputs/emoji --teacher_dir outputs/emoji-teacher

The judge (eval/emoji_judge.py) must have been trained before: its features' statistics of the real pictures are part of the assets.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel

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
    output_dir: str = "assets"
    """Folder for emoji-stable-diffusion and emoji-evaluation, which must not exist."""


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


def main() -> None:
    (config,) = parse(None, Assets, prog="emoji_assets.py", description=__doc__ or "")
    data, teacher, output = Path(config.data_dir), Path(config.teacher_dir), Path(config.output_dir)
    pipeline, evaluation = output / "emoji-stable-diffusion", output / "emoji-evaluation"
    for folder in (pipeline, evaluation):
        if folder.exists():
            raise reject("output_dir", str(folder), "a folder that does not exist yet is needed")
    pipe = StableDiffusionPipeline.from_pretrained(teacher / "pipeline")
    pipe.to(torch.float16).save_pretrained(pipeline)
    save_in_half(pipe.text_encoder, pipeline / "text_encoder")
    shutil.copyfile(teacher / "teacher.json", pipeline / "training.json")
    shutil.copytree(teacher / "clip", evaluation / "clip")
    save_in_half(CLIPModel.from_pretrained(teacher / "clip"), evaluation / "clip")
    for split in SPLITS:
        shutil.copyfile(data / split / "prompts.txt", evaluation / f"{split}.txt")
        write_statistics(data / split, evaluation / f"{split}.npz")
    for folder in (pipeline, evaluation):
        (folder / "sha256.json").write_text(json.dumps(hashes(folder), indent=2) + "\n")
        print(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes")


if __name__ == "__main__":
    run_cli(main)
