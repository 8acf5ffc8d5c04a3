"""Checkpoints that are written beside the training steps."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .checkpoint import TensorGroups
from .errors import RunError


class BackgroundWriter:
    """Runs one write at a time in a thread, on a copy of the tensors: the steps that follow change the originals.

    Hashing, fsync and the file system let go of the interpreter, so only the copy holds up the step. It costs the checkpoint's size in
    main memory for as long as the write lasts.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[object] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last write has ended in an error, which `wait` raises."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def start(self, tensors: TensorGroups, write: Callable[[TensorGroups], object]) -> None:
        """Hand a copy of `tensors` to `write`, after the write before is through; its error, if it had one, is raised here."""
        self.wait()
        copied = {name: {key: value.detach().to("cpu", copy=True) for key, value in group.items()} for name, group in tensors.items()}
        self._running = self._thread.submit(write, copied)

    def wait(self) -> None:
        """Return when nothing is being written; raise what the last write raised, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def finish(self) -> None:
        """Return when nothing is being written; say on stderr what the last write raised, for another error is on its way."""
        try:
            self.wait()
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
