"""Everything a user can get wrong: exit code 2, one line that names where, what and what would do, and nothing written."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, KarrasVeScheduler
from PIL import Image
from tiny_pipelines import class_conditional, stable_diffusion

from diffusion_distill.checkpoint import save_checkpoint
from diffusion_distill.cli import main

ROOT = Path(__file__).parents[1]
SECONDS = 5  # of CPU time, for one mistake
IMAGE_FREE = ["--gan_weight", "0", "--guidance_scale", "1"]

Flags = Callable[[Path, Path], list[str]]  # of a folder to write to and one of whole pipelines: the flags that hold the mistake


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    class_conditional("flow").save_pretrained(folder / "labels")
    stable_diffusion().save_pretrained(folder / "prompts")
    return folder


def outcome(flags: list[str], method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, float]:
    """Exit code, the last line on stderr, and CPU seconds of the console command."""
    monkeypatch.setattr(sys, "argv", ["diffusion-distill", method, *flags])
    capsys.readouterr()
    before = time.process_time()
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return int(stop.value.code or 0), error.splitlines()[-1], time.process_time() - before


def refused(flags: list[str], words: tuple[str, ...], folder: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys) -> str:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, line, seconds = outcome(flags, method, monkeypatch, capsys)
    assert code == 2 and line.startswith("error: "), line
    assert all(word in line for word in words), line
    assert seconds < SECONDS
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return line


# ---------------------------------------------------------------------- flags and configuration files: nothing is looked at

USAGE: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown flag": (["--guidance_scal", "2"], ("--guidance_scal", "Perhaps you meant", "--guidance_scale")),
    "stray word": (["stray"], ("stray",)),
    "text for a number": (["--guidance_scale", "fast"], ("--guidance_scale", "'fast'", "FLOAT")),
    "a fraction for a whole number": (["--seed", "1.5"], ("--seed", "'1.5'", "INT")),
    "no value": (["--max_train_steps"], ("--max_train_steps",)),
    "no choice": (["--mixed_precision", "fp8"], ("--mixed_precision", "fp8", "bf16")),
    "a value for a switch": (["--push_to_hub", "yes"], ("yes",)),
    "one of many": (["--timesteps", "999", "now"], ("--timesteps", "now")),
    "config without a file": (["--config"], ("--config",)),
    "no such config": (["--config", "/nowhere.yaml"], ("config", "/nowhere.yaml", "YAML")),
    "a folder as config": (["--config", "/"], ("config", "'/'", "YAML")),
    "not a number": (["--guidance_scale", "nan"], ("guidance_scale", "nan", "0 or more")),
    "infinite": (["--learning_rate", "inf"], ("learning_rate", "inf", "above 0")),
    "negative": (["--learning_rate", "-1"], ("learning_rate", "-1", "above 0")),
    "no steps": (["--max_train_steps", "0"], ("max_train_steps", "got 0", "1 or more")),
    "no batch": (["--train_batch_size", "0"], ("train_batch_size", "got 0", "1 or more")),
    "beta of one": (["--adam_beta2", "1"], ("adam_beta2", "1.0", "below 1")),
    "negative decay": (["--adam_weight_decay", "-0.1"], ("adam_weight_decay", "-0.1", "0 or more")),
    "no epsilon": (["--adam_epsilon", "0"], ("adam_epsilon", "0.0", "above 0")),
    "no clipping": (["--max_grad_norm", "0"], ("max_grad_norm", "0.0", "above 0")),
    "decay of one": (["--ema_decay", "1"], ("ema_decay", "1.0", "below 1")),
    "no checkpoint to keep": (["--checkpoints_total_limit", "0"], ("checkpoints_total_limit", "got 0", "1 or more")),
    "negative rank": (["--lora_rank", "-1"], ("lora_rank", "-1", "0 or more")),
    "no alpha": (["--lora_rank", "2", "--lora_alpha", "0"], ("lora_alpha", "got 0", "1 or more")),
    "no patience": (["--rank_timeout", "0"], ("rank_timeout", "0.0", "above 0")),
    "fp16": (["--mixed_precision", "fp16"], ("mixed_precision", "fp16", "bf16")),
    "no inference steps": (["--num_inference_steps", "0"], ("num_inference_steps", "0")),
    "two sources": (["--dataset", "digits", "--num_classes", "3"], ("dataset and num_classes", "exactly one")),
    "no classes": (["--num_classes", "0"], ("num_classes", "got 0", "1 or more")),
    "no resolution": (["--dataset", "digits", "--resolution", "0"], ("resolution", "got 0", "1 or more")),
    "fewer than no workers": (["--dataset", "digits", "--dataloader_num_workers", "-1"], ("dataloader_num_workers", "-1", "0 or more")),
    "no teacher": (["--dataset", "digits", "--pretrained_model_name_or_path", ""], ("pretrained_model_name_or_path", "a folder")),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_flags(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags, words = USAGE[name]
    start = ["--pretrained_model_name_or_path", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")]
    data = [] if {"--dataset", "--num_classes"} & set(flags) else ["--dataset", "digits"]
    refused([*start, *data, *flags], words, tmp_path, "dmd2", monkeypatch, capsys)


FILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "unknown key": ("guidance_scal: 2", ("'guidance_scal'", "did you mean 'guidance_scale'")),
    "wrong type": ("guidance_scale: high", ("guidance_scale", "'high'", "a number")),
    "list for a number": ("seed: [1]", ("seed", "[1]", "a whole number")),
    "null": ("seed: null", ("seed", "None", "a whole number")),
    "yes": ("push_to_hub: yes", ("push_to_hub", "'yes'", "true or false")),
    "choice": ("lr_scheduler: exponential", ("lr_scheduler", "'exponential'", "'cosine'")),
    "twice": ("seed: 1\nseed: 2", ("'seed'", "twice")),
    "nested": ("train: {seed: 1}", ("'train'", "unknown key")),
    "a list": ("- seed", ("list", "key: value")),
    "text": ("seed", ("str", "key: value")),
    "open bracket": ("timesteps: [1", ("not valid YAML",)),
    "tab": ("seed:\t\t[", ("not valid YAML",)),
    "an object": ("seed: !!python/object/apply:os.getcwd []", ("not valid YAML",)),
    "an alias of nothing": ("seed: *x", ("not valid YAML",)),
    "a key that is a list": ("[a, b]: 1", ("not valid YAML",)),
    "a date": ("hub_model_id: 2024-01-01", ("hub_model_id", "2024", "text")),
    "binary": (b"\xff\xfe\x00\x01", ("not valid YAML",)),
    "null byte": (b"seed: 1\x00", ("not valid YAML",)),
    "out of range": ("ema_decay: 1.5", ("ema_decay", "1.5", "below 1")),
    "huge": ("learning_rate: 1e400", ("learning_rate", "a number")),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_configuration_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = FILES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--config", str(path), "--pretrained_model_name_or_path", str(tmp_path / "nowhere"), "--dataset", "digits"]
    line = refused(flags, words, tmp_path, "dmd2", monkeypatch, capsys)
    assert name == "out of range" or str(path) in line


# ---------------------------------------------------------------------- data and folders: seen before the teacher is loaded


def without_weights(teachers: Path, folder: Path, kind: str) -> Path:
    """A teacher that nothing can load: what is refused with it is refused before."""
    shutil.copytree(teachers / kind, folder / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder / "teacher"


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def images(*rows: object, name: str = "a.png") -> Flags:
    """A folder of one image and a metadata.jsonl."""

    def make(folder: Path, teachers: Path) -> list[str]:
        (folder / "images").mkdir()
        Image.new("L", (8, 8)).save(folder / "images" / name)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
        return ["--train_data_dir", str(folder / "images"), "--gan_weight", "0.1"]

    return make


def linked(folder: Path, teachers: Path) -> list[str]:
    (folder / "images").mkdir()
    Image.new("L", (8, 8)).save(folder / "outside.png")
    os.symlink(folder / "outside.png", folder / "images" / "a.png")
    (folder / "images" / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 1}')
    return ["--train_data_dir", str(folder / "images"), "--gan_weight", "0.1"]


def linked_list(folder: Path, teachers: Path) -> list[str]:
    (folder / "images").mkdir()
    (folder / "secret.jsonl").write_text('{"file_name": "a.png", "label": 1}')
    os.symlink(folder / "secret.jsonl", folder / "images" / "metadata.jsonl")
    return ["--train_data_dir", str(folder / "images")]


def text_file(content: bytes, flag: str = "--prompts_file") -> Flags:
    def make(folder: Path, teachers: Path) -> list[str]:
        (folder / "file.txt").write_bytes(content)
        return [flag, str(folder / "file.txt")]

    return make


def pairs(index: object, shard: bytes = b"") -> Flags:
    def make(folder: Path, teachers: Path) -> list[str]:
        (folder / "pairs").mkdir()
        (folder / "pairs" / "pairs.json").write_text(index if isinstance(index, str) else json.dumps(index))
        (folder / "pairs" / "pairs-00000.safetensors").write_bytes(shard)
        return ["--pairs_dir", str(folder / "pairs")]

    return make


def run_folder(*flags: str, record: bool = True, broken: bool = False) -> Flags:
    def make(folder: Path, teachers: Path) -> list[str]:
        run = folder / "run"
        run.mkdir()
        if record:
            (run / "run.json").write_text("{}")
        if broken:
            path = save_checkpoint(run, 3, {"student": {"w": torch.ones(3)}}, {"step": 3})
            (path / "state.json").write_text("")
        return ["--dataset", "digits", *flags]

    return make


ENTRY = {"file": "pairs-00000.safetensors", "pairs": 2, "bytes": 4, "sha256": "0"}
SETTINGS = {"num_pairs": 2, "shard_size": 2, "sample_shape": [1, 8, 8]}
INDEX = {"settings": SETTINGS, "conditions": [0, 1], "shards": [ENTRY]}

SOURCES: dict[str, tuple[Flags, tuple[str, ...]]] = {
    "no folder": (lambda folder, t: ["--train_data_dir", str(folder / "none")], ("train_data_dir", "none", "an existing folder")),
    "a file for a folder": (text_file(b"x", "--train_data_dir"), ("train_data_dir", "file.txt", "an existing folder")),
    "an empty folder": (lambda folder, t: ["--train_data_dir", str(made(folder / "empty"))], ("train_data_dir", "metadata.jsonl")),
    "no lines": (images(), ("metadata.jsonl", "not blank")),
    "half a line": (images('{"file_name": "a.pn'), ("metadata.jsonl, line 1", "JSON object")),
    "a number for a line": (images("7"), ("metadata.jsonl, line 1", "'7'", "JSON object")),
    "deep nesting": (images("[" * 100_000), ("metadata.jsonl, line 1", "JSON object")),
    "no file name": (images({"label": 1}), ("line 1: file_name", "None", "path of an image")),
    "no such file": (images({"file_name": "b.png", "label": 1}), ("line 1: file_name", "b.png", "no such file")),
    "a way out": (images({"file_name": "../outside.png", "label": 1}), ("line 1: file_name", "outside.png", "inside")),
    "an absolute path": (images({"file_name": "/etc/hostname", "label": 1}), ("line 1: file_name", "/etc/hostname", "inside")),
    "a null byte": (images({"file_name": "a\0.png", "label": 1}), ("line 1: file_name", "a\\x00.png")),
    "a long name": (images({"file_name": "a" * 5000, "label": 1}), ("line 1: file_name", "aaa")),
    "a link out": (linked, ("line 1: file_name", "a.png", "links out of the folder")),
    "a list elsewhere": (linked_list, ("train_data_dir", "metadata.jsonl", "links out of the folder")),
    "label as text": (images({"file_name": "a.png", "label": "3"}), ("line 1: label", "'3'")),
    "captions and labels": (images({"file_name": "a.png", "text": "x"}, {"file_name": "a.png", "label": 1}), ("line 2", "all lines")),
    "no prompts": (text_file(b"\n \n"), ("prompts_file", "file.txt", "not blank")),
    "prompts that are no text": (text_file(b"\xff\xff"), ("prompts_file", "file.txt", "UTF-8")),
    "a folder of prompts": (lambda folder, t: ["--prompts_file", str(folder)], ("prompts_file", "readable text file")),
    "images needed": (lambda folder, t: ["--num_classes", "10", "--gan_weight", "0.1"], ("num_classes", "no images")),
    "no pairs": (lambda folder, t: ["--pairs_dir", str(folder)], ("pairs_dir", "pairs.json", "make_pairs")),
    "half an index of pairs": (pairs('{"settings"'), ("pairs.json", "not the index")),
    "an index of something else": (pairs({}), ("pairs.json", "not the index")),
    "an index with holes": (pairs(INDEX | {"settings": {}}), ("pairs.json", "not the index")),
    "pairs unfinished": (pairs(INDEX | {"shards": []}), ("pairs_dir", "not finished")),
    "pairs cut short": (pairs(INDEX), ("pairs_dir", "pairs-00000.safetensors", "4 were written")),
    "pairs of noise": (pairs(INDEX, b"junk"), ("pairs_dir", "pairs-00000.safetensors", "not readable")),
    "another run": (run_folder(), ("output_dir", "already holds a run", "resume_from_checkpoint")),
    "nothing to resume": (run_folder("--resume_from_checkpoint", "latest", record=False), ("resume_from_checkpoint", "no sound")),
    "no such checkpoint": (run_folder("--resume_from_checkpoint", "checkpoint-7"), ("resume_from_checkpoint", "checkpoint-7", "none")),
    "a model elsewhere": (
        lambda folder, t: ["--dataset", "digits", "--pretrained_model_name_or_path", str(folder / "none")],
        ("pretrained_model_name_or_path", "none", "no such folder"),
    ),
    "a folder without a model": (
        lambda folder, t: ["--dataset", "digits", "--pretrained_model_name_or_path", str(folder)],
        ("pretrained_model_name_or_path", "model_index.json"),
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_wrong_data_and_folders_are_seen_before_the_teacher_is_loaded(
    name: str, tmp_path: Path, teachers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = SOURCES[name]
    flags = make(tmp_path, teachers)
    start = ["--pretrained_model_name_or_path", str(without_weights(teachers, tmp_path, "labels")), "--trust_remote_code"]
    start += ["--output_dir", str(tmp_path / "run"), *IMAGE_FREE]
    refused([*start, *flags], words, tmp_path, "dmd2", monkeypatch, capsys)


# ---------------------------------------------------------------------- pipelines


def edited(file: str, kind: str = "prompts", **changes: object) -> Flags:
    def make(folder: Path, teachers: Path) -> list[str]:
        shutil.copytree(teachers / kind, folder / "teacher")
        path = folder / "teacher" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return []

    return make


def overwritten(file: str, content: bytes | None, kind: str = "prompts", *flags: str) -> Flags:
    """A file of the pipeline with other content; None removes it."""

    def make(folder: Path, teachers: Path) -> list[str]:
        shutil.copytree(teachers / kind, folder / "teacher")
        path = folder / "teacher" / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if content is not None:
            path.write_bytes(content)
        return list(flags)

    return make


def other_pipeline(folder: Path, teachers: Path) -> list[str]:
    pipe = class_conditional("epsilon")
    DDPMPipeline(pipe.unet, pipe.scheduler).save_pretrained(folder / "teacher")
    return []


def other_scheduler(folder: Path, teachers: Path) -> list[str]:
    edited("model_index.json", scheduler=["diffusers", "KarrasVeScheduler"])(folder, teachers)
    KarrasVeScheduler().save_pretrained(folder / "teacher" / "scheduler")
    return []


def cut_weights(folder: Path, teachers: Path) -> list[str]:
    overwritten("unet/diffusion_pytorch_model.safetensors", (teachers / "prompts" / WEIGHTS).read_bytes()[:-100])(folder, teachers)
    return []


def with_flags(*flags: str) -> Flags:
    def make(folder: Path, teachers: Path) -> list[str]:
        shutil.copytree(teachers / "prompts", folder / "teacher")
        return list(flags)

    return make


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CANNOT = ("pretrained_model_name_or_path", "cannot load", "teacher")
PIPELINES: dict[str, tuple[Flags, tuple[str, ...]]] = {
    "empty index": (overwritten("model_index.json", b""), ("model_index.json", "_class_name")),
    "a list for an index": (overwritten("model_index.json", b"[1]"), ("model_index.json", "_class_name")),
    "a number for a class": (edited("model_index.json", _class_name=3), ("model_index.json", "_class_name")),
    "unknown class": (edited("model_index.json", _class_name="Nope"), ("_class_name", "Nope", "supported", "StableDiffusionPipeline")),
    "unsupported class": (other_pipeline, ("pipeline class", "DDPMPipeline", "StableDiffusionPipeline")),
    "unsupported scheduler": (other_scheduler, ("scheduler", "KarrasVeScheduler", "flow-matching")),
    "junk for a component": (edited("model_index.json", unet=5), CANNOT),
    "a component from elsewhere": (edited("model_index.json", unet=["os", "system"]), CANNOT),
    "an unknown component": (edited("model_index.json", unet=["diffusers", "Nope"]), (*CANNOT, "Nope")),
    "no weights": (overwritten(WEIGHTS, None), (*CANNOT, "safetensors", "unet")),
    "empty weights": (overwritten(WEIGHTS, b""), (*CANNOT, WEIGHTS)),
    "cut weights": (cut_weights, (*CANNOT, WEIGHTS)),
    "junk for weights": (overwritten(WEIGHTS, b"\xff" * 100), (*CANNOT, WEIGHTS)),
    "junk for the encoder": (overwritten("text_encoder/model.safetensors", b"123"), CANNOT),
    "half a configuration": (overwritten("unet/config.json", b"{"), (*CANNOT, "unet/config.json")),
    "negative channels": (edited("unet/config.json", in_channels=-4), CANNOT),
    "other shapes": (edited("unet/config.json", cross_attention_dim=64), (*CANNOT, "shape")),
    "text for blocks": (edited("unet/config.json", block_out_channels="x"), (*CANNOT, "block_out_channels")),
    "no scheduler": (overwritten("scheduler", None), ("pretrained_model_name_or_path", "'scheduler'", "missing")),
    "unknown betas": (edited("scheduler/scheduler_config.json", beta_schedule="nope"), (*CANNOT, "nope")),
    "many timesteps": (edited("scheduler/scheduler_config.json", num_train_timesteps="many"), CANNOT),
    "no timesteps": (edited("scheduler/scheduler_config.json", num_train_timesteps=0), CANNOT),
    "unknown prediction": (edited("scheduler/scheduler_config.json", prediction_type="nope"), ("prediction_type", "nope", "epsilon")),
    "no tokenizer": (overwritten("tokenizer", None), ("pretrained_model_name_or_path", "'tokenizer'", "missing")),
    "junk for a tokenizer": (overwritten("tokenizer/tokenizer_config.json", b"junk"), CANNOT),
    "no such variant": (with_flags("--variant", "fp16"), (*CANNOT, "fp16")),
    "timestep outside": (with_flags("--timesteps", "1200", "500"), ("timesteps", "1200", "0 to 999")),
    "odd resolution": (with_flags("--resolution", "17"), ("resolution", "17")),
    "unknown tracker": (with_flags("--report_to", "nonsense"), ("report_to", "nonsense")),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_wrong_pipelines(
    name: str, tmp_path: Path, teachers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = PIPELINES[name]
    flags = make(tmp_path, teachers)
    (tmp_path / "prompts.txt").write_text("a house\n")
    start = ["--pretrained_model_name_or_path", str(tmp_path / "teacher"), "--prompts_file", str(tmp_path / "prompts.txt")]
    start += ["--output_dir", str(tmp_path / "run"), "--train_batch_size", "1", "--max_train_steps", "1", *IMAGE_FREE]
    refused([*start, *flags], words, tmp_path, "dmd2", monkeypatch, capsys)


if __name__ == "__main__":
    print(sum(map(len, (USAGE, FILES, SOURCES, PIPELINES))))
