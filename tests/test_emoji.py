"""The text-to-image test-bed: pictures and captions, the parts of its training, the pipeline and the judge that the repository keeps."""

import hashlib
import json
import random
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT / "train")]

import emoji_assets
import emoji_clip
import emoji_data
import emoji_flow
import emoji_training
from common.command_line import InputError
from common.measurement import collect
from common.processes import Team
from emoji_accuracy import EmojiAccuracyConfig, emoji_accuracy, words_of
from emoji_clip import ClipSize, ClipTraining, new_clip, tokens_of, word_tokenizer
from emoji_data import BACKGROUNDS, COLOURS, FONT, OBJECTS, Triple, draw, split, triples
from emoji_judge import judge
from emoji_table import markdown, reference_of
from emoji_training import CaptionedImages, Recipe, optimise
from emoji_transformer import FlowTraining, LastTextTokenRepeated, new_pipeline, new_transformer
from emoji_vae import fold_whitening, new_autoencoder

from diffusion_distill.families import family_of

ASSETS = ROOT / "assets"
with_font = pytest.mark.skipif(not Path(FONT).is_file(), reason="Noto Color Emoji is not installed (fonts-noto-color-emoji)")


def pose(seed: int = 0) -> random.Random:
    return random.Random(seed)


def test_captions_name_every_visible_triple_once():
    every = triples()
    assert len({triple.caption for triple in every}) == len(every) == 20 * (8 * 6 - 4)  # red, green, blue and white are also backgrounds
    assert all(words_of(triple.caption) == triple._asdict() for triple in every)
    assert Triple("cat", "orange", "gray").caption == "an orange cat on a gray background"


def test_held_out_triples_are_new_and_each_two_of_their_words_are_not():
    train, held_out = split(0.12, 0)
    assert sorted(train + held_out) == sorted(triples()) and not set(train) & set(held_out)
    assert len(held_out) == round(0.12 * len(triples()))
    assert split(0.12, 1) != (train, held_out) == split(0.12, 0)
    train, held_out = split(0.45, 0)  # where chance alone would hold back all triples of some pair
    seen = Counter(pair for triple in train for pair in combinations(triple._asdict().items(), 2))
    assert all(seen[pair] >= 2 for triple in held_out for pair in combinations(triple._asdict().items(), 2))


@with_font
def test_a_picture_shows_its_caption_and_depends_on_the_pose_alone():
    triple = Triple("heart", "red", "black")
    image = np.asarray(draw(triple, pose()))
    assert image.shape == (32, 32, 3) and (image == np.asarray(draw(triple, pose()))).all()
    assert (image != np.asarray(draw(triple, pose(1)))).any()
    rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert np.median(rim, 0) == pytest.approx(BACKGROUNDS["black"])
    nearest = {name: np.abs(image.astype(int) - colour).sum(2).min() for name, colour in COLOURS.items()}
    assert min(nearest, key=nearest.get) == "red"  # some pixel has the pure colour


@with_font
def test_data_on_disk_are_the_same_bytes_again(tmp_path: Path):
    chosen = split(0.12, 0)[1][:3]
    for name in ("a", "b"):
        emoji_data.write_split(tmp_path / name, chosen, emoji_data.EmojiData(poses=2))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 6 + 2 and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    images = emoji_training.read_split(tmp_path / "a")
    assert images.captions == 2 * [triple.caption for triple in chosen] and images.pixels.shape == (6, 3, 32, 32)
    assert images.batch([0]).abs().max() <= 1 and (images.pixels[:3] != images.pixels[3:]).flatten(1).any(1).all()


def test_every_word_of_a_caption_is_one_token():
    captions = [triple.caption for triple in triples()]
    tokenizer = word_tokenizer(captions)
    for caption in captions[::17]:
        assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
    assert tokenizer.decode(tokens_of(tokenizer, ["a zebra"])[0], skip_special_tokens=True).strip() == "a zebra"


def test_training_stopped_in_between_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emoji_training, "SAVE_EVERY", 0.0)
    data = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))

    def run(path: Path, stop: int) -> nn.Module:
        torch.manual_seed(1)
        network, calls = nn.Linear(3, 3), iter(range(stop))

        def loss(index: list[int], generator: torch.Generator) -> torch.Tensor:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return F.mse_loss(network(data[index] + torch.randn(4, 3, generator=generator)), data[index])

        optimise(network, loss, len(data), Recipe(8, 4, 0.1, 0.9), path)
        return network

    whole = run(tmp_path / "whole.safetensors", 100)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts.safetensors", 5)
    resumed = run(tmp_path / "parts.safetensors", 3)
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)


@torch.no_grad()
def test_folded_whitening_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(0)
    vae = new_autoencoder().eval()
    images = torch.randn(4, 3, 32, 32)
    before = vae.encode(images).latent_dist
    drawn = vae.decode(before.mean).sample
    fold_whitening(vae, before.mean)
    after = vae.encode(images).latent_dist
    assert after.mean.mean((0, 2, 3)) == pytest.approx(np.zeros(4), abs=1e-5) and after.mean.std((0, 2, 3)) == pytest.approx(np.ones(4))
    torch.testing.assert_close(after.std, before.std / before.mean.std((0, 2, 3))[:, None, None])
    torch.testing.assert_close(vae.decode(after.mean).sample, drawn, atol=1e-5, rtol=1e-4)


def test_the_contrastive_loss_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(emoji_clip, "degrade", lambda pixels, generator: pixels)
    rows = [{"text": triple.caption, **triple._asdict()} for triple in triples()[:5]]
    images = CaptionedImages(torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8), rows)
    tokenizer = word_tokenizer(images.captions)
    training = ClipTraining(new_clip(tokenizer, ClipSize(16, 1, 1, 8, 8)), tokenizer, images)
    for head in training.heads:
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)  # an undecided head costs the logarithm of its classes
    index = [4, 0, 2]
    tokens = tokens_of(tokenizer, [images.captions[i] for i in index])
    expected = training.clip(pixel_values=images.batch(index), input_ids=tokens, return_loss=True).loss.item()
    expected += sum(np.log(head.out_features) for head in training.heads) / 3
    assert training.loss(index, torch.Generator()).item() == pytest.approx(expected, abs=1e-5)


def small_flow() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    pipe = new_pipeline(StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-stable-diffusion"), new_transformer(96, layers=2, heads=2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_images(count: int) -> CaptionedImages:
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return CaptionedImages(pixels, [{"text": triple.caption, **triple._asdict()} for triple in triples()[:count]])


@torch.no_grad()
def test_one_weighted_text_token_is_the_stock_transformer_with_256_of_them():
    pipe = small_flow()
    for weight in pipe.transformer.parameters():
        weight += 0.05 * torch.randn_like(weight)
    cond = family_of(pipe).encode_conditions(pipe, ["a red cat on a blue background", ""])
    assert cond["prompt_embeds"].shape == (2, 16 + 256, 2 * 96) and not cond["prompt_embeds"][:, 16:].any()
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "pooled_projections": cond["pooled"], "timestep": torch.tensor([300.0, 900.0])}
    stock = pipe.transformer(encoder_hidden_states=cond["prompt_embeds"], **inputs).sample
    with LastTextTokenRepeated(256):
        short = pipe.transformer(encoder_hidden_states=cond["prompt_embeds"][:, :17], **inputs).sample
    torch.testing.assert_close(short, stock, atol=1e-5, rtol=1e-5)
    unweighted = pipe.transformer(encoder_hidden_states=cond["prompt_embeds"][:, :17], **inputs).sample
    assert (unweighted - stock).abs().max() > 100 * (short - stock).abs().max()


def test_the_flow_is_that_of_the_pipelines_scheduler():
    pipe, images, seen = small_flow(), noise_images(8), {}
    training = FlowTraining(pipe, images)
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    loss = training.loss(list(range(8)), torch.Generator().manual_seed(0))
    sigma = seen["timestep"][:, None, None, None] / 1000
    eps = (seen["hidden_states"] - (1 - sigma) * training.latents) / sigma
    assert eps.std() == pytest.approx(1, abs=0.1) and (sigma > 0).all() and (sigma < 1).all()
    assert loss.item() == pytest.approx((eps - training.latents).square().mean().item(), rel=1e-4)  # the untrained output is zero
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(8)
    x_t = eps
    for t, s in zip(scheduler.timesteps, [*scheduler.timesteps[1:], torch.tensor(0.0)], strict=True):
        torch.testing.assert_close(training.schedule.add_noise(training.latents, eps, t.expand(8)), x_t, atol=1e-4, rtol=1e-4)
        x_t = scheduler.step(eps - training.latents, t, x_t).prev_sample
        torch.testing.assert_close(training.schedule.add_noise(training.latents, eps, s.expand(8)), x_t, atol=1e-4, rtol=1e-4)


def test_the_flow_transformer_learns_and_a_tenth_of_the_captions_is_dropped(tmp_path: Path):
    pipe, images, texts = small_flow(), noise_images(2), []
    training = FlowTraining(pipe, images)
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: texts.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    before = training.loss([0, 1] * 256, torch.Generator().manual_seed(0)).item()
    handle.remove()
    dropped = [torch.equal(text, training.cond["prompt_embeds"][0]) for text in texts[0]]  # row 0 is ""
    assert 0.05 < np.mean(dropped) < 0.15
    step = lambda index, generator: training.loss(index * 16, generator)  # noqa: E731
    optimise(pipe.transformer, step, 2, Recipe(80, 2, 3e-3, 0.9), tmp_path / "transformer.safetensors")
    assert training.loss([0, 1] * 256, torch.Generator().manual_seed(0)).item() < 0.5 * before


def test_the_flow_pipeline_is_packed_and_plain_diffusers_draws_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("train", "held_out"):
        images = noise_images(3)
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [row | {"file_name": f"{i}.png"} for i, row in enumerate(images.rows)]
        for row, pixels in zip(rows, images.pixels, strict=True):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "data" / name / row["file_name"])
        (tmp_path / "data" / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"data_dir": tmp_path / "data", "parts": ASSETS / "emoji-stable-diffusion", "output_dir": tmp_path / "flow", "steps": 2}
    monkeypatch.setattr(sys, "argv", ["emoji_flow.py", *(f"--{name}={value}" for name, value in flags.items())])
    emoji_flow.main()
    monkeypatch.setattr(sys, "argv", ["emoji_assets.py", f"--flow_dir={tmp_path / 'flow'}", f"--output_dir={tmp_path / 'assets'}"])
    emoji_assets.main()
    packed = tmp_path / "assets" / "emoji-stable-diffusion-3"
    assert set(json.loads((packed / "training.json").read_text())["flow"]) == {"cpu_seconds", "loss_held_out"}
    assert json.loads((packed / "sha256.json").read_text()) == emoji_assets.hashes(packed)
    assert (packed / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size <= 5e6
    weights = "diffusion_pytorch_model.safetensors"  # the same bytes, which Git keeps once
    assert (packed / "vae" / weights).read_bytes() == (ASSETS / "emoji-stable-diffusion" / "vae" / weights).read_bytes()
    pipe = DiffusionPipeline.from_pretrained(packed)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusion3Pipeline and pipe.text_encoder_2.dtype == torch.float32
    drawn = pipe(["a red cat on a blue background"] * 2, num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert drawn.shape == (2, 32, 32, 3) and np.isfinite(drawn).all()


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ASSETS.glob("*/sha256.json")))
def test_assets_are_the_files_that_were_recorded(name: str):
    recorded = json.loads((ASSETS / name / "sha256.json").read_text())
    found = {str(p.relative_to(ASSETS / name)): p for p in (ASSETS / name).rglob("*") if p.is_file() and p.suffix != ".md"}
    found.pop("sha256.json")
    assert {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in found.items()} == recorded


def test_plain_diffusers_draws_what_the_judge_reads():
    pipe = DiffusionPipeline.from_pretrained(ASSETS / "emoji-stable-diffusion")
    assert type(pipe) is StableDiffusionPipeline and pipe.text_encoder.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    asked = [Triple("heart", "red", "white"), Triple("star", "yellow", "blue"), Triple("umbrella", "green", "black")] * 4
    generators = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    call = {"num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "pt", "generator": generators}
    read = judge().read(judge().features(pipe([each.caption for each in asked], **call).images))
    for name, share in (("object", 0.5), ("colour", 0.8), ("background", 0.9)):
        assert np.mean([word == getattr(each, name) for word, each in zip(read[name], asked, strict=True)]) >= share


@with_font
def test_the_judge_reads_real_pictures(tmp_path: Path):
    chosen = [Triple(o, c, b) for o, (c, b) in zip(OBJECTS, [("red", "black"), ("blue", "white"), ("yellow", "green")] * 7, strict=False)]
    emoji_data.write_split(tmp_path / "real", chosen, emoji_data.EmojiData(poses=3, seed=99))
    config = EmojiAccuracyConfig(folder=tmp_path / "real", cache_dir=tmp_path / "cache")
    estimates = emoji_accuracy(collect(config, Team()), config)
    assert {name: round(each.value, 1) for name, each in estimates.items()} == {
        "object_accuracy": 1.0,
        "colour_accuracy": 1.0,
        "background_accuracy": 1.0,
        "all_accuracy": 1.0,
    }
    lines = (tmp_path / "real" / "metadata.jsonl").read_text().splitlines()
    wrong = [json.loads(line) | {"text": f"a pink moon on a {json.loads(line)['background']} background"} for line in lines]
    (tmp_path / "real" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    estimates = emoji_accuracy(collect(config, Team()), config)
    assert (
        estimates["background_accuracy"].value > 0.9 and estimates["colour_accuracy"].value < 0.1 and estimates["all_accuracy"].value == 0
    )


@pytest.mark.parametrize("prompt", ["two cats", "a red cat on a blue background, at night"])
def test_a_prompt_of_another_form_is_refused(prompt: str):
    with pytest.raises(InputError, match="COLOUR OBJECT"):
        words_of(prompt)


def test_the_teachers_reference_is_its_best_distance_over_enough_steps():
    others = {"clip_score": 50.0, "object_accuracy": 0.5, "colour_accuracy": 0.5, "background_accuracy": 0.5, "all_accuracy": 0.25}
    distances = [("teacher", 4, 1.0), ("teacher", 8, 4.0), ("teacher", 16, 2.0), ("student", 1, 3.0)]
    found = [{"split": "train", "model": m, "steps": s, "frechet_distance": d, **others} for m, s, d in distances]
    assert reference_of(found, "teacher", "train")["steps"] == 16
    assert "| train | student | 1 | 3.00 | 1.50 | 50.0 | 0.500 | 0.500 | 0.500 | 0.250 |" in markdown(found, "teacher")


def test_images_of_a_folder_without_captions_are_refused(tmp_path: Path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    config = EmojiAccuracyConfig(folder=tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="prompts"):
        emoji_accuracy(collect(config, Team()), config)
