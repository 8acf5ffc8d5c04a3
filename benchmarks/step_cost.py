"""Time of each turn of every method, as its digits recipe sets it, over its floor: the bare passes that it cannot avoid.

    python benchmarks/step_cost.py --output benchmarks/results/step_cost_cpu.json

Turn and floor are measured in the same run, interleaved, as process CPU time (on CUDA: wall time between two
synchronisations), and each figure is the median over repeats. The floor of a turn is what its hooks saw, on the bare diffusers
module and in the order that the turn cannot avoid: the forward passes with gradient, then those without (their memory comes on top of
the graph's), then the backward pass. `separate` is the sum of the same passes run one by one, which leaves that memory out.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))
from diffusion_distill.build import build_networks
from diffusion_distill.config import from_mapping, parse, read_yaml, run_cli
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.ema import EMA
from diffusion_distill.families import family_of
from diffusion_distill.methods import METHODS, Batch, Method
from diffusion_distill.optim import build_optimizer
from diffusion_distill.provenance import provenance, write_json
from diffusion_distill.random import SampleRandom
from diffusion_distill.train_config import TrainConfig
from train.digits_teacher import digits_pipeline


@dataclass
class StepCost:
    output: str = "benchmarks/results/step_cost.json"
    """JSON file of the results."""
    repeats: int = 15
    """Measurements of each figure."""
    batch_size: int = 64
    """Samples a turn."""
    process: str = "flow"
    """The digits teacher's: flow, v_prediction or epsilon."""
    methods: tuple[str, ...] = ()
    """Methods to measure. Empty: all."""


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of one run; wall seconds on CUDA."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = clock()
    run()
    synchronize()
    return clock() - start


class Turn:
    """One turn of a method as the trainer runs it, and its floor."""

    def __init__(self, pipe: Any, method: Method, turn: int, batch_size: int):
        self.pipe, self.method, self.batch_size = pipe, method, batch_size
        turns = list(method.updates(0))
        self.roles, self.loss_fn = turns[turn]
        self.family = family_of(pipe)
        self.shape = self.family.sample_shape(pipe)
        config = TrainConfig(learning_rate=1e-6)
        self.nets = build_networks(pipe, method, config)
        self.optimizers = {role: build_optimizer(self.nets.parameters(role).values(), 1e-6, config) for role in self.nets.trained_roles}
        self.emas = {role: EMA(self.nets.parameters(role), 0.999) for role in method.student_roles}
        self.cond = self.family.encode_conditions(pipe, [0] * batch_size)
        self.x = torch.randn(batch_size, *self.shape, device=pipe.device)
        self.noise = torch.randn_like(self.x)
        self.step = 0
        batch = self._batch()
        for roles, loss_fn in turns[:turn]:  # what the turns before hand on
            with self.nets.only_trains(roles):
                loss_fn(self.nets, batch)
        self.carried = {name: value.detach() for name, value in batch.carried.items()}

    def _batch(self) -> Batch:
        random = SampleRandom((self.step,), range(self.batch_size), self.pipe.device)
        return Batch(self.cond, self.cond, self.shape, random, self.x, self.noise)

    def run(self) -> None:
        batch = self._batch()
        batch.carried |= self.carried
        with self.nets.only_trains(self.roles):
            loss, _ = self.loss_fn(self.nets, batch)
            loss.backward()
        for role in self.roles:
            parameters = list(self.nets.parameters(role).values())
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            self.optimizers[role].step()
            self.optimizers[role].zero_grad(set_to_none=True)
            if role in self.emas:
                self.emas[role].update()
        self.step += 1

    def passes(self) -> tuple[int, int]:
        """(forward passes without gradient, forward and backward passes) of the big networks in one turn."""
        found = {False: 0, True: 0}
        models = {net.model for role in self.nets if isinstance(net := getattr(self.nets, role), Denoiser)}

        def count(*_: Any) -> None:
            found[torch.is_grad_enabled()] += 1

        handles = [model.register_forward_pre_hook(count) for model in models]
        self.run()
        for handle in handles:
            handle.remove()
        return found[False], found[True]

    def bare_passes(self, forward: int, forward_backward: int) -> None:
        """So many forward passes with gradient, so many without, and one backward pass through the former."""
        role = self.method.student_roles[0]
        model = getattr(self.nets, role).model
        with self.nets.only_trains((role,)):
            outputs = [self._call(model) for _ in range(forward_backward)]
            with torch.no_grad():
                for _ in range(forward):
                    self._call(self.nets.teacher.model)
            if outputs:
                torch.stack(outputs).square().mean().backward()
        for p in model.parameters():
            p.grad = None

    def _call(self, model: Any) -> torch.Tensor:
        return self.family.call(model, self.x, torch.full((self.batch_size,), 500, device=self.x.device), self.cond)


def measure(turn: Turn, repeats: int) -> dict[str, Any]:
    """Median milliseconds of the turn and of its floor, measured in turn."""
    forward, both = turn.passes()
    runs = {
        "measured": turn.run,
        "floor": lambda: turn.bare_passes(forward, both),
        "forward": lambda: turn.bare_passes(1, 0),
        "forward_backward": lambda: turn.bare_passes(0, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    separate = forward * ms["forward"] + both * ms["forward_backward"]
    passes = {"forward_passes": forward, "forward_backward_passes": both}
    return ms | passes | {"separate": separate, "over_floor": ms["measured"] / ms["floor"], "over_separate": ms["measured"] / separate}


def recipe(name: str) -> Method:
    """The method called `name` as train/recipes/digits_NAME.yaml sets it."""
    path = Path(__file__).parents[1] / "train" / "recipes" / f"digits_{name}.yaml"
    known = {f.name for f in fields(METHODS[name])}
    settings = {key: value for key, value in read_yaml(path).items() if key in known}
    return from_mapping(METHODS[name], settings, str(path))


def main() -> None:
    (config,) = parse(None, StepCost, prog="step_cost.py", description=__doc__ or "")
    torch.manual_seed(0)
    pipe = digits_pipeline(config.process).to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name in config.methods or METHODS:
        method = recipe(name)
        for index, (roles, _) in enumerate(method.updates(0)):
            row = {"method": name, "turn": "+".join(roles), **measure(Turn(pipe, method, index, config.batch_size), config.repeats)}
            rows.append(row)
            print(
                f"{name:8} {row['turn']:12} {row['floor']:8.1f} ms floor, {row['over_floor']:.3f} x ({row['over_separate']:.3f} x separate)"
            )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(config.output), {"device": device, "threads": torch.get_num_threads(), "rows": rows, **provenance()})
    print(json.dumps({row["turn"]: round(row["over_floor"], 3) for row in rows}))


if __name__ == "__main__":
    run_cli(main)
