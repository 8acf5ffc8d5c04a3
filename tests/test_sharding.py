"""Weights spread over two ranks: the same training as on one, resumed to the bit, and a student that leaves whole."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from safetensors.torch import load_file
from test_ranks import SMALL, local, log, one_thread  # noqa: F401
from test_trainer import ENVIRONMENT, METHODS, assert_equal, final_weights, in_a_process, trainer
from tiny_pipelines import PIPELINES, class_conditional, example_conditions, resolution_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffusion_distill import DMD2, InputError, TrainConfig, Trainer, distill, sharding
from diffusion_distill.families import family_of

SHARD: dict[str, Any] = {"parallelism": "shard"}
SHARED, LORA = {"lora_rank": 2, "sharing": "shared"}, {"lora_rank": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd2": ("image_free", {"gradient_checkpointing": True}),
    "dmd2_gan": ("gan", {}),
    "dmd2_gan_lora": ("gan", LORA),
    "dmd2_gan_shared": ("gan", SHARED),
    "lcm": ("lcm", {}),
    "lcm_shared": ("lcm", SHARED),
    "scm": ("scm", {}),
    "scm_lora": ("scm", LORA),
    "asd": ("self", {}),
    "asd_shared": ("self", SHARED),
    "phased": ("phased", {"max_train_steps": 6}),
}


def run_of(folder: Path, name: str, **changes: Any) -> Trainer:
    method, options = CASES[name]
    return trainer(folder, METHODS[method], **SMALL | {"max_train_steps": 3, "checkpointing_steps": 0} | options | changes)


def train(run: Trainer, steps: int | None = None) -> None:
    """To the end, or so many steps; without sample grids, which cost more than the steps."""
    for raw in itertools.islice(run._data(), steps):
        run.train_step(run._prepare(raw))
    run.save()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_and_resume_bit_exactly(tmp_path: Path, name: str) -> None:
    """In the middle of an epoch, with accumulation, moving averages and followers."""

    def work(rank: int) -> None:
        train(run_of(tmp_path / "whole", name, **SHARD))
        train(run_of(tmp_path / "parts", name, **SHARD), 2)
        train(run_of(tmp_path / "parts", name, resume_from_checkpoint="latest", **SHARD))

    assert on_ranks(2, work, tmp_path) == [0, 0], log(tmp_path, 0)[-3000:] + log(tmp_path, 1)[-3000:]
    alone = run_of(tmp_path / "one", name, train_batch_size=2)
    start = {role: {key: p.detach().clone() for key, p in alone.nets.parameters(role).items()} for role in alone.trained}
    train(alone)
    steps = alone.config.max_train_steps
    assert_equal(*(final_weights(tmp_path / kind, steps) for kind in ("whole", "parts")))
    one, two = (final_weights(tmp_path / kind, steps) for kind in ("one", "whole"))
    assert one.keys() == two.keys()
    for role, weights in start.items():
        assert_same_up_to_rounding(weights, one[f"{role}.safetensors"], two[f"{role}.safetensors"])
    with pytest.raises(InputError, match=r"parallelism: stored 'shard', now 'replicate'; number of processes: stored 2, now 1"):
        run_of(tmp_path / "parts", name, resume_from_checkpoint="latest")


def assert_same_up_to_rounding(start: Any, one: Any, two: Any) -> None:
    """The weights end much closer to each other than to where they began. Adam turns the rounding of a vanishing gradient into a step."""
    keys = [key for key in start if not key.endswith("to_k.bias")]  # the softmax does not see them: rounding alone moves them
    moved, different = (torch.cat([(one[key] - other[key]).flatten() for key in keys]).norm().item() for other in (start, two))
    assert moved > 0 and different < 0.005 * moved, (moved, different)


FAMILIES = {
    "stable_diffusion": "fake_score",
    "stable_diffusion_xl": "teacher",
    "stable_diffusion_3": "teacher",
    "flux": "fake_score",
    "class_dit": "fake_score",
    "pixart_alpha": "teacher",
    "sana": "fake_score",
    "qwen_image": "teacher",
    "z_image": "fake_score",
    "wan": "fake_score",
}


def steps_of(folder: Path, name: str, **changes: Any) -> list[dict[str, Tensor]]:
    """What two steps of DMD2 with a discriminator log."""
    pipe = PIPELINES[name]()
    shape, generator = family_of(pipe).sample_shape(pipe, resolution_of(pipe)), torch.Generator().manual_seed(3)
    data: Any = [{"condition": c, "x0": torch.randn(shape, generator=generator)} for c in example_conditions(pipe)]
    method = DMD2(num_inference_steps=2, guidance_scale=2.0, student_update_interval=1, discriminator=FAMILIES[name])  # type: ignore[arg-type]
    config = TrainConfig(output_dir=str(folder / name), train_batch_size=1, max_train_steps=2, learning_rate=1e-3, **changes)
    run = Trainer(pipe, method, config, data, resolution_of(pipe))
    return [run.train_step(run._prepare(raw)) for raw in run._data()]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_train_alike(tmp_path: Path, name: str) -> None:
    """Blocks in the place of a UNet, recomputed; features from the midst of a block; a block's part that is called alone."""

    def work(rank: int) -> None:
        whole = steps_of(tmp_path / "whole", name, gradient_checkpointing=True)
        parts = steps_of(tmp_path / "parts", name, gradient_checkpointing=True, **SHARD)
        keys = [f"{role}/{value}" for role in ("student", "fake_score", "discriminator") for value in ("loss", "grad_norm")]
        for before, after in zip(whole, parts, strict=True):
            for key in (key for key in keys if key in before):
                torch.testing.assert_close(after[key], before[key], rtol=2e-4, atol=0, msg=lambda m: f"{key}: {m}")  # noqa: B023

    assert on_ranks(2, work, tmp_path) == [0, 0], log(tmp_path, 0)[-3000:] + log(tmp_path, 1)[-3000:]


def storages() -> dict[int, int]:
    """Bytes of all memory that a tensor of this process holds, by its address."""
    gc.collect()
    held = (local(thing).untyped_storage() for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter, DTensor))
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.device.type != "meta"}


def test_a_rank_holds_about_half(tmp_path: Path) -> None:
    def weights(run: Trainer) -> int:
        own = {p for role in run.nets for p in getattr(run.nets, role).parameters()}
        moments = [value for o in run.optimizers.values() for state in o.state.values() for value in state.values()]
        return sum(local(t).numel() * t.element_size() for t in (*own, *moments, *run.emas["student"].average.values()))

    def work(rank: int) -> None:
        found: dict[str, tuple[int, int]] = {}
        before = storages().keys()  # of tests that ran here earlier
        for kind in ("replicate", "shard"):
            run = trainer(tmp_path / kind, METHODS["image_free"], parallelism=kind, **SMALL)
            run.train_step(run._prepare(next(run._data())))
            found[kind] = weights(run), sum(size for place, size in storages().items() if place not in before)
            del run
            gc.collect()
        if rank == 0:
            (tmp_path / "resident.json").write_text(json.dumps(found))
        parts, whole = found["shard"][0], found["replicate"][0]
        assert parts < 0.52 * whole, found
        assert found["shard"][1] < 0.52 * found["replicate"][1], found  # nothing gathered is left behind

    assert on_ranks(2, work, tmp_path) == [0, 0], log(tmp_path, 0)[-3000:]
    print((tmp_path / "resident.json").read_text())


def test_gradients_are_clipped_over_parts_and_whole_parameters(tmp_path: Path) -> None:
    """Against PyTorch's own clipping of the mean gradients; sizes that two ranks do not divide, and one that a rank has nothing of."""
    shapes = [(5, 3), (1, 4), (7,), (2, 2)]

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo")
        model = nn.Module()
        for i, shape in enumerate(shapes):
            name = f"lora_{i}" if i == 3 else f"weight_{i}"
            model.register_parameter(name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))))
        whole = [p.detach().clone() for p in model.parameters()]
        gradients = [[torch.randn(shape, generator=torch.Generator().manual_seed(10 * r + 100)) for shape in shapes] for r in range(2)]
        means = [(a + b) / 2 for a, b in zip(*gradients, strict=True)]
        sharding.shard(model, (), (), torch.device("cpu"))
        parameters = list(model.parameters())
        assert [isinstance(p, DTensor) for p in parameters] == [True, True, True, False]
        for p, value, mean, own in zip(parameters, whole, means, gradients[rank], strict=True):
            assert torch.equal(sharding.part_of(value, p).full_tensor() if isinstance(p, DTensor) else p, value)  # type: ignore[attr-defined]
            p.grad = sharding.part_of(mean, p) if isinstance(p, DTensor) else own  # those of parts are averaged in the backward pass
        expected = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for q, mean in zip(expected, means, strict=True):
            q.grad = mean.clone()
        norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
        torch.testing.assert_close(sharding.clip_gradients(parameters, 0.5), norm)
        for p, q in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad.full_tensor() if isinstance(p, DTensor) else p.grad, q.grad)  # type: ignore[union-attr]

    assert on_ranks(2, work, tmp_path) == [0, 0], log(tmp_path, 0)[-3000:] + log(tmp_path, 1)[-3000:]


@pytest.mark.parametrize("options", [{}, SHARED], ids=["full", "shared"])
def test_the_student_leaves_whole_and_proved(tmp_path: Path, options: dict[str, Any]) -> None:
    """The folder of two ranks holds the weights of one, at the moving average, and the caller's pipeline is as it was."""
    changes = SMALL | options | {"max_train_steps": 3, "ema_decay": 0.9, "learning_rate": 1e-3, "checkpointing_steps": 0}
    data: Any = [{"condition": i} for i in range(10)]

    def run(folder: Path, **more: Any) -> Any:
        pipe = class_conditional("flow")
        distill(pipe, METHODS["image_free"], data, TrainConfig(**{"output_dir": str(folder)} | changes | more))
        return pipe

    def work(rank: int) -> None:
        before = class_conditional("flow").unet.state_dict()
        pipe = run(tmp_path / "two", **SHARD)
        if rank == 0:
            now = {name.replace("base_layer.", ""): value for name, value in pipe.unet.state_dict().items() if "lora_" not in name}
            assert now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())

    assert on_ranks(2, work, tmp_path) == [0, 0], log(tmp_path, 0)[-3000:] + log(tmp_path, 1)[-3000:]
    run(tmp_path / "one", train_batch_size=2)
    one, two = (load_file(next((tmp_path / kind / "student").rglob("diffusion_pytorch_model.safetensors"))) for kind in ("one", "two"))
    assert one.keys() == two.keys()
    assert_same_up_to_rounding(class_conditional("flow").unet.state_dict(), one, two)
    assert json.loads((tmp_path / "two" / "student" / "verification.json").read_text())["max_difference"] <= 1e-6
    assert {path.name for path in (tmp_path / "two" / "samples").iterdir()} == {"teacher.png", "step_000003.png"}


def test_killed_ranks_resume_bit_exactly(tmp_path: Path) -> None:
    """Under torchrun, as a user has it."""
    changes: dict[str, Any] = SHARD | {"max_train_steps": 10, "checkpointing_steps": 1, "train_batch_size": 2, "num_validation_images": 1}

    def launch(**more: Any) -> list[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        return [*command, *in_a_process(tmp_path / "parts", **changes | more)]

    ranks = subprocess.Popen(launch(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "parts" / "checkpoint-4").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in (*children(ranks.pid), ranks.pid):
        os.kill(process, signal.SIGKILL)
    assert ranks.wait() == -signal.SIGKILL and not (tmp_path / "parts" / "checkpoint-10").exists()
    resumed = subprocess.run(launch(resume_from_checkpoint="latest"), capture_output=True, text=True, env=ENVIRONMENT)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert on_ranks(2, lambda rank: trainer(tmp_path / "whole", **changes).train(), tmp_path) == [0, 0]
    assert_equal(*(final_weights(tmp_path / kind, 10) for kind in ("whole", "parts")))
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10]


def children(process: int) -> Iterator[int]:
    yield from map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())


def test_one_process_has_nothing_to_spread(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="parallelism: got 'shard'; 'replicate' for one process"):
        trainer(tmp_path, **SHARD)
