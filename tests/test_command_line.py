"""`train/dmd2.py` and `diffusion-distill` from flags to an exported student, and one line for everything a user can get wrong."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from diffusers import DDPMPipeline, DiffusionPipeline, KarrasVeScheduler
from PIL import Image
from tiny_pipelines import class_conditional

from diffusion_distill.build import load_pipeline
from diffusion_distill.cli import train
from diffusion_distill.config import TeacherConfig, run_cli
from diffusion_distill.methods import METHODS

ROOT = Path(__file__).parent.parent
SMALL = ["--trust_remote_code", "--max_train_steps", "2", "--train_batch_size", "4", "--gan_weight", "0", "--guidance_scale", "1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    class_conditional("flow").save_pretrained(folder)
    return folder


def run(*flags: str, method: str = "dmd2") -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: train(method, flags))
    return int(stop.value.code or 0)


def test_from_flags_to_a_student_that_diffusers_loads(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x7" * 17)
    flags = [
        *SMALL,
        "--hub_model_id",
        os.environ["HF_TOKEN"],
        "--dataset",
        "digits",
        "--num_inference_steps",
        "2",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert run("--pretrained_model_name_or_path", str(teacher), *flags) == 0
    student = tmp_path / "run" / "student"
    record = json.loads((student / "distillation.json").read_text())
    assert record["method"] == "dmd2" and record["samplers"][0]["timesteps"] == [1000.0, 500.0] and record["teacher"] == str(teacher)
    assert json.loads((student / "verification.json").read_text())["max_difference"] <= 1e-6
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and os.environ["HF_TOKEN"].encode() in path.read_bytes()]
    pipe = DiffusionPipeline.from_pretrained(student, trust_remote_code=True)
    assert len(pipe(class_labels=[1, 2]).images) == 2
    assert "trust_remote_code=True" in (student / "README.md").read_text()


def load_often(folder: str) -> None:
    for _ in range(40):
        for name in [name for name in sys.modules if name.startswith("diffusers_modules.local")]:
            del sys.modules[name]  # as in a process that loads for the first time
        load_pipeline(TeacherConfig(folder, trust_remote_code=True))


def test_processes_that_load_a_pipeline_with_code_of_its_own_do_not_disturb_each_other(teacher: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=load_often, args=(str(teacher),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]


def test_every_recipe_is_a_configuration_of_its_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = sorted((ROOT / "train" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert isinstance(yaml.safe_load(recipe.read_text()), dict)
        bed, _, named = recipe.stem.partition("_")
        assert bed in ("digits", "emoji")
        method, settings = max((name for name in METHODS if named.startswith(name)), key=len), yaml.safe_load(recipe.read_text())
        pairs = [] if {"dataset", "prompts_file", "train_data_dir"} & set(settings) else ["--pairs_dir", str(tmp_path)]
        assert run("--config", str(recipe), *pairs, "--pretrained_model_name_or_path", str(tmp_path / "nowhere"), method=method) == 2
        assert "pretrained_model_name_or_path" in capsys.readouterr().err  # everything before the teacher was accepted


def test_the_console_command_lists_the_methods(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_distill.cli import main

    for arguments, code, text in ((["--help"], 0, "dmd2"), (["nonsense"], 2, "dmd2")):
        monkeypatch.setattr(sys, "argv", ["diffusion-distill", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert (stop.value.code or 0) == code and text in printed.out + printed.err
    assert "dmd2" in METHODS


def unreadable_scheduler(folder: Path) -> list[str]:
    pipe = class_conditional("flow")
    pipe.save_pretrained(folder)
    KarrasVeScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "KarrasVeScheduler"]}))
    return ["--pretrained_model_name_or_path", str(folder)]


def unknown_pipeline(folder: Path) -> list[str]:
    pipe = class_conditional("epsilon")
    DDPMPipeline(pipe.unet, pipe.scheduler).save_pretrained(folder)
    return ["--pretrained_model_name_or_path", str(folder)]


def no_images(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("")
    return ["--train_data_dir", str(folder), "--gan_weight", "0.1"]


def wrong_channels(folder: Path) -> list[str]:
    folder.mkdir()
    Image.new("I;16", (8, 8)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "label": 1}))
    return ["--train_data_dir", str(folder), "--gan_weight", "0.1"]


def another_run(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    return ["--output_dir", str(folder)]


WRONG = {
    "path": (lambda folder: ["--pretrained_model_name_or_path", str(folder / "nowhere")], ["pretrained_model_name_or_path", "nowhere"]),
    "pipeline class": (unknown_pipeline, ["pipeline class", "DDPMPipeline", "StableDiffusionPipeline"]),
    "scheduler": (unreadable_scheduler, ["scheduler", "KarrasVeScheduler", "flow-matching"]),
    "fp16": (lambda folder: ["--mixed_precision", "fp16"], ["mixed_precision", "fp16", "bf16"]),
    "timesteps": (lambda folder: ["--timesteps", "1200", "500"], ["timesteps", "1200", "0 to 1000"]),
    "empty data": (no_images, ["metadata.jsonl"]),
    "channels": (wrong_channels, ["a.png"]),
    "images needed": (lambda folder: ["--dataset", "", "--num_classes", "10", "--gan_weight", "0.1"], ["num_classes", "images"]),
    "output folder": (another_run, ["output_dir", "already holds a run", "resume_from_checkpoint"]),
    "trust": (lambda folder: ["--no_trust_remote_code"], ["pretrained_model_name_or_path", "trust_remote_code"]),
    "not a number": (lambda folder: ["--guidance_scale", "nan"], ["guidance_scale", "nan"]),
    "lora": (lambda folder: ["--lora_rank", "-1"], ["lora_rank", "-1", "0 or more"]),
    "label": (lambda folder: ["--validation_prompts", "12"], ["class label", "12", "0 to 9"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_with_exit_code_2_and_changes_nothing(
    name: str, tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = WRONG[name]
    flags = make(tmp_path / "input")
    data = [] if "--train_data_dir" in flags or "--dataset" in flags else ["--dataset", "digits"]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    base = ["--pretrained_model_name_or_path", str(teacher), *SMALL, *data, "--output_dir", str(tmp_path / "run")]
    assert run(*base, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_unknown_flag_is_refused_before_anything_is_loaded(teacher: Path) -> None:
    flags = ["--pretrained_model_name_or_path", str(teacher), "--dataset", "digits", "--guidance_scal", "2"]
    done = subprocess.run(
        [sys.executable, "train/dmd2.py", *flags], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and "guidance_scale" in done.stdout + done.stderr and "Traceback" not in done.stderr
