"""Whatever a file holds, it is used or refused in one line: no other exception, no value out of range."""

import json
import math
import string
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_distill import DMD2, DataConfig, InputError, TrainConfig, build_dataset
from diffusion_distill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from diffusion_distill.config import TeacherConfig, from_mapping, read_yaml, to_mapping
from diffusion_distill.data import ConditionDataset, ImageFiles
from diffusion_distill.pairs import PairDataset
from diffusion_distill.prediction import PREDICTION_TYPES
from diffusion_distill.schedule import NoiseSchedule, prediction_type_of

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
GROUPS = (TeacherConfig, DataConfig, TrainConfig, DMD2)
NAMES = list(to_mapping(TeacherConfig("x"), DataConfig(dataset="digits"), TrainConfig(), DMD2()))

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 0.5, 2**70, 1e308]))
WORDS = st.one_of(st.text(max_size=8), st.sampled_from(["no", "digits", "1e-4", "../x", "\x00", "nan", "cosine", "latest"]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def one_line(error: InputError) -> None:
    text = str(error)
    assert text and "\n" not in text.strip() and len(text) < 2000


# ---------------------------------------------------------------------- configuration


@QUICK
@given(st.dictionaries(st.sampled_from([*NAMES, "seeds"]), JSON, max_size=5), st.booleans())
def test_a_mapping_is_a_configuration_or_refused(mapping: dict[str, Any], whole: bool) -> None:
    if whole:
        mapping = {"pretrained_model_name_or_path": "x", "num_classes": 3} | mapping
    try:
        made = from_mapping(GROUPS, mapping, "file.yaml")
    except InputError as error:
        one_line(error)
        return
    again = to_mapping(*made)
    assert from_mapping(GROUPS, again, "file.yaml") == made or any(isinstance(v, float) and math.isnan(v) for v in again.values())
    config: TrainConfig = made[2]
    assert 0 < config.learning_rate < math.inf and 0 <= config.adam_beta1 < 1 and config.max_train_steps >= 1


YAML_TEXT = st.text(alphabet=string.ascii_lowercase + string.digits + " :-[]{}#&*!|>'\"%@`,?\n\t.~_", max_size=60)


@QUICK
@given(st.one_of(st.binary(max_size=60), YAML_TEXT.map(str.encode), st.builds(lambda v: yaml.safe_dump(v).encode(), JSON)))
def test_a_file_is_a_mapping_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.yaml")
        path.write_bytes(content)
        try:
            assert isinstance(read_yaml(path), dict)
        except InputError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("text", ["[" * 3000, "a: " + "9" * 5000, "? [a]\n: 1", "&a [*a]", "<<: 1", "a: 2001-99-99", "a: !!binary x"])
def test_yaml_that_broke_loaders_before(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    try:
        assert isinstance(read_yaml(path), dict)
    except InputError as error:
        assert str(path) in str(error)


# ---------------------------------------------------------------------- metadata.jsonl and pairs.json

FILE_NAMES = st.one_of(WORDS, st.sampled_from(["a.png", "./a.png", "sub/../a.png", "../outside.png", "/etc/hostname", "link.png", "", "."]))
ROWS = st.one_of(
    st.fixed_dictionaries({}, optional={"file_name": st.one_of(FILE_NAMES, JSON), "text": JSON, "label": JSON}).map(json.dumps),
    JSON.map(json.dumps),
    st.text(max_size=20),
)


@QUICK
@given(st.lists(ROWS, max_size=4), st.booleans())
def test_a_list_of_images_is_used_inside_its_folder_or_refused(rows: list[str], needs_images: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve() / "data"
        root.mkdir()
        Image.new("L", (8, 8)).save(root / "a.png")
        Image.new("L", (8, 8)).save(root.parent / "outside.png")
        (root / "link.png").symlink_to(root.parent / "outside.png")
        (root / "metadata.jsonl").write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
        try:
            data = build_dataset(DataConfig(train_data_dir=str(root)), needs_images=needs_images, channels=1, resolution=8, num_classes=4)
        except InputError as error:
            one_line(error)
            return
        assert isinstance(data, ConditionDataset) and len({type(condition) for condition in data.conditions}) == 1
        assert all(isinstance(condition, str) or 0 <= condition < 4 for condition in data.conditions)
        if needs_images:
            assert isinstance(data.images, ImageFiles) and data[0]["image"].shape == (1, 8, 8)
            assert all(path.resolve().is_relative_to(root) for path in data.images.paths)


ENTRY = st.fixed_dictionaries({}, optional={"pairs": JSON, "bytes": JSON, "sha256": JSON, "file": JSON})


@QUICK
@given(
    st.fixed_dictionaries(
        {"settings": st.one_of(JSON, st.fixed_dictionaries({"num_pairs": JSON, "shard_size": JSON, "sample_shape": JSON}))},
        optional={"conditions": JSON, "shards": st.one_of(JSON, st.lists(ENTRY, max_size=2))},
    )
)
def test_an_index_of_pairs_is_refused(index: Any) -> None:
    """None of them describes a shard that is there."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pairs.json").write_text(json.dumps(index))
        with pytest.raises(InputError) as caught:
            PairDataset(folder)
        one_line(caught.value)


# ---------------------------------------------------------------------- schedulers

VALUES = st.one_of(NUMBERS, st.floats(0, 1), WORDS, st.none())
KNOWN = {
    "num_train_timesteps": st.one_of(st.integers(-2, 2000), VALUES),
    "beta_start": VALUES,
    "beta_end": VALUES,
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "nope"]),
    "trained_betas": st.one_of(st.none(), st.lists(st.floats(-1, 2), max_size=5)),
    "prediction_type": st.one_of(st.sampled_from([*PREDICTION_TYPES, "nope"]), VALUES),
    "rescale_betas_zero_snr": st.booleans(),
    "shift": VALUES,
    "timestep_type": st.sampled_from(["discrete", "continuous"]),
    "invert_sigmas": st.booleans(),
    "use_flow_sigmas": st.booleans(),
}


@QUICK
@given(
    st.sampled_from([DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, FlowMatchEulerDiscreteScheduler]),
    st.fixed_dictionaries({}, optional=KNOWN),
)
def test_a_scheduler_gives_finite_coefficients_or_is_refused(kind: Any, config: dict[str, Any]) -> None:
    config.setdefault("num_train_timesteps", 1000)
    if isinstance(config["num_train_timesteps"], int) and config["num_train_timesteps"] > 10_000:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scheduler = kind.from_config(config)
        except Exception:  # diffusers' own refusal, which `load_pipeline` turns into a line
            return
    try:
        schedule = NoiseSchedule.from_scheduler(scheduler)
        prediction_type_of(scheduler)
    except InputError as error:
        one_line(error)
        return
    t = schedule.timestep(torch.tensor([0.0, 0.3, 1.0]))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.isfinite().all() and sigma.isfinite().all() and (alpha >= 0).all() and (sigma >= 0).all()


# ---------------------------------------------------------------------- checkpoints

MANIFESTS = st.one_of(
    st.binary(max_size=80),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(
        st.sampled_from(["state.json", "student.safetensors", "../state.json", "/etc/hostname", "x"]),
        st.one_of(JSON, st.fixed_dictionaries({"size": JSON, "sha256": JSON})),
        max_size=4,
    ).map(lambda value: json.dumps(value).encode()),
)


@QUICK
@given(MANIFESTS)
def test_any_other_manifest_is_refused_and_the_previous_checkpoint_used(content: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        root = Path(name)
        for step in (1, 2):
            save_checkpoint(root, step, {"student": {"w": torch.ones(2)}}, {"step": step})
        (root / "checkpoint-2" / "manifest.json").write_bytes(content)
        with pytest.raises(InputError, match="checkpoint-2"):
            load_checkpoint(root / "checkpoint-2")
        with pytest.warns(UserWarning, match="using checkpoint-1 instead"):
            assert latest_checkpoint(root) == root / "checkpoint-1"


def test_deep_and_endless_manifests(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"student": {"w": torch.ones(2)}}, {"step": 1})
    for text in ("[" * 100_000, '{"state.json": {"size": Infinity, "sha256": "x"}}', '{"state.json": {"size": ' + "9" * 5000 + "}}"):
        (path / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json"):
            load_checkpoint(path)
