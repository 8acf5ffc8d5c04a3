"""Grids of samples and the curve of quality over steps, as PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

matplotlib.use("Agg")  # no display is needed

CELL = 48  # smallest side of an image in a grid, pixels
GAP = 4
HEADER = 20


@dataclass(frozen=True)
class Curve:
    """Distances (mean and standard deviation over noise seeds) of one model at its step counts."""

    label: str
    steps: Sequence[int]
    means: Sequence[float]
    deviations: Sequence[float]


def save_grid(images: Tensor, columns: Sequence[str], path: Path) -> None:
    """Write images (N, C, H, W) in [0, 1], C 1 or 3, row by row under the column titles, enlarged without smoothing."""
    scale = max(1, -(-CELL // images.shape[-1]))
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    rows = -(-len(images) // len(columns))
    canvas = Image.new("RGB", (GAP + len(columns) * (width + GAP), HEADER + rows * (height + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for column, title in enumerate(columns):
        draw.text((GAP + column * (width + GAP) + width / 2, HEADER / 2), title, fill="black", font=font, anchor="mm")
    for i, image in enumerate(images):
        row, column = divmod(i, len(columns))
        tile = _to_pil(image).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(tile, (GAP + column * (width + GAP), HEADER + row * (height + GAP)))
    canvas.save(path)


def save_quality_curve(teacher: Curve, students: Sequence[Curve], samples: str, path: Path) -> None:
    """Plot the Fréchet distance over sampling steps, both logarithmic: the teacher as a line, students as points."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(teacher.steps, teacher.means, teacher.deviations, marker="o", capsize=3, color="black", label=teacher.label)
    for i, curve in enumerate(students):
        style: dict[str, Any] = {"marker": "sDv^P*X<>"[i % 9], "color": f"C{i % 10}", "linestyle": ":" if len(curve.steps) > 1 else "none"}
        axes.errorbar(curve.steps, curve.means, curve.deviations, capsize=3, label=curve.label, **style)
    axes.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel=f"Fréchet distance ({samples})")
    axes.xaxis.set_major_locator(FixedLocator(sorted({step for curve in (teacher, *students) for step in curve.steps})))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)


def _to_pil(image: Tensor) -> Image.Image:
    values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values.squeeze(2) if values.shape[2] == 1 else values).convert("RGB")
