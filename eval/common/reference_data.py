"""The real images that generated ones are judged by."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from common.command_line import reject
from torch import Tensor


@dataclass(frozen=True)
class ReferenceData:
    """Images (N, C, H, W), float32 in [0, 1] as pipelines return them, and labels (N,), int64 from 0 to `classes` - 1."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.train_images.shape[1:])


@cache
def digits() -> ReferenceData:
    """scikit-learn's digits, 1,797 grey 8x8 images: 1,297 for training and 500 held out, stratified, always the same split."""
    from sklearn.datasets import load_digits  # only this data set needs it
    from sklearn.model_selection import train_test_split

    values, labels = load_digits(return_X_y=True)
    pixels = values / 8 - 1
    train, test, train_labels, test_labels = train_test_split(pixels, labels, test_size=500, stratify=labels, random_state=0)

    def images(rows: object) -> Tensor:
        return (torch.as_tensor(rows, dtype=torch.float32).reshape(-1, 1, 8, 8) + 1) / 2

    return ReferenceData("digits", images(train), torch.as_tensor(train_labels), images(test), torch.as_tensor(test_labels))


DATASETS: dict[str, Callable[[], ReferenceData]] = {"digits": digits}


def load_reference_data(name: str) -> ReferenceData:
    """The data set called `name`.

    Raises:
        InputError: for an unknown name.
    """
    if name not in DATASETS:
        raise reject("dataset", name, "accepted: " + ", ".join(sorted(DATASETS)))
    return DATASETS[name]()
