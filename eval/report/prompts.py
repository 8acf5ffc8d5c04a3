"""Images and prompts of a report out of folders of samples: the columns of the grid, and the prompts that are served worst and best."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.image_files import ImageSet, open_folder, read_jsonl
from PIL import Image
from report.data import Column, ScoredPrompt
from report.reading import Pictures

COLUMNS = 8
RANKED_PROMPTS = 4


@dataclass(frozen=True)
class Kept:
    """The images of one result at one noise seed, as they lie on disk, with what was asked for each."""

    images: ImageSet
    scores: Sequence[float] | None  # CLIP scores, one an image

    @cached_property
    def seeds(self) -> list[int]:
        """Seed of every image."""
        return [row["seed"] for row in read_jsonl(self.images.folder / "prompts.jsonl")]

    def image(self, index: int) -> Image.Image:
        """Image number `index`."""
        with Image.open(self.images.path(index)) as image:
            return image.convert("RGB")

    def caption(self, index: int) -> str:
        """Prompt or label of an image; its number where it has neither."""
        known: Sequence[object] = self.images.prompts or self.images.labels or range(1, len(self.images) + 1)
        return str(known[index])

    def prompt_scores(self) -> dict[str, float]:
        """Mean score of each prompt over its images; empty without scores."""
        if self.scores is None or self.images.prompts is None:
            return {}
        return {prompt: statistics.fmean(self.scores[i] for i in rows) for prompt, rows in self.images.groups().items()}


def kept(result: Mapping[str, Any], seed: int) -> Kept:
    """The images that an evaluation with `--metrics` left for a noise seed.

    Raises:
        InputError: where they are no longer there.
    """
    scores = result["metrics"].get("clip_score", {}).get("per_image", {}).get(str(seed))
    record = result["images"][str(seed)]
    return Kept(open_folder(Path(record["folder"]), record["count"]), scores)


def pictures(result: Mapping[str, Any], seed: int) -> Pictures:
    """The first images of a result: one for each column."""
    found = kept(result, seed)
    return Pictures(tuple(found.image(i) for i in range(min(COLUMNS, len(found.images)))))


def columns(result: Mapping[str, Any], seed: int) -> tuple[Column, ...]:
    """What the first images of a result were asked for, and their seeds."""
    found = kept(result, seed)
    return tuple(Column(found.caption(i), found.seeds[i]) for i in range(min(COLUMNS, len(found.images))))


def worst_and_best(results: Sequence[Sequence[Mapping[str, Any]]], seed: int) -> tuple[tuple[ScoredPrompt, ...], tuple[ScoredPrompt, ...]]:
    """The prompts with the lowest and with the highest mean CLIP score over the students; none where there are no scores.

    `results` are those of the teacher and of each student, in the order of the report; without students the teacher's count.
    """
    everything = [kept(result, seed) for model in results for result in model]
    scores = [found.prompt_scores() for found in everything]
    if not all(scores):
        return (), ()
    ranked = scores[len(results[0]) :] or scores
    order = sorted(ranked[0], key=lambda prompt: statistics.fmean(own[prompt] for own in ranked))
    count = min(RANKED_PROMPTS, len(order) // 2)
    worst, best = order[:count], order[::-1][:count]
    return tuple(_scored(prompt, everything, scores) for prompt in worst), tuple(_scored(prompt, everything, scores) for prompt in best)


def _scored(prompt: str, everything: Sequence[Kept], scores: Sequence[Mapping[str, float]]) -> ScoredPrompt:
    first = (everything[0].images.prompts or ()).index(prompt)
    images = tuple(found.image(first) for found in everything)
    return ScoredPrompt(prompt, everything[0].seeds[first], tuple(own[prompt] for own in scores), images)
