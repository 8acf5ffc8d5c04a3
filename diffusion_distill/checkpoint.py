"""Checkpoints that a kill never leaves half-written and that no damage passes silently.

`checkpoint-N/` holds one safetensors file a group of tensors, `state.json`, and `manifest.json` with the size and SHA-256 of
each. A folder is written under a hidden name, forced to disk and then renamed, so a visible one is complete; before it is
read, every byte is compared with the manifest. Nothing is pickled. One process writes to a folder at a time.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import InputError, reject

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", ".safetensors"
SAVING, REPLACED, DELETED = ".saving-", ".replaced-", ".deleted-"
GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
HEADER_BYTES_PER_TENSOR = 512  # generous: a safetensors header entry is a name, a shape and two offsets
KERNEL_CHOICES = ("foreach", "fused", "capturable", "differentiable")  # how an optimizer computes, not what

TensorGroups = Mapping[str, Mapping[str, Tensor]]


def save_checkpoint(root: Path, step: int, tensors: TensorGroups, state: Mapping[str, Any], keep: int | None = None) -> Path:
    """Write `root/checkpoint-{step}` and return its path; a checkpoint of the same step is replaced.

    Tensors of any device, dtype, stride and sharing come back contiguous, each with storage of its own. `state` is JSON: tuples
    come back as lists and integer keys as strings. With `keep`, this checkpoint and the `keep - 1` newest sound others stay,
    which are read in full to know it; newer damaged ones are left for inspection.

    Raises:
        InputError: for a bad `keep`, `step` or group name, and when the disk has too little room.
        OSError: when writing fails all the same. What was there before is untouched in either case.
    """
    if keep is not None and keep < 1:
        raise reject("keep", keep, "at least 1")
    if step < 0:
        raise reject("step", step, "0 or more")
    for name in tensors:
        if not GROUP_NAME.fullmatch(name):
            raise reject("tensor group", name, "letters, digits, '_', '-' and '.', which make a file name")
    final, text = root / f"checkpoint-{step}", json.dumps(state, indent=1) + "\n"
    root.mkdir(parents=True, exist_ok=True)
    _tidy(root)
    needed = _bytes_needed(tensors, text)
    _require_space(root, final.name, needed)
    partial = root / (SAVING + final.name)
    try:
        _write(partial, tensors, text)
        _publish(partial, final)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{final} was not written ({error}); it needs {needed:,} bytes") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if keep is not None:
        _prune(root, final, keep)
    return final


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors, on `device`, and the state of a checkpoint whose every file is as it was written.

    Raises:
        InputError: naming the first file that is missing, truncated, altered or not in the manifest.
    """
    _verify(path)
    place = "cpu" if torch.device(device).type == "cpu" else str(device)  # safetensors knows no cpu:0, a rank's name for it
    tensors = {file.name.removesuffix(TENSORS): load_file(file, place) for file in sorted(path.glob("*" + TENSORS))}
    return tensors, json.loads((path / STATE).read_text())


def latest_checkpoint(root: Path) -> Path | None:
    """The newest sound checkpoint in `root`, None if there is none. Warns, one line each, of newer ones that are damaged."""
    damaged, found = [], None
    for path in checkpoints_in(root):
        try:
            _verify(path)
        except InputError as error:
            damaged.append(str(error))
        else:
            found = path
            break
    for line in damaged:
        warnings.warn(f"{line}; {f'using {found.name} instead' if found else 'no sound checkpoint is left'}", stacklevel=2)
    return found


def resolve_checkpoint(root: Path, value: str) -> Path:
    """The folder that `value` names: "latest", a path, or the name of a checkpoint in `root`.

    Raises:
        InputError: when there is none.
    """
    if value == "latest":
        if found := latest_checkpoint(root):
            return found
        raise reject("resume_from_checkpoint", value, f"there is no sound checkpoint in {root}")
    for path in (Path(value), root / value):
        if (path / MANIFEST).is_file():
            return path
    names = ", ".join(path.name for path in checkpoints_in(root)) or "none"
    raise reject("resume_from_checkpoint", value, f"'latest' or the path of a checkpoint is needed; in {root}: {names}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors `exp_avg/<parameter name>` (not copies) and a JSON part.

    `names` are those of the optimizer's parameters, in its order. The JSON part holds state that is no tensor, and the
    settings of the parameter groups.
    """
    saved = optimizer.state_dict()
    _check_names(saved["param_groups"], names)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{names[index]}"] = value
            else:
                scalars.setdefault(names[index], {})[key] = value
    groups = [group | {"params": [names[index] for index in group["params"]]} for group in saved["param_groups"]]
    return tensors, {"scalars": scalars, "param_groups": groups}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Undo `optimizer_tensors` on an optimizer of the same parameter groups; parameters are matched by name.

    Settings come from the checkpoint, save for `fused` and the like: how to compute is the running optimizer's affair.

    Raises:
        InputError: when the parameters of a group are not those of the checkpoint.
    """
    live = optimizer.state_dict()["param_groups"]
    _check_names(live, names)
    if len(live) != len(state["param_groups"]):
        raise reject("optimizer state", f"{len(state['param_groups'])} parameter groups", f"this optimizer has {len(live)}")
    groups = [_settings(group, saved, names) for group, saved in zip(live, state["param_groups"], strict=True)]
    index = {name: i for i, name in enumerate(names)}
    entries: dict[int, dict[str, Any]] = {index[name]: dict(values) for name, values in state["scalars"].items()}
    for path, value in tensors.items():
        key, name = path.split("/", 1)
        entries.setdefault(index[name], {})[key] = value.clone()  # safetensors maps the file: the optimizer writes in place
    optimizer.load_state_dict({"state": dict(sorted(entries.items())), "param_groups": groups})


def _check_names(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    count = sum(len(group["params"]) for group in groups)
    if count != len(names) or len(set(names)) != len(names):
        raise ValueError(f"{len(set(names))} distinct names for the {count} parameters of the optimizer")


def _settings(live: Mapping[str, Any], saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The saved settings of one parameter group in the types of the running one's: JSON knows no tuples."""
    own = [names[index] for index in live["params"]]
    if different := sorted(set(own) ^ set(saved["params"])):
        where = "this optimizer" if different[0] in own else "the checkpoint"
        raise reject("optimizer state", different[0], f"the same parameters on both sides are needed, it is in {where} alone")
    settings = {key: tuple(value) if isinstance(live.get(key), tuple) else value for key, value in saved.items()}
    return settings | {key: live[key] for key in KERNEL_CHOICES if key in live} | {"params": live["params"]}


def checkpoints_in(root: Path) -> list[Path]:
    """Checkpoint folders, sound or not, newest first; a replaced one counts where a kill came before its successor had its name."""
    found: dict[int, Path] = {}
    for path in root.glob("*checkpoint-*"):
        match = re.fullmatch(rf"({re.escape(REPLACED)})?checkpoint-(\d+)", path.name)
        if match and path.is_dir() and not (match[1] and int(match[2]) in found):
            found[int(match[2])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def _tidy(root: Path) -> None:
    """Remove what a killed save left behind, and give a half-replaced checkpoint its name back."""
    for path in root.glob(REPLACED + "*"):
        visible = root / path.name.removeprefix(REPLACED)
        if visible.exists():
            _delete(path)
        else:
            os.rename(path, visible)
    for path in (*root.glob(SAVING + "*"), *root.glob(DELETED + "*")):
        shutil.rmtree(path, ignore_errors=True)


def _bytes_needed(tensors: TensorGroups, text: str) -> int:
    every = [tensor for group in tensors.values() for tensor in group.values()]
    return sum(t.numel() * t.element_size() + HEADER_BYTES_PER_TENSOR for t in every) + len(text.encode()) + 4096 * (len(tensors) + 2)


def _require_space(root: Path, name: str, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        raise InputError(f"output_dir: {name} needs {needed:,} bytes and {root} has {free:,} left; make room or choose another disk")


def _write(folder: Path, tensors: TensorGroups, text: str) -> None:
    """Fill a new `folder` and force it to disk, the manifest last."""
    folder.mkdir()
    for name, group in tensors.items():
        save_file(_writable(group), folder / (name + TENSORS), metadata={"format": "pt"})
    (folder / STATE).write_text(text)
    for path in folder.iterdir():
        _sync(path)
    manifest = {name: {"size": size, "sha256": digest} for name, size, digest in _digests(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))  # no newline at the end: losing any byte breaks the JSON
    _sync(folder / MANIFEST)
    _sync(folder)


def _writable(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, which is what safetensors accepts."""
    out, storages = {}, set()
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return out


def _publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name. At every moment the old or the new checkpoint is one that `_checkpoints` finds."""
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    _sync(final.parent)
    if replaced.exists():
        _delete(replaced)


def _prune(root: Path, saved: Path, keep: int) -> None:
    """Delete what is older than the `keep - 1` newest sound checkpoints beside `saved`."""
    others = [path for path in checkpoints_in(root) if path != saved]
    if len(others) < keep:
        return
    sound = 0
    for path in others:
        if sound == keep - 1:
            _delete(path)
        else:
            sound += _is_sound(path)


def _delete(folder: Path) -> None:
    """Rename, then remove: a kill half-way leaves no visible folder with files missing. Left-overs go at the next save."""
    hidden = Path(tempfile.mkdtemp(prefix=DELETED, dir=folder.parent))
    os.rename(folder, hidden / folder.name)
    shutil.rmtree(hidden, ignore_errors=True)


def _is_sound(path: Path) -> bool:
    try:
        _verify(path)
    except InputError:
        return False
    return True


def _verify(path: Path) -> None:
    """Raise InputError, naming the file, unless every byte of a checkpoint is as it was written."""
    if not path.is_dir():
        raise InputError(f"checkpoint {path}: there is no such folder")
    try:
        difference = next(_differences(path, _read_manifest(path)), None)
    except OSError as error:
        difference = f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    if difference:
        raise InputError(f"checkpoint {path}: {difference}")


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by file name; empty when the manifest is missing or not what was written."""
    try:
        entries = json.loads((path / MANIFEST).read_text()).items()
        return {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in entries}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):  # ValueError: no JSON
        return {}


def _differences(path: Path, manifest: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """What differs between a folder and its manifest, the cheap comparisons first."""
    present = {entry.name for entry in path.iterdir()}
    if MANIFEST not in present:
        yield f"{MANIFEST} is missing"
    if STATE not in manifest:
        yield f"{MANIFEST} is not the list of sizes and hashes that was written"
    present -= {MANIFEST}
    for name in sorted(manifest.keys() - present):
        yield f"{name} is missing"
    for name in sorted(present - manifest.keys()):
        yield f"{name} is not in {MANIFEST}"
    for name in sorted(present):
        size, written = (path / name).stat().st_size, manifest[name][0]
        if size != written:
            yield f"{name} has {size:,} bytes, {written:,} were written"
    for name, _, digest in _digests(path):
        if name != MANIFEST and digest != manifest[name][1]:
            yield f"{name} has changed since it was written (its SHA-256 is not the one in {MANIFEST})"


def _digests(folder: Path) -> list[tuple[str, int, str]]:
    """(name, size, SHA-256) of every file; hashing lets go of the interpreter, so threads share the work."""
    files = sorted(folder.iterdir())
    with ThreadPoolExecutor() as pool:
        return [(file.name, file.stat().st_size, digest) for file, digest in zip(files, pool.map(_sha256, files), strict=True)]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
