"""Generation, evaluation and comparison of real (tiny, untrained) pipelines, as users run them."""

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import compare as comparison
import evaluate as evaluation
from common.command_line import InputError, run
from common.generate import balanced_labels, generate, image_seed, load_pipeline
from common.metrics import NotFiniteError
from compare import CompareConfig, compare
from data_floor import FloorConfig
from data_floor import main as floor
from evaluate import EvaluateConfig, evaluate, fingerprint
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


def table_rows(report: str, before: str) -> list[list[str]]:
    """The cells of the last table that stands before a heading."""
    tables = re.findall(r"(?:^\|.*\n)+", report[: report.index(f"\n{before}")] + "\n", re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[-1].splitlines()[2:]]


def grid_images(page: str, model: str) -> list[tuple[str, Image.Image]]:
    """Title and image of each cell of a model's row in the HTML grid, in their order."""
    cells = re.findall(rf'<img src="data:image/png;base64,([^"]+)" alt="{model}: [^"]*" title="([^"]+)"', page)
    return [(title, Image.open(io.BytesIO(base64.b64decode(content))).convert("L")) for content, title in cells]


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
    (summary,), rows = table_rows(report, "## Quality"), table_rows(report, "### What")
    assert [row[:2] for row in rows] == [["teacher", "1"], ["teacher", "8"], ["teacher", "9"], ["student", "2"]]
    files = {folder: json.loads((folder / "evaluation.json").read_text()) for folder in (teacher, student)}
    means = {r["num_inference_steps"]: r["metrics"]["frechet_distance"]["mean"] for r in files[teacher]["results"]}
    own = files[student]["results"][0]["metrics"]["frechet_distance"]
    assert rows[3][2].startswith(f"{own['mean']:.3f} ± {own['std']:.3f}, ")
    assert summary[:3] == [
        "student, 2 steps",
        f"{own['mean']:.3f} ± {own['std']:.3f} (60 × 2)",
        f"{own['mean'] / min(means[8], means[9]):.2f} ×",
    ]
    assert [row[2].endswith(", reference") for row in rows] == [False, means[8] < means[9], means[8] > means[9], False]
    page = (folder / "report.html").read_text()
    assert all("diverged was not evaluated: images: 60 of 60 hold NaN" in text for text in (report, page))
    pictures = sorted(path.name for path in folder.glob("*.png"))
    drawn = [f"samples_{m}_steps.png" for m in ("student_2", "teacher_1", "teacher_8", "teacher_9")]
    assert pictures == ["quality_vs_latency.png", "quality_vs_steps.png", "samples.png", *drawn]
    assert all(f"]({name})" in report for name in pictures)
    assert "python eval/evaluate.py" in report and "--teacher_num_inference_steps 1 8 9" in report
    for folder, steps, name in ((teacher, 1, "teacher, 1 step"), (teacher, 9, "teacher, 9 steps"), (student, None, "student, 2 steps")):
        expected = generate(load_pipeline(folder, True, "cpu"), balanced_labels(10, 10), 0, 10, steps).images
        cells = grid_images(page, name)
        assert [title for title, _ in cells] == [f"{i}, seed {image_seed(0, i)}" for i in range(10)]
        for (_, cell), image in zip(cells, expected, strict=True):
            assert torch.allclose(torch.from_numpy(np.array(cell)) / 255, image[0], atol=0.51 / 255 + 1e-5)


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
    assert [row[0] for row in table_rows(report, "### What")][1:] == [f"{tmp_path.name}/student", "again/student"]
    with pytest.raises(InputError, match="teacher_num_inference_steps: .*at least one of 8 or more"):
        compare(replace(config, teacher_num_inference_steps=(1, 4)))
    with pytest.raises(InputError, match="students: .*different folders, none of them the teacher's"):
        compare(replace(config, students=(teacher,)))


def test_a_killed_comparison_goes_on_where_it_stopped(
    teacher: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own" / "teacher"  # without the evaluations of the other tests
    shutil.copytree(teacher, own, ignore=shutil.ignore_patterns("evaluation*"))
    settings = FAST | {"samples": 20, "noise_seeds": (0, 1, 2)}
    config = CompareConfig(teacher=own, students=(student,), output_dir=tmp_path / "c", teacher_num_inference_steps=(1, 9), **settings)
    arguments = [own, student, "--output_dir", config.output_dir, "--teacher_num_inference_steps", 1, 9, "--samples", 20]
    arguments += ["--noise_seeds", 0, 1, 2, "--device", "cpu", "--trust_remote_code"]
    command = [sys.executable, str(EVAL / "compare.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (own / "evaluation.json").exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (config.output_dir / "report.md").exists()
    stood = json.loads((own / "evaluation.json").read_text())["results"]
    before = {(r["num_inference_steps"], seed): v for r in stood for seed, v in r["metrics"]["frechet_distance"]["per_seed"].items()}
    assert 1 <= len(before) < 6

    calls = count_calls(monkeypatch)
    report = compare(config).read_text()
    expected = [(steps, seed) for steps in (1, 9) for seed in (0, 1, 2) if (steps, str(seed)) not in before]
    assert calls == expected + [(None, 0), (None, 1), (None, 2)]
    again = tmp_path / "other" / "teacher"
    shutil.copytree(own, again, ignore=shutil.ignore_patterns("evaluation*"))
    whole = evaluate(replace(config.evaluation(config.teacher), folder=again))["results"]
    distances = [result["metrics"]["frechet_distance"] for result in whole]
    written = [row[2].partition(",")[0] for row in table_rows(report, "### What")]
    assert written[:2] == [f"{distance['mean']:.3f} ± {distance['std']:.3f}" for distance in distances]


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
    assert "--output_dir" in answer(monkeypatch, capsys, CompareConfig, comparison.main, teacher, "--output_dri", tmp_path)
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
