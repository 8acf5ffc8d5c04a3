"""What no metric can be computed from."""

from common.command_line import InputError
from torch import Tensor


class NotFiniteError(InputError):
    """Samples or features hold NaN or infinity: the model has diverged."""


def check_finite(name: str, values: Tensor) -> None:
    """Raise `NotFiniteError` unless every row of `values` (N, ...) is finite."""
    bad = int((~values.flatten(1).isfinite().all(1)).sum())
    if bad:
        raise NotFiniteError(f"{name}: {bad} of {len(values)} hold NaN or infinity; finite numbers are needed")
