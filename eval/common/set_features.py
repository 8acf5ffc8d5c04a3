"""Features of whole sets of images: computed in blocks that neither batch size nor number of processes changes, and kept on disk."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from common.checks import check_finite
from common.extractors import Extractor
from common.image_files import ImageSet, read_image
from common.processes import Team
from torch import Tensor
from tqdm import tqdm

BLOCK = 32  # images in one network call: fixed, because networks round differently in batches of another size
PART = 8  # blocks in one file


def set_features(images: ImageSet, extractor: Extractor, cache: Path | None, team: Team, name: str = "images") -> Tensor:
    """Features (N, D) of a set, float64 on the CPU, in its order; every process must call this, each computes its share.

    Args:
        cache: folder for features of sets that were seen before. None: `default_cache`.
        name: what the set is called in errors and on the progress bar.

    Raises:
        InputError: for files that are no images, or images that the network cannot take.
        NotFiniteError: where features hold NaN or infinity.
    """
    folder = (cache or default_cache()) / _key(images, extractor)
    parts = [list(range(len(images)))[first : first + BLOCK * PART] for first in range(0, len(images), BLOCK * PART)]
    own = [i for i in team.share(len(parts)) if not (folder / _file(i)).is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(own, desc=f"{extractor.name} of {name}", unit=f"x{BLOCK * PART} img", disable=team.rank > 0 or not own):
        _save(
            folder / _file(i), np.concatenate([_block(images, extractor, parts[i][k : k + BLOCK]) for k in range(0, len(parts[i]), BLOCK)])
        )
    team.wait()
    found = torch.from_numpy(np.concatenate([np.load(folder / _file(i), allow_pickle=False) for i in range(len(parts))])).double()
    check_finite(f"features of {name}", found)
    return found


def default_cache() -> Path:
    """Where features are kept: `EVAL_CACHE`, or a folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EVAL_CACHE") or Path(base, "diffusion-distill", "features"))


def array_features(images: np.ndarray, extractor: Extractor) -> Tensor:
    """Features (N, D), float64, of images (N, H, W, 3) uint8, in blocks as those of files."""
    rows = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    blocks = [extractor.features(rows[k : k + BLOCK]) for k in range(0, len(rows), BLOCK)]
    return torch.from_numpy(np.concatenate(blocks)).double()


def _block(images: ImageSet, extractor: Extractor, indices: list[int]) -> np.ndarray:
    return extractor.features([read_image(images.path(i)) for i in indices])


def _key(images: ImageSet, extractor: Extractor) -> str:
    """Hash of all that decides the features."""
    identity = [
        images.sha256(),
        len(images),
        extractor.name,
        extractor.sha256,
        extractor.preprocessing,
        extractor.device.split(":")[0],
        BLOCK,
        PART,
    ]
    return hashlib.sha256(json.dumps([*identity, torch.__version__]).encode()).hexdigest()[:32]


def _file(part: int) -> str:
    return f"{part:05d}.npy"


def _save(path: Path, features: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, features)
    partial.replace(path)
