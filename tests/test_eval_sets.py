"""Sets of images: reading, sampling of any pipeline, features, reference statistics, and the metric scripts as users run them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image
from tiny_pipelines import class_conditional, stable_diffusion
from tiny_pipelines.parts import seeded

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from common import sampling
from common.checks import NotFiniteError
from common.command_line import InputError, run
from common.extractors import load_extractor
from common.generate import image_seed
from common.image_files import file_sha256, open_folder, read_image, read_jsonl, write_jsonl
from common.measurement import AgainstReferenceConfig, collect, measure
from common.processes import Team
from common.references import load_reference
from common.sampling import SamplingConfig, open_images, quantise, sampling_cost
from common.set_features import set_features
from diversity import DiversityConfig, diversity
from evaluate import EvaluateConfig, evaluate
from export_images import ExportConfig
from export_images import main as export
from fid import FidConfig, fid
from kid import KidConfig, kid
from memorization import MemorizationConfig, memorization
from reference_statistics import ReferenceConfig
from reference_statistics import main as write_statistics

EVAL = Path(__file__).resolve().parents[1] / "eval"
ALONE = Team()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    class_conditional("flow").save_pretrained(folder / "labels")
    stable_diffusion().save_pretrained(folder / "text")
    (folder / "prompts.txt").write_text("a cat\n\na dog\na much longer prompt\n")
    return folder


def labels_config(models: Path, images: Path, **changes: Any) -> SamplingConfig:
    given = {"samples": 20, "num_inference_steps": 2, "trust_remote_code": True, "device": "cpu"} | changes
    return SamplingConfig(folder=models / "labels", images_dir=images, **given)


def text_config(models: Path, images: Path, **changes: Any) -> SamplingConfig:
    given = {"num_inference_steps": 2, "prompts_file": models / "prompts.txt", "device": "cpu"} | changes
    return SamplingConfig(folder=models / "text", images_dir=images, **given)


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def random_images(count: int, seed: int = 0, side: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_folders_are_read_by_name_or_by_record(tmp_path: Path) -> None:
    write_images(tmp_path / "b", random_images(2))
    write_images(tmp_path / "a", random_images(2, 1))
    assert open_folder(tmp_path).files == ("a/000.png", "a/001.png", "b/000.png", "b/001.png")
    rows = [{"file_name": "b/001.png", "text": "two"}, {"file_name": "a/000.png", "text": "one"}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    images = open_folder(tmp_path)
    assert images.files == ("b/001.png", "a/000.png") and images.prompts == ("two", "one") and images.labels is None
    assert open_folder(tmp_path, 1).prompts == ("two",)
    assert images.sha256() != open_folder(tmp_path / "b").sha256()
    write_jsonl(tmp_path / "metadata.jsonl", [*rows, {"file_name": "c.png"}])
    with pytest.raises(InputError, match=r"metadata.jsonl: got 'c.png'; 1 of 3 lines name no file"):
        open_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b/001.png"}\n{')
    with pytest.raises(InputError, match="metadata.jsonl, line 2: not JSON"):
        open_folder(tmp_path)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images there"):
        open_folder(tmp_path)
    with pytest.raises(InputError, match="a folder of images or of a diffusers pipeline is needed"):
        open_folder(tmp_path / "missing")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep.png: got 'mode I;16'; images of 8 bits a channel are needed, 0 to 255"):
        read_image(tmp_path / "deep.png")
    whole = write_images(tmp_path, random_images(1, side=40)) / "000.png"
    whole.write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(InputError, match=r"000.png: cannot be read as an image"):
        read_image(whole)
    with pytest.raises(InputError, match="samples: got 9; .* holds 2 images"):
        open_folder(tmp_path, 9)
    Image.fromarray(np.array([[0, 200]], np.uint8)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").tolist() == [[[0, 200]]] * 3


def test_quantisation_is_diffuserss_and_refuses_other_ranges() -> None:
    images = np.random.default_rng(0).random((3, 5, 5, 3), np.float32)
    expected = [np.array(image) for image in DiffusionPipeline.numpy_to_pil(images)]
    assert np.array_equal(quantise(images), np.stack(expected))
    with pytest.raises(InputError, match="image range: got '-1 to 1'; values from 0 to 1"):
        quantise(np.stack([np.full((2, 2, 3), x, np.float32) for x in (-1, 1)]))
    with pytest.raises(NotFiniteError, match="images: 1 of 3 hold NaN"):
        quantise(np.where(np.arange(3)[:, None, None, None] == 1, np.nan, images))
    with pytest.raises(InputError, match=r"image shape: got \(3, 5, 3\)"):
        quantise(images[:, 0])


@pytest.mark.parametrize("kind", ["labels", "text"])
def test_exact_images_do_not_depend_on_the_batch_size(kind: str, models: Path, tmp_path: Path) -> None:
    config = labels_config if kind == "labels" else text_config
    for size in (7, 64):
        open_images(config(models, tmp_path / str(size), batch_size=size, samples=12, exact=True), ALONE)
        open_images(config(models, tmp_path / f"rounded-{size}", batch_size=size, samples=12), ALONE)
    assert open_folder(tmp_path / "7").sha256() == open_folder(tmp_path / "64").sha256()
    difference = abs(pixels(tmp_path / "rounded-7") - pixels(tmp_path / "rounded-64"))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001


def test_samples_are_the_pipelines_own(models: Path, tmp_path: Path) -> None:
    images = open_images(text_config(models, tmp_path / "images", samples=5, noise_seed=3, guidance_scale=2.0), ALONE)
    assert images.prompts == ("a cat", "a dog", "a much longer prompt", "a cat", "a dog")
    pipe = DiffusionPipeline.from_pretrained(models / "text")
    generator = torch.Generator().manual_seed(image_seed(3, 4))
    expected = pipe("a dog", num_inference_steps=2, guidance_scale=2.0, generator=generator).images[0]
    assert abs(np.array(expected).astype(int) - pixels(images.folder)[4]).max() <= 1
    cost = sampling_cost(images.folder)
    assert cost["network_evaluations_per_image"] == 4 and cost["seconds_per_image"] > 0 and cost["peak_memory_bytes"] > 1e8
    assert read_jsonl(images.folder / "prompts.jsonl")[4]["seed"] == image_seed(3, 4)


def test_sampling_goes_on_where_it_stopped(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = labels_config(models, tmp_path, batch_size=5)
    whole = open_images(config, ALONE)
    hashes = [file_sha256(whole.path(i)) for i in range(20)]
    assert whole.labels == tuple(range(10)) * 2
    for i in (7, 12):
        whole.path(i).unlink()
    drawn: list[int] = []
    call = sampling._call
    monkeypatch.setattr(sampling, "_call", lambda pipe, plan, seed, first, last: drawn.append(first) or call(pipe, plan, seed, first, last))
    again = open_images(config, ALONE)
    assert drawn == [5, 10] and [file_sha256(again.path(i)) for i in range(20)] == hashes
    longer = open_images(replace(config, samples=25), ALONE)
    assert drawn == [5, 10, 20] and [file_sha256(longer.path(i)) for i in range(20)] == hashes
    assert len(open_images(replace(config, samples=15), ALONE)) == 15 and len(drawn) == 3
    with pytest.raises(InputError, match=r"images_dir: .* holds images of other settings \(noise_seed: 0 there, 1 now\)"):
        open_images(replace(config, noise_seed=1), ALONE)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="images_dir: .*an empty or new folder, or one with samples.json"):
        open_images(replace(config, images_dir=tmp_path / "foreign"), ALONE)


def test_students_are_called_as_their_record_says(models: Path, tmp_path: Path) -> None:
    pipe = class_conditional("flow")
    pipe.save_pretrained(tmp_path / "student")
    grids = [
        {"timesteps": [1000.0, 500.0], "call": {"num_inference_steps": 2}},
        {"timesteps": [1000.0], "call": {"num_inference_steps": 1}},
    ]
    (tmp_path / "student" / "distillation.json").write_text(json.dumps({"samplers": grids}))
    config = SamplingConfig(folder=tmp_path / "student", samples=3, trust_remote_code=True, device="cpu")
    images = open_images(config, ALONE)
    assert images.folder == tmp_path / "student-images" / "steps-own_seed-0"
    assert sampling_cost(images.folder)["network_evaluations_per_image"] == 2
    one = open_images(replace(config, num_inference_steps=1), ALONE)
    assert sampling_cost(one.folder)["network_evaluations_per_image"] == 1
    with pytest.raises(InputError, match="num_inference_steps: got 4; this student serves 1, 2"):
        open_images(replace(config, num_inference_steps=4), ALONE)


def test_unconditional_pipelines_and_what_pipelines_refuse(models: Path, tmp_path: Path) -> None:
    blocks = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 8),
    }
    with seeded(0):
        unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler(10)).save_pretrained(tmp_path / "ddpm")
    config = SamplingConfig(folder=tmp_path / "ddpm", samples=3, num_inference_steps=2, device="cpu")
    images = open_images(config, ALONE)
    assert pixels(images.folder).shape == (3, 8, 8, 3) and images.prompts is None and images.labels is None
    for change, message in [
        ({"guidance_scale": 2.0}, "guidance_scale: got 2.0; DDPMPipeline takes no such argument"),
        ({"samples": None}, "samples: got None; a number of images is needed"),
        ({"batch_size": 0}, "batch_size: got 0; at least 1"),
        ({"noise_seed": -1}, "noise_seed: got -1"),
    ]:
        with pytest.raises(InputError, match=message):
            open_images(replace(config, **change), ALONE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prompts_file: got None; a text-to-image pipeline needs a file of prompts"):
        open_images(text_config(models, tmp_path / "x", prompts_file=None), ALONE)
    with pytest.raises(InputError, match="brings its own pipeline code"):
        open_images(labels_config(models, tmp_path / "x", trust_remote_code=False), ALONE)
    unet.conv_out.bias.data.fill_(torch.nan)
    DDPMPipeline(unet, DDPMScheduler(10)).save_pretrained(tmp_path / "diverged")
    with pytest.raises(NotFiniteError, match="images: 3 of 3 hold NaN"):
        open_images(replace(config, folder=tmp_path / "diverged"), ALONE)


def launch(arguments: list[str], cwd: Path, processes: int) -> str:
    """What a script prints when it is started as so many processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "EVAL_CACHE": str(cwd / f"cache-{processes}"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *several, str(EVAL / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_measure_what_one_does(models: Path, tmp_path: Path) -> None:
    reference = write_images(tmp_path / "reference", random_images(300, side=8))
    common = {"samples": 40, "num_inference_steps": 1, "batch_size": 8, "trust_remote_code": True, "device": "cpu", "features": "pixels"}
    config = KidConfig(folder=models / "labels", images_dir=tmp_path / "one", reference=reference, subsets=5, subset_size=20, **common)
    alone = kid(collect(config, ALONE), config)["kernel_distance"]
    flags = [f"--{name}={value}" for name, value in common.items() if name != "trust_remote_code"] + ["--trust_remote_code"]
    sets = ["--images_dir", "two", "--reference", "reference", "--subsets", "5", "--subset_size", "20", "--output", "two.json"]
    printed = launch(["kid.py", str(models / "labels"), *sets, *flags], tmp_path, 2)
    assert printed.startswith("kernel_distance: ") and printed.count("kernel_distance") == 1
    together = json.loads((tmp_path / "two.json").read_text())
    assert together["images"]["sha256"] == open_folder(tmp_path / "one").sha256()
    assert together["metrics"]["kernel_distance"]["value"] == pytest.approx(alone.value, rel=1e-9)
    assert sorted(path.name for path in (tmp_path / "two").glob("costs-*")) == ["costs-0.jsonl", "costs-1.jsonl"]


def test_features_are_kept_and_belong_to_their_images(tmp_path: Path) -> None:
    folder, extractor = write_images(tmp_path / "images", random_images(300)), load_extractor("pixels")
    first = set_features(open_folder(folder), extractor, None, ALONE)
    assert torch.equal(first, torch.from_numpy(random_images(300)).permute(0, 3, 1, 2).flatten(1).float().div(255).double())
    parts = list((tmp_path / "cache").glob("*/*.npy"))
    assert len(parts) == 2
    changed = [path.stat().st_mtime_ns for path in parts]
    assert torch.equal(set_features(open_folder(folder), extractor, None, ALONE), first)
    assert [path.stat().st_mtime_ns for path in parts] == changed
    Image.fromarray(random_images(1, 9)[0]).save(folder / "000.png")
    second = set_features(open_folder(folder), extractor, None, ALONE)
    assert not torch.equal(second[0], first[0]) and torch.equal(second[1:], first[1:])


def against(folder: Path, reference: Path, **changes: Any) -> AgainstReferenceConfig:
    return AgainstReferenceConfig(folder=folder, reference=reference, features="pixels", device="cpu", **changes)


def test_statistics_are_read_from_and_by_other_tools(tmp_path: Path) -> None:
    images = random_images(150, side=4)
    folder, file = write_images(tmp_path / "real", images), tmp_path / "real.npz"
    write_statistics(ReferenceConfig(folder=folder, output=file, features="pixels", device="cpu"))
    arrays = np.load(file, allow_pickle=False)
    flat = np.transpose(images, (0, 3, 1, 2)).reshape(150, -1).astype(np.float32) / np.float32(255)
    assert np.allclose(arrays["mu"], flat.astype(float).mean(0)) and np.allclose(arrays["sigma"], np.cov(flat.astype(float), rowvar=False))
    assert (arrays["mu"].dtype, int(arrays["samples"]), str(arrays["images_sha256"])) == (np.float64, 150, open_folder(folder).sha256())
    extractor = load_extractor("pixels")
    expected = load_reference(folder, extractor, None, ALONE)
    np.savez(tmp_path / "edm.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=arrays["mu"], sigma=arrays["sigma"], mu_s=arrays["mu"], sigma_s=arrays["sigma"])
    np.savez(tmp_path / "clean_kid.npz", feats=flat)
    for name, count in [("real", 150), ("edm", None), ("adm", 150), ("clean_kid", 150)]:
        found = load_reference(tmp_path / f"{name}.npz", extractor, None, ALONE)
        torch.testing.assert_close(found.statistics.covariance, expected.statistics.covariance)
        assert found.statistics.samples == count and (found.features is None) == (name in ("real", "edm"))
    with pytest.raises(InputError, match="reference: got .*statistics alone do not do here"):
        load_reference(tmp_path / "edm.npz", extractor, None, ALONE).needed_features()
    with pytest.raises(
        InputError, match="reference: got 'real.npz of pixels'; feature_network_sha256 differs from that of features 'digits_classifier'"
    ):
        load_reference(file, load_extractor("digits"), None, ALONE)


def test_files_that_are_no_reference(tmp_path: Path) -> None:
    mean, covariance = np.zeros(3), np.eye(3)
    np.savez(tmp_path / "whole.npz", mu=mean, sigma=covariance)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    np.savez(tmp_path / "shape.npz", mu=mean, sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=mean, sigma=covariance * np.nan)
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "nothing.npz", other=mean)
    for name, message in [
        ("cut.npz", "reference: .*cut.npz is no whole .npz"),
        ("shape.npz", r"mu and sigma: got \(\(3,\), \(4, 4\)\)"),
        ("nan.npz", "mu and sigma: got 'NaN or infinity'"),
        ("float.npz", r"arr_0: got 'float64 \(2, 4, 4, 3\)'; uint8"),
        ("nothing.npz", r"got \['other'\]; mu and sigma, or arr_0, or feats"),
        ("missing.npz", "reference: got .*a folder of images, or an .npz"),
    ]:
        with pytest.raises(InputError, match=message):
            load_reference(tmp_path / name, load_extractor("pixels"), None, ALONE)


def test_scripts_end_with_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    images, real = (
        write_images(tmp_path / "images", random_images(30, side=2)),
        write_images(tmp_path / "real", random_images(40, 1, side=2)),
    )

    def script(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, arguments)])
        run(FidConfig, lambda config: measure(config, fid), "many")

    script(images, "--reference", real, "--features", "pixels", "--device", "cpu", "--output", tmp_path / "fid.json")
    assert capsys.readouterr().out.startswith("frechet_distance: ")
    content = json.loads((tmp_path / "fid.json").read_text())
    metric = content["metrics"]["frechet_distance"]
    assert metric["samples"] == content["images"]["count"] == 30 and metric["error"] > 0 and content["reference"]["count"] == 40
    assert not caplog.records
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.py").write_text(
        "import torch\nclass Nan(torch.nn.Module):\n    def forward(self, x):\n        return x.float().mean((2, 3)) / 0 * 0\n"
    )
    for arguments, message in [
        ([tmp_path / "empty", "--reference", real], "no images there"),
        ([images, "--reference", tmp_path / "empty"], "no images there"),
        ([images, "--reference", real, "--features", "vgg"], "features: got 'vgg'"),
        ([images, "--reference", real, "--features", f"{tmp_path / 'own.py'}:Nan"], "features of reference: 40 of 40 hold NaN"),
        ([images, "--reference", real, "--bootstrap", "-1"], "bootstrap: got -1"),
        ([images, "--reference", real, "--device", "tpu7"], "device: got 'tpu7'"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            script(*arguments, *([] if "--features" in arguments else ["--features", "pixels"]))
        error = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and error.startswith("error: ") and message in error
    few = write_images(tmp_path / "few", random_images(12, side=2))
    script(few, "--reference", real, "--features", "pixels", "--device", "cpu")
    assert "images: 12 samples for 12 dimensions; the Fréchet distance is unreliable" in caplog.text


def test_copies_are_found(tmp_path: Path) -> None:
    train = random_images(200)
    generated = np.concatenate([train[[5, 9]], random_images(18, 1)])
    config = MemorizationConfig(
        folder=write_images(tmp_path / "generated", generated),
        reference=write_images(tmp_path / "train", train),
        held_out=write_images(tmp_path / "held_out", random_images(100, 2)),
        pairs=3,
        device="cpu",
    )
    found = memorization(collect(config, ALONE), config)
    assert found["copy_rate"].value == pytest.approx(0.1)
    closest = found["copy_rate"].details["closest"]  # type: ignore[index]
    assert [(row["file"], row["training_image"], row["distance"]) for row in closest[:2]] == [
        ("000.png", "005.png", 0),
        ("001.png", "009.png", 0),
    ]


def test_diversity_is_within_prompts(tmp_path: Path) -> None:
    images = np.concatenate([np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)])
    write_images(tmp_path, images)
    config = DiversityConfig(folder=tmp_path, features="pixels", device="cpu")
    for prompts, value in [("aabb", 0), ("abab", 48)]:
        write_jsonl(tmp_path / "prompts.jsonl", [{"file_name": f"{i:03d}.png", "prompt": p} for i, p in enumerate(prompts)])
        assert diversity(collect(config, ALONE), config)["diversity"].value == pytest.approx(value)
    write_jsonl(tmp_path / "prompts.jsonl", [{"file_name": f"{i:03d}.png", "prompt": p} for i, p in enumerate("abcd")])
    with pytest.raises(InputError, match="at least two images of a prompt are needed; there are 4 prompts"):
        diversity(collect(config, ALONE), config)


def test_evaluate_measures_a_set_and_goes_on(models: Path, tmp_path: Path) -> None:
    reference = write_images(tmp_path / "reference", random_images(50, side=16))
    config = EvaluateConfig(
        folder=models / "text",
        metrics=("diversity", "precision_recall"),
        features={"diversity": "pixels", "precision_recall": "pixels"},
        reference=reference,
        prompts_file=models / "prompts.txt",
        samples=12,
        noise_seeds=(0, 1),
        num_inference_steps=(1,),
        images_dir=tmp_path / "images",
        output=tmp_path / "e.json",
        device="cpu",
    )
    report = evaluate(config)
    assert json.loads((tmp_path / "e.json").read_text()) == report
    (result,) = report["results"]
    assert {"diversity", "precision", "coverage", "seconds_per_image", "network_evaluations_per_image"} <= set(result["metrics"])
    assert result["metrics"]["diversity"]["samples"] == 12 and list(result["metrics"]["diversity"]["per_seed"]) == ["0", "1"]
    assert (
        result["metrics"]["network_evaluations_per_image"]["mean"] == 2
        and result["metrics"]["diversity"]["feature_network"]["name"] == "pixels"
    )
    assert result["images"]["1"]["sha256"] == open_folder(tmp_path / "images" / "steps-1_seed-1").sha256()
    more = evaluate(replace(config, metrics=("diversity", "memorization")))
    values = more["results"][0]["metrics"]
    assert values["diversity"] == result["metrics"]["diversity"] and len(values["copy_rate"]["per_seed"]) == 2
    with pytest.raises(InputError, match="another evaluation .*samples_per_seed: 12 there, 9 now"):
        evaluate(replace(config, samples=9))
    with pytest.raises(InputError, match="reference: got None; precision_recall compares with real images"):
        evaluate(replace(config, reference=None))
    folder = evaluate(replace(config, folder=tmp_path / "images" / "steps-1_seed-0", output=tmp_path / "f.json", num_inference_steps=()))
    assert folder["results"][0]["metrics"]["recall"]["mean"] == result["metrics"]["recall"]["per_seed"]["0"]


def test_layouts_of_the_suites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", random_images(8))
    rows = [{"file_name": f"{i:03d}.png", "prompt": "ab"[i % 2]} for i in range(8)]
    write_jsonl(images / "prompts.jsonl", rows)
    metadata = [{"prompt": p, "tag": "colors", "style": "anime", "id": f"item-{p}"} for p in "ab"]
    write_jsonl(tmp_path / "metadata.jsonl", metadata)

    def layout(suite: Any) -> list[str]:
        out = tmp_path / suite
        export(ExportConfig(folder=images, suite=suite, output_dir=out, metadata=tmp_path / "metadata.jsonl", device="cpu"))
        return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())

    assert layout("plain") == [f"0000{i}_{k}.png" for i in (0, 1) for k in range(4)] + ["prompts.jsonl"]
    assert read_jsonl(tmp_path / "plain" / "prompts.jsonl")[1] == {"file_name": "00001_0.png", "prompt": "b"}
    samples = [f"0000{i}/{name}" for i in (0, 1) for name in ("metadata.jsonl", *(f"samples/000{k}.png" for k in range(4)))]
    assert layout("geneval") == samples
    assert read_jsonl(tmp_path / "geneval" / "00001" / "metadata.jsonl") == [metadata[1]]
    assert (tmp_path / "geneval" / "00001" / "samples" / "0003.png").read_bytes() == (images / "007.png").read_bytes()
    assert layout("hpsv2") == ["anime/00000.jpg", "anime/00001.jpg"]
    assert layout("dpg") == ["item-a.png", "item-b.png"]
    grid, all_images = np.array(Image.open(tmp_path / "dpg" / "item-b.png")), random_images(8)
    assert np.array_equal(grid[:6, 6:], all_images[3]) and np.array_equal(grid[6:, :6], all_images[5])
    with pytest.raises(InputError, match=r"suite: got 'vbench'; videos \(.mp4\) are needed"):
        layout("vbench")
    with pytest.raises(InputError, match="output_dir: .*an empty or new folder"):
        layout("plain")
    write_jsonl(tmp_path / "metadata.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match="metadata: got 'b'; every prompt"):
        export(ExportConfig(folder=images, suite="geneval", output_dir=tmp_path / "x", metadata=tmp_path / "metadata.jsonl", device="cpu"))
