"""Draw the captioned emoji: 20 objects in 8 colours on 6 backgrounds, "a green banana on a red background".

    apt-get install fonts-noto-color-emoji
    python train/emoji_data.py --output_dir outputs/emoji

The folder gets `train/` and `held_out/`, each with a metadata.jsonl of `file_name`, `text`, `object`, `colour`, `background`, and a
`prompts.txt` of its captions. Held-out captions are new triples; each pair of their words occurs in training. An object in the colour of
its background cannot be seen and is left out. Every image has a size, a turn and a place of its own. About 20 CPU seconds.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.append(str(Path(__file__).parents[1]))
from diffusion_distill.config import parse, run_cli
from diffusion_distill.errors import reject

SIDE = 32
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # of the bitmaps in the font, which come in no other
OVERSAMPLING = 4
MIDDLE_TONE = 0.6  # luminance that is drawn in the pure colour: below it the colour darkens, above it turns to white
OBJECTS = {
    "heart": "❤",
    "star": "⭐",
    "moon": "🌙",
    "key": "🔑",
    "bell": "🔔",
    "apple": "🍎",
    "banana": "🍌",
    "fish": "🐟",
    "leaf": "🍁",
    "umbrella": "☂",
    "cup": "☕",
    "house": "🏠",
    "car": "🚗",
    "anchor": "⚓",
    "mushroom": "🍄",
    "crown": "👑",
    "shirt": "👕",
    "hat": "🎩",
    "lock": "🔒",
    "cat": "🐱",
}
COLOURS = {
    "red": (226, 41, 47),
    "orange": (255, 140, 0),
    "yellow": (255, 214, 10),
    "green": (46, 170, 60),
    "blue": (40, 90, 230),
    "purple": (140, 60, 190),
    "pink": (255, 120, 180),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "black": (24, 24, 28),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "red": (190, 35, 40),
    "green": (60, 150, 70),
    "blue": (50, 90, 200),
}


class Triple(NamedTuple):
    """What a caption says."""

    object: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.object} on a {self.background} background"


@dataclass
class EmojiData:
    output_dir: str = "outputs/emoji"
    """Folder of the two splits."""
    font: str = FONT
    """Noto Color Emoji, from Debian's fonts-noto-color-emoji (OFL-1.1)."""
    poses: int = 16
    """Images of each caption, each in another size, turn and place."""
    held_out_share: float = 0.12
    """Share of the captions that is held out."""
    seed: int = 0
    """Seed of the split and of the poses."""

    def __post_init__(self) -> None:
        if not Path(self.font).is_file():
            raise reject("font", self.font, "the file of Noto Color Emoji, which `apt-get install fonts-noto-color-emoji` brings")
        if self.poses < 1:
            raise reject("poses", self.poses, "at least 1")
        if not 0 < self.held_out_share < 0.5:
            raise reject("held_out_share", self.held_out_share, "a share between 0 and .5")


def triples() -> list[Triple]:
    """All captions' contents, in the order of the tables above."""
    return [Triple(*words) for words in product(OBJECTS, COLOURS, BACKGROUNDS) if words[1] != words[2]]


def split(share: float, seed: int) -> tuple[list[Triple], list[Triple]]:
    """Training and held-out triples; each two words of a held-out triple occur together in at least two training triples."""
    every, wanted = triples(), round(share * len(triples()))
    order = random.Random(seed).sample(every, len(every))
    uses = {pair: sum(pair <= _words(triple) for triple in every) for triple in every for pair in _pairs(triple)}
    held: set[Triple] = set()
    for triple in order:
        if len(held) < wanted and all(uses[pair] > 2 for pair in _pairs(triple)):
            held.add(triple)
            for pair in _pairs(triple):
                uses[pair] -= 1
    return [t for t in every if t not in held], [t for t in every if t in held]


def _words(triple: Triple) -> frozenset[tuple[str, str]]:
    return frozenset(triple._asdict().items())


def _pairs(triple: Triple) -> list[frozenset[tuple[str, str]]]:
    return [frozenset(pair) for pair in combinations(triple._asdict().items(), 2)]


@cache
def glyph(name: str, font: str = FONT) -> Image.Image:
    """The object's luminance and opacity (mode LA) without margins; half of the opaque pixels are darker than `MIDDLE_TONE`."""
    image = Image.new("RGBA", (136, 136))
    face = ImageFont.truetype(font, FONT_SIZE)
    ImageDraw.Draw(image).text((68, 68), OBJECTS[name], font=face, embedded_color=True, anchor="mm")
    pixels = np.asarray(image.crop(image.getbbox())).astype(np.float64) / 255
    opacity, luminance = pixels[..., 3], pixels[..., :3] @ (0.299, 0.587, 0.114)
    low, high = np.percentile(luminance[opacity > 0.5], (2, 98))
    tone = ((luminance - low) / max(high - low, 0.2)).clip(0, 1)
    median = np.median(tone[opacity > 0.5]).clip(0.15, 0.9)
    tone = np.where(opacity > 0.02, tone ** (np.log(MIDDLE_TONE) / np.log(median)), MIDDLE_TONE)
    return Image.fromarray((np.stack([tone, opacity], 2) * 255).round().astype(np.uint8), "LA")


def draw(triple: Triple, pose: random.Random, font: str = FONT) -> Image.Image:
    """An RGB image of `SIDE` pixels: the object at 72 to 90 % of the side, turned by up to 10 degrees, anywhere that it fits."""
    big = SIDE * OVERSAMPLING
    turned = glyph(triple.object, font).rotate(pose.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True, fillcolor=(153, 0))
    turned = turned.crop(turned.getchannel("A").getbbox())
    scale = pose.uniform(0.72, 0.9) * big / max(turned.size)
    small = turned.resize((round(turned.width * scale), round(turned.height * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("LA", (big, big), (153, 0))
    canvas.paste(small, (pose.randint(0, big - small.width), pose.randint(0, big - small.height)))
    tone, opacity = (np.asarray(canvas).astype(np.float64) / 255).transpose(2, 0, 1)[..., None]
    pixels = opacity * _tinted(tone, COLOURS[triple.colour]) + (1 - opacity) * np.array(BACKGROUNDS[triple.background])
    blocks = pixels.reshape(SIDE, OVERSAMPLING, SIDE, OVERSAMPLING, 3)
    return Image.fromarray(blocks.mean((1, 3)).round().astype(np.uint8))


def _tinted(tone: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """RGB (H, W, 3) in [0, 255] of tones (H, W, 1) in [0, 1]."""
    pure = np.array(colour, dtype=np.float64)
    shade = 0.3 + 0.7 * (tone / MIDDLE_TONE).clip(0, 1)
    light = 0.45 * ((tone - MIDDLE_TONE) / (1 - MIDDLE_TONE)).clip(0, 1)
    return (pure * shade) * (1 - light) + 255 * light


def write_split(folder: Path, chosen: Sequence[Triple], config: EmojiData) -> None:
    """Images, metadata.jsonl and prompts.txt; the image of one pose of every caption comes before the next pose."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for pose, triple in product(range(config.poses), chosen):
        name = f"images/{len(rows):06d}.png"
        draw(triple, random.Random(f"{config.seed} {pose} {triple.caption}"), config.font).save(folder / name)
        rows.append({"file_name": name, "text": triple.caption, **triple._asdict()})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(triple.caption + "\n" for triple in chosen))


def main() -> None:
    (config,) = parse(None, EmojiData, prog="emoji_data.py", description=__doc__ or "")
    folder = Path(config.output_dir)
    for name, chosen in zip(("train", "held_out"), split(config.held_out_share, config.seed), strict=True):
        if (folder / name).exists():
            raise reject("output_dir", str(folder / name), "a folder without the splits is needed; remove them or name another")
        write_split(folder / name, chosen, config)
        print(f"{folder / name}: {len(chosen)} captions, {config.poses * len(chosen)} images")


if __name__ == "__main__":
    run_cli(main)
