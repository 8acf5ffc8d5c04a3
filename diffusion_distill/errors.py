"""Exceptions that are shown as a single line, each kind with an exit code of its own (docs/reliability.md)."""

from typing import ClassVar


class InputError(ValueError):
    """A wrong value from outside (flag, file, folder, pipeline). The message names the field, the value and what is accepted."""

    exit_code: ClassVar[int] = 2


class RunError(RuntimeError):
    """Something ended a run that had begun; its last checkpoint is sound, and the message says what to do."""

    exit_code: ClassVar[int] = 1


class NonFiniteError(RunError):
    """A loss, a gradient or a weight stopped being a number; nothing was stepped with it, and nothing was saved of it."""

    exit_code: ClassVar[int] = 3


class CheckpointError(RunError):
    """A checkpoint could not be written."""

    exit_code: ClassVar[int] = 4


class LostRankError(RunError):
    """A rank did not come to where all the others were waiting."""

    exit_code: ClassVar[int] = 5


def reject(field: str, value: object, accepted: str) -> InputError:
    """Return (not raise) the error for `field` having received `value` where `accepted` is what would do."""
    return InputError(f"{field}: got {value!r}; {accepted}")
