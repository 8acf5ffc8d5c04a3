"""A report as Markdown, with its pictures as PNG files beside it."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from report import text as text
from report.data import Entry, Report, ScoredPrompt
from report.pictures import grid, quality_plot

SAMPLES = "samples.png"


def write_markdown(report: Report, folder: Path) -> Path:
    """Write report.md and its pictures into `folder`, and return the path of report.md."""
    for plot in text.plots(report):
        quality_plot(plot.curves, plot.cost, plot.quality).savefig(folder / plot.file, metadata={"Software": None})
    for name, picture in _pictures(report):
        picture.save(folder / name)
    path = folder / "report.md"
    path.write_text("\n".join(_lines(report)) + "\n", encoding="utf-8")
    return path


def plain(content: str) -> str:
    """Text that Markdown shows as it is, in one line: what has a meaning there is escaped."""
    escaped = re.sub(r"([\\`*\[\]<>|&~$])", r"\\\1", " ".join(content.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)


def fenced(content: str) -> list[str]:
    """A code block, its fence longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", content)), default=0))
    return [fence, content, fence]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A table whose first `left` columns are aligned to the left, the numbers to the right."""
    marks = ["---" if i < left else "--:" for i in range(len(head))]
    lines = [[plain(cell) for cell in head], marks, *([plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def file_of(entry: Entry) -> str:
    """Name of the picture of an entry's samples."""
    return re.sub(r"[^\w.-]+", "_", f"samples_{entry.model}_{entry.steps}_steps.png")


def _lines(report: Report) -> Iterator[str]:
    yield f"# {plain(report.title)}\n"
    yield plain(text.lead(report))
    yield ""
    yield from _summary(report)
    for failure in report.failures:
        yield f"\n**{plain(failure)}**"
    yield f"\n## {text.HEADINGS['plots']}\n"
    yield from (f"![{plain(plot.title)}]({plot.file})" for plot in text.plots(report))
    yield from _measurements(report)
    yield from _samples(report)
    yield from _prompts(report)
    yield from _provenance(report)


def _summary(report: Report) -> list[str]:
    metric = report.main_metric
    head = ["model", metric.title, "of the teacher's best", "", "network evaluations", "speed", "the teacher at as many steps"]
    rows = [[s.name, s.distance, s.ratio, s.sentence, s.evaluations, s.speed, s.teacher] for s in text.summaries(report)]
    return table(head, rows) if rows else []


def _measurements(report: Report) -> Iterator[str]:
    yield f"\n## {text.HEADINGS['table']}\n"
    head = ["model", "steps", *(" ".join(filter(None, (h.title, h.samples and f"({h.samples})"))) for h in text.headings(report))]
    yield from table(head, [[entry.model, str(entry.steps), *_cells(report, entry)] for entry in report.entries])
    yield ""
    yield from (f"- {plain(note)}" for note in text.notes(report))
    yield f"\n### {text.HEADINGS['legend']}\n"
    yield from (f"- **{plain(title)}**: {plain(meaning)}" for title, meaning in text.legend(report))


def _cells(report: Report, entry: Entry) -> list[str]:
    return [", ".join(filter(None, (cell.text, cell.note, cell.samples))) for cell in text.cells(report, entry)]


def _samples(report: Report) -> Iterator[str]:
    if report.columns:
        yield f"\n## {text.HEADINGS['samples']}\n"
        yield plain(text.samples_note(report)) + "\n"
        yield f"![{text.HEADINGS['samples']}]({SAMPLES})\n"
        yield from (f"{i}. {plain(caption)}" for i, caption in text.numbered_captions(report))
    for entry in report.entries:
        if entry.more_images is not None:
            yield f"\n### {plain(entry.name)}\n\n![samples of {plain(entry.name)}]({file_of(entry)})"


def _prompts(report: Report) -> Iterator[str]:
    for title, prompts in text.ranked_prompts(report):
        yield f"\n## {title}\n\n{plain(text.PROMPTS_NOTE)}"
        for i, prompt in enumerate(prompts):
            yield f"\n**{plain(prompt.text)}** (seed {prompt.seed})\n\n![{plain(prompt.text)}]({_prompt_file(title, i)})\n"
            yield from table([entry.name for entry in report.entries], [[f"{score:.2f}" for score in prompt.scores]], left=0)


def _provenance(report: Report) -> Iterator[str]:
    yield f"\n## {text.HEADINGS['run']}\n"
    yield from table(["what", "value"], text.run_facts(report), left=2)
    yield "\nThe commands, each model on its own and then all together:\n"
    yield from fenced("\n".join(report.commands))
    yield f"\n## {text.HEADINGS['numbers']}\n"
    yield from table(*text.all_numbers(report))


def _pictures(report: Report) -> Iterator[tuple[str, Image.Image]]:
    if report.columns:
        images = [image for entry in report.entries for image in entry.images]
        yield SAMPLES, grid(images, text.column_titles(report), [entry.name for entry in report.entries])
    for entry in report.entries:
        if entry.more_images is not None:
            yield file_of(entry), entry.more_images
    for title, prompts in text.ranked_prompts(report):
        yield from ((_prompt_file(title, i), _prompt_picture(report, prompt)) for i, prompt in enumerate(prompts))


def _prompt_picture(report: Report, prompt: ScoredPrompt) -> Image.Image:
    return grid(prompt.images, [str(entry.steps) for entry in report.entries])


def _prompt_file(title: str, index: int) -> str:
    return f"{title.split()[0].lower()}_prompt_{index + 1}.png"
