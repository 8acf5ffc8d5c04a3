"""Statistics of reference images as .npz with `mu` and `sigma`, which EDM's, ADM's, clean-fid's and pytorch-fid's tools read and write too.

python eval/reference_statistics.py IMAGES --output reference.npz
python eval/fid.py SAMPLES --reference reference.npz
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from common.command_line import reject, run
from common.extractors import load_extractor
from common.processes import join
from common.references import load_reference, save_statistics


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Statistics of real images, to compare generated ones with."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of images, or an .npz with arr_0."""
    output: Path
    """The .npz to write."""
    features: str = "inception"
    """inception, inception_clean, dinov2, clip, a registered small network, or FILE.py:NAME."""
    weights: Path | None = None
    """Weights of the feature network; None takes them from torch's or Hugging Face's cache."""
    cache_dir: Path | None = None
    """Where features are kept; None is a folder in the user's cache."""
    device: str = "auto"
    """Where the network runs; auto takes CUDA where there is some."""


def main(config: ReferenceConfig) -> None:
    if config.output.suffix != ".npz":
        raise reject("output", str(config.output), "a file that ends in .npz")
    team = join(config.device)
    extractor = load_extractor(config.features, config.weights, team.device)
    reference = load_reference(config.folder, extractor, config.cache_dir, team)
    if team.rank == 0:
        save_statistics(config.output, reference, extractor)
        print(f"{config.output}: {reference.statistics.samples or 'unknown'} images, features {extractor.name}")
    team.leave()


if __name__ == "__main__":
    run(ReferenceConfig, main, "many")
