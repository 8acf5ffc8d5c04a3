"""Feature networks of real classes with random weights: against torch-fidelity, transformers and torchmetrics, and without weights."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fidelity_reference import fidelity
from PIL import Image
from tiny_pipelines.parts import TEXT_LENGTH, clip_tokenizer, seeded
from torch import Tensor
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from accuracy import AccuracyConfig, accuracy
from clip_score import ClipScoreConfig, clip_score
from common import inception, perceptual
from common.command_line import InputError
from common.extractors import load_extractor, resize_bicubic, resize_clean
from common.image_files import ImageSet, open_folder, write_jsonl
from common.measurement import Inputs
from common.metrics import frechet_distance
from common.processes import Team
from common.reference_data import digits
from common.set_features import set_features


def pictures(count: int = 3, height: int = 40, width: int = 56) -> Tensor:
    """Smooth random images, uint8 (count, 3, height, width)."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round().byte()


def save_pictures(folder: Path, images: Tensor, **columns: list[Any]) -> ImageSet:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    if columns:
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(images))]
        write_jsonl(folder / "prompts.jsonl", [{"file_name": f"{i:03d}.png"} | row for i, row in enumerate(rows)])
    return open_folder(folder)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / inception.WEIGHTS_FILE
    with seeded(0):
        network = inception.Inception()
        for name, tensor in network.state_dict().items():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(tensor)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(inception_weights: Path) -> None:
    reference = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    network = reference("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights))
    images = pictures(2)
    features, logits = network(images)
    extractor = load_extractor("inception", inception_weights)
    found = torch.from_numpy(extractor.features(list(images)))
    assert features.std() > 0.1
    torch.testing.assert_close(found, features, rtol=1e-5, atol=1e-5)
    assert extractor.classify is not None
    torch.testing.assert_close(extractor.classify(found), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 56), (299, 300), (500, 400)])
def test_resize_is_tensorflows(size: tuple[int, int]) -> None:
    interpolate = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    images = pictures(1, *size)
    expected = interpolate(images.float(), size=(299, 299), align_corners=False)[0]
    assert torch.equal(inception.resize_like_tensorflow(images[0]), expected)


@pytest.mark.parametrize("size", [(40, 56), (700, 500)])
def test_smoothing_resizes_are_torchs_antialiased_bicubic(size: tuple[int, int]) -> None:
    image = pictures(1, *size)
    expected = F.interpolate(image.double(), (299, 299), mode="bicubic", antialias=True)[0]
    assert (resize_clean(image[0], 299) - expected).abs().max() < 1e-2
    assert (resize_bicubic(image[0], 299) - expected.clamp(0, 255)).abs().max() < 1.1


def test_dinov2_is_the_class_token(tmp_path: Path) -> None:
    with seeded(0):
        model = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=28)).eval()
    model.save_pretrained(tmp_path)
    images = pictures(2, 224, 224)
    processor = BitImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    inputs = processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[:, 0]
    found = load_extractor("dinov2", tmp_path).features(list(images))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("weights") / "clip", clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH, **ends}
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with seeded(0):
        model = CLIPModel(
            CLIPConfig(text_config=text | shared, vision_config=shared | {"image_size": 32, "patch_size": 8}, projection_dim=12)
        )
    with torch.no_grad():
        model.visual_projection.weight.neg_()  # positive cosines
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_score_is_a_direct_computation(clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["a cat", "ten boats", "a prompt of far more letters than the text encoder reads"]
    images = save_pictures(tmp_path / "images", pictures(3), prompt=prompts)
    extractor = load_extractor("clip", clip_folder)
    features = set_features(images, extractor, tmp_path / "cache", Team())
    found = clip_score(Inputs(images, extractor, features), ClipScoreConfig(folder=images.folder))["clip_score"]

    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder, backend="pil")
    opened = [Image.open(images.path(i)) for i in range(3)]
    inputs = processor(text=prompts, images=opened, padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        cosines = (model(**inputs).logits_per_image / model.logit_scale.exp()).diagonal()
    assert cosines.min() > 0.1
    assert found.per_image == pytest.approx((100 * cosines.double()).tolist(), rel=1e-6)
    assert found.value == pytest.approx(100 * cosines.double().mean().item(), rel=1e-6)
    assert clip_score(Inputs(images, extractor, -features), ClipScoreConfig(folder=images.folder))["clip_score"].value == 0
    assert "1 of 3 prompts are longer than the 16 tokens" in caplog.text


def test_clip_score_needs_prompts_and_text(clip_folder: Path, tmp_path: Path) -> None:
    images = save_pictures(tmp_path, pictures(2))
    config, features = ClipScoreConfig(folder=tmp_path), torch.rand(2, 12)
    with pytest.raises(InputError, match=r"prompts: got None; .* needs a prompts.jsonl with a prompt for every image"):
        clip_score(Inputs(images, load_extractor("clip", clip_folder), features), config)
    with pytest.raises(InputError, match="features: got 'pixels'; clip: a network that reads images and text"):
        clip_score(Inputs(images, load_extractor("pixels"), features), config)


def test_lpips_is_torchmetricss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        trunk = perceptual.alexnet_trunk()
    torch.save(
        {f"features.{name}": w for name, w in trunk.state_dict().items()} | {"classifier.1.weight": torch.zeros(1)}, tmp_path / "alex.pth"
    )
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda name, pretrained: trunk)  # it would ask torchvision
    reference = torchmetrics_lpips._LPIPS(net="alex")
    images = pictures(2, 224, 224)
    with torch.no_grad():
        expected = reference(images[:1] / 127.5 - 1, images[1:] / 127.5 - 1).item()
    extractor = load_extractor("lpips", tmp_path / "alex.pth")
    first, second = torch.from_numpy(extractor.features(list(images))).double()
    assert extractor.distance == "squared" and (first - second).square().sum().item() == pytest.approx(expected, rel=1e-5)


def test_accuracy_by_a_transformers_classifier(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, num_labels=4
    )
    with seeded(0):
        model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "model")
    inputs = processor(images=[image.permute(1, 2, 0).numpy() for image in pictures(5)], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(1).tolist()
    labels = [*predicted[:4], (predicted[4] + 1) % 4]
    images = save_pictures(tmp_path / "images", pictures(5), label=labels)
    extractor = load_extractor("classifier", tmp_path / "model")
    settings = AccuracyConfig(folder=images.folder)
    features = set_features(images, extractor, tmp_path / "cache", Team())
    assert accuracy(Inputs(images, extractor, features), settings)["accuracy"].value == 0.8
    wrong = ImageSet(images.folder, images.files, labels=(*labels[:4], 9))
    with pytest.raises(InputError, match="labels: got '.* to 9'; the classifier knows 0 to 3"):
        accuracy(Inputs(wrong, extractor, features), settings)


def test_small_networks_read_the_digits_as_files(tmp_path: Path) -> None:
    data, extractor = digits(), load_extractor("digits")
    levels = (data.test_images * 255).round()
    images = save_pictures(tmp_path / "images", levels.byte().expand(-1, 3, -1, -1)[:100])
    found = set_features(images, extractor, tmp_path / "cache", Team())
    expected = extractor.network.features(levels[:100] / 255)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert frechet_distance(found, expected) < 1e-4
    with pytest.raises(InputError, match=r"image shape: got \(3, 40, 56\); feature network digits_classifier reads"):
        extractor.features([pictures(1)[0]])


OWN = """
import torch
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
    def forward(self, images):
        return self.scale * images.double().mean((2, 3))
def wrong():
    return torch.nn.Flatten(0)
"""


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    images = pictures(3)
    extractor = load_extractor(f"{tmp_path / 'own.py'}:Own")
    assert np.array_equal(extractor.features(list(images)), images.double().mean((2, 3)).numpy())
    (tmp_path / "own.py").write_text(OWN.replace("ones(1)", "zeros(1)"))
    assert load_extractor(f"{tmp_path / 'own.py'}:Own").sha256 != extractor.sha256
    with pytest.raises(InputError, match=r"must return \(3, D\)"):
        load_extractor(f"{tmp_path / 'own.py'}:wrong").features(list(images))
    with pytest.raises(InputError, match="image sizes: .*need images of one size"):
        load_extractor("pixels").features([images[0], pictures(1, 8, 8)[0]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", f"weights: no file .*{inception.WEIGHTS_FILE}; fetch https://.*--weights FILE; without them work: pixels, digits"),
        ("lpips", f"weights: no file .*{perceptual.WEIGHTS_FILE}; fetch https://"),
        ("dinov2", "weights: dinov2 needs facebook/dinov2-large, .*`hf download facebook/dinov2-large`.*without them work: pixels, digits"),
        ("clip", "weights: clip needs openai/clip-vit-large-patch14, .*or pass --weights FOLDER"),
        ("vgg", "features: got 'vgg'; accepted: inception, inception_clean, dinov2"),
        ("missing.py:Own", "features: got 'missing.py:Own'; FILE.py:NAME of a file that exists"),
    ],
)
def test_missing_networks_say_what_to_fetch(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=message):
        load_extractor(name)


def test_damaged_weights_are_named(inception_weights: Path, clip_folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(inception_weights.read_bytes()[:1000])
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for path in (cut, tmp_path / "other.pth"):
        with pytest.raises(InputError, match=f"weights: {path} holds no Inception weights .*{inception.WEIGHTS_FILE} is needed"):
            load_extractor("inception", path)
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(InputError, match="holds no whole CLIPModel"):
        load_extractor("clip", tmp_path / "clip")
    with pytest.raises(InputError, match="weights: got .*the folder of a transformers model"):
        load_extractor("clip", tmp_path)
    with pytest.raises(InputError, match="weights: got .*features 'digits' bring their own"):
        load_extractor("digits", cut)
