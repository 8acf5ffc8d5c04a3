"""Grids of samples, and curves of quality over steps and over time, as PNG and SVG."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

matplotlib.use("Agg")  # no display is needed

CELL = 48  # smallest side of an image in a grid, pixels
GAP = 4
HEADER = 20
Theme = Literal["light", "dark"]
# ten hues, and the same ten lighter
PALETTES: dict[Theme, Sequence[Any]] = {"light": matplotlib.color_sequences["tab10"], "dark": matplotlib.color_sequences["tab20"][1::2]}
INK: dict[Theme, str] = {"light": "#1f2328", "dark": "#d1d7e0"}


@dataclass(frozen=True)
class Point:
    """A model at one number of steps: quality and its standard deviation over cost and its standard deviation."""

    steps: int
    cost: float
    quality: float
    cost_deviation: float = 0.0
    quality_deviation: float = 0.0


@dataclass(frozen=True)
class Curve:
    """The points of one model."""

    label: str
    points: Sequence[Point]


def save_grid(images: Tensor, columns: Sequence[str], path: Path) -> None:
    """Write images (N, C, H, W) in [0, 1], C 1 or 3, row by row under the column titles, enlarged without smoothing."""
    grid([to_pil(image) for image in images], columns).save(path)


def grid(images: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str] = ()) -> Image.Image:
    """Images of one size, row by row under the column titles, each row under its own title if there are any; small ones enlarged."""
    scale = max(1, -(-CELL // images[0].width))
    width, height = images[0].width * scale, images[0].height * scale
    pitch = height + GAP + (HEADER if rows else 0)
    lines = -(-len(images) // len(columns))
    canvas = Image.new("RGB", (GAP + len(columns) * (width + GAP), HEADER + lines * pitch), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for column, title in enumerate(columns):
        draw.text((GAP + column * (width + GAP) + width / 2, HEADER / 2), title, fill="black", font=font, anchor="mm")
    for row, title in enumerate(rows):
        draw.text((GAP, HEADER + row * pitch + HEADER / 2), title, fill="black", font=font, anchor="lm")
    for i, image in enumerate(images):
        row, column = divmod(i, len(columns))
        top = HEADER + row * pitch + (HEADER if rows else 0)
        canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (GAP + column * (width + GAP), top))
    return canvas


def quality_plot(curves: Sequence[Curve], cost: str, quality: str, theme: Theme = "light") -> Figure:
    """Quality over cost, logarithmic where the values allow it: the first curve, the teacher's, as a line, the others as points.

    Points carry their number of steps where the cost is something else.
    """
    with matplotlib.rc_context(_colours(theme)):
        figure = Figure(figsize=(5.2, 4.0), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            _draw(axes, curve, i, PALETTES[theme])
        axes.set(xlabel=cost, ylabel=quality)
        _scale(axes, [point for curve in curves for point in curve.points])
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2 if len(curves) > 3 else 1, frameon=False, fontsize="small")
    return figure


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG on a transparent ground, the same bytes at every call."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def to_pil(image: Tensor) -> Image.Image:
    """An image (C, H, W) in [0, 1], C 1 or 3, in eight bits a channel."""
    values = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values.squeeze(2) if values.shape[2] == 1 else values).convert("RGB")


def _colours(theme: Theme) -> dict[str, Any]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK[theme])
    return ink | {"axes.facecolor": "none" if theme == "dark" else "white"}


def _draw(axes: Axes, curve: Curve, index: int, palette: Sequence[Any]) -> None:
    points = sorted(curve.points, key=lambda point: point.cost)
    style: dict[str, Any] = {"marker": "o", "color": axes.xaxis.label.get_color()}
    if index:
        line = ":" if len(points) > 1 else "none"
        style = {"marker": "sDv^P*X<>"[(index - 1) % 9], "color": palette[(index - 1) % 10], "linestyle": line}
    quality, cost = [point.quality for point in points], [point.cost for point in points]
    errors = [point.quality_deviation for point in points], [point.cost_deviation for point in points]
    axes.errorbar(cost, quality, *errors, capsize=3, label=curve.label.replace("$", r"\$"), **style)
    for point in points:
        if point.cost != point.steps:
            where = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": "small", "color": style["color"]}
            axes.annotate(str(point.steps), (point.cost, point.quality), **where)


def _scale(axes: Axes, points: Sequence[Point]) -> None:
    if all(point.quality > 0 for point in points):
        axes.set_yscale("log")
        _label_decades(axes.yaxis, [point.quality for point in points])
    if all(point.cost > 0 for point in points):
        axes.set_xscale("log")
        _label_decades(axes.xaxis, [point.cost for point in points])
    if all(point.cost == point.steps for point in points):
        axes.xaxis.set_major_locator(FixedLocator(sorted({point.steps for point in points})))


def _label_decades(axis: Axis, values: Sequence[float]) -> None:
    """Labels that do not run into each other, and at least a few of them, however narrow or wide the range is."""
    decades = math.log10(max(values) / min(values))
    parts = (1, 1.5, 2, 3, 4, 5, 6, 7, 8) if decades < 0.8 else (1, 2, 3, 5, 7) if decades < 1.3 else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=parts if decades < 3 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
