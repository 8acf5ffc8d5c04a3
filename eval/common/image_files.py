"""Sets of image files: what is in a folder, in which order, with which prompts or labels, and how a file becomes numbers."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.command_line import InputError, reject
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
RECORDS = ("prompts.jsonl", "metadata.jsonl")
EIGHT_BIT = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
CHUNK = 2**20


@dataclass(frozen=True)
class ImageSet:
    """Image files in a fixed order; `prompts` and `labels`, where they are known, have one entry for each file."""

    folder: Path
    files: tuple[str, ...]
    prompts: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.folder / self.files[index]

    def sha256(self) -> str:
        """SHA-256 over the content of the files in their order: the same set has the same hash wherever it lies."""
        digest = hashlib.sha256()
        for name in self.files:
            digest.update(bytes.fromhex(file_sha256(self.folder / name)))
        return digest.hexdigest()

    def groups(self) -> dict[str, list[int]]:
        """Indices of the images of each prompt, or of each label; none where neither is known."""
        found: dict[str, list[int]] = {}
        for i, key in enumerate(self.prompts or self.labels or ()):
            found.setdefault(str(key), []).append(i)
        return found


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def open_folder(folder: Path, samples: int | None = None) -> ImageSet:
    """The images of a folder; the first `samples` of them, if given.

    With a prompts.jsonl or metadata.jsonl, lines of `file_name` with `prompt` (or `text`) or `label`: the files that it names, in
    its order. Without: all images of the folder and of those below it, by name.

    Raises:
        InputError: for a folder that is missing or has no images or too few, and for a record that does not fit the files.
    """
    if not folder.is_dir():
        raise reject("folder", str(folder), "a folder of images or of a diffusers pipeline is needed")
    record = next((folder / name for name in RECORDS if (folder / name).is_file()), None)
    found = _recorded(folder, record) if record else ImageSet(folder, _sorted_files(folder))
    if not found.files:
        raise reject("folder", str(folder), f"no images there; files that end in {', '.join(SUFFIXES)} are read")
    if samples is None:
        return found
    if not 1 <= samples <= len(found):
        raise reject("samples", samples, f"{folder} holds {len(found)} images")
    return first(found, samples)


def first(images: ImageSet, count: int) -> ImageSet:
    """The first `count` images of a set."""
    prompts, labels = images.prompts and images.prompts[:count], images.labels and images.labels[:count]
    return replace(images, files=images.files[:count], prompts=prompts, labels=labels)


def read_image(path: Path) -> Tensor:
    """An image file as uint8 (3, H, W); grey becomes three equal channels, transparency is dropped.

    Raises:
        InputError: for a missing or damaged file, and for one with more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BIT:
                raise reject(str(path), f"mode {image.mode}", "images of 8 bits a channel are needed, 0 to 255")
            pixels = np.array(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:  # Pillow's ways to say: damaged
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def write_png(image: np.ndarray, path: Path) -> None:
    """Write (H, W, C) uint8, C 1 or 3, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(partial, format="PNG", compress_level=1)
    partial.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; empty lines are skipped.

    Raises:
        InputError: for a line that is no JSON object.
    """
    return list(_objects(path, path.read_text(encoding="utf-8").splitlines()))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _objects(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise reject(f"{path}, line {number}", type(row).__name__, "a JSON object is needed")
        yield row


def _recorded(folder: Path, record: Path) -> ImageSet:
    rows = read_jsonl(record)
    names = [row.get("file_name") for row in rows]
    missing = [name for name in names if not isinstance(name, str) or not (folder / name).is_file()]
    if missing:
        raise reject(str(record), missing[0], f"{len(missing)} of {len(names)} lines name no file of {folder}")
    prompts = [row.get("prompt", row.get("text")) for row in rows]
    labels = [row.get("label") for row in rows]
    return ImageSet(
        folder,
        tuple(map(str, names)),
        prompts=tuple(map(str, prompts)) if all(isinstance(prompt, str) for prompt in prompts) else None,
        labels=tuple(map(int, labels)) if all(isinstance(label, int) for label in labels) else None,  # type: ignore[arg-type]
    )


def _sorted_files(folder: Path) -> tuple[str, ...]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return tuple(sorted(path.relative_to(folder).as_posix() for path in found))
