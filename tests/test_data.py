"""Data sources on real files, the order of samples, and every error line."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_distill.batches import GlobalBatchSampler, batches, micro_batches
from diffusion_distill.data import ConditionDataset, DataConfig, build_dataset, load_image
from diffusion_distill.errors import InputError


def save_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 8), seed: int = 0) -> np.ndarray:
    """A smooth random picture; returns its RGB pixels (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path)
    return np.array(image)


def metadata(folder: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def build(config: DataConfig, needs_images: bool = True, channels: int | None = 3, resolution: int | None = 8, **kwargs: Any) -> Any:
    return build_dataset(config, needs_images=needs_images, channels=channels, resolution=resolution, **kwargs)


def message(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("given", "named"),
    [({}, "none"), ({"train_data_dir": "x", "num_classes": 3}, "train_data_dir and num_classes"), ({"train_data_dir": ""}, "none")],
)
def test_exactly_one_source(given, named):
    fields = "train_data_dir, prompts_file, dataset, num_classes, pairs_dir, cache_dir"
    line = f"{fields}: got {named}; exactly one of the six says what to train on"
    assert message(lambda: DataConfig(**given)) == line


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"num_classes": 0}, "num_classes: got 0; 1 or more"),
        ({"dataset": "digits", "resolution": 0}, "resolution: got 0; 1 or more"),
        ({"dataset": "digits", "dataloader_num_workers": -1}, "dataloader_num_workers: got -1; 0 or more"),
        ({"dataset": "digits", "caption_column": ""}, "caption_column: got ''; a key of metadata.jsonl"),
    ],
)
def test_settings_out_of_range(given, line):
    assert message(lambda: DataConfig(**given)) == line


def test_class_folders_give_labels_in_sorted_order(tmp_path):
    pixels = {name: save_image(tmp_path / name, seed=i) for i, name in enumerate(("cat/b.png", "cat/a/c.png", "ant/z.PNG"))}
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    data = build(DataConfig(train_data_dir=str(tmp_path)))
    assert [data[i]["condition"] for i in range(len(data))] == [0, 1, 1]
    for item, name in zip((data[i] for i in range(3)), ("ant/z.PNG", "cat/a/c.png", "cat/b.png")):
        assert item["image"].dtype == torch.float32
        assert torch.equal(item["image"], torch.from_numpy(pixels[name]).permute(2, 0, 1) / 127.5 - 1)


def test_captions_and_labels_from_metadata(tmp_path):
    save_image(tmp_path / "sub" / "a.png")
    metadata(tmp_path, {"file_name": "sub/a.png", "text": "ein Fuß", "label": 3}, "", {"file_name": "sub/../sub/a.png", "text": ""})
    data = build(DataConfig(train_data_dir=str(tmp_path)))
    assert data.conditions == ["ein Fuß", ""] and data[1]["image"].shape == (3, 8, 8)
    metadata(tmp_path, {"file_name": "sub/a.png", "caption": "a foot"})
    assert build(DataConfig(train_data_dir=str(tmp_path), caption_column="caption")).conditions == ["a foot"]
    metadata(tmp_path, {"file_name": "sub/a.png", "label": 2}, {"file_name": "sub/a.png", "label": 0})
    assert build(DataConfig(train_data_dir=str(tmp_path)), num_classes=3).conditions == [2, 0]


def test_without_images_none_is_opened(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    assert build(DataConfig(train_data_dir=str(tmp_path)), needs_images=False, channels=None, resolution=None)[0] == {"condition": 0}
    metadata(tmp_path, {"file_name": "nowhere.png", "text": "a cat"})
    assert build(DataConfig(train_data_dir=str(tmp_path)), needs_images=False)[0] == {"condition": "a cat"}


def test_prompts_one_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat \r\n\n  \na dog, \u2028 sitting".encode())
    data = build(DataConfig(prompts_file=str(path)), needs_images=False)
    assert [data[i] for i in range(len(data))] == [{"condition": "a cat"}, {"condition": "a dog, \u2028 sitting"}]


def test_class_labels_without_data():
    data = build(DataConfig(num_classes=3), needs_images=False, num_classes=10)
    assert [data[i] for i in range(len(data))] == [{"condition": i} for i in range(3)]


def test_digits_are_the_stratified_training_split():
    from sklearn.datasets import load_digits

    data = build(DataConfig(dataset="digits"), channels=1)
    everything = {(image / 8 - 1).astype(np.float32).tobytes(): label for image, label in zip(*load_digits(return_X_y=True))}
    items = [data[i] for i in range(len(data))]
    assert len(items) == 1297 and items[0]["image"].shape == (1, 8, 8)
    assert all(everything[item["image"].numpy().tobytes()] == item["condition"] for item in items)
    assert len({item["image"].numpy().tobytes() for item in items}) == 1297
    counts = np.bincount([item["condition"] for item in items])
    assert (np.abs(counts - np.bincount(list(everything.values())) * 1297 / 1797) < 1).all()
    assert torch.equal(build(DataConfig(dataset="digits"))[5]["image"], items[5]["image"].expand(3, -1, -1))
    assert build(DataConfig(dataset="digits"), needs_images=False, channels=None, resolution=512)[5] == {"condition": items[5]["condition"]}


def test_digits_without_scikit_learn(monkeypatch):
    for name in ("sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    line = "dataset: got 'digits'; it needs scikit-learn: pip install 'diffusion-distill[demo]'"
    assert message(lambda: build(DataConfig(dataset="digits"))) == line


@pytest.mark.parametrize("needs", ["prompts_file", "num_classes"])
def test_a_source_without_images_where_images_are_needed(needs):
    config = DataConfig(prompts_file="p.txt") if needs == "prompts_file" else DataConfig(num_classes=2)
    line = f"{needs}: it holds no images; give train_data_dir (or dataset), or choose settings that need no images"
    assert message(lambda: build(config)) == line


@pytest.mark.parametrize(
    ("kwargs", "line"),
    [
        ({"channels": 4}, "channels: got 4; the teacher's images must have 1 channel (grey) or 3 (RGB)"),
        ({"channels": None}, "channels: got None; the teacher's images must have 1 channel (grey) or 3 (RGB)"),
        ({"resolution": None}, "resolution: got None; the side of the training images in pixels; the teacher does not say it"),
        ({"resolution": 16}, "resolution: got 16; digits are 8x8 pixels"),
        ({"num_classes": 9}, "dataset: got 10 classes; the teacher knows 9"),
    ],
)
def test_data_that_the_teacher_cannot_use(kwargs, line):
    assert message(lambda: build(DataConfig(dataset="digits"), **kwargs)) == line


# ---------------------------------------------------------------------- broken sources


def test_missing_and_empty_sources(tmp_path):
    folder, prompts = tmp_path / "folder", tmp_path / "prompts.txt"
    assert message(lambda: build(DataConfig(train_data_dir=str(folder)))) == f"train_data_dir: got '{folder}'; an existing folder"
    folder.mkdir()
    accepted = "a folder with a metadata.jsonl, or with nothing but one sub-folder of images a class"
    assert message(lambda: build(DataConfig(train_data_dir=str(folder)))) == f"train_data_dir: got '{folder}'; {accepted}"
    save_image(folder / "cat" / "a.png")
    (folder / "dog").mkdir()
    assert message(lambda: build(DataConfig(train_data_dir=str(folder)))).startswith(f"train_data_dir: got '{folder}/dog'; a class needs")
    save_image(folder / "stray.png")
    assert message(lambda: build(DataConfig(train_data_dir=str(folder)))) == f"train_data_dir: got '{folder}'; {accepted}"
    metadata(folder, "", " ")
    found = message(lambda: build(DataConfig(train_data_dir=str(folder))))
    assert found == f"train_data_dir: got '{folder}/metadata.jsonl'; at least one line that is not blank"
    config = DataConfig(prompts_file=str(prompts))
    assert str(prompts) in message(lambda: build(config, needs_images=False)) and not prompts.exists()
    prompts.write_text("\n \n")
    assert message(lambda: build(config, needs_images=False)) == f"prompts_file: got '{prompts}'; at least one line that is not blank"
    prompts.write_bytes(b"\xff\xff")
    assert message(lambda: build(config, needs_images=False)).startswith(f"prompts_file: got '{prompts}'; a readable text file in UTF-8 (")


def test_more_classes_than_the_teacher_knows(tmp_path):
    for name in "abc":
        save_image(tmp_path / name / "x.png")
    line = "train_data_dir: got 3 classes; the teacher knows 2"
    assert message(lambda: build(DataConfig(train_data_dir=str(tmp_path)), num_classes=2)) == line
    line = "num_classes: got 3 classes; the teacher knows 2"
    assert message(lambda: build(DataConfig(num_classes=3), needs_images=False, num_classes=2)) == line


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("{", ": got '{'; a JSON object on each line"),
        ([1], ": got '[1]'; a JSON object on each line"),
        ({"file_name": "a.png"}, ": text: got None; a caption as text under 'text', or an integer 'label'"),
        ({"file_name": "a.png", "text": 3}, ": text: got 3; a caption as text under 'text', or an integer 'label'"),
        ({"file_name": "a.png", "label": 1}, ": got 1 after 'first'; all lines have a caption, or all a label"),
        ({"text": "x"}, ": file_name: got None; the path of an image, relative to the folder"),
        ({"text": "x", "file_name": ""}, ": file_name: got ''; the path of an image, relative to the folder"),
        ({"text": "x", "file_name": "b.png"}, ": file_name: got 'b.png'; no such file in {folder}"),
        ({"text": "x", "file_name": "."}, ": file_name: got '.'; no such file in {folder}"),
        (
            {"text": "x", "file_name": "../out.png"},
            ": file_name: got '{folder}/../out.png'; a file inside {folder}; links out of the folder are not followed",
        ),
        (
            {"text": "x", "file_name": "/out.png"},
            ": file_name: got '/out.png'; a file inside {folder}; links out of the folder are not followed",
        ),
        (
            {"text": "x", "file_name": "link.png"},
            ": file_name: got '{folder}/link.png'; a file inside {folder}; links out of the folder are not followed",
        ),
    ],
)
def test_error_lines_of_metadata(tmp_path, row, line):
    folder = tmp_path.resolve() / "data"
    save_image(folder / "a.png")
    save_image(folder.parent / "out.png")
    os.symlink(folder.parent / "out.png", folder / "link.png")
    metadata(folder, {"file_name": "a.png", "text": "first"}, "", row)
    expected = f"{folder}/metadata.jsonl, line 3" + line.replace("{folder}", str(folder))
    assert message(lambda: build(DataConfig(train_data_dir=str(folder)))) == expected


@pytest.mark.parametrize(
    ("label", "num_classes", "accepted"),
    [(-1, None, "a whole number, 0 or more"), (True, None, "a whole number, 0 or more"), ("3", 10, "0 to 9"), (10, 10, "0 to 9")],
)
def test_labels_out_of_range(tmp_path, label, num_classes, accepted):
    save_image(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "label": label})
    found = message(lambda: build(DataConfig(train_data_dir=str(tmp_path)), num_classes=num_classes))
    assert found == f"{tmp_path}/metadata.jsonl, line 1: label: got {label!r}; {accepted}"


def test_a_link_out_of_a_class_folder(tmp_path):
    save_image(tmp_path / "out" / "secret.png")
    save_image(tmp_path / "data" / "cat" / "a.png")
    os.symlink("a.png", tmp_path / "data" / "cat" / "b.png")
    assert len(build(DataConfig(train_data_dir=str(tmp_path / "data")))) == 2
    os.symlink(tmp_path / "out", tmp_path / "data" / "dog")
    assert "links out of the folder are not followed" in message(lambda: build(DataConfig(train_data_dir=str(tmp_path / "data"))))


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize(("size", "box"), [((48, 24), (12, 0, 36, 24)), ((24, 60), (0, 18, 24, 42)), ((24, 24), (0, 0, 24, 24))])
def test_shorter_side_is_resized_and_the_centre_kept(tmp_path, size, box):
    pixels = torch.from_numpy(save_image(tmp_path / "a.png", size=size)).permute(2, 0, 1)[None].double()
    scaled = torch.nn.functional.interpolate(pixels, (size[1] // 3, size[0] // 3), mode="bicubic", antialias=True)
    left, top, right, bottom = (edge // 3 for edge in box)
    expected = scaled[0, :, top:bottom, left:right].clamp(0, 255) / 127.5 - 1
    image = load_image(tmp_path / "a.png", 3, 8)
    assert image.shape == (3, 8, 8) and image.is_contiguous()
    assert (image - expected).abs().max() < 2 / 127.5


def test_stretching_keeps_all_of_the_picture(tmp_path):
    pixels = torch.from_numpy(save_image(tmp_path / "a.png", size=(48, 24))).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(pixels, (8, 8), mode="bicubic", antialias=True)[0].clamp(0, 255) / 127.5 - 1
    assert (load_image(tmp_path / "a.png", 3, 8, center_crop=False) - expected).abs().max() < 2 / 127.5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_take_the_teachers_channels(tmp_path, mode, channels):
    save_image(tmp_path / "a.png", mode)
    stored = Image.open(tmp_path / "a.png").convert("RGB")
    expected = np.array(stored.convert("L"))[None] if channels == 1 else np.array(stored).transpose(2, 0, 1)
    image = load_image(tmp_path / "a.png", channels, 8)
    assert ((image + 1) * 127.5 - torch.from_numpy(expected)).abs().max() <= 1.001
    assert image.min() >= -1 and image.max() <= 1


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))  # white on top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees: white on the right
    image.save(tmp_path / "a.png", exif=exif)
    turned = load_image(tmp_path / "a.png", 1, 8)[0]
    assert (turned[:, 4:] == 1).all() and (turned[:, :4] == -1).all()


@pytest.mark.parametrize("size", [(3, 301), (301, 3), (1, 1), (49, 50), (93, 93)])
def test_odd_sizes_fill_the_square(tmp_path, size):
    Image.new("L", size, 255).save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png", 3, 8), torch.ones(3, 8, 8))


def test_unreadable_images_are_named_when_loaded(tmp_path, monkeypatch):
    save_image(tmp_path / "a" / "1good.png", size=(64, 64))
    whole = (tmp_path / "a" / "1good.png").read_bytes()
    (tmp_path / "a" / "2cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "3text.png").write_text("no image")
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "a" / "4deep.png")
    data = build(DataConfig(train_data_dir=str(tmp_path)))
    assert data[0]["image"].shape == (3, 8, 8)
    assert message(lambda: data[1]).startswith(f"{tmp_path}/a/2cut.png: not a readable image (")
    assert message(lambda: data[2]).startswith(f"{tmp_path}/a/3text.png: not a readable image (")
    assert message(lambda: data[3]).startswith(f"{tmp_path}/a/4deep.png: got 'I;16'; an image of 8 bits a channel")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert message(lambda: data[0]).startswith(f"{tmp_path}/a/1good.png: not a readable image (")


# ---------------------------------------------------------------------- order


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (3, 8), (8, 8), (1, 5)])
def test_epochs_are_permutations_and_steps_need_no_order(size, batch):
    sampler = GlobalBatchSampler(size, batch, seed=3)
    forward = [sampler.indices(step) for step in range(size * 2)]
    flat = [index for indices in forward for index in indices]
    epochs = [flat[i : i + size] for i in range(0, len(flat), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and len(epochs) == 2 * batch
    assert size < 3 or len({tuple(epoch) for epoch in epochs}) > 1
    other = GlobalBatchSampler(size, batch, seed=3)
    assert [other.indices(step) for step in reversed(range(size * 2))] == forward[::-1]
    assert size == 1 or any(GlobalBatchSampler(size, batch, seed=4).indices(step) != forward[step] for step in range(size * 2))


def test_a_huge_step_is_as_cheap_as_the_first():
    assert len(GlobalBatchSampler(1000, 8, seed=0).indices(10**12)) == 8


def test_the_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(steps_of(ConditionDataset(range(10)), 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("size", "batch", "field"), [(0, 4, "dataset_size"), (4, 0, "global_batch_size")])
def test_empty_batches_are_refused(size, batch, field):
    assert message(lambda: GlobalBatchSampler(size, batch, 0)) == f"{field}: got 0; 1 or more"


def test_slots_follow_accumulation_then_rank():
    share = micro_batches(list(range(100, 112)), rank=1, world_size=2, accumulation=3)
    assert share == [[(2, 102), (3, 103)], [(6, 106), (7, 107)], [(10, 110), (11, 111)]]
    line = "global batch size: got 8; a multiple of 3 processes x 1 micro-batches"
    assert message(lambda: micro_batches(range(8), 0, 3, 1)) == line
    assert message(lambda: steps_of(ConditionDataset(range(10)), 8, world_size=3)) == line


def steps_of(
    dataset: Any, batch: int, world_size: int = 1, accumulation: int = 1, rank: int = 0, start: int = 0, stop: int = 6, workers: int = 0
) -> Any:
    layout = {"rank": rank, "world_size": world_size, "accumulation": accumulation, "num_workers": workers}
    return batches(dataset, GlobalBatchSampler(len(dataset), batch, seed=7), start_step=start, stop_step=stop, **layout)


def by_slot(ranks: list[list[list[Any]]]) -> list[list[Any]]:
    """For each step the (slot, condition, image) of all ranks and micro-batches, in the order of the slots."""
    steps = []
    for step in zip(*ranks):
        micros = [micro for rank in step for micro in rank]
        rows = [row for m in micros for row in zip(m["slots"], m["condition"], m["image"].flatten(1).tolist(), strict=True)]
        steps.append(sorted(rows, key=lambda row: row[0]))
    return steps


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (2, 2), (1, 8)])
def test_the_layout_does_not_change_the_global_batch(world_size, accumulation):
    data = build(DataConfig(dataset="digits"), channels=1)
    whole = by_slot([list(steps_of(data, 8))])
    ranks = [list(steps_of(data, 8, world_size, accumulation, rank)) for rank in range(world_size)]
    assert all(len(step) == accumulation and len(m["slots"]) == 8 // world_size // accumulation for r in ranks for step in r for m in step)
    assert by_slot(ranks) == whole
    assert [row[0] for row in whole[0]] == list(range(8)) and len(whole) == 6


def test_worker_processes_and_resuming_keep_the_order(tmp_path):
    for i in range(5):
        save_image(tmp_path / "ab"[i % 2] / f"{i}.png", seed=i)
    data = build(DataConfig(train_data_dir=str(tmp_path)))
    here = by_slot([list(steps_of(data, 4, accumulation=2))])
    assert by_slot([list(steps_of(data, 4, accumulation=2, workers=1))]) == here
    assert by_slot([list(steps_of(data, 4, accumulation=2, start=4))]) == here[4:]
    assert list(steps_of(data, 4, start=6)) == []


def test_conditions_stay_a_list_and_images_may_be_absent():
    (step,) = steps_of(ConditionDataset(["a", "b"]), 4, accumulation=2, stop=1)
    assert [m["image"] for m in step] == [None, None] and [m["slots"] for m in step] == [[0, 1], [2, 3]]
    assert sorted(step[0]["condition"]) == sorted(step[1]["condition"]) == ["a", "b"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_from_any_process(tmp_path, workers):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_text("no image")
    data = build(DataConfig(train_data_dir=str(tmp_path)))
    assert message(lambda: next(steps_of(data, 1, workers=workers))).startswith(f"{tmp_path}/a/broken.png: not a readable image (")
