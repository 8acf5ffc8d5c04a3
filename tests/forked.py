"""Processes and ranks for tests, forked: importing takes longer than most tests."""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(act: Callable[[], Any], log: Path, **environment: str) -> int:
    """Process id of a child that runs `act` and exits with 0, with 1 after an exception, or with the code of a SystemExit."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= environment
        torch.set_num_threads(1)  # the parent's other threads did not survive
        tqdm.set_lock(threading.RLock())  # its own is shared with the parent, who would wait for ever for that of a killed process
        AcceleratorState._reset_state(reset_partial_state=True)
        act()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(process: int, log: Path, seconds: float = 900) -> int:
    """Exit code of the child, negative for the signal that ended it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, 9)
    os.waitpid(process, 0)
    raise TimeoutError(log.read_text(errors="replace")[-3000:])


def on_ranks(count: int, act: Callable[[int], Any], folder: Path) -> list[int]:
    """Exit codes of `count` ranks over gloo that run `act(rank)`; what rank r prints is in `folder`/rank-r.log."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    processes = [
        start(lambda: act(rank), log, RANK=str(rank), LOCAL_RANK=str(rank), **shared)  # noqa: B023
        for rank, log in enumerate(logs)
    ]
    return [end(process, log) for process, log in zip(processes, logs, strict=True)]
