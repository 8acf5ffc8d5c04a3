"""Prompts, class labels, images and pairs, and the folders and files that they are read from."""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from .cached import CachedDataset
from .errors import InputError, reject
from .pairs import PairDataset

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ITEMS_SEEN = 32  # of a data set of another class, to know it again
PIL_MODES = {1: "L", 3: "RGB"}  # by number of channels
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what Pillow's decoders raise

Condition = str | int  # a prompt or a class label


class _Conditioned(TypedDict):
    condition: Condition


class Item(_Conditioned, total=False):
    """One sample."""

    image: Tensor  # (C, H, W) float32 in [-1, 1]
    noise: Tensor  # of a stored pair, shaped like the teacher's samples
    x0: Tensor  # what the teacher drew from `noise`, or a stored image, encoded
    cond: dict[str, Tensor]  # the condition, stored encoded


@dataclass
class DataConfig:
    """What to train on: exactly one of `train_data_dir`, `prompts_file`, `dataset`, `num_classes`, `pairs_dir` and `cache_dir`."""

    train_data_dir: str | None = None
    """Folder of images: one sub-folder a class (labels count from 0 in sorted order of the names), or images with a
    metadata.jsonl of `file_name` and caption (or integer `label`) a line, as in Hugging Face's imagefolder."""
    caption_column: str = "text"
    """Key of the caption in metadata.jsonl."""
    prompts_file: str | None = None
    """Text file of one prompt a line; for training without images."""
    dataset: Literal["", "digits"] = ""
    """Built-in data: `digits` is the training split of scikit-learn's 8x8 digits."""
    num_classes: int | None = None
    """Number of class labels; for training a class-conditional teacher without images."""
    pairs_dir: str | None = None
    """Folder of pairs that train/make_pairs.py drew from the teacher."""
    cache_dir: str | None = None
    """Folder in which train/make_cache.py stored any of these, encoded by the teacher."""
    resolution: int | None = None
    """Side of the training images in pixels. None: the teacher's own."""
    center_crop: bool = True
    """Scale the shorter side to `resolution` and crop the centre. Off: stretch the image to a square."""
    dataloader_num_workers: int = 0
    """Processes that load images; 0 loads in the main process."""

    def __post_init__(self) -> None:
        if len(given := self.sources()) != 1:
            fields = "train_data_dir, prompts_file, dataset, num_classes, pairs_dir, cache_dir"
            raise InputError(f"{fields}: got {' and '.join(given) or 'none'}; exactly one of the six says what to train on")
        for name, minimum in (("num_classes", 1), ("resolution", 1), ("dataloader_num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise reject(name, value, f"{minimum} or more")
        if not self.caption_column:
            raise reject("caption_column", self.caption_column, "a key of metadata.jsonl")

    def sources(self) -> list[str]:
        """Names of the fields that say what to train on and are set."""
        given = [name for name in ("train_data_dir", "prompts_file", "dataset", "pairs_dir", "cache_dir") if getattr(self, name)]
        return given + (["num_classes"] if self.num_classes is not None else [])


@dataclass(frozen=True)
class ImageFiles:
    """Images by index, read from disk at each access as (channels, resolution, resolution) float32 in [-1, 1]."""

    paths: Sequence[Path]
    channels: int
    resolution: int
    center_crop: bool

    def __getitem__(self, index: int) -> Tensor:
        return load_image(self.paths[index], self.channels, self.resolution, self.center_crop)


class ConditionDataset(Dataset[Item]):
    """Conditions, with the image of the same index where there are images."""

    def __init__(self, conditions: Sequence[Condition], images: ImageFiles | Tensor | None = None):
        self.conditions, self.images = conditions, images

    def __len__(self) -> int:
        return len(self.conditions)

    def __getitem__(self, index: int) -> Item:
        item: Item = {"condition": self.conditions[index]}
        if self.images is not None:
            item["image"] = self.images[index]
        return item


def build_dataset(
    config: DataConfig,
    *,
    needs_images: bool,
    channels: int | None,
    resolution: int | None,
    num_classes: int | None = None,
    needs_pairs: bool = False,
) -> ConditionDataset | PairDataset | CachedDataset:
    """The samples that `config` describes; without `needs_images`, no image is opened, and without `needs_pairs`, no pair.

    `channels`, `resolution` (pixels) and `num_classes` are the teacher's, None where it has none; `config.resolution` comes
    before `resolution`. InputError: missing or empty sources, images or pairs needed where there are none, metadata lines that are
    not usable, labels the teacher does not know. An unreadable image is an InputError when it is loaded.
    """
    if config.cache_dir:
        cached = CachedDataset(config.cache_dir, needs_images=needs_images, needs_pairs=needs_pairs)
        _check_labels("cache_dir", cached.conditions, num_classes)
        return cached
    side = config.resolution or resolution
    if needs_images:
        _check_image_settings(config, channels, side)
    if needs_pairs and not config.pairs_dir:
        raise reject("pairs_dir", config.pairs_dir, "this method trains on a teacher's pairs; draw them with train/make_pairs.py")
    if config.pairs_dir:
        pairs = PairDataset(config.pairs_dir)
        _check_labels("pairs_dir", pairs.conditions, num_classes)
        return pairs if needs_pairs else ConditionDataset(pairs.conditions)
    if config.prompts_file:
        return ConditionDataset([line for _, line in _numbered_lines("prompts_file", Path(config.prompts_file))])
    if config.num_classes is not None:
        _check_class_count("num_classes", config.num_classes, num_classes)
        return ConditionDataset(range(config.num_classes))
    if config.dataset == "digits":
        images, labels = load_digits_split(side if needs_images else None)
        _check_class_count("dataset", 10, num_classes)
        return ConditionDataset(labels, images.expand(-1, channels or 1, -1, -1) if needs_images else None)
    conditions, paths = _read_folder(config, needs_images, num_classes)
    files = ImageFiles(paths, channels, side, config.center_crop) if needs_images and channels and side else None
    return ConditionDataset(conditions, files)


def check_sources(config: DataConfig, needs_images: bool, needs_pairs: bool) -> None:
    """Raise InputError for what is wrong with the sources themselves, whatever the teacher. No image is opened."""
    if needs_images and not config.cache_dir:
        _check_has_images(config)
    if config.cache_dir:
        CachedDataset(config.cache_dir, needs_images=needs_images, needs_pairs=needs_pairs)
    elif config.train_data_dir:
        _read_folder(config, needs_images, None)
    else:
        build_dataset(config, needs_images=False, needs_pairs=needs_pairs, channels=None, resolution=None)


def fingerprint(dataset: Dataset[Any]) -> dict[str, Any]:
    """Number of samples and a SHA-256 that tells one set from another.

    It covers all conditions; of pairs and caches, the hashes of all shards; of images, their values or all file names, with a thousand of
    the sizes: a folder may be large and far away. Of a class that is not this package's, it covers what some items hold.
    """
    found: dict[str, Any] = {"samples": len(dataset)}  # type: ignore[arg-type]
    parts: list[Any]
    if isinstance(dataset, PairDataset | CachedDataset):
        parts = [dataset.settings, dataset.shards, dataset.conditions]
    elif isinstance(dataset, ConditionDataset):
        parts = [list(dataset.conditions), _image_part(dataset.images)]
    else:
        parts = _some_items(dataset, found["samples"])
    return found | {"SHA-256": hashlib.sha256(json.dumps(parts).encode()).hexdigest()}


def _some_items(dataset: Dataset[Any], samples: int) -> list[Any]:
    """What about ITEMS_SEEN items hold, each read twice: an entry that changed meanwhile, such as an augmented image, says nothing."""
    numbers = range(0, samples, max(1, samples // ITEMS_SEEN))
    with torch.random.fork_rng():
        first, again = ([{key: _digest(value) for key, value in dataset[i].items()} for i in numbers] for _ in range(2))
    changing = {key for one, other in zip(first, again, strict=True) for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    return [{key: digest for key, digest in item.items() if key not in changing} for item in first]


def _digest(value: Any) -> str | None:
    """Of text, numbers and tensors; nothing tells other objects apart from one process to the next."""
    if isinstance(value, dict):
        return json.dumps({key: _digest(part) for key, part in value.items()})
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + content).hexdigest()
    return repr(value) if isinstance(value, str | int | float) else None


def pair_settings(dataset: Dataset[Any]) -> dict[str, Any] | None:
    """How the pairs of a data set were drawn, also of a cache; None for one of no pairs."""
    if isinstance(dataset, CachedDataset):
        stored: dict[str, Any] | None = dataset.settings["pairs"]
        return stored
    return dataset.settings if isinstance(dataset, PairDataset) else None


def _image_part(images: ImageFiles | Tensor | None) -> Any:
    if images is None:
        return None
    if isinstance(images, Tensor):
        return hashlib.sha256(images.contiguous().numpy().data).hexdigest()
    some = images.paths[:: max(1, len(images.paths) // 1000)]
    return [[path.name for path in images.paths], [path.stat().st_size for path in some]]


def load_digits_split(resolution: int | None = 8) -> tuple[Tensor, list[int]]:
    """The 1,297 training digits of scikit-learn, (1297, 1, 8, 8) float32 in [-1, 1], and their labels.

    The other 500 are the held-out split of `train_test_split(test_size=500, stratify=labels, random_state=0)`.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise reject("dataset", "digits", "it needs scikit-learn: pip install 'diffusion-distill[demo]'") from None
    if resolution not in (None, 8):
        raise reject("resolution", resolution, "digits are 8x8 pixels")
    digits = load_digits()
    images, _, labels, _ = train_test_split(digits.images, digits.target, test_size=500, stratify=digits.target, random_state=0)
    return torch.from_numpy(images).float().unsqueeze(1) / 8 - 1, labels.tolist()


def load_image(path: Path, channels: int, resolution: int, center_crop: bool = True) -> Tensor:
    """An image file as (channels, resolution, resolution) float32 in [-1, 1]; an alpha channel is dropped.

    Bicubic with antialiasing, upright as its EXIF orientation says. InputError names a file that cannot be read or is not 8-bit.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable image ({error})") from None
    if image.mode not in _EIGHT_BIT_MODES:  # Pillow clips 16-bit pixels at 255 without a word
        raise reject(str(path), image.mode, f"an image of 8 bits a channel, of mode {', '.join(_EIGHT_BIT_MODES)}")
    image = _square(image.convert(PIL_MODES[channels]), resolution, center_crop)
    pixels = torch.from_numpy(np.array(image)).reshape(resolution, resolution, channels)
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def _square(image: Image.Image, side: int, center_crop: bool) -> Image.Image:
    if not center_crop:
        return image.resize((side, side), Image.Resampling.BICUBIC)
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def _check_has_images(config: DataConfig) -> None:
    if not config.train_data_dir and not config.dataset:
        source = "prompts_file" if config.prompts_file else "pairs_dir" if config.pairs_dir else "num_classes"
        raise InputError(f"{source}: it holds no images; give train_data_dir (or dataset), or choose settings that need no images")


def _check_image_settings(config: DataConfig, channels: int | None, side: int | None) -> None:
    _check_has_images(config)
    if channels not in PIL_MODES:
        raise reject("channels", channels, "the teacher's images must have 1 channel (grey) or 3 (RGB)")
    if side is None:
        raise reject("resolution", side, "the side of the training images in pixels; the teacher does not say it")


def _check_class_count(field: str, count: int, num_classes: int | None) -> None:
    if num_classes is not None and count > num_classes:
        raise InputError(f"{field}: got {count} classes; the teacher knows {num_classes}")


def _check_labels(field: str, conditions: Sequence[Condition], num_classes: int | None) -> None:
    labels = [condition for condition in conditions if isinstance(condition, int)]
    _check_class_count(field, max(labels, default=-1) + 1, num_classes)


def _numbered_lines(field: str, path: Path) -> list[tuple[int, str]]:
    """Stripped lines of a text file that are not blank, each with its number from 1."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise reject(field, str(path), f"a readable text file in UTF-8 ({error})") from None
    kept = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise reject(field, str(path), "at least one line that is not blank")
    return kept


def _read_folder(config: DataConfig, needs_images: bool, num_classes: int | None) -> tuple[list[Condition], list[Path]]:
    """Conditions and, where images are needed, their paths."""
    root = Path(config.train_data_dir or "")
    if not root.is_dir():
        raise reject("train_data_dir", str(root), "an existing folder")
    if (root / "metadata.jsonl").is_file():
        _check_inside(root.resolve(), root / "metadata.jsonl", "train_data_dir")
        return _read_metadata(root, config.caption_column, needs_images, num_classes)
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes or any(_is_image(p.name) for p in root.iterdir()):
        raise reject("train_data_dir", str(root), "a folder with a metadata.jsonl, or with nothing but one sub-folder of images a class")
    _check_class_count("train_data_dir", len(classes), num_classes)
    conditions: list[Condition] = []
    paths: list[Path] = []
    for label, folder in enumerate(classes):
        found = _images_below(root, folder)
        conditions += [label] * len(found)
        paths += found
    return conditions, paths


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _images_below(root: Path, folder: Path) -> list[Path]:
    found = sorted(Path(base, name) for base, _, names in os.walk(folder) for name in names if _is_image(name))
    if not found:
        raise reject("train_data_dir", str(folder), f"a class needs at least one image ({', '.join(SUFFIXES)})")
    for path in (folder, *found):
        if path.is_symlink():
            _check_inside(root.resolve(), path, "train_data_dir")
    return found


def _check_inside(real_root: Path, path: Path, where: str) -> None:
    try:
        inside = path.resolve().is_relative_to(real_root)
    except (OSError, ValueError):  # a loop of links, a name that is too long, a null byte
        raise reject(where, str(path)[:200], "no such file can be") from None
    if not inside:
        raise reject(where, str(path), f"a file inside {real_root}; links out of the folder are not followed")


def _read_metadata(root: Path, caption_column: str, needs_images: bool, num_classes: int | None) -> tuple[list[Condition], list[Path]]:
    conditions: list[Condition] = []
    paths: list[Path] = []
    real_root = root.resolve()
    for number, line in _numbered_lines("train_data_dir", root / "metadata.jsonl"):
        where = f"{root / 'metadata.jsonl'}, line {number}"
        row = _parse_row(line, where)
        conditions.append(_condition_of(row, caption_column, num_classes, where))
        if type(conditions[0]) is not type(conditions[-1]):
            raise InputError(f"{where}: got {conditions[-1]!r} after {conditions[0]!r}; all lines have a caption, or all a label")
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise reject(f"{where}: file_name", name, "the path of an image, relative to the folder")
        if needs_images:
            _check_inside(real_root, root / name, f"{where}: file_name")
            if not _is_file(root / name):
                raise reject(f"{where}: file_name", name[:200], f"no such file in {root}")
            paths.append(root / name)
    return conditions, paths


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, a number of thousands of digits, a nesting as deep
        row = None
    if not isinstance(row, dict):
        raise reject(where, line[:80], "a JSON object on each line")
    return row


def _condition_of(row: dict[str, Any], caption_column: str, num_classes: int | None, where: str) -> Condition:
    """The caption, or the label of a line that has no caption."""
    if caption_column in row or "label" not in row:
        caption = row.get(caption_column)
        if not isinstance(caption, str):
            raise reject(f"{where}: {caption_column}", caption, f"a caption as text under {caption_column!r}, or an integer 'label'")
        return caption
    label = row["label"]
    if type(label) is not int or label < 0 or (num_classes is not None and label >= num_classes):
        raise reject(f"{where}: label", label, f"0 to {num_classes - 1}" if num_classes else "a whole number, 0 or more")
    return label
