"""The images that generated ones are compared with: a folder, or an .npz (this project's, EDM's, ADM's, clean-fid's, pytorch-fid's).

A file of ours also names the feature network, the images and their hash, and a distance in other features than the file's is refused. Files
of other tools are taken at their word: `mu`, `sigma`; `arr_0` (ADM: uint8 images); `feats` or `features` (clean-fid's for KID).
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common.command_line import InputError, reject
from common.distances import Statistics, statistics_of
from common.extractors import Extractor
from common.image_files import file_sha256, open_folder
from common.processes import Team
from common.set_features import array_features, set_features
from torch import Tensor

UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Reference:
    """Real images in a feature space: their statistics, and their features where there are images or a file holds them."""

    name: str
    sha256: str  # of the set of images, or of the file
    statistics: Statistics
    features: Tensor | None
    files: tuple[str, ...] = ()

    def needed_features(self) -> Tensor:
        """The features. InputError where the reference is a file without them."""
        if self.features is None:
            raise reject(
                "reference", self.name, "statistics alone do not do here; a folder of images, or .npz with arr_0 or feats, is needed"
            )
        return self.features


def load_reference(path: Path, extractor: Extractor, cache: Path | None, team: Team) -> Reference:
    """The reference in `path`: a folder of images, or an .npz; every process must call this.

    Raises:
        InputError: for a path that is neither, for a damaged file, and for one of another feature network.
    """
    if path.is_dir():
        images = open_folder(path)
        features = set_features(images, extractor, cache, team, "reference")
        return Reference(str(path), images.sha256(), statistics_of(features), features, images.files)
    if path.suffix != ".npz" or not path.is_file():
        raise reject("reference", str(path), "a folder of images, or an .npz with mu and sigma, is needed")
    return _from_arrays(path, _read(path), extractor)


def save_statistics(path: Path, reference: Reference, extractor: Extractor) -> None:
    """Write `mu`, `sigma` (float64) and what they belong to."""
    statistics = reference.statistics
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez(
        partial,
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        samples=statistics.samples or 0,
        images_sha256=reference.sha256,
        feature_network=extractor.name,
        feature_network_sha256=extractor.sha256,
        preprocessing=extractor.preprocessing,
    )
    partial.replace(path)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise InputError(f"reference: {path} is no whole .npz ({str(error).splitlines()[0]})") from error


def _from_arrays(path: Path, arrays: dict[str, np.ndarray], extractor: Extractor) -> Reference:
    _check_network(path, arrays, extractor)
    features: Tensor | None = None
    if "feats" in arrays or "features" in arrays:
        features = torch.from_numpy(arrays.get("feats", arrays.get("features"))).double()
    elif "arr_0" in arrays:
        features = array_features(_checked_images(path, arrays["arr_0"]), extractor)
    if "mu" in arrays and "sigma" in arrays:
        samples = int(arrays["samples"]) if "samples" in arrays else (None if features is None else len(features))
        statistics = _checked_statistics(path, arrays["mu"], arrays["sigma"], samples or None)
    elif features is not None:
        statistics = statistics_of(features)
    else:
        raise reject(str(path), sorted(arrays), "mu and sigma, or arr_0, or feats are needed")
    return Reference(str(path), file_sha256(path), statistics, features)


def _check_network(path: Path, arrays: dict[str, np.ndarray], extractor: Extractor) -> None:
    for key, value in (("feature_network_sha256", extractor.sha256), ("preprocessing", extractor.preprocessing)):
        if key in arrays and str(arrays[key]) != value:
            raise reject(
                "reference", f"{path.name} of {arrays['feature_network']}", f"{key} differs from that of features {extractor.name!r}"
            )


def _checked_images(path: Path, images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise reject(f"{path}, arr_0", f"{images.dtype} {images.shape}", "uint8 (N, H, W, 3) is needed")
    return images


def _checked_statistics(path: Path, mean: np.ndarray, covariance: np.ndarray, samples: int | None) -> Statistics:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise reject(f"{path}, mu and sigma", (mean.shape, covariance.shape), "(D,) and (D, D) are needed")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise reject(f"{path}, mu and sigma", "NaN or infinity", "finite numbers are needed")
    return Statistics(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), samples)
