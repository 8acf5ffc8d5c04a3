"""The processes of one command: `accelerate launch` or `torchrun` starts them, each takes its share, the first one reports."""

import os
from dataclasses import dataclass

import torch
from accelerate import PartialState
from common.command_line import reject
from common.generate import find_device


@dataclass(frozen=True)
class Team:
    """This process among those of the command. They share files alone: what one wrote the others read after `wait`."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def share(self, parts: int) -> range:
        """Which of `parts` pieces of work are this process's own."""
        return range(self.rank, parts, self.size)

    def leave(self) -> None:
        """End what `join` began."""
        if self.size > 1:
            PartialState().destroy_process_group()


def join(device: str = "auto") -> Team:
    """Join the processes that were started with this one. `device` "auto" is the process's own CUDA device, or the CPU.

    Raises:
        InputError: where the processes that were started do not find each other.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return Team(device=find_device(device))
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    if state.num_processes != started:
        raise reject("number of processes", started, f"accelerate sees {state.num_processes}; on CPUs, set ACCELERATE_USE_CPU=true")
    return Team(state.process_index, state.num_processes, str(state.device) if device == "auto" else find_device(device))
