"""Checkpoints: exact round trip, refusal of any damage, and no moment at which a kill or a full disk loses the last good one."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_distill.background import BackgroundWriter
from diffusion_distill.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    resolve_checkpoint,
    save_checkpoint,
)
from diffusion_distill.errors import CheckpointError, InputError

FILES = ("student.safetensors", "student.optimizer.safetensors", "state.json", "manifest.json")


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    return {"student": {"weight": torch.full((3, 5), float(step))}, "student.optimizer": {"step/weight": torch.tensor(float(step))}}


def save(root: Path, step: int, keep: int | None = None) -> Path:
    return save_checkpoint(root, step, tensors_of(step), {"step": step}, keep)


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in root.glob("checkpoint-*"))


def hidden_in(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------------------------------------------------------- round trip


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weird = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 3.4e38])
    tensors = {
        "student": {
            "whole": base,
            "shared": base,
            "transposed": base.T,
            "slice": base[2:4],
            "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "expanded": torch.ones(1, 3).expand(4, 3),
            "weird": weird,
            "trained": nn.Parameter(base.clone()),
        },
        "student.optimizer": {"step/whole": torch.tensor(7.0), "half": weird.bfloat16(), "empty": torch.zeros(0, 3)},
        "student.ema": {"counter": torch.tensor(2**53 + 1), "mask": torch.tensor([True, False]), "double": base.double() / 3},
        "nothing": {},
    }
    state = {"step": 3, "rate": 0.1, "names": ["a", "ü"], "nested": {"none": None}}
    loaded, loaded_state = load_checkpoint(save_checkpoint(tmp_path, 3, tensors, state))
    assert loaded_state == state
    assert {name: set(group) for name, group in loaded.items()} == {name: set(group) for name, group in tensors.items()}
    for name, group in tensors.items():
        for key, expected in group.items():
            got = loaded[name][key]
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            expected = expected.detach().contiguous()
            assert got.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8)), (name, key)


def test_what_is_loaded_does_not_write_through_to_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    loaded, _ = load_checkpoint(path)
    loaded["student"]["weight"].add_(1)
    assert load_checkpoint(path, torch.device("cpu", 0))[0]["student"]["weight"].eq(1).all()  # as a rank calls its CPU


def test_manifest_holds_the_size_and_hash_of_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    expected = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    assert json.loads((path / "manifest.json").read_text()) == expected
    assert set(files) == set(FILES) - {"manifest.json"}


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tensor group: got '../x'"):
        save_checkpoint(tmp_path, 1, {"../x": {}}, {})
    with pytest.raises(InputError, match="keep: got 0"):
        save(tmp_path, 1, keep=0)
    with pytest.raises(InputError, match="step: got -1"):
        save(tmp_path, -1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, {}, {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------------- damage


def flip_first_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lose_one_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip_first_bit, flip_last_bit, truncate, lose_one_byte, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_by_name_and_the_previous_checkpoint_used(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad / name)
    with pytest.raises(InputError, match=f"checkpoint-2: .*{re.escape(name)}"):
        load_checkpoint(bad)
    with pytest.warns(UserWarning) as caught:
        assert latest_checkpoint(tmp_path) == good
    assert len(caught) == 1
    line = str(caught[0].message)
    assert name in line and line.endswith("using checkpoint-1 instead") and "\n" not in line


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Of all files, the manifest itself among them; every fifth bit, to bound the time."""
    path = save(tmp_path, 1)
    for file in path.iterdir():
        whole = file.read_bytes()
        for bit in range(0, 8 * len(whole), 5):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(InputError):
                load_checkpoint(path)
        file.write_bytes(whole)
    assert load_checkpoint(path)[1] == {"step": 1}


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    shutil.copy(path / "student.safetensors", path / "teacher.safetensors")
    with pytest.raises(InputError, match=r"teacher\.safetensors is not in manifest\.json"):
        load_checkpoint(path)


def test_no_sound_checkpoint_is_none_and_said(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path) is None
        assert latest_checkpoint(tmp_path / "never-made") is None
    empty(save(tmp_path, 1) / "state.json")
    with pytest.warns(UserWarning, match=r"state\.json has 0 bytes.*no sound checkpoint is left"):
        assert latest_checkpoint(tmp_path) is None
    with pytest.raises(InputError, match="no such folder"):
        load_checkpoint(tmp_path / "checkpoint-9")


def test_newest_is_by_step_and_not_by_name_or_time(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"resume_from_checkpoint: got 'latest'; there is no sound checkpoint in"):
        resolve_checkpoint(tmp_path, "latest")
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert resolve_checkpoint(tmp_path, "latest") == second
    assert resolve_checkpoint(tmp_path / "elsewhere", str(first)) == first
    assert resolve_checkpoint(tmp_path, "checkpoint-1") == first
    with pytest.raises(InputError, match=r"got 'checkpoint-3'; .*: checkpoint-2, checkpoint-1"):
        resolve_checkpoint(tmp_path, "checkpoint-3")


# ------------------------------------------------------------------------------------------------------------------- pruning


def test_keep_leaves_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert steps_in(tmp_path) == [15, 20]
    save(tmp_path, 25, keep=1)
    assert steps_in(tmp_path) == [25]
    assert hidden_in(tmp_path) == []


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_last_bit(tmp_path / "checkpoint-3" / "student.safetensors")
    save(tmp_path, 4, keep=2)
    assert steps_in(tmp_path) == [2, 3, 4]  # 2 is the sound one to fall back to; 3 is there to be looked at
    save(tmp_path, 5, keep=2)
    assert steps_in(tmp_path) == [4, 5]


def test_the_checkpoint_just_saved_is_never_pruned(tmp_path: Path) -> None:
    """Continuing from an older checkpoint saves steps below the newest one that lies there."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep=1)
    assert steps_in(tmp_path) == [15]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save_checkpoint(tmp_path, 1, {"other": {"x": torch.ones(2)}}, {"again": True})
    tensors, state = load_checkpoint(path)
    assert (set(tensors), state) == ({"other"}, {"again": True})
    assert hidden_in(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------- full disk


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", [1, 2])
def test_a_write_that_fails_half_way_leaves_the_previous_checkpoint(tmp_path: Path, step: int) -> None:
    """For a new step, and for the one that is there already."""
    save(tmp_path, 1)
    large = {"student": {"weight": torch.zeros(256)}, "fake_score": {"weight": torch.zeros(1 << 20)}}
    with largest_file(1 << 20), pytest.raises(OSError, match=r"checkpoint-\d was not written .* it needs 4,\d{3},\d{3} bytes"):
        save_checkpoint(tmp_path, step, large, {}, keep=1)
    assert steps_in(tmp_path) == [1] and hidden_in(tmp_path) == []
    assert load_checkpoint(tmp_path / "checkpoint-1")[1] == {"step": 1}


def test_too_little_room_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(InputError, match=r"checkpoint-2 needs 4,\d{3},\d{3} bytes and .* has 5,000 left"):
        save_checkpoint(tmp_path, 2, {"student": {"weight": torch.zeros(1 << 20)}}, {}, keep=1)
    assert steps_in(tmp_path) == [1]


def test_the_room_asked_for_covers_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, free = namedtuple("usage", "total used free"), 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free, 0, free))
    tensors = {"student": {f"down_blocks.{i}.attentions.0.to_q.weight": torch.zeros(3) for i in range(200)}}
    with pytest.raises(InputError) as caught:
        save_checkpoint(tmp_path, 1, tensors, {})
    needed = re.search(r"needs ([\d,]+) bytes", str(caught.value))
    assert needed is not None
    free = int(needed[1].replace(",", ""))
    path = save_checkpoint(tmp_path, 1, tensors, {})
    assert sum(file.stat().st_size for file in path.iterdir()) <= free


# --------------------------------------------------------------------------------------------------------------------- kills

KILLS = '''
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from diffusion_distill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
warnings.simplefilter("error")  # a damaged newest checkpoint would warn


def save(root, step):
    tensors = {role: {"w": torch.full((4000,), float(step))} for role in ("student", "student.optimizer", "student.ema")}
    save_checkpoint(root, step, tensors, {"step": step}, keep=2)


def check(root):
    """The newest visible checkpoint is sound and all of one step; returns the step."""
    newest = latest_checkpoint(root)
    visible = [int(path.name[len("checkpoint-"):]) for path in root.glob("checkpoint-*")]
    tensors, state = load_checkpoint(newest)
    assert state["step"] >= max(visible, default=0), (state, visible)
    assert len(tensors) == 3 and all(t["w"].eq(state["step"]).all() for t in tensors.values())
    return state["step"]


def random_kills(root, count):
    """kill -9 of a process that saves back to back, each step twice; prints how many kills fell inside a save."""
    generator, inside, done = random.Random(0), 0, 0
    for _ in range(count):
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            for step in range(done + 1, done + 10000):
                for _ in range(2):
                    save(root, step)
                os.write(tell, step.to_bytes(4, "big"))
        os.close(tell)
        os.read(told, 4)  # the first save of this child is through
        time.sleep(generator.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rest = os.read(told, 1 << 20)
        os.close(told)
        inside += any(path.name.startswith(".") for path in root.iterdir())
        finished = int.from_bytes(rest[-4:], "big") if rest else done + 1
        step = check(root)
        assert step >= finished, (step, finished)
        done = step
    print("inside", inside)


def kills_at_every_operation(root):
    """A process that dies at the n-th rename, fsync, new folder or removal of a save, for every n: a new step, then a replaced one."""
    for first, again in ((2, 3), (3, 3)):
        n = 0
        while True:
            child = os.fork()
            if not child:
                left = n
                def dying(operation):
                    def call(*args, **kwargs):
                        nonlocal left
                        if left == 0:
                            os._exit(9)
                        left -= 1
                        return operation(*args, **kwargs)
                    return call
                for name in ("rename", "fsync", "mkdir", "unlink"):
                    setattr(os, name, dying(getattr(os, name)))
                save(root, again)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert check(root) in (first, again)
            if os.waitstatus_to_exitcode(status) == 0:
                break
            n += 1
        assert check(root) == again
        print("operations", n)


root = Path(sys.argv[1])
save(root / "random", 0)
random_kills(root / "random", 15)
save(root / "every", 1)
save(root / "every", 2)
kills_at_every_operation(root / "every")
'''


def test_kills_leave_the_newest_checkpoint_sound() -> None:
    """In memory where there is a file system for it: what a kill leaves is the same there, and hundreds of fsyncs cost nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        command = [sys.executable, "-c", KILLS, root]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert counts[0] >= 5, "the random kills fell between the saves: they tested nothing"
    assert min(counts[1:]) >= 12, "the operations of a save were not all intercepted"


def test_left_overs_of_a_killed_run_go_at_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".saving-checkpoint-2").mkdir()
    (tmp_path / ".saving-checkpoint-2" / "student.safetensors").write_bytes(b"half")
    os.rename(tmp_path / "checkpoint-1", tmp_path / ".replaced-checkpoint-1")  # killed between the two renames
    found = latest_checkpoint(tmp_path)
    assert found is not None and load_checkpoint(found)[1] == {"step": 1}
    save(tmp_path, 2)
    assert steps_in(tmp_path) == [1, 2] and hidden_in(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------- background


def test_the_background_writes_a_copy_and_one_at_a_time() -> None:
    writer, go, seen = BackgroundWriter(), threading.Event(), []
    weight = torch.ones(3)

    def write(tensors: Any) -> None:
        assert go.wait(60)
        seen.append(tensors["student"]["weight"].clone())

    writer.start({"student": {"weight": weight}}, write)
    weight.add_(1)
    assert not seen and not writer.failed
    threading.Timer(0.05, go.set).start()
    writer.start({"student": {"weight": weight}}, write)
    assert len(seen) >= 1  # the first is through before the second begins
    writer.wait()
    assert [value.tolist() for value in seen] == [[1.0] * 3, [2.0] * 3]


def test_what_the_background_raises_is_raised_once_and_printed_where_another_error_is_on_its_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(tensors: Any) -> None:
        raise CheckpointError("no room")

    writer = BackgroundWriter()
    writer.start({}, fail)
    with pytest.raises(CheckpointError, match="no room"):
        writer.wait()
    writer.wait()
    writer.start({}, fail)
    writer.finish()
    assert capsys.readouterr().err == "error: no room\n" and not writer.failed


# ----------------------------------------------------------------------------------------------------------------- optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.SiLU(), nn.Linear(9, 3, bias=False))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(x).float().square().sum().backward()
        optimizer.step()


def two_groups(net: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    parameters = list(net.parameters())
    return torch.optim.AdamW([{"params": parameters[1:2], "weight_decay": 0.0}, {"params": parameters[::2]}], lr=1e-2, **settings)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "loop": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.0, 0.99), foreach=False),
    "fused": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True),
    "foreach": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, foreach=True),
    "amsgrad": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, amsgrad=True),
    "groups": lambda net: two_groups(net, fused=True),
    "momentum": lambda net: torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9),
    "stateless": lambda net: torch.optim.SGD(net.parameters(), lr=1e-2),
}


def names_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    name = {p: n for n, p in net.named_parameters()}
    return [name[p] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_bit_identically(tmp_path: Path, build: Callable[[nn.Module], torch.optim.Optimizer], dtype: torch.dtype) -> None:
    whole = network().to(dtype)
    optimizer = build(whole)
    train(whole, optimizer, range(3))
    names = names_of(whole, optimizer)
    tensors, state = optimizer_tensors(optimizer, names)
    path = save_checkpoint(tmp_path, 3, {"net": dict(whole.state_dict()), "optimizer": tensors}, {"optimizer": state})
    train(whole, optimizer, range(3, 6))

    loaded, loaded_state = load_checkpoint(path)
    resumed = network().to(dtype)
    resumed.load_state_dict(loaded["net"])
    again = build(resumed)
    for group in again.param_groups:
        group["lr"] = 123.0  # must come from the checkpoint
    load_optimizer_tensors(again, names, loaded["optimizer"], loaded_state["optimizer"])
    train(resumed, again, range(3, 6))
    for (name, expected), got in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert got.equal(expected), name
    expected_tensors, expected_state = optimizer_tensors(optimizer, names)
    got_tensors, got_state = optimizer_tensors(again, names)
    assert got_state == expected_state and got_tensors.keys() == expected_tensors.keys()
    assert all(got_tensors[key].equal(value) and got_tensors[key].dtype == value.dtype for key, value in expected_tensors.items())


def test_tensor_names_are_state_key_and_parameter_name() -> None:
    net = network()
    optimizer = OPTIMIZERS["fused"](net)
    train(net, optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer, names_of(net, optimizer))
    assert set(tensors) == {f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in ("0.weight", "0.bias", "2.weight")}
    assert tensors["exp_avg/0.bias"] is optimizer.state[net[0].bias]["exp_avg"]
    assert state["param_groups"][0]["params"] == ["0.weight", "0.bias", "2.weight"] and json.loads(json.dumps(state))


def test_parameters_are_matched_by_name_and_kernels_stay_the_running_ones() -> None:
    net = network()
    optimizer = OPTIMIZERS["fused"](net)
    train(net, optimizer, range(2))
    tensors, state = optimizer_tensors(optimizer, names_of(net, optimizer))
    reversed_names = list(reversed(names_of(net, optimizer)))
    other = torch.optim.AdamW(list(reversed(list(net.parameters()))), lr=1.0, foreach=False)
    load_optimizer_tensors(other, reversed_names, tensors, state)
    for p in net.parameters():
        assert other.state[p]["exp_avg"].equal(optimizer.state[p]["exp_avg"])
        assert other.state[p]["exp_avg"].data_ptr() != optimizer.state[p]["exp_avg"].data_ptr()
    assert (other.param_groups[0]["lr"], other.param_groups[0]["fused"]) == (1e-2, None)


def test_another_parameter_set_is_refused_by_name() -> None:
    net = network()
    optimizer = OPTIMIZERS["loop"](net)
    train(net, optimizer, range(1))
    tensors, state = optimizer_tensors(optimizer, ["a", "b", "c"])
    with pytest.raises(InputError, match="optimizer state: got 'c'; .* the checkpoint alone"):
        load_optimizer_tensors(optimizer, ["a", "b", "d"], tensors, state)
    with pytest.raises(InputError, match="got '1 parameter groups'; this optimizer has 2"):
        load_optimizer_tensors(two_groups(net), ["a", "b", "c"], tensors, state)
    with pytest.raises(ValueError, match="2 distinct names for the 3 parameters"):
        optimizer_tensors(optimizer, ["a", "b", "b"])
