"""Lay images out as a preference or composition suite reads them; the suites themselves need environments of their own.

    accelerate launch eval/export_images.py FOLDER --suite geneval --prompts_file evaluation_metadata.jsonl --samples 2212 --output_dir OUT
    python eval/export_images.py IMAGES --suite plain --output_dir OUT

docs/evaluation.md says for each suite which prompts it wants, how many images of each, and what to run then. A prompts.jsonl of
`file_name`, `prompt` and `seed` goes along in every layout but those whose tools read the folder itself (dpg, vbench: beside it).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.command_line import reject, run
from common.image_files import ImageSet, read_jsonl, write_jsonl
from common.processes import join
from common.sampling import SamplingConfig, open_images
from PIL import Image

Row = dict[str, Any]
DPG_GRID = 4  # images of a prompt in one file, two by two


@dataclass(frozen=True, kw_only=True)
class ExportConfig(SamplingConfig):
    """Export images for a suite."""

    suite: Literal["plain", "hpsv2", "geneval", "dpg", "vbench"]
    """plain (HPSv3, ImageReward and whatever reads a list), hpsv2, geneval, dpg, vbench."""
    output_dir: Path
    """New or empty folder."""
    metadata: Path | None = None
    """.jsonl whose lines belong to prompts: geneval's evaluation_metadata.jsonl, for hpsv2 `prompt` and `style`, for dpg `prompt` and `id`.
    None: the prompts file, where that is .jsonl."""


@dataclass(frozen=True)
class Item:
    """One image: its file, its prompt, the place of the prompt in the list, which image of the prompt it is, and the suite's own record."""

    source: Path
    prompt: str
    prompt_index: int
    repetition: int
    record: Row


def export_images(images: ImageSet, suite: str, output: Path, metadata: list[Row]) -> None:
    """Copy `images` into `output` in the layout of `suite`.

    Raises:
        InputError: for images without prompts, a folder that is not empty, or metadata that lacks a prompt or a key.
    """
    if output.is_dir() and any(output.iterdir()):
        raise reject("output_dir", str(output), "an empty or new folder is needed")
    if images.prompts is None:
        raise reject("prompts", None, f"{images.folder} needs a prompts.jsonl with a prompt for every image")
    output.mkdir(parents=True, exist_ok=True)
    LAYOUTS[suite](list(_items(images, metadata)), output)


def _items(images: ImageSet, metadata: list[Row]) -> Iterator[Item]:
    records = {row.get("prompt"): row for row in metadata}
    places: dict[str, int] = {}
    seen: dict[str, int] = {}
    for i, prompt in enumerate(images.prompts or ()):
        if metadata and prompt not in records:
            raise reject("metadata", prompt, "every prompt of the images must have a line")
        index = places.setdefault(prompt, len(places))
        repetition = seen[prompt] = seen.get(prompt, -1) + 1
        yield Item(images.path(i), prompt, index, repetition, records.get(prompt, {}))


def _plain(items: list[Item], output: Path) -> None:
    rows = []
    for item in items:
        name = f"{item.prompt_index:05d}_{item.repetition}{item.source.suffix}"
        shutil.copyfile(item.source, output / name)
        rows.append({"file_name": name, "prompt": item.prompt})
    write_jsonl(output / "prompts.jsonl", rows)


def _hpsv2(items: list[Item], output: Path) -> None:
    """STYLE/00000.jpg, numbered within each style; the files keep their format, which Pillow reads whatever the name says."""
    counts: dict[str, int] = {}
    rows = []
    for item in (item for item in items if item.repetition == 0):
        style = _needed(item, "style", "hpsv2")
        number = counts[style] = counts.get(style, -1) + 1
        name = f"{style}/{number:05d}.jpg"
        _copy(item.source, output / name)
        rows.append({"file_name": name, "prompt": item.prompt})
    write_jsonl(output.with_name(output.name + ".prompts.jsonl"), rows)


def _geneval(items: list[Item], output: Path) -> None:
    """00000/metadata.jsonl with the prompt's line, 00000/samples/0000.png ..."""
    for item in items:
        _needed(item, "tag", "geneval")
        folder = output / f"{item.prompt_index:05d}"
        _copy(item.source, folder / "samples" / f"{item.repetition:04d}.png")
        (folder / "metadata.jsonl").write_text(json.dumps(item.record) + "\n")


def _dpg(items: list[Item], output: Path) -> None:
    """ID.png: the four images of a prompt, two by two."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(str(_needed(item, "id", "dpg")), []).append(item)
    for name, group in groups.items():
        if len(group) < DPG_GRID:
            raise reject("samples", len(group), f"dpg shows {DPG_GRID} images of every prompt; {name} has fewer")
        _two_by_two([item.source for item in group[:DPG_GRID]]).save(output / f"{name}.png")


def _vbench(items: list[Item], output: Path) -> None:
    """PROMPT-0.mp4 ... PROMPT-4.mp4, from a folder whose prompts.jsonl names videos."""
    for item in items:
        if item.source.suffix != ".mp4":
            raise reject("suite", "vbench", f"videos (.mp4) are needed, not {item.source.name}")
        if "/" in item.prompt:
            raise reject("prompt", item.prompt, "vbench takes the prompt as the file's name, which must not hold /")
        shutil.copyfile(item.source, output / f"{item.prompt}-{item.repetition}.mp4")


LAYOUTS: dict[str, Callable[[list[Item], Path], None]] = {
    "plain": _plain,
    "hpsv2": _hpsv2,
    "geneval": _geneval,
    "dpg": _dpg,
    "vbench": _vbench,
}


def _needed(item: Item, key: str, suite: str) -> str:
    if key not in item.record:
        raise reject("metadata", item.prompt, f"suite {suite} needs the key {key!r} for every prompt")
    return str(item.record[key])


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _two_by_two(paths: list[Path]) -> Image.Image:
    pictures = [Image.open(path).convert("RGB") for path in paths]
    width, height = pictures[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % 2 * width, i // 2 * height))
    return grid


def main(config: ExportConfig) -> None:
    team = join(config.device)
    images = open_images(config, team)
    if team.rank == 0:
        source = config.metadata or config.prompts_file
        metadata = read_jsonl(source) if source is not None and source.suffix == ".jsonl" else []
        export_images(images, config.suite, config.output_dir, metadata)
        print(f"{config.output_dir}: {len(images):,} images for {config.suite}")
    team.leave()


if __name__ == "__main__":
    run(ExportConfig, main, "many")
