"""A report as one HTML file: images and plots inside it, no script, nothing fetched from anywhere."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from report import text as text
from report.data import Report
from report.pictures import Theme, as_svg, quality_plot

LARGEST = 256  # pixels; larger images are shown reduced to this
PIXELATED = 64  # images up to this side are enlarged without smoothing
TEMPLATE = "template.html"


def write_html(report: Report, folder: Path) -> Path:
    """Write report.html into `folder` and return its path."""
    path = folder / "report.html"
    path.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    """The whole page. Every text is escaped by the template; what is trusted are base64 data URIs alone."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": picture, "whole": whole, "pixelated": _pixelated}
    return environment.get_template(TEMPLATE).render(report=report, text=text, plot=plot) + "\n"


def picture(image: Image.Image) -> Markup:
    """An image as a data URI: PNG while it is small, JPEG at a side of at most 256 pixels beyond."""
    if _pixelated(image):
        return whole(image)
    reduced = image.convert("RGB")
    reduced.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return _data_uri("image/jpeg", _encoded(reduced, format="JPEG", quality=92))


def whole(image: Image.Image) -> Markup:
    """An image as a PNG data URI, at its full size."""
    return _data_uri("image/png", _encoded(image, format="PNG", optimize=True))


def plot(drawn: text.Plot, theme: Theme) -> Markup:
    """A plot as an SVG data URI in the colours of a light or a dark page."""
    return _data_uri("image/svg+xml", as_svg(quality_plot(drawn.curves, drawn.cost, drawn.quality, theme)))


def _pixelated(image: Image.Image) -> bool:
    return max(image.size) <= PIXELATED


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _data_uri(kind: str, content: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}")  # no character that HTML could read
