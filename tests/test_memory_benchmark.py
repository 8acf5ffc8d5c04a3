"""`benchmarks/memory.py` stays runnable, and the pipelines of real size are of the size that is published."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory
import real_size
from torch import nn


def test_the_script_runs_on_the_cpu(tmp_path: Path) -> None:
    memory.main(["--tiny", "--steps", "1", "--cases", "bf16", "lora_shared", "--output", str(tmp_path / "memory.json")])
    lines = [json.loads(line) for line in (tmp_path / "memory.json").read_text().splitlines()]
    assert [line["case"] for line in lines] == ["bf16", "lora_shared"]
    for line in lines:
        assert line["steps_per_second"] > 0 and line["planned_bytes"] > line["resident_bytes"] > 0
        assert line["device"] == "cpu" and "commit" in line and "error" not in line


SIZES = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "flux": {"transformer": 11_901_408_320, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},
}


@pytest.mark.parametrize("name", SIZES)
def test_pipelines_of_real_size_have_the_published_number_of_weights(name: str) -> None:
    """Of the weight files of stable-diffusion-v1-5, stable-diffusion-xl-base-1.0 and FLUX.1-dev."""
    pipe = real_size.PIPELINES[name][0]("meta")
    found = {part: sum(p.numel() for p in net.parameters()) for part in SIZES[name] if isinstance(net := getattr(pipe, part), nn.Module)}
    assert found == SIZES[name]
