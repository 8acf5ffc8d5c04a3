"""Stored pairs: what they hold, by diffusers' own pipelines; and that killing, splitting and damaging their writing is harmless or seen."""

import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler
from tiny_pipelines import class_conditional, example_conditions, stable_diffusion, stable_diffusion_3
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_distill.batches import GlobalBatchSampler, batches
from diffusion_distill.data import DataConfig, build_dataset
from diffusion_distill.errors import InputError
from diffusion_distill.pair_writer import PairConfig, write_pairs
from diffusion_distill.pairs import PairDataset
from diffusion_distill.random import derive_seed

START = PairConfig(num_pairs=25, num_inference_steps=4, batch_size=3, shard_size=8, seed=5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as the processes that are forked here: results are the same to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder: Path, pipe: Any = None, labels: Any = range(10), **changes: Any) -> Path:
    return write_pairs(pipe or class_conditional(), labels, replace(START, output_dir=str(folder), **changes), teacher="tiny")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stacked(folder: Path) -> tuple[list[Any], Tensor, Tensor]:
    data = PairDataset(folder)
    items = [data[i] for i in range(len(data))]
    return [item["condition"] for item in items], torch.stack([i["noise"] for i in items]), torch.stack([i["x0"] for i in items])


def message(act: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ what the pairs are


def own_noise(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(5, i))) for i in range(count)])


@pytest.mark.parametrize("process", ["flow", "v_prediction", "epsilon"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_class_conditional_pairs_are_what_the_pipeline_draws(tmp_path: Path, process: Any, scale: float) -> None:
    """Trailing DDIM, and Euler over sigmas 1 - i/N."""
    pipe = class_conditional(process)
    labels, noise, x0 = stacked(write(tmp_path, pipe, guidance_scale=scale))
    assert labels == [i % 10 for i in range(25)] and torch.equal(noise, own_noise(25, (1, 8, 8)))
    pipe._set_timesteps(4, None)
    drawn = pipe._denoise(noise, torch.tensor(labels), scale, None)
    torch.testing.assert_close(x0, drawn, rtol=1e-4, atol=1e-4 * float(drawn.abs().max()))


@torch.no_grad()
def test_latents_of_prompts_are_what_the_pipeline_draws(tmp_path: Path) -> None:
    diffusion, flow = stable_diffusion(), stable_diffusion_3()
    diffusion.scheduler = DDIMScheduler.from_config(diffusion.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    # SD 3's scheduler shifts given sigmas by 3 itself
    grids: list[tuple[Any, dict[str, Any], float]] = [
        (diffusion, {"num_inference_steps": 4}, 1.0),
        (flow, {"sigmas": [1, 0.75, 0.5, 0.25]}, 3.0),
    ]
    for number, (pipe, grid, shift) in enumerate(grids):
        folder = write(tmp_path / str(number), pipe, example_conditions(pipe), num_pairs=3, guidance_scale=2.5, timestep_shift=shift)
        prompts, noise, x0 = stacked(folder)
        assert prompts == ["a photo of 0", "a photo of 1", "a photo of 0"] and noise.shape == (3, 4, 8, 8)
        drawn = pipe(prompts, latents=noise, guidance_scale=2.5, output_type="latent", **grid).images
        torch.testing.assert_close(x0, drawn, rtol=1e-3, atol=1e-3 * float(drawn.abs().max()))


def test_noise_and_conditions_depend_on_the_index_alone(tmp_path: Path) -> None:
    first = stacked(write(tmp_path / "a", labels=[4, 4, 7, 4, 1]))
    second = stacked(write(tmp_path / "b", labels=[4, 7, 1], batch_size=5, shard_size=25))
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    torch.testing.assert_close(first[2], second[2], rtol=1e-4, atol=1e-4)
    assert Counter(first[0]) == {4: 9, 7: 8, 1: 8}
    assert not torch.equal(first[1], stacked(write(tmp_path / "c", seed=6))[1])
    half = stacked(write(tmp_path / "d", mixed_precision="bf16"))[2]
    assert half.dtype == torch.float32 and 0 < (half - stacked(write(tmp_path / "e"))[2]).abs().max() < 0.5


def test_the_index_says_how_the_pairs_were_drawn(tmp_path: Path) -> None:
    index = json.loads((write(tmp_path) / "pairs.json").read_text())
    assert index["settings"]["timesteps"] == [1000, 750, 500, 250] and index["settings"]["process"] == "RectifiedFlow"
    assert index["settings"]["guidance_scale"] == 1.0 and index["settings"]["scheduler_config"]["shift"] == 1.0
    assert index["made_with"]["teacher"] == "tiny" and "commit" in index["made_with"] and index["conditions"] == list(range(10))
    assert [shard["pairs"] for shard in index["shards"]] == [8, 8, 8, 1]


# ------------------------------------------------------------------ interruptions and processes


def fork(act: Callable[[], Any], **environment: str) -> Any:
    """A process of its own in which `act` runs; forked, for importing takes longer than the test."""

    def run() -> None:
        os.environ |= environment
        tqdm.set_lock(threading.RLock())  # its own is shared with the parent, who would wait for ever for that of a killed process
        PartialState._reset_state()
        act()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_a_killed_run_continues_to_the_same_bytes_and_redoes_nothing(tmp_path: Path) -> None:
    whole = files(write(tmp_path / "whole", num_pairs=96))
    parts = tmp_path / "parts"
    process = fork(lambda: write(parts, num_pairs=96))
    deadline = time.monotonic() + 60
    while not (parts / "pairs-00002.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("pairs-*")}
    assert process.exitcode == -signal.SIGKILL and 3 <= len(done) < 12
    assert message(lambda: PairDataset(parts)).endswith("its pairs are not finished; run the command that was writing them again")
    (parts / ".writing-1-pairs-00007.safetensors").write_bytes(b"half")
    write(parts, num_pairs=96)
    assert files(parts) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    write(parts, num_pairs=96)
    assert {path: path.stat().st_mtime_ns for path in parts.iterdir()} == before


def test_two_processes_share_the_shards(tmp_path: Path) -> None:
    port = str(20000 + os.getpid() % 10000)
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}

    def share() -> None:
        write(tmp_path / "two")
        (tmp_path / f"rank-{PartialState().process_index}-of-{PartialState().num_processes}").touch()
        torch.distributed.destroy_process_group()

    processes = [fork(share, RANK=str(rank), LOCAL_RANK=str(rank), **both) for rank in range(2)]
    for process in processes:
        process.join(60)
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank-0-of-2", "rank-1-of-2"}
    assert files(tmp_path / "two") == files(write(tmp_path / "one"))


def test_processes_that_accelerate_does_not_see_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = f"number of processes: got 2; accelerate sees {PartialState().num_processes}; on CPUs, set ACCELERATE_USE_CPU=true"
    assert message(lambda: write(tmp_path)) == line


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 6}, "seed: stored 5, now 6"),
        ({"num_pairs": 30}, "num_pairs: stored 25, now 30"),
        ({"guidance_scale": 2.0}, "guidance_scale: stored 1.0, now 2.0"),
        ({"num_inference_steps": 2}, "timesteps: stored [1000.0, 750.0, 500.0, 250.0], now [1000.0, 500.0]"),
        ({"labels": [1, 2]}, "conditions_sha256: stored"),
        ({"pipe": class_conditional(seed=1)}, "teacher_sha256: stored"),
    ],
)
def test_pairs_of_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    before = files(write(tmp_path))
    found = message(lambda: write(tmp_path, **changes))
    assert found.startswith(f"output_dir: {tmp_path} holds pairs of other settings ({named}") and found.endswith("choose another folder")
    assert files(tmp_path) == before


def test_shards_of_unknown_origin_are_refused_and_lost_ones_drawn_again(tmp_path: Path) -> None:
    whole = files(write(tmp_path))
    (tmp_path / "pairs-00001.safetensors").unlink()
    assert files(write(tmp_path)) == whole
    (tmp_path / "pairs-00001.safetensors").unlink()
    (tmp_path / "pairs-00002.safetensors").write_bytes(b"?")
    assert "pairs-00002.safetensors is not as it was written" in message(lambda: write(tmp_path))
    (tmp_path / "pairs.json").unlink()
    assert "holds shards of pairs without pairs.json" in message(lambda: write(tmp_path))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_pairs": 0}, "num_pairs: got 0; at least 1"),
        ({"shard_size": 0}, "shard_size: got 0; at least 1"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0; 0 or more"),
        ({"timestep_shift": 0.0}, "timestep_shift: got 0.0; a number above 0"),
        ({"mixed_precision": "fp16"}, "mixed_precision: got 'fp16'; accepted: 'no', 'bf16'"),
    ],
)
def test_wrong_settings_are_input_errors(changes: dict[str, Any], line: str) -> None:
    assert message(lambda: replace(START, **changes)) == line


def cut(folder: Path) -> None:
    path = folder / "pairs-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "pairs-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reshape(folder: Path) -> None:
    index = json.loads((folder / "pairs.json").read_text())
    index["settings"]["sample_shape"] = [1, 4, 16]
    (folder / "pairs.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda folder: (folder / "pairs.json").unlink(), "there is no pairs.json; train/make_pairs.py writes such a folder"),
        (lambda folder: (folder / "pairs.json").write_text("{}"), "pairs.json: not the index of a set of pairs"),
        (lambda folder: (folder / "pairs-00001.safetensors").unlink(), "pairs-00001.safetensors is missing"),
        (cut, "bytes, "),
        (flip, "pairs-00001.safetensors has changed since it was written (its SHA-256 is not the one in pairs.json)"),
        (reshape, "pairs-00000.safetensors holds [(8, 1, 8, 8)]; (8, 1, 4, 16) was written"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, damage: Callable[[Path], Any], line: str) -> None:
    damage(write(tmp_path))

    def read() -> None:
        data = PairDataset(tmp_path)
        assert data[7]["condition"] == 7  # of a shard that is as it was
        data[8]

    assert line in message(read)


# ------------------------------------------------------------------ as training data


def test_pairs_are_a_source_of_data(tmp_path: Path) -> None:
    write(tmp_path / "pairs")
    config = DataConfig(pairs_dir=str(tmp_path / "pairs"))
    teacher = {"needs_images": False, "channels": 1, "resolution": 8, "num_classes": 10}
    data: Any = build_dataset(config, needs_pairs=True, **teacher)  # type: ignore[arg-type]
    data = pickle.loads(pickle.dumps(data))
    order = GlobalBatchSampler(len(data), 6, 0)
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "accumulation": 1, "start_step": 0, "stop_step": 2}
    for workers in (0, 1):
        ((micro,), _) = batches(data, order, num_workers=workers, **settings)
        for slot, index in enumerate(order.indices(0)):
            item = data[index]
            assert micro["condition"][slot] == item["condition"] == index % 10
            assert torch.equal(micro["noise"][slot], item["noise"]) and torch.equal(micro["x0"][slot], item["x0"])
        assert micro["image"] is None
    conditions = build_dataset(config, **teacher)  # type: ignore[arg-type]
    assert len(conditions) == 10 and conditions[3] == {"condition": 3}
    with pytest.raises(IndexError):
        data[25]


def test_pairs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = DataConfig(pairs_dir=str(write(tmp_path)))
    teacher: dict[str, Any] = {"channels": 1, "resolution": 8}
    line = "pairs_dir: got 10 classes; the teacher knows 4"
    assert message(lambda: build_dataset(config, needs_images=False, needs_pairs=True, num_classes=4, **teacher)) == line
    assert message(lambda: build_dataset(config, needs_images=True, **teacher)).startswith("pairs_dir: it holds no images")
    line = "pairs_dir: got None; this method trains on a teacher's pairs; draw them with train/make_pairs.py"
    assert message(lambda: build_dataset(DataConfig(dataset="digits"), needs_images=False, needs_pairs=True, **teacher)) == line
