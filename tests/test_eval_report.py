"""The report of a comparison: what it says, that it says all of it, and that nothing in it can break out of the page."""

import base64
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from report import text as report_text
from report.data import Column, Entry, Model, Report, ScoredPrompt, Value, judged, value_from
from report.html_page import render
from report.markdown import fenced, plain, write_markdown
from report.metric_words import BY_KEY, METRICS, metric_named
from report.pictures import Curve, Point, as_svg, grid, quality_plot, save_grid
from report.reading import entry_from

HOSTILE = (
    "<script>alert('x')</script> | [a](http://evil.example/x.js) `b` \"><img src=http://evil.example/y onerror=alert(1)>\n# c & *d* $e$"
)
DISTANCE = BY_KEY["frechet_distance"]
SPREAD = BY_KEY["within_class_spread"]
TIME = BY_KEY["seconds_per_image"]


class Page(HTMLParser):
    """What an HTML page holds, as a browser's parser reads it."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.inside.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self.inside:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.inside):
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def value(*per_seed: float, samples: int = 5000) -> Value:
    mean = sum(per_seed) / len(per_seed)
    std = (sum((x - mean) ** 2 for x in per_seed) / (len(per_seed) - 1)) ** 0.5 if len(per_seed) > 1 else None
    return Value(mean, std, samples, {str(seed): x for seed, x in enumerate(per_seed)})


def entry(model: str, steps: int, *distances: float, seconds: float = 0.1, environment: str = "cpu") -> Entry:
    values = {"frechet_distance": value(*distances), "network_evaluations_per_image": value(*[float(steps)] * len(distances))}
    values["seconds_per_image"] = value(*(steps * seconds * (1 + 0.01 * i) for i in range(len(distances))))
    values["within_class_spread"] = value(*(1 + 0.1 * x for x in distances))
    return Entry(model, steps, values, environment)


def flat(colour: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (colour, 10, 20))


def small_report(name: str = "student", **changes: Any) -> Report:
    teacher = Model("teacher", "models/teacher", "a" * 64, "", (entry("teacher", 2, 4.0, 4.1, 4.2), entry("teacher", 8, 0.5, 0.52, 0.54)))
    student = Model(name, f"models/{name}", "b" * 64, f"method {name}", (entry(name, 2, 0.4, 0.41, 0.42),))
    report = Report(teacher, (student,), {"samples per seed": "5,000"}, (f"python eval/compare.py {name}",), "c0ffee", "torch 2")
    return replace(report, **changes)


def pictured(report: Report, captions: list[str]) -> Report:
    """The same with a grid: the image of entry e in column c has the colour 40 e + c."""

    def drawn(model: Model) -> Model:
        numbers = {entry.name: i for i, entry in enumerate(report.entries)}
        return replace(
            model,
            entries=tuple(replace(e, images=tuple(flat(40 * numbers[e.name] + c) for c in range(len(captions)))) for e in model.entries),
        )

    columns = tuple(Column(caption, 100 + i) for i, caption in enumerate(captions))
    return replace(report, teacher=drawn(report.teacher), students=tuple(map(drawn, report.students)), columns=columns)


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(";base64,")[2], validate=True)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([0.40, 0.41, 0.42], [0.50, 0.52, 0.54]),
        ([0.40, 0.60, 0.50], [0.52, 0.50, 0.54]),
        ([0.9, 0.91], [0.5, 0.52]),
        ([0.5, 0.9], [0.4, 0.41]),
        ([0.400, 0.401, 0.402], [0.45, 0.50, 0.55]),
    ],
)
def test_verdict_is_welchs_test(ours: list[float], theirs: list[float]) -> None:
    differs = scipy.stats.ttest_ind(ours, theirs, equal_var=False).pvalue < 0.05
    expected = ("better" if sum(ours) / len(ours) < sum(theirs) / len(theirs) else "worse") if differs else "within noise"
    assert judged(DISTANCE, value(*ours), value(*theirs)) == expected


def test_verdict_follows_the_direction_of_the_metric() -> None:
    low, high = value(0.40, 0.41, 0.42), value(0.60, 0.61, 0.62)
    assert judged(DISTANCE, low, high) == "better" and judged(BY_KEY["recall"], low, high) == "worse"
    assert judged(SPREAD, value(1.1, 1.11, 1.12), value(0.7, 0.71, 0.72)) == "better"  # nearer to 1, though higher
    assert judged(SPREAD, value(0.8, 0.81, 0.82), value(1.2, 1.19, 1.18)) == "within noise"  # as far on the other side
    evaluations = BY_KEY["network_evaluations_per_image"]  # a number without noise
    for seeds in (1, 2):
        assert judged(evaluations, value(*[2.0] * seeds), value(*[50.0] * seeds)) == "better"
        assert judged(evaluations, value(*[2.0] * seeds), value(*[2.0] * seeds)) == "within noise"
    assert (
        judged(DISTANCE, value(0.5, 0.5), value(0.4, 0.4)) == "worse"
        and judged(DISTANCE, value(0.4, 0.4), value(0.4, 0.4)) == "within noise"
    )


@pytest.mark.parametrize(
    ("difference", "errors", "expected"), [(0.3, (0.1, 0.1), "better"), (0.3, (0.12, 0.1), "within noise"), (0.3, (0.0, 0.1), "one seed")]
)
def test_one_seed_is_judged_by_the_errors_of_the_metric(difference: float, errors: tuple[float, float], expected: str) -> None:
    ours, theirs = (replace(value(0.5 - part), error=error) for part, error in zip((difference, 0), errors))
    assert judged(DISTANCE, ours, theirs) == expected
    assert expected == "one seed" or (expected == "better") == (scipy.stats.norm.cdf(-difference, scale=np.hypot(*errors)) < 0.025)
    assert judged(DISTANCE, value(0.4), value(0.9)) == "one seed"


def test_reference_is_the_best_of_eight_steps_or_more() -> None:
    entries = tuple(entry("t", steps, distance) for steps, distance in ((4, 0.5), (8, 1.2), (16, 1.1), (50, 1.3)))
    report = small_report(teacher=Model("t", "t", "a" * 64, "", entries))
    assert report.reference is entries[2]
    assert report.ratio(report.students[0].entries[0], "frechet_distance") == pytest.approx(0.41 / 1.1)


def test_main_metric_is_common_to_all() -> None:
    report = small_report()
    only_kid = replace(report.students[0].entries[0], values={"kid": value(0.1, 0.2)})
    with pytest.raises(ValueError, match="no quality metric is common"):
        assert replace(report, students=(replace(report.students[0], entries=(only_kid,)),)).main_metric
    assert report.main_metric is DISTANCE and [metric.key for metric in report.metrics][-1] == "seconds_per_image"
    counted = replace(report.reference, values=report.reference.values | {"timed_images": value(18)})
    assert replace(report, teacher=replace(report.teacher, entries=(counted,))).metrics == report.metrics


def test_times_of_another_device_are_not_compared() -> None:
    report = small_report()
    assert report.speed_up(report.students[0].entries[0]) == pytest.approx(4)
    moved = replace(report.students[0].entries[0], environment="cuda")
    report = replace(report, students=(replace(report.students[0], entries=(moved,)),))
    assert report.speed_up(moved) is None and report.verdict(moved, TIME) == "not comparable"
    assert report.verdict(moved, DISTANCE) == "better"
    assert [plot.file for plot in report_text.plots(report)] == ["quality_vs_steps.png"]
    assert "different environments" in Page(render(report)).text


def test_a_reader_sees_first_who_how_far_at_what_cost() -> None:
    page = Page(render(small_report())).text
    (summary,) = report_text.summaries(small_report())
    assert summary.ratio == "0.79 ×" and summary.evaluations == "2 instead of 8" and summary.speed == "4.0 × faster"
    assert summary.distance == "0.410 ± 0.010 (5,000 × 3)" and summary.teacher == "4.100 ± 0.100"
    others = replace(small_report().students[0], entries=(entry("student", 4, 0.4, 0.41),))
    assert report_text.summaries(small_report(students=(others,)))[0].teacher == "–"
    facts = ["The teacher's best is 0.520 ± 0.020, at 8 steps", "student, 2 steps", "0.79 ×", "0.410 ± 0.010 (5,000 × 3)"]
    facts += [
        "better than the teacher's best",
        "4.0 × faster",
        "2 instead of 8",
        "All measurements",
        "What the numbers mean",
        "What was run",
    ]
    assert [page.index(fact) for fact in facts] == sorted(page.index(fact) for fact in facts)


def test_differences_within_noise_are_marked(tmp_path: Path) -> None:
    report = small_report()
    noisy = Model("noisy", "n", "d" * 64, "", (entry("noisy", 8, 0.3, 0.5, 0.7, seconds=0.1005),))
    report = replace(report, students=(noisy,))
    (summary,) = report_text.summaries(report)
    assert summary.verdict == "within noise" and summary.speed == "≈ as fast (within noise)"
    markdown = write_markdown(report, tmp_path).read_text()
    assert "| noisy | 8 | 0.500 ± 0.200, ≈ within noise |" in markdown
    assert "0.500 ± 0.200≈ within noise" in Page(render(report)).cells
    one_seed = replace(report, students=(replace(noisy, entries=(entry("noisy", 8, 0.3),)),))
    assert "the noise is unknown" in report_text.summaries(one_seed)[0].sentence and "With one noise seed," in Page(render(one_seed)).text


def test_every_number_stands_in_both_reports(tmp_path: Path) -> None:
    report = small_report()
    unknown = replace(
        report.students[0].entries[0], values=report.students[0].entries[0].values | {"new_score": value(12.345678, 23.456789)}
    )
    report = replace(report, students=(replace(report.students[0], entries=(unknown,)),))
    markdown, page = write_markdown(report, tmp_path).read_text(), Page(render(report))
    for found in report.entries:
        for name, metric in found.values.items():
            assert re.search(rf"\| {found.model} \| {found.steps} \| {name} \| {metric.mean:.6g} \| .* \| {metric.samples} \|", markdown)
            for number in (metric.mean, metric.std, *metric.per_seed.values()):
                assert f"{number:.6g}" in page.cells and f" {number:.6g} |" in markdown
            shown = metric_named(name).plus_minus(metric.mean, metric.std)
            assert any(cell.startswith(shown) for cell in page.cells) and f"| {shown}" in markdown
    assert "new score" in page.text and "17.9 ± 7.857" in page.text


def test_each_number_has_its_samples_and_each_metric_its_direction_and_meaning() -> None:
    page = Page(render(small_report()))
    assert (
        "Fréchet distance\N{NO-BREAK SPACE}↓5,000 × 3" in page.cells and "within-class spread\N{NO-BREAK SPACE}→ 15,000 × 3" in page.cells
    )
    assert f"Fréchet distance\N{NO-BREAK SPACE}↓{DISTANCE.meaning} Lower is better." in "".join(page.texts)
    report = small_report()
    fewer = replace(report.students[0].entries[0], values=report.students[0].entries[0].values | {"recall": value(0.9, 0.91, samples=100)})
    more = replace(report.teacher.entries[1], values=report.teacher.entries[1].values | {"recall": value(0.8, 0.81)})
    teacher, student = replace(report.teacher, entries=(more,)), replace(report.students[0], entries=(fewer,))
    mixed = Page(render(replace(report, teacher=teacher, students=(student,))))
    assert (
        "recall\N{NO-BREAK SPACE}↑" in mixed.cells
        and "0.905 ± 0.007better100 × 2" in mixed.cells
        and "0.805 ± 0.007reference5,000 × 2" in mixed.cells
    )
    assert all(metric.meaning.endswith(".") and metric.direction for metric in METRICS)


def test_hostile_names_stay_text_in_html() -> None:
    image = flat(200)
    prompt = ScoredPrompt(HOSTILE, 7, (20.0, 21.0, 22.0), (image,) * 3)
    report = pictured(small_report(HOSTILE, worst_prompts=(prompt,), failures=(HOSTILE,), commit=HOSTILE), [HOSTILE] * 2)
    report = replace(report, protocol={HOSTILE: HOSTILE}, versions=HOSTILE, teacher=replace(report.teacher, label=HOSTILE, about=HOSTILE))
    plain_page, page = Page(render(pictured(small_report(), ["0", "1"]))), Page(render(report))
    added = {"p", "section", "figure", "figcaption", "img", "h2", "h3", "small", "ol", "li", "div", "dt", "dd"}
    assert {tag for tag, _ in page.elements} - {tag for tag, _ in plain_page.elements} <= added
    assert not page.all("script") and not page.all("a") and all("onerror" not in attributes for _, attributes in page.elements)
    assert page.text.count("<script>alert('x')</script>") >= 10
    assert any(attributes.get("alt", "").startswith(HOSTILE) for attributes in page.all("img"))


def test_hostile_names_stay_text_in_markdown(tmp_path: Path) -> None:
    report = pictured(small_report(HOSTILE, failures=(HOSTILE,), commit=HOSTILE), [HOSTILE] * 2)
    markdown = write_markdown(report, tmp_path).read_text()
    outside = re.sub(r"^(```+)\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<(script|img)", outside) and "](http" not in outside.replace(r"\](", "")
    assert not re.search(r"^# c", outside, re.MULTILINE)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith(f"| {plain(HOSTILE)} | 2 |")}
    assert len(widths) == 2  # the table of measurements and that of all numbers: no name adds a column
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*")) and {path.suffix for path in tmp_path.iterdir()} == {".md", ".png"}


def test_markdown_text_and_code() -> None:
    assert plain("a|b\n<c> [d](e) `f` *g* snake_case _h_") == r"a\|b \<c\> \[d\](e) \`f\` \*g\* snake_case \_h\_"
    assert fenced("x ``` y") == ["````", "x ``` y", "````"] and fenced("x")[0] == "```"


def test_html_needs_nothing_from_elsewhere() -> None:
    prompt = ScoredPrompt("a lighthouse", 7, (20.0, 21.0, 22.0), (flat(1, 600),) * 3)
    html = render(pictured(small_report(best_prompts=(prompt,)), ["0", "1", "2"]))
    page = Page(html)
    sources = [
        attributes[name] for _, attributes in page.elements for name in ("src", "srcset", "href", "data", "poster") if name in attributes
    ]
    assert len(sources) == 2 * 2 + 3 * 3 + 3  # two plots in two colours, the grid, one prompt
    assert all(re.fullmatch(r"data:image/(png|jpeg|svg\+xml);base64,[A-Za-z0-9+/=]+", source) for source in sources)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in html and "url(" not in html
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for source in sources:
        if source.startswith("data:image/svg"):
            assert not re.search(rb"(href|src)=\"(?!#)|<script|url\((?!#)", decoded(source))


def test_columns_show_each_models_image_of_the_same_seed(tmp_path: Path) -> None:
    report = pictured(small_report(), ["zero", "one", "a third caption"])
    images = [image for image in Page(render(report)).all("img") if "seed" in image.get("title", "")]
    assert [image["title"] for image in images] == ["zero, seed 100", "one, seed 101", "a third caption, seed 102"] * 3
    for i, image in enumerate(images):
        assert Image.open(io.BytesIO(decoded(image["src"]))).convert("RGB").getpixel((3, 3)) == (40 * (i // 3) + i % 3, 10, 20)
        assert image["alt"].startswith(report.entries[i // 3].name)
    assert report_text.column_titles(report) == ["1", "2", "3"] and "3. a third caption" in write_markdown(report, tmp_path).read_text()
    with Image.open(tmp_path / "samples.png") as picture:
        colours = [[picture.getpixel((4 + 52 * column + 24, 20 + 72 * row + 20 + 24))[0] for column in range(3)] for row in range(3)]
    assert colours == [[40 * row + column for column in range(3)] for row in range(3)]


def test_large_images_are_reduced() -> None:
    prompt = ScoredPrompt("a lighthouse", 7, (20.0, 21.5, 22.25), (flat(200, 600),) * 3)
    page = Page(render(small_report(worst_prompts=(prompt,))))
    shot = next(image for image in page.all("img") if image["alt"] == "student, 2 steps: a lighthouse")
    picture = Image.open(io.BytesIO(decoded(shot["src"])))
    assert picture.format == "JPEG" and picture.size == (256, 256) and abs(picture.getpixel((9, 9))[0] - 200) <= 3
    assert "teacher, 8 steps: 21.50" in page.text and "student, 2 steps: 22.25" in page.text and "Worst prompts" in page.text


def test_a_page_fits_narrow_screens_and_both_colour_schemes() -> None:
    html = render(small_report())
    page = Page(html)
    assert any(meta.get("content") == "width=device-width, initial-scale=1" for meta in page.all("meta"))
    tables, scrolling = page.all("table"), [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(tables) == len(scrolling) == 2
    light, dark = re.search(r"srcset=\"(.*?)\"", html), re.search(r"<img src=\"(.*?)\"", html)
    assert light is not None and dark is not None and decoded(light[1]) != decoded(dark[1])
    assert "prefers-color-scheme: dark" in html and re.search(r"\.scroll \{ overflow-x: auto", html)


def test_reading_a_result(tmp_path: Path) -> None:
    metric: dict[str, Any] = {"mean": 2.0, "std": 0.5, "samples": 40, "per_seed": {"0": 1.5, "1": 2.5}}
    result = {"num_inference_steps": None, "metrics": {"network_evaluations_per_image": metric}}
    result["environment"] = {"device": "cpu (x86_64)", "cpu_threads": 1, "batch_size": 250}
    read = entry_from(result, "m", tmp_path)
    assert read.steps == 2 and read.values["network_evaluations_per_image"] == Value(2.0, 0.5, 40, {"0": 1.5, "1": 2.5})
    assert read.environment == "cpu (x86_64), 1 CPU thread(s), batches of 250"
    (tmp_path / "distillation.json").write_text(json.dumps({"samplers": [{"timesteps": [999, 749, 499, 249]}, {"timesteps": [999]}]}))
    assert entry_from(result, "m", tmp_path).steps == 4 and entry_from(result | {"num_inference_steps": 8}, "m", tmp_path).steps == 8
    known = metric | {"std": None, "error_per_seed": {"0": 0.1, "1": 0.3}, "feature_network": {"name": "clip", "sha256": "abc" * 20}}
    assert value_from(known) == Value(2.0, None, 40, metric["per_seed"], pytest.approx(0.2), "clip (SHA-256 abcabcabcabc)")
    assert value_from(known).uncertainty == pytest.approx(0.2) and value_from(metric).uncertainty == 0.5


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.5), (0.0005, 40.0), (-0.01, 0.2)])
def test_plots_have_labels_whatever_the_range(low: float, high: float) -> None:
    curves = [Curve("a $x$", [Point(1, 0.5, high), Point(8, 4.0, low, 0.1, 0.001)]), Curve("b", [Point(1, 0.4, low)])]
    figure = quality_plot(curves, "ms", "d")
    assert as_svg(figure) == as_svg(quality_plot(curves, "ms", "d"))
    (axes,) = figure.axes
    limits = axes.get_ylim()
    labels = [tick.get_text() for tick in axes.get_yticklabels() if limits[0] <= tick.get_position()[1] <= limits[1]]
    assert 2 <= len([label for label in labels if label]) <= 10
    assert [text.get_text() for text in axes.texts] == ["1", "8", "1"]


def test_grid_shows_each_image_enlarged_in_its_column(tmp_path: Path) -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[1, 0, 0, 0], images[2] = 1, 0.5  # second column's top-left pixel, first column of the second row
    save_grid(images, ["a", "b"], tmp_path / "grid.png")
    picture = Image.open(tmp_path / "grid.png").convert("L")
    assert picture.size == (4 + 2 * 52, 20 + 2 * 52)
    assert picture.getpixel((56, 20)) == 255 and picture.getpixel((61, 25)) == 255 and picture.getpixel((62, 20)) == 0
    assert picture.getpixel((30, 90)) == 128
    assert len(picture.crop((0, 0, 108, 20)).getcolors()) > 2  # the titles
    assert grid([flat(9, 100)] * 2, ["a"], ["x", "y"]).size == (4 + 104, 20 + 2 * 124)
