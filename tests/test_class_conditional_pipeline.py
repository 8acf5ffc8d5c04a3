"""The class-conditional pipeline against hand-written samplers, and its life on disk with plain diffusers."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler
from tiny_pipelines import class_conditional
from torch import Tensor

from pipelines import class_conditional as pipeline_file

LABELS, CLASSES = [3, 9], 10


def network(pipe: Any, x: Tensor, t: float, labels: list[int]) -> Tensor:
    return pipe.unet(x, torch.full((len(x),), t), class_labels=torch.tensor(labels), return_dict=False)[0]


def noise_of(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def pixels(x0: Tensor) -> Tensor:
    return (x0 / 2 + 0.5).clamp(0, 1)


def draw(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{"class_labels": LABELS, "generator": generator, "output_type": "pt"} | call).images


def student(scheduler: Any, process: str, timesteps: list[float]) -> Any:
    teacher = class_conditional(process)
    return pipeline_file.ClassConditionalPipeline(teacher.unet, scheduler, grids=[timesteps], num_inference_steps=len(timesteps))


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_flow_teacher_is_euler_over_even_sigmas(steps: int, scale: float) -> None:
    pipe, x = class_conditional("flow"), noise_of(0)
    for i in range(steps, 0, -1):
        t = 1000 * i / steps
        flow, nothing = network(pipe, x, t, LABELS), network(pipe, x, t, [CLASSES] * 2)
        x = x - (nothing + scale * (flow - nothing)) / steps
    torch.testing.assert_close(draw(pipe, num_inference_steps=steps, guidance_scale=scale), pixels(x), atol=1e-6, rtol=0)


@torch.no_grad()
def test_ddim_teacher_walks_the_trailing_grid() -> None:
    pipe, x = class_conditional("v_prediction"), noise_of(0)
    power = pipe.scheduler.alphas_cumprod.double()
    for t, s in zip([999, 749, 499, 249], [749, 499, 249, None]):
        alpha, sigma = power[t].sqrt(), (1 - power[t]).sqrt()
        v = network(pipe, x, t, LABELS).double()
        x0, eps = alpha * x - sigma * v, sigma * x + alpha * v
        x = (x0 if s is None else power[s].sqrt() * x0 + (1 - power[s]).sqrt() * eps).float()
    torch.testing.assert_close(draw(pipe, num_inference_steps=4), pixels(x), atol=1e-6, rtol=0)


@torch.no_grad()
def test_flow_student_predicts_x0_and_renoises_on_its_own_grid() -> None:
    pipe = student(FlowMatchLCMScheduler(shift=1.0), "flow", [1000.0, 600.0])
    generator = torch.Generator().manual_seed(0)
    x, fresh = (torch.randn(2, 1, 8, 8, generator=generator) for _ in range(2))
    x0 = x - network(pipe, x, 1000.0, LABELS)
    x = 0.4 * x0 + 0.6 * fresh
    torch.testing.assert_close(draw(pipe), pixels(x - 0.6 * network(pipe, x, 600.0, LABELS)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scheduler", "process", "grid"),
    [(FlowMatchLCMScheduler(), "flow", [1000.0, 500.0]), (LCMScheduler(), "epsilon", [999, 499])],
)
def test_each_image_has_its_own_generator(scheduler: Any, process: str, grid: list[float]) -> None:
    pipe = student(scheduler, process, grid)
    together = draw(pipe, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)])
    alone = draw(pipe, class_labels=LABELS[1], generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="list of 1 for 2 labels"):
        draw(pipe, generator=[torch.Generator()])


@pytest.mark.parametrize("labels", [10, -1, [0, 10], [], [1.5], [True], [[1, 2]], torch.tensor([0.0])])
def test_unknown_labels_are_refused_with_their_range(labels: Any) -> None:
    with pytest.raises(ValueError, match="class_labels: .*whole numbers from 0 to 9"):
        class_conditional()(labels)


@pytest.mark.parametrize(
    ("scheduler", "process", "grid"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow", [1000.0, 500.0]),
        (DDIMScheduler(timestep_spacing="trailing"), "epsilon", [999, 300]),
        (DDIMScheduler(timestep_spacing="leading"), "epsilon", [999, 499]),
    ],
)
def test_a_scheduler_that_cannot_visit_the_grid_is_refused(scheduler: Any, process: str, grid: list[float]) -> None:
    with pytest.raises(ValueError, match="timesteps: got .* would visit"):
        draw(student(scheduler, process, grid))


def test_wrong_calls_are_refused() -> None:
    pipe = class_conditional()
    for call, message in [
        ({"num_inference_steps": 2, "timesteps": [1000.0]}, "one of them"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"output_type": "png"}, "output_type: got 'png'"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(pipe, **call)


def test_output_types_agree() -> None:
    pipe = class_conditional()
    tensor = draw(pipe, num_inference_steps=1)
    array = draw(pipe, num_inference_steps=1, output_type="np")
    image = draw(pipe, num_inference_steps=1, output_type="pil")[0]
    assert tensor.shape == (2, 1, 8, 8)
    assert torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(array))
    assert image.mode == "L" and image.getpixel((2, 5)) == round(float(tensor[0, 0, 5, 2]) * 255)
    assert torch.equal(draw(pipe, num_inference_steps=1, class_labels=torch.tensor(LABELS)), tensor)


def test_saved_folder_is_complete_and_can_be_saved_again(tmp_path: Path) -> None:
    first = student(FlowMatchLCMScheduler(shift=1.0), "flow", [1000.0, 333.25])
    first.save_pretrained(tmp_path / "1")
    second = DiffusionPipeline.from_pretrained(tmp_path / "1", trust_remote_code=True)
    (tmp_path / "1" / "pipeline.py").unlink()  # a loaded pipeline needs its folder no more
    second.save_pretrained(tmp_path / "2")
    third = DiffusionPipeline.from_pretrained(tmp_path / "2", trust_remote_code=True)
    assert type(third) is not type(first) and type(third).__name__ == "ClassConditionalPipeline"
    for pipe in (second, third):
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(draw(pipe), draw(first))
    index = json.loads((tmp_path / "2" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ClassConditionalPipeline"]
    assert index["grids"] == [[1000.0, 333.25]] and index["num_inference_steps"] == 2
    assert (tmp_path / "2" / "pipeline.py").read_text() == Path(pipeline_file.__file__).read_text()


def test_the_travelling_file_needs_diffusers_alone() -> None:
    names = set()
    for node in ast.walk(ast.parse(Path(pipeline_file.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) <= {"diffusers", "torch", "numpy", "PIL"}
