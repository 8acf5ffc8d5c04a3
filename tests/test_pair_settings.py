"""Warnings of pairs that were drawn otherwise than the method expects, from the settings that real pairs carry."""

from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import class_conditional

from diffusion_distill.methods import DMD, Method, Reflow, ReflowDistillation
from diffusion_distill.pair_settings import pair_warnings
from diffusion_distill.pair_writer import PairConfig, write_pairs
from diffusion_distill.pairs import PairDataset


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of pairs drawn in 12 calls at guidance scale 2."""
    folder: Path = tmp_path_factory.mktemp("pairs")
    config = PairConfig(output_dir=str(folder), num_pairs=2, num_inference_steps=12, guidance_scale=2.0, batch_size=2)
    return PairDataset(write_pairs(class_conditional(), [0, 1], config)).settings


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (DMD(guidance_scale=2.0), []),
        (DMD(guidance_scale=3.0), ["pairs_dir: guidance_scale of the pairs is 2, the method's 3: its two losses pull"]),
        (Reflow((4, 1)), []),  # learns whatever guidance its pairs have
        (Reflow((1, 8)), ["pairs_dir: the pairs were drawn in 12 network calls; fewer than 16 leave a student of up to 8"]),
        (ReflowDistillation((2,)), []),
    ],
)
def test_other_settings_are_named_in_one_line(settings: dict[str, Any], method: Method, found: list[str]) -> None:
    lines = pair_warnings(settings, method.expected_pairs, max(getattr(method, "num_inference_steps", (1,))))
    assert len(lines) == len(found) and all(line.startswith(start) and "\n" not in line for line, start in zip(lines, found))


def test_few_calls_are_few_for_any_student(settings: dict[str, Any]) -> None:
    few = settings | {"timesteps": settings["timesteps"][:9]}
    assert len(pair_warnings(few, {}, 1)) == 1 and not pair_warnings(settings, {}, 1)
