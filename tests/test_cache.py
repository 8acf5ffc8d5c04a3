"""Encoded data: training from it is the training without it, to the bit; killing, splitting and damaging it is harmless or seen."""

import json
import os
import pickle
import runpy
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from PIL import Image
from test_pairs import files, fork, message, one_thread, write
from test_trainer import METHODS, assert_equal, final_weights
from tiny_pipelines import PIPELINES, class_conditional, stable_diffusion, stable_diffusion_3
from torch import nn

from diffusion_distill import DMD2, DataConfig, TrainConfig, build_dataset
from diffusion_distill.cache_writer import CacheConfig, write_cache
from diffusion_distill.cached import CachedDataset, encoders
from diffusion_distill.config import run_cli
from diffusion_distill.families import family_of
from diffusion_distill.methods import Method
from diffusion_distill.pairs import PairDataset
from diffusion_distill.trainer import Trainer

__all__ = ["one_thread"]  # a fixture for every test here
START = CacheConfig(batch_size=3, shard_size=4)
PROMPTS = [f"a photo of {'very ' * (i % 3)}{i}" for i in range(7)]
WITH_IMAGES = DMD2(num_inference_steps=2, guidance_scale=2.0, gan_weight=0.1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Seven images with captions."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(len(PROMPTS)):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": prompt}) for i, prompt in enumerate(PROMPTS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return build_dataset(DataConfig(train_data_dir=str(folder)), needs_images=True, channels=3, resolution=16)


def cache(folder: Path, pipe: Any, data: Any, **changes: Any) -> Path:
    return write_cache(pipe, data, replace(START, output_dir=str(folder), **changes), teacher="tiny")


def cached(folder: Path, method: Method) -> Any:
    config = DataConfig(cache_dir=str(folder))
    return build_dataset(config, needs_images=method.needs_images, needs_pairs=method.needs_pairs, channels=3, resolution=16)


def run(folder: Path, pipe: Any, data: Any, method: Method = WITH_IMAGES, **changes: Any) -> Trainer:
    settings = TrainConfig(output_dir=str(folder), train_batch_size=2, max_train_steps=4, learning_rate=1e-3, num_validation_images=2)
    return Trainer(pipe, replace(method), replace(settings, logging_steps=1, **changes), data)


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "steps_per_second"} for line in lines]


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3], ids=["sd", "sd3"])
def test_training_from_a_cache_is_the_same_to_the_bit(tmp_path: Path, images: Any, make: Callable[[], Any]) -> None:
    """Encoded in batches of two, as it is trained; interrupted after two steps."""
    run(tmp_path / "plain", make(), images).train()
    data = cached(cache(tmp_path / "cache", make(), images, batch_size=2), WITH_IMAGES)
    pipe = make()
    first = run(tmp_path / "cached", pipe, data, checkpointing_steps=2)
    called: list[str] = []
    for name, part in encoders(pipe, first.family).items():
        part.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    steps = first._data()
    for _ in range(2):
        first.train_step(first._prepare(next(steps)))
    assert not called
    first.save()
    second = run(tmp_path / "cached", make(), data, resume_from_checkpoint="latest")
    assert second.step == 2
    second.train()
    assert_equal(final_weights(tmp_path / "plain", 4), final_weights(tmp_path / "cached", 4))
    assert losses(tmp_path / "plain")[2:] == losses(tmp_path / "cached")
    other = cached(cache(tmp_path / "other", make(), images, shard_size=3), WITH_IMAGES)
    for name, value in other[6]["cond"].items():
        torch.testing.assert_close(value, data[6]["cond"][name], rtol=1e-4, atol=1e-5)
    assert "SHA-256 of the data set: stored" in message(lambda: run(tmp_path / "cached", make(), other, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_stored_is_what_each_family_encodes(tmp_path: Path, name: str, images: Any) -> None:
    """Where prompts are padded to the longest of their batch, up to rounding."""
    pipe = PIPELINES[name]()
    family, labelled = family_of(pipe), family_of(pipe).num_classes(pipe) is not None
    conditions: list[Any] = list(range(7)) if labelled else PROMPTS
    data = build_dataset(DataConfig(num_classes=7), needs_images=False, channels=None, resolution=None)
    data.conditions = conditions
    stored = CachedDataset(cache(tmp_path, pipe, data))
    for i in (0, 3, 6):
        item, alone = stored[i], family.encode_conditions(pipe, [conditions[i]])
        assert item["condition"] == conditions[i] and item.keys() == {"condition", "cond"} and item["cond"].keys() == alone.keys()
        for key, value in alone.items():
            assert item["cond"][key].dtype == value.dtype
            torch.testing.assert_close(item["cond"][key], value[0], rtol=1e-4, atol=1e-5)


def test_pairs_are_cached_with_their_conditions(tmp_path: Path) -> None:
    pipe = class_conditional()
    pairs = PairDataset(write(tmp_path / "pairs", pipe))
    method = METHODS["reflow"]
    run(tmp_path / "plain", class_conditional(), pairs, method, ema_decay=0.9).train()
    data = cached(cache(tmp_path / "cache", pipe, pairs, shard_size=10), method)
    assert len(data) == 25 and data.settings["pairs"] == pairs.settings
    run(tmp_path / "cached", class_conditional(), data, method, ema_decay=0.9).train()
    assert_equal(final_weights(tmp_path / "plain", 4), final_weights(tmp_path / "cached", 4))
    assert "it holds no images" in message(lambda: CachedDataset(tmp_path / "cache", needs_images=True))


# ------------------------------------------------------------------ interruptions, processes, damage


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    pipe = class_conditional()
    data = build_dataset(DataConfig(dataset="digits"), needs_images=True, channels=1, resolution=8)
    small = {"shard_size": 40, "batch_size": 4}
    whole = files(cache(tmp_path / "whole", pipe, data, **small))
    parts = tmp_path / "parts"
    process = fork(lambda: cache(parts, pipe, data, **small))
    deadline = time.monotonic() + 60
    while not (parts / "samples-00002.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("samples-*")}
    assert process.exitcode == -signal.SIGKILL and 3 <= len(done) < 33
    assert message(lambda: CachedDataset(parts)).endswith("its samples are not finished; run the command that was writing them again")
    cache(parts, pipe, data, **small)
    assert files(parts) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_two_processes_share_the_shards(tmp_path: Path, images: Any) -> None:
    port, pipe = str(20000 + (os.getpid() + 77) % 10000), stable_diffusion()
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}

    def share() -> None:
        cache(tmp_path / "two", pipe, images, shard_size=2)
        (tmp_path / f"rank-{PartialState().process_index}-of-{PartialState().num_processes}").touch()
        torch.distributed.destroy_process_group()

    processes = [fork(share, RANK=str(rank), LOCAL_RANK=str(rank), **both) for rank in range(2)]
    for process in processes:
        process.join(60)
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank-0-of-2", "rank-1-of-2"}
    assert files(tmp_path / "two") == files(cache(tmp_path / "one", pipe, images, shard_size=2))


def test_a_cache_is_refused_where_it_does_not_belong(tmp_path: Path, images: Any) -> None:
    folder, pipe = cache(tmp_path / "cache", stable_diffusion(), images), stable_diffusion()
    assert "holds samples of other settings (data: stored" in message(lambda: cache(folder, pipe, prompts_of(images)))
    data = pickle.loads(pickle.dumps(cached(folder, WITH_IMAGES)))
    assert data[6]["x0"].shape == (4, 8, 8)
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).view(-1)[0] += 1
    line = message(lambda: run(tmp_path / "run", pipe, data))
    assert "cache_dir: got" in line and "this one was encoded by 'tiny' (text_encoder SHA-256: stored" in line
    assert "(pipeline: stored" in message(lambda: run(tmp_path / "run", stable_diffusion_3(), data))
    pipe = stable_diffusion()
    pipe.vae.register_to_config(scaling_factor=0.5)
    assert "(vae config: stored" in message(lambda: run(tmp_path / "run", pipe, data))
    pipe = stable_diffusion()
    nn.init.zeros_(pipe.unet.conv_out.bias)
    assert run(tmp_path / "run", pipe, data).step == 0  # a network that denoises otherwise does not matter
    bare = cache(tmp_path / "bare", pipe, prompts_of(images))
    assert message(lambda: cached(bare, WITH_IMAGES)).endswith("it holds no images; write one from a source that has them")
    assert message(lambda: CachedDataset(bare, needs_pairs=True)).endswith("it holds no pairs; write one from a source that has them")
    (bare / "cache.json").write_text("{}")
    assert message(lambda: CachedDataset(bare)) == f"{bare / 'cache.json'}: not the index of a set of samples"
    assert "there is no cache.json; train/make_cache.py writes such a folder" in message(lambda: CachedDataset(tmp_path))


def prompts_of(images: Any) -> Any:
    return type(images)(images.conditions)


def test_from_flags_to_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class_conditional().save_pretrained(tmp_path / "teacher")
    base = ["make_cache.py", "--pretrained_model_name_or_path", str(tmp_path / "teacher"), "--trust_remote_code"]
    script = runpy.run_path(str(Path(__file__).parents[1] / "train" / "make_cache.py"))
    for flags, code in ((["--dataset", "digits"], 0), (["--cache_dir", str(tmp_path / "cache")], 2), (["--num_classes", "11"], 2)):
        monkeypatch.setattr("sys.argv", [*base, *flags, "--output_dir", str(tmp_path / "cache"), "--batch_size", "500"])
        with pytest.raises(SystemExit) as stop:
            run_cli(script["main"])
        assert (stop.value.code or 0) == code
    error = capsys.readouterr().err
    assert "error: cache_dir: it is encoded already; give the source of the data" in error and "num_classes: got 11 classes" in error
    data = CachedDataset(tmp_path / "cache", needs_images=True)
    assert len(data) == 1297 and data[1296]["x0"].shape == (1, 8, 8) and data.made_with["teacher"] == str(tmp_path / "teacher")


def test_damage_is_one_line(tmp_path: Path, images: Any) -> None:
    folder = cache(tmp_path, stable_diffusion(), images)
    data, shard = CachedDataset(folder), folder / "samples-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert data[3]["condition"] == PROMPTS[3]
    assert "samples-00001.safetensors has changed since it was written" in message(lambda: data[4])
    shard.write_bytes(content[:-1])
    assert "samples-00001.safetensors has" in message(lambda: CachedDataset(folder))
