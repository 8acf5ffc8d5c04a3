"""An exported folder, sampled by plain diffusers, against the toolkit's own sampler.

`verify_export` is the comparison. Starting its fresh process takes seconds, so only some tests start it; the others run the
same script on the same folder inside this process.
"""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from huggingface_hub import ModelCard
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES, class_conditional, example_conditions, resolution_of, stable_diffusion_3

from diffusion_distill import export, export_child
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.errors import InputError
from diffusion_distill.export import export_student, push_to_hub, verify_export
from diffusion_distill.families import family_of
from diffusion_distill.networks import trainable_copy
from diffusion_distill.sampler import FewStepSampler, uniform_timesteps
from diffusion_distill.schedule import NoiseSchedule, prediction_type_of
from diffusion_distill.student_scheduler import student_scheduler

Kind = Literal["sde", "ode"]
GRIDS = {
    1: {"vp": [999], "flow": [1000]},
    2: {"vp": [999, 499], "flow": [1000, 500]},
    4: {"vp": [999, 749, 499, 249], "flow": [1000, 750, 500, 250]},
    8: {"vp": [999, 874, 749, 624, 499, 374, 249, 124], "flow": [1000, 875, 750, 625, 500, 375, 250, 125]},
}
FLOW_TRANSFORMERS = ("flux", "qwen_image", "z_image")
LATENT_TRANSFORMERS = ("pixart_sigma", "sana", "class_dit", "wan")
INFO = {"teacher": "owner/teacher", "method": "DMD2", "hyper_parameters": {"learning_rate": 1e-5}, "packages": {"torch": "2"}}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(request: dict[str, Any]) -> Any:
        with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
            export_child.main(request | {"output": name})
            return export.read_results(Path(name))[0], []

    monkeypatch.setattr(export, "_fresh_process", run)


class Exported:
    """A tiny teacher, a student of it with other weights, and where it was exported to. `grid`: timesteps, or how many even ones."""

    def __init__(self, folder: Path, build: Callable[[], Any], grid: list[float] | int, kind: Kind, **options: Any):
        self.pipe, self.folder = build(), folder
        self.family, self.conditions = family_of(self.pipe), example_conditions(self.pipe)
        schedule = NoiseSchedule.from_scheduler(self.pipe.scheduler)
        self.sampler = FewStepSampler(uniform_timesteps(schedule, grid) if isinstance(grid, int) else tuple(grid), kind)
        self.samplers = [self.sampler, *options.pop("others", ())]
        self.student = options.pop("student", None) or student_of(self.pipe)
        same = {"family": self.family, "info": INFO, "conditions": self.conditions, "resolution": resolution_of(self.pipe)}
        arguments = same | options
        export_student(self.pipe, self.student, self.samplers, folder, **arguments)

    def verify(self, **options: Any) -> dict[str, Any]:
        same = {"student": self.student, "samplers": self.samplers, "family": self.family, "pipe": self.pipe}
        return verify_export(self.folder, **same, **({"conditions": self.conditions, "trust_remote_code": True} | options))


def denoiser_of(pipe: Any) -> Denoiser:
    family = family_of(pipe)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    return Denoiser(getattr(pipe, family.component), schedule, prediction_type_of(pipe.scheduler), family)


def student_of(pipe: Any) -> Denoiser:
    """In training mode, and different from the teacher, so that exporting the wrong network is seen."""
    student: Any = trainable_copy(denoiser_of(pipe))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in student.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return student


# ------------------------------------------------------------------ the promise


@pytest.mark.parametrize(
    ("name", "steps"), [(name, steps) for name in PIPELINES for steps in GRIDS if name.startswith("class") or steps in (1, 4)]
)
@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_diffusers_samples_what_the_trainer_samples(name: str, kind: Kind, steps: int, tmp_path: Path, in_process: None) -> None:
    exported = Exported(tmp_path / "student", PIPELINES[name], steps, kind)
    result = exported.verify(atol=1e-6)
    assert result["timesteps"] in ([GRIDS[steps]["vp"]], [GRIDS[steps]["flow"]])
    assert exported.student.training


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", *FLOW_TRANSFORMERS, "pixart_alpha", "class_conditional_v"]
)
@pytest.mark.parametrize(
    ("kind", "grid"), [("sde", [399]), ("ode", [399]), ("sde", [900, 399, 20]), ("ode", [900, 399, 20]), ("ode", [999, 666, 332])]
)
def test_inner_and_uneven_grids(name: str, kind: Kind, grid: list[float], tmp_path: Path, in_process: None) -> None:
    assert Exported(tmp_path / "student", PIPELINES[name], grid, kind).verify(atol=1e-6)["timesteps"] == [grid]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_one_student_serves_several_numbers_of_steps(name: str, kind: Kind, tmp_path: Path, in_process: None) -> None:
    pipe = PIPELINES[name]()
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    others = [FewStepSampler(uniform_timesteps(schedule, steps), kind) for steps in (1, 2, 8)]
    if name == "wan" and kind == "sde":
        with pytest.raises(InputError, match=r"timesteps: got \[\[1000.0, .*with sampling 'sde' one number of steps"):
            Exported(tmp_path / "student", PIPELINES[name], 4, kind, others=others)
        return
    exported = Exported(tmp_path / "student", PIPELINES[name], 4, kind, others=others)
    visited = exported.verify(atol=1e-6)["timesteps"]
    assert [len(grid) for grid in visited] == [4, 1, 2, 8]
    card = (exported.folder / "README.md").read_text()
    assert "# 1/2/4/8-step student" in card and card.count("num_inference_steps=") >= 5


def test_kinds_cannot_be_mixed_in_one_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sampling: .*one kind"):
        Exported(tmp_path / "student", class_conditional, 4, "sde", others=[FewStepSampler((1000.0,), "ode")])


def test_flow_timesteps_need_not_be_integers(tmp_path: Path, in_process: None) -> None:
    for build in (class_conditional, stable_diffusion_3):
        exported = Exported(tmp_path / build.__name__, build, [1000.0, 900.0 + 1 / 3, 222.2], "ode")
        # the network sees timesteps that went through float32 sigmas, and answers a little differently
        assert exported.verify(atol=1e-5)["timesteps"][0] == pytest.approx([1000.0, 900.0 + 1 / 3, 222.2], rel=1e-6)


def test_fresh_process_agrees_to_the_last_digit(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "student", class_conditional, [1000.0, 500.0], "sde")
    result = exported.verify(atol=0.0)
    assert result == {"max_difference": 0.0, "x0_difference": 0.0, "timesteps": [[1000.0, 500.0]]}


def test_fresh_process_cannot_import_the_toolkit(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "student", class_conditional, [1000.0], "sde")
    code = exported.folder / "pipeline.py"
    code.write_text(code.read_text() + "\nimport diffusion_distill\n")
    with pytest.raises(InputError, match="must work without diffusion_distill"):
        exported.verify()


def test_different_noise_is_seen(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = Exported(tmp_path / "student", class_conditional, [1000.0, 500.0], "sde")
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    with pytest.raises(RuntimeError, match="images differ by"):
        exported.verify()


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        ("class_conditional_flow", "model_index.json", {"grids": [[1000.0, 499.0]]}, r"called at \[1000.0, 499.0\]; .*\[1000.0, 500.0\]"),
        ("class_conditional_flow", "model_index.json", {"guidance_scale": 2.0}, "guidance is on"),
        (
            "class_conditional_flow",
            "model_index.json",
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            "images differ by",
        ),
        ("class_conditional_v", "scheduler/scheduler_config.json", {"timestep_scaling": 1e-3}, "images differ by"),
        ("stable_diffusion_3", "scheduler/scheduler_config.json", {"shift": 3.0}, r"called at \[1000.0, 750.0\d*\]"),
        ("stable_diffusion", "distillation.json", {"samplers": [{"call": {"num_inference_steps": 3, "guidance_scale": 0}}]}, "called at"),
        (
            "stable_diffusion",
            "distillation.json",
            {"samplers": [{"call": {"timesteps": [999, 499], "guidance_scale": 7.5}}]},
            "guidance is on",
        ),
    ],
)
def test_a_tampered_folder_fails(name: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path, in_process: None) -> None:
    exported = Exported(tmp_path / "student", PIPELINES[name], 2, "sde")
    if message == "called at":  # the grid of its own that this scheduler would take
        (exported.folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(LCMScheduler().config)))
    path = exported.folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RuntimeError, match=message):
        exported.verify()


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    "name", ["class_conditional_flow", "stable_diffusion", "stable_diffusion_3", *FLOW_TRANSFORMERS, *LATENT_TRANSFORMERS]
)
def test_lora_adapters_are_merged_in_a_copy(name: str, tmp_path: Path, in_process: None) -> None:
    pipe = PIPELINES[name]()
    student: Any = trainable_copy(denoiser_of(pipe))
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=list(student.family.lora_targets), init_lora_weights=False)
    torch.manual_seed(0)
    inject_adapter_in_model(adapter, student.model)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    exported = Exported(tmp_path / "student", PIPELINES[name], 2, "sde", student=student)
    exported.verify(atol=1e-5)  # against the unmerged adapters: merging rounds once more
    component = family_of(pipe).component
    saved = load_file(exported.folder / component / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == getattr(pipe, component).state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_half_precision_weights_are_verified_as_saved(tmp_path: Path, in_process: None) -> None:
    exported = Exported(tmp_path / "student", class_conditional, [1000.0, 500.0], "ode", dtype=torch.bfloat16)
    saved = load_file(exported.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert {p.dtype for p in exported.student.parameters()} == {torch.float32}
    exported.verify(atol=1e-6)


def test_teacher_pipeline_is_left_alone(tmp_path: Path) -> None:
    pipe = class_conditional()
    unet, scheduler, config = pipe.unet, pipe.scheduler, dict(pipe.config)
    Exported(tmp_path / "student", lambda: pipe, [1000.0], "sde")
    assert pipe.unet is unet and pipe.scheduler is scheduler and dict(pipe.config) == config


# ------------------------------------------------------------------ schedulers


@pytest.mark.parametrize("steps", GRIDS)
def test_the_number_of_steps_alone_yields_the_trained_ddpm_grid(steps: int) -> None:
    teacher = DDIMScheduler(clip_sample=True, timestep_spacing="leading")
    for kind in ("sde", "ode"):
        sampler = FewStepSampler(tuple(GRIDS[steps]["vp"]), kind)
        found = student_scheduler(NoiseSchedule.from_scheduler(teacher), [sampler], "epsilon", teacher)
        found.set_timesteps(steps)
        assert found.timesteps.tolist() == GRIDS[steps]["vp"] and not found.config.clip_sample


def test_asking_an_lcm_student_for_more_steps_is_an_error() -> None:
    teacher = DDIMScheduler()
    found = student_scheduler(NoiseSchedule.from_scheduler(teacher), [FewStepSampler((999, 749, 499, 249))], "epsilon", teacher)
    with pytest.raises(ValueError, match="smaller than `num_inference_steps`"):
        found.set_timesteps(50)


def test_lcm_boundary_condition_vanishes_in_float32() -> None:
    teacher = DDIMScheduler()
    found = student_scheduler(NoiseSchedule.from_scheduler(teacher), [FewStepSampler((999,))], "epsilon", teacher)
    c_skip, c_out = found.get_scalings_for_boundary_condition_discrete(torch.arange(1, 1000))
    assert c_out.dtype == torch.float32 and bool((c_out == 1).all()) and c_skip.max() < 1e-20


@pytest.mark.parametrize(
    ("teacher", "sampler", "message"),
    [
        (EDMEulerScheduler(), FewStepSampler((0.5,)), "scheduler: got 'EDMEulerScheduler'"),
        (DDIMScheduler(), FewStepSampler((998.5,)), "integer timesteps only"),
        (DDIMScheduler(), FewStepSampler((999, 0)), "end above it"),
        (DDIMScheduler(), FewStepSampler((999,), guidance_scale=3.0), "guidance_scale: got 3.0"),
        (DDIMScheduler(), FewStepSampler((499, 999)), "descend"),
        (FlowMatchEulerDiscreteScheduler(), FewStepSampler((1001.0,)), "1001.0"),
    ],
)
def test_students_without_a_stock_scheduler_are_refused(teacher: Any, sampler: FewStepSampler, message: str) -> None:
    with pytest.raises(InputError, match=message):
        student_scheduler(NoiseSchedule.from_scheduler(teacher), [sampler], prediction_type_of(teacher), teacher)


def test_flow_schedulers_read_flow_predictions_only() -> None:
    teacher = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="prediction_type: got 'sample'"):
        student_scheduler(NoiseSchedule.from_scheduler(teacher), [FewStepSampler((1000.0,))], "sample", teacher)


# ------------------------------------------------------------------ folder


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="output folder: .*previous export"):
        Exported(tmp_path, class_conditional, [1000.0], "sde")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_previous_export_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    Exported(folder, class_conditional, [1000.0], "sde")
    (folder / "left-over.txt").write_text("")
    Exported(folder, class_conditional, [1000.0, 500.0], "sde")
    assert not (folder / "left-over.txt").exists()
    with pytest.raises(TypeError, match="not JSON serializable"):
        Exported(folder, class_conditional, [700.0], "sde", info={"metrics": {"distance": object()}})
    assert json.loads((folder / "distillation.json").read_text())["samplers"][0]["timesteps"] == [1000.0, 500.0]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("name", ["class_conditional_flow", "stable_diffusion"])
def test_model_card_has_metadata_and_code_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = INFO | {"metrics": {"Frechet distance": 1.25}, "commit": "abc123", "license": "mit"}
    images = torch.zeros(2, 1 if name.startswith("class") else 3, 16, 16)
    exported = Exported(tmp_path / "student", PIPELINES[name], 2, "sde", info=info, images=images)
    folder = exported.folder
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.license) == ("owner/teacher", "diffusers", "mit")
    for expected in ("DMD2", "| Frechet distance | 1.25 |", "abc123", "| learning_rate | 1e-05 |", "![samples](samples.png)"):
        assert expected in card.text
    record = json.loads((folder / "distillation.json").read_text())
    assert record["samplers"][0]["timesteps"] == list(exported.sampler.timesteps) and record["method"] == "DMD2"
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(code, {})
    assert (folder / "sample.png").is_file() and (folder / "samples.png").is_file()


def test_a_local_teacher_is_no_base_model(tmp_path: Path) -> None:
    folder = Exported(tmp_path / "student", class_conditional, [1000.0], "sde", info={"teacher": str(tmp_path)}).folder
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None and str(tmp_path) not in card.content


def test_push_to_hub_needs_an_export_and_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="an exported student"):
        push_to_hub(tmp_path, "owner/student")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    folder = Exported(tmp_path / "student", class_conditional, [1000.0], "sde").folder
    with pytest.raises(InputError, match="no Hugging Face token"):
        push_to_hub(folder, "owner/student")


def test_a_pipeline_file_without_grids_cannot_serve_several_numbers_of_steps() -> None:
    """As teachers that were saved before have it; known before the training."""

    class Older(DiffusionPipeline):
        def __init__(self, unet: Any, scheduler: Any, num_inference_steps: int = 50):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    new = class_conditional()
    older, student = Older(new.unet, new.scheduler), denoiser_of(new)
    several = [FewStepSampler(uniform_timesteps(student.schedule, steps), "sde") for steps in (2, 1)]
    export.check_exportable(older, student, several[:1], student.family)
    export.check_exportable(new, student, several, student.family)
    with pytest.raises(InputError, match=re.escape("num_inference_steps: got [2, 1]; one number of steps, for the teacher's own")):
        export.check_exportable(older, student, several, student.family)
