"""Generation, evaluation and comparison of real (tiny, untrained) pipelines, as users run them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import compare as comparison
import evaluate as evaluation
from command_line import InputError, run
from compare import CompareConfig, compare
from data_floor import FloorConfig
from data_floor import main as floor
from evaluate import EvaluateConfig, evaluate, fingerprint
from generate import balanced_labels, generate, image_seed, load_pipeline
from metrics import NotFiniteError
from pictures import save_grid
from tiny_pipelines import class_conditional, stable_diffusion
from train_digits_classifier import Recipe
from train_digits_classifier import main as train_classifier

EVAL = Path(__file__).resolve().parents[1] / "eval"
FAST: dict[str, Any] = {"samples": 40, "noise_seeds": (0, 1), "trust_remote_code": True, "device": "cpu"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    class_conditional("flow").save_pretrained(folder)
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    save_student(folder)
    return folder


def save_student(folder: Path, seed: int = 1) -> None:
    pipe = class_conditional("v_prediction", seed=seed)
    pipe.register_to_config(grids=[[999, 499]])
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder)
    (folder / "distillation.json").write_text(json.dumps({"method": "dmd2", "samplers": [{"timesteps": [999, 499], "call": {}}]}))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int]]:
    """The (steps, seed) of each generation that an evaluation really does."""
    calls: list[tuple[int | None, int]] = []

    def counted(pipe: Any, labels: list[int], seed: int, batch_size: int, steps: int | None, *rest: Any) -> Any:
        calls.append((steps, seed))
        return generate(pipe, labels, seed, batch_size, steps, *rest)

    monkeypatch.setattr(evaluation, "generate", counted)
    return calls


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_images_do_not_depend_on_the_batch_size(kind: str, teacher: Path, student: Path) -> None:
    # The student re-noises between its steps: those draws must be the image's own too.
    pipe = load_pipeline(teacher if kind == "teacher" else student, trust_remote_code=True, device="cpu")
    labels, steps = balanced_labels(64, 10), 3 if kind == "teacher" else None
    whole = generate(pipe, labels, 5, 64, steps)
    parts = generate(pipe, labels, 5, 7, steps)
    assert whole.images.shape == (64, 1, 8, 8) and whole.images.min() >= 0 and whole.images.max() <= 1
    assert torch.allclose(whole.images, parts.images, atol=1e-5)
    assert not torch.allclose(whole.images, generate(pipe, labels, 6, 64, steps).images, atol=0.1)
    assert not torch.allclose(whole.images[0], whole.images[10], atol=0.1)  # same class, other noise
    assert torch.allclose(generate(pipe, labels[:12], 5, 64, steps).images, whole.images[:12], atol=1e-5)


def test_cost_counts_rows_of_the_network(teacher: Path, student: Path) -> None:
    pipe = load_pipeline(teacher, trust_remote_code=True, device="cpu")
    labels = balanced_labels(10, 10)
    assert generate(pipe, labels, 0, 4, 3).network_evaluations == 3
    guided = generate(pipe, labels, 0, 4, 3, guidance_scale=2.0)
    assert guided.network_evaluations == 6 and guided.seconds > 0 and guided.cpu_seconds > 0
    assert generate(load_pipeline(student, True, "cpu"), labels, 0, 4).network_evaluations == 2
    assert not pipe.unet._forward_hooks


def test_labels_are_balanced_and_seeds_differ() -> None:
    assert balanced_labels(23, 10) == list(range(10)) * 2 + [0, 1, 2]
    seeds = {image_seed(seed, index) for seed in range(3) for index in range(1000)}
    assert len(seeds) == 3000 and max(seeds) < 2**32


def test_folders_that_cannot_be_judged(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder: got .*a diffusers pipeline folder with a model_index.json"):
        load_pipeline(tmp_path, trust_remote_code=True)
    with pytest.raises(InputError, match=r"brings its own pipeline code \(pipeline.py\); read it and pass --trust_remote_code"):
        load_pipeline(teacher, trust_remote_code=False)
    with pytest.raises(InputError, match="device: got 'tpu7'"):
        load_pipeline(teacher, trust_remote_code=True, device="tpu7")
    stable_diffusion().save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match="pipeline: got 'StableDiffusionPipeline'; a pipeline that takes class_labels"):
        load_pipeline(tmp_path / "text", trust_remote_code=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 45}, "samples: got 45; a multiple of the 10 classes, at least 20"),
        ({"samples": 10}, "samples: got 10"),
        ({"noise_seeds": (1, 1)}, "noise_seeds: got"),
        ({"noise_seeds": ()}, "noise_seeds: got"),
        ({"batch_size": 0}, "batch_size: got 0; at least 1"),
        ({"num_inference_steps": (4, 0)}, "num_inference_steps: got"),
        ({"dataset": "letters"}, "dataset: got 'letters'"),
        ({"feature_network": "inception"}, "feature_network: got 'inception'"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(replace(EvaluateConfig(folder=teacher, output=tmp_path / "e.json", **FAST), **change))
    assert not (tmp_path / "e.json").exists()


def test_evaluation_file(student: Path) -> None:
    report = evaluate(EvaluateConfig(folder=student, **FAST))
    assert json.loads((student / "evaluation.json").read_text()) == report
    assert report["protocol"]["samples_per_seed"] == 40 and report["protocol"]["noise_seeds"] == [0, 1]
    assert len(report["protocol"]["feature_network_sha256"]) == 64
    assert report["distillation"]["method"] == "dmd2"
    (result,) = report["results"]
    metric = result["metrics"]["frechet_distance"]
    values = list(metric["per_seed"].values())
    assert metric["mean"] == pytest.approx(sum(values) / 2)
    assert metric["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert {m["samples"] for m in result["metrics"].values()} == {40}
    assert result["metrics"]["network_evaluations_per_image"]["mean"] == 2
    assert result["num_inference_steps"] is None


def test_evaluation_goes_on_where_it_stopped(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluateConfig(folder=teacher, output=tmp_path / "e.json", num_inference_steps=(1, 2), **FAST)
    complete = evaluate(config)
    partial = json.loads(json.dumps(complete))
    del partial["results"][1]
    for metric in partial["results"][0]["metrics"].values():
        del metric["per_seed"]["1"]
    config.output.write_text(json.dumps(partial))  # type: ignore[union-attr]
    assert evaluation.complete_results(partial) == []

    calls = count_calls(monkeypatch)
    resumed = evaluate(config)
    assert calls == [(1, 1), (2, 0), (2, 1)]
    for now, then in zip(resumed["results"], complete["results"]):
        assert now["metrics"]["frechet_distance"] == then["metrics"]["frechet_distance"]
    evaluate(config)
    assert len(calls) == 3
    evaluate(replace(config, num_inference_steps=(2, 4)))
    assert calls[3:] == [(4, 0), (4, 1)]
    evaluate(replace(config, overwrite=True))
    assert calls[5:] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_an_evaluation_of_something_else_is_not_mixed_in(student: Path) -> None:
    config = EvaluateConfig(folder=student, **FAST)
    first = evaluate(config)
    with pytest.raises(InputError, match="samples_per_seed: 40 there, 60 now.*--overwrite"):
        evaluate(replace(config, samples=60))
    assert fingerprint(student) == first["model_sha256"]
    evaluate(replace(config, feature_network="digits_second"))
    assert (student / "evaluation_digits_second.json").is_file()
    save_student(student, seed=2)
    with pytest.raises(InputError, match="the model has changed since"):
        evaluate(config)
    again = evaluate(replace(config, overwrite=True))
    assert again["model_sha256"] != first["model_sha256"]
    assert again["results"][0]["metrics"]["frechet_distance"]["mean"] != first["results"][0]["metrics"]["frechet_distance"]["mean"]
    (student / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        evaluate(config)


def break_network(folder: Path) -> None:
    pipe = load_pipeline(folder, trust_remote_code=True, device="cpu")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    pipe.save_pretrained(folder)


def table_rows(report: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line.startswith("| ")]
    return rows[2:]


def test_comparison(teacher: Path, student: Path, tmp_path: Path) -> None:
    diverged = tmp_path / "diverged"
    shutil.copytree(student, diverged)
    break_network(diverged)
    with pytest.raises(NotFiniteError, match="images: 40 of 40 hold NaN or infinity"):
        evaluate(EvaluateConfig(folder=diverged, **FAST))
    folder = tmp_path / "comparison"
    config = CompareConfig(
        teacher=teacher, students=(student, diverged), output_dir=folder, teacher_num_inference_steps=(1, 8, 9), **(FAST | {"samples": 60})
    )
    report = compare(config).read_text()
    rows = table_rows(report)
    assert [row[:3] for row in rows] == [["teacher", "1", "1"], ["teacher", "8", "8"], ["teacher", "9", "9"], ["student", "2", "2"]]
    assert min(float(rows[1][4]), float(rows[2][4])) == 1
    files = {folder: json.loads((folder / "evaluation.json").read_text()) for folder in (teacher, student)}
    means = {r["num_inference_steps"]: r["metrics"]["frechet_distance"]["mean"] for r in files[teacher]["results"]}
    reference = min(means[8], means[9])
    own = files[student]["results"][0]["metrics"]["frechet_distance"]
    assert rows[3][3] == f"{own['mean']:.3f} ± {own['std']:.3f}" and rows[3][4] == f"{own['mean'] / reference:.2f}"
    assert "diverged was not evaluated: images: 60 of 60 hold NaN" in report
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["quality_vs_steps.png", *(f"samples_{m}_steps.png" for m in ("student_2", "teacher_1", "teacher_8", "teacher_9"))]
    assert all(f"]({name})" in report for name in pictures)
    assert "python eval/evaluate.py" in report and "--teacher_num_inference_steps 1 8 9" in report


def test_comparison_reads_what_stands(teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "again" / "student"
    shutil.copytree(student, copy)
    settings = FAST | {"samples": 20, "overwrite": True}
    config = CompareConfig(
        teacher=teacher, students=(student, copy), output_dir=tmp_path / "c", teacher_num_inference_steps=(8,), **settings
    )
    compare(config)
    calls = count_calls(monkeypatch)
    report = compare(replace(config, overwrite=False)).read_text()
    assert calls == []
    assert [row[0] for row in table_rows(report)][1:] == [f"{tmp_path.name}/student", "again/student"]
    with pytest.raises(InputError, match="teacher_num_inference_steps: .*at least one of 8 or more"):
        compare(replace(config, teacher_num_inference_steps=(1, 4)))
    with pytest.raises(InputError, match="students: .*different folders, none of them the teacher's"):
        compare(replace(config, students=(teacher,)))


def test_reference_is_the_best_of_eight_steps_or_more() -> None:
    def row(steps: int, distance: float) -> comparison.Row:
        return comparison.Row("t", Path("t"), {"num_inference_steps": steps, "metrics": {"frechet_distance": {"mean": distance}}}, None)

    assert comparison.reference_distance([row(4, 0.5), row(8, 1.2), row(16, 1.1), row(50, 1.3)]) == 1.1


def test_grid_shows_each_image_enlarged_in_its_column(tmp_path: Path) -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[1, 0, 0, 0], images[2] = 1, 0.5  # second column's top-left pixel, first column of the second row
    save_grid(images, ["a", "b"], tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png").convert("L")
    assert grid.size == (4 + 2 * 52, 20 + 2 * 52)
    assert grid.getpixel((56, 20)) == 255 and grid.getpixel((61, 25)) == 255 and grid.getpixel((62, 20)) == 0
    assert grid.getpixel((30, 90)) == 128
    assert len(grid.crop((0, 0, 108, 20)).getcolors()) > 2  # the titles


def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: type, main: Any, *arguments: object) -> str:
    """What a script prints to stderr before it leaves with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run(config, main)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_scripts_answer_mistakes_with_one_line_and_code_2(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = answer(monkeypatch, capsys, EvaluateConfig, evaluation.main, tmp_path)
    assert missing == f"error: folder: got '{tmp_path}'; a diffusers pipeline folder with a model_index.json is needed\n"
    recipe = answer(monkeypatch, capsys, Recipe, train_classifier, "--epochs", 0)
    assert recipe == "error: epochs: got 0; at least 1\n"
    assert "teacher" in answer(monkeypatch, capsys, CompareConfig, comparison.main, "--techer", teacher)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert answer(monkeypatch, capsys, FloorConfig, floor) == "error: num_processes: got 2; this script runs in one process\n"


def test_evaluate_script_in_its_own_process(teacher: Path, tmp_path: Path) -> None:
    steps = ["--num_inference_steps", "1", "2", "--samples", "20", "--noise_seeds", "0", "--output", "e.json", "--trust_remote_code"]
    command = [sys.executable, str(EVAL / "evaluate.py"), str(teacher), *steps]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["1 steps", "2 steps"]
    assert "(20 x 1)" in done.stdout
    assert [r["num_inference_steps"] for r in json.loads((tmp_path / "e.json").read_text())["results"]] == [1, 2]
