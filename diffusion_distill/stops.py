"""Signals that end a run, or make it save, at a step boundary."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from . import parallel


class Stopped(SystemExit):
    """A signal ended the run after its checkpoint was written. The exit code is 128 + signal, as shells and schedulers expect."""

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.number, self.step = number, step

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"{name}: step {self.step} is saved; go on with --resume_from_checkpoint latest"


class Signals:
    """SIGTERM and SIGINT ask for an end, SIGUSR1 for a checkpoint; what any rank was sent holds for all of them.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self._end, self._save = 0, False

    @contextmanager
    def caught(self) -> Iterator["Signals"]:
        """Replace the handlers inside the block. Outside the main thread there is nothing to replace, and nothing is caught."""
        numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
        try:
            previous = {number: signal.signal(number, self._note) for number in numbers}
        except ValueError:  # how Python says that this is not the main thread
            previous = {}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agreed(self, device: torch.device, failed: bool = False) -> tuple[int, bool, bool]:
        """(signal that ends the run or 0, whether a checkpoint is asked for since the last call, whether any rank `failed`).

        The same on every rank.
        """
        end, save, broken = parallel.maximum((self._end, int(self._save), int(failed)), device)
        self._save = False
        return end, bool(save), bool(broken)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self._save = True
        elif number == signal.SIGINT and self._end:
            raise KeyboardInterrupt
        else:
            self._end = number
