"""CPU time of each turn of every method, as its digits recipe sets it, over its floor: the bare passes that it cannot avoid.

    python benchmarks/step_cost.py --output benchmarks/results/step_cost_methods_cpu.json

A turn runs as the trainer runs it, and what its hooks saw is run again at once: the same modules with the same inputs, gradients and
adapters, in the order that the turn cannot avoid: forward passes with gradient, then those without (their memory comes on top of the
graph's), then one backward pass. That is the floor of this very step, so a roll-out that is longer in one step than in the next cancels.
Both are process CPU time (on CUDA: wall time between two synchronisations); the ratio is the median over the pairs.

An adapter's own layers belong to the floor, switching it on and off does not. A network that is run half-way for its features is counted
where a discriminator on them calls it.
"""

import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from diffusion_distill.adapters import switched_on
from diffusion_distill.build import build_networks
from diffusion_distill.config import from_mapping, parse, read_yaml, run_cli
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.ema import EMA
from diffusion_distill.experts import Experts
from diffusion_distill.families import family_of
from diffusion_distill.methods import METHODS, Batch, Method
from diffusion_distill.networks import Networks
from diffusion_distill.optim import build_optimizer
from diffusion_distill.provenance import provenance, write_json
from diffusion_distill.random import SampleRandom
from diffusion_distill.train_config import TrainConfig
from train.digits_teacher import digits_pipeline

LATE = 10**6  # a step after every warm-up and in the last stage; a multiple of every update interval


@dataclass
class StepCost:
    output: str = "benchmarks/results/step_cost.json"
    """JSON file of the results."""
    repeats: int = 15
    """Steps of each turn, with and without everything beside its passes."""
    batch_size: int = 64
    """Samples a turn."""
    process: str = "flow"
    """The digits teacher's: flow, v_prediction or epsilon."""
    methods: tuple[str, ...] = ()
    """Methods to measure. Empty: all."""
    lora_rank: int = 0
    """Rank of a LoRA adapter in place of the student's weights, where a method trains copies. 0: all weights."""
    guidance_scale: float | None = None
    """The teacher's guidance in place of the recipe's, for methods that have it."""


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of CPU time (wall time on CUDA) of one run, and its result."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = clock()
    result = run()
    synchronize()
    return 1e3 * (clock() - start), result


@dataclass
class Pass:
    """One call of a network, to be made again with nothing around it."""

    network: nn.Module
    adapter: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    with_gradient: bool

    def again(self) -> Tensor:
        output = self.network(*self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


def detached(value: Any) -> Any:
    """The same values as the start of a graph of their own."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


class Recorder:
    """The calls that a turn makes: of the diffusers networks, and of what else the method trains. One inside another is not counted."""

    def __init__(self, nets: Networks):
        self.passes: list[Pass] = []
        self.roles = {role: getattr(nets, role) for role in nets if not isinstance(getattr(nets, role), Experts)}
        self.adapter: str | None = None
        self.depth = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            for net in self.roles.values():
                if isinstance(net, Denoiser):
                    stack.callback(net.register_forward_pre_hook(self._switch).remove)
            for network in {net.model if isinstance(net, Denoiser) else net for net in self.roles.values()}:
                stack.callback(network.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(network.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _switch(self, denoiser: Denoiser, args: Any) -> None:
        self.adapter = denoiser.adapter

    def _enter(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth == 1:
            inputs = tuple(map(detached, args)), {name: detached(value) for name, value in kwargs.items()}
            self.passes.append(Pass(network, self.adapter, *inputs, torch.is_grad_enabled()))

    def _leave(self, *_: Any) -> None:
        self.depth -= 1


class Turn:
    """One turn of a method as the trainer runs it, and its floor."""

    def __init__(self, pipe: Any, method: Method, roles: tuple[str, ...], config: StepCost):
        self.pipe, self.method, self.roles, self.batch_size = pipe, method, roles, config.batch_size
        train = TrainConfig(learning_rate=1e-6, lora_rank=config.lora_rank)
        self.shape = family_of(pipe).sample_shape(pipe)
        self.nets = build_networks(pipe, method, train)
        self.optimizers = {role: build_optimizer(self.nets.parameters(role).values(), 1e-6, train) for role in roles}
        self.emas = {role: EMA(self.nets.parameters(role), 0.999) for role in method.student_roles if role in roles}
        self.conds = [family_of(pipe).encode_conditions(pipe, [label] * self.batch_size) for label in (0, 1)]
        self.x = torch.randn(self.batch_size, *self.shape, device=pipe.device)
        self.noise = torch.randn_like(self.x)

    def compare(self, step: int) -> tuple[float, float, list[Pass]]:
        """Milliseconds of the turn at `step` and of its floor, and the passes of both."""
        batch = Batch(*self.conds, self.shape, SampleRandom((step,), range(self.batch_size), self.pipe.device), self.x, self.noise)
        for roles, loss_fn in self.method.updates(step):
            if roles == self.roles:
                break
            with torch.no_grad():  # the turns before hand on what they made
                loss_fn(self.nets, batch)
        recorder = Recorder(self.nets)
        with recorder.listening():
            measured, _ = timed(lambda: self.run(lambda: loss_fn(self.nets, batch)[0]))
        return measured, self.floor(recorder.passes), recorder.passes

    def run(self, loss: Callable[[], Tensor]) -> None:
        with self.nets.only_trains(self.roles):
            loss().backward()
        for role in self.roles:
            parameters = list(self.nets.parameters(role).values())
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            self.optimizers[role].step()
            self.optimizers[role].zero_grad(set_to_none=True)
            if role in self.emas:
                self.emas[role].update()

    def floor(self, passes: list[Pass]) -> float:
        spent, outputs = 0.0, []
        with self.nets.only_trains(self.roles):
            for call in sorted(passes, key=lambda call: not call.with_gradient):
                with switched_on(call.network, call.adapter), torch.set_grad_enabled(call.with_gradient):
                    ms, output = timed(call.again)
                spent += ms
                outputs += [output] if output.requires_grad else []
            if outputs:
                spent += timed(lambda: sum(output.square().mean() for output in outputs).backward())[0]  # type: ignore[union-attr]
        for role in self.roles:
            for p in self.nets.parameters(role).values():
                p.grad = None
        return spent


def measure(turn: Turn, steps: Iterator[int], repeats: int) -> dict[str, Any]:
    """Medians over `repeats` steps, after one that warms up."""
    turn.compare(next(steps))
    pairs = [turn.compare(step) for step in itertools.islice(steps, repeats)]
    ratios = sorted(measured / floor for measured, floor, _ in pairs)
    return {
        "measured": statistics.median(measured for measured, *_ in pairs),
        "floor": statistics.median(floor for _, floor, _ in pairs),
        "over_floor": statistics.median(ratios),
        "over_floor_range": [ratios[0], ratios[-1]],
        "forward_passes": [sum(not call.with_gradient for call in calls) for *_, calls in pairs],
        "gradient_passes": [sum(call.with_gradient for call in calls) for *_, calls in pairs],
    }


def recipe(name: str, guidance_scale: float | None = None) -> Method:
    """The method called `name` as train/recipes/digits_NAME.yaml sets it."""
    path = Path(__file__).parents[1] / "train" / "recipes" / f"digits_{name}.yaml"
    known = {f.name for f in fields(METHODS[name])}
    settings = {key: value for key, value in read_yaml(path).items() if key in known}
    if guidance_scale is not None and "guidance_scale" in known:
        settings["guidance_scale"] = guidance_scale
    return from_mapping(METHODS[name], settings, str(path))


def turns(method: Method) -> dict[tuple[str, ...], int]:
    """The turns of a method by the roles they train, and a step from which on each of them is in its last stage."""
    return {roles: first for first in (0, LATE) for roles, _ in method.updates(first)}


def steps_with(method: Method, roles: tuple[str, ...], first: int) -> Iterator[int]:
    return (step for step in itertools.count(first) if any(found == roles for found, _ in method.updates(step)))


def main() -> None:
    (config,) = parse(None, StepCost, prog="step_cost.py", description=__doc__ or "")
    torch.manual_seed(0)
    pipe = digits_pipeline(config.process).to("cuda" if torch.cuda.is_available() else "cpu")
    rows, load = [], [os.getloadavg()[0]]
    for name in config.methods or METHODS:
        method = recipe(name, config.guidance_scale)
        for roles, first in turns(method).items():
            row = measure(Turn(pipe, method, roles, config), steps_with(method, roles, first), config.repeats)
            rows.append({"method": name, "turn": "+".join(roles)} | row)
            print(f"{name:30} {rows[-1]['turn']:22} {row['floor']:8.1f} ms floor, {row['over_floor']:.3f} x", flush=True)
    load.append(os.getloadavg()[0])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    measured_with = {"device": device, "threads": torch.get_num_threads(), "load_average": load, "repeats": config.repeats}
    write_json(Path(config.output), measured_with | {"batch_size": config.batch_size, "rows": rows, **provenance()})
    print(json.dumps({f"{row['method']} {row['turn']}": round(row["over_floor"], 3) for row in rows}))


if __name__ == "__main__":
    run_cli(main)
