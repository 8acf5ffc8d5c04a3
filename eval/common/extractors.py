"""Feature networks for whole sets of images: Inception, DINOv2, CLIP, LPIPS, an image classifier, small networks, pixels, own modules.

Weights are read from this machine alone; where they are missing, the error says which file to fetch and where to put it.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import inception, perceptual
from common.command_line import InputError, reject
from common.feature_networks import FEATURE_NETWORKS, FeatureNetwork, load_feature_network
from common.image_files import file_sha256
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

DINOV2, CLIP, CLASSIFIER = "facebook/dinov2-large", "openai/clip-vit-large-patch14", "google/vit-base-patch16-224"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SIDE = 224
WITHOUT_WEIGHTS = f"without them work: pixels, {', '.join(FEATURE_NETWORKS)}, a .safetensors file with its .json, FILE.py:NAME"


@dataclass(frozen=True)
class Extractor:
    """A feature network with what turns an image file's pixels into its input."""

    name: str
    sha256: str  # of the weights (of the code, for a module of the user's own)
    preprocessing: str
    prepare: Callable[[Tensor], Tensor]  # uint8 (3, H, W) to one input row
    network: Callable[[Tensor], Tensor]  # inputs (B, ...) to features (B, D)
    classify: Callable[[Tensor], Tensor] | None = None  # features (B, D) to class logits
    device: str = "cpu"
    distance: Literal["cosine", "squared"] = "cosine"  # of two images' features, where how different they are is asked
    model: Any = None  # the transformers model, and where it came from, for those that read text too
    source: Path | None = None

    @torch.no_grad()
    def features(self, images: list[Tensor]) -> np.ndarray:
        """Features (B, D) of uint8 images (3, H, W), in the network's own precision.

        Raises:
            InputError: where the network cannot take the images, or gives no (B, D).
        """
        rows = [self.prepare(image) for image in images]
        if len({row.shape for row in rows}) > 1:
            raise reject("image sizes", sorted({tuple(row.shape) for row in rows}), f"features {self.name!r} need images of one size")
        found = self.network(torch.stack(rows).to(self.device))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            raise reject("features", getattr(found, "shape", type(found).__name__), f"{self.name} must return ({len(images)}, D)")
        return found.float().cpu().numpy() if found.dtype in (torch.bfloat16, torch.float16) else found.cpu().numpy()


def load_extractor(name: str, weights: Path | None = None, device: str = "cpu") -> Extractor:
    """The feature network called `name`, on `device`.

    Args:
        name: inception, inception_clean, dinov2, clip, lpips, classifier, pixels, a network of `feature_networks` by name or file, or
            FILE.py:NAME, whose NAME() is a module from uint8 (B, 3, H, W) to (B, D).
        weights: file (inception, lpips) or folder (dinov2, clip, classifier). None: their place in torch's or Hugging Face's cache.

    Raises:
        InputError: for an unknown name, and for missing or damaged weights.
    """
    if name in BUILDERS:
        return BUILDERS[name](name, weights, device)
    if weights is not None:
        raise reject("weights", str(weights), f"features {name!r} bring their own; weights go with {', '.join(BUILDERS)}")
    if ".py:" in name:
        return _own_module(name, device)
    if name in FEATURE_NETWORKS or name.endswith(".safetensors"):
        return _small_network(load_feature_network(name).to(device), device)
    raise reject(
        "features", name, f"accepted: {', '.join((*BUILDERS, *FEATURE_NETWORKS))}, a .safetensors file with its .json, FILE.py:NAME"
    )


def resize_bicubic(image: Tensor, side: int) -> Tensor:
    """An image, uint8 (3, H, W), as uint8 (3, side, side) by Pillow's bicubic resize, which smooths when it shrinks."""
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def resize_clean(image: Tensor, side: int) -> Tensor:
    """An image, uint8 (3, H, W), as float32 (3, side, side): Pillow's bicubic resize of each channel, unrounded (arXiv:2104.11222)."""
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in image]
    resized = [np.array(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized))


def normalise(image: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """An image (3, H, W) in [0, 255] as float32 of zero mean and unit deviation over ImageNet."""
    return (image.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _inception(name: str, weights: Path | None, device: str) -> Extractor:
    path = _weights_file(weights, inception.WEIGHTS_FILE, inception.WEIGHTS_URL)
    network = inception.load_inception(path).to(device)
    clean = name == "inception_clean"
    how = f"Pillow bicubic in float32 to {inception.SIDE}" if clean else f"TensorFlow 1 bilinear to {inception.SIDE}"
    prepare = (lambda image: resize_clean(image, inception.SIDE)) if clean else inception.resize_like_tensorflow
    return Extractor(name, file_sha256(path), how, prepare, network, network.classify, device)


def _lpips(name: str, weights: Path | None, device: str) -> Extractor:
    path = _weights_file(weights, perceptual.WEIGHTS_FILE, perceptual.WEIGHTS_URL)
    return Extractor(
        name,
        file_sha256(path),
        f"Pillow bicubic to {perceptual.SIDE}",
        lambda image: resize_bicubic(image, perceptual.SIDE).float(),
        perceptual.load_lpips(path).to(device),
        device=device,
        distance="squared",
    )


def _dinov2(name: str, weights: Path | None, device: str) -> Extractor:
    from transformers import Dinov2Model

    folder = _model_folder(name, weights, DINOV2)
    model = _load(Dinov2Model, folder).to(device)
    return Extractor(
        name,
        _folder_sha256(folder),
        f"Pillow bicubic to {DINOV2_SIDE}, ImageNet normalisation; class token after the last norm",
        lambda image: normalise(resize_bicubic(image, DINOV2_SIDE)),
        lambda rows: model(pixel_values=rows).pooler_output,
        device=device,
    )


def _clip(name: str, weights: Path | None, device: str) -> Extractor:
    from transformers import CLIPImageProcessorPil, CLIPModel

    folder = _model_folder(name, weights, CLIP)
    model, processor = _load(CLIPModel, folder).to(device), _load_processor(CLIPImageProcessorPil, folder)
    return Extractor(
        name,
        _folder_sha256(folder),
        "the folder's own image processor; projected image embeddings, not normalised",
        _processed(processor),
        lambda rows: model.get_image_features(pixel_values=rows).pooler_output,
        device=device,
        model=model,
        source=folder,
    )


def _classifier(name: str, weights: Path | None, device: str) -> Extractor:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = _model_folder(name, weights, CLASSIFIER)
    model, processor = _load(AutoModelForImageClassification, folder).to(device), _load_processor(AutoImageProcessor, folder)
    return Extractor(
        name,
        _folder_sha256(folder),
        "the folder's own image processor; class logits",
        _processed(processor),
        lambda rows: model(pixel_values=rows).logits,
        classify=lambda logits: logits,
        device=device,
    )


def _pixels(name: str, weights: Path | None, device: str) -> Extractor:
    if weights is not None:
        raise reject("weights", str(weights), "pixels need none")
    return Extractor(
        name,
        "",
        "none; values from 0 to 1",
        lambda image: image.float() / 255,
        lambda rows: rows.flatten(1),
        device=device,
        distance="squared",
    )


BUILDERS: dict[str, Callable[[str, Path | None, str], Extractor]] = {
    "inception": _inception,
    "inception_clean": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
    "lpips": _lpips,
    "classifier": _classifier,
    "pixels": _pixels,
}


def _small_network(network: FeatureNetwork, device: str) -> Extractor:
    channels = network.image_shape[0]

    def prepare(image: Tensor) -> Tensor:
        if tuple(image[:channels].shape) != network.image_shape:
            raise reject("image shape", tuple(image.shape), f"feature network {network.name} reads {network.image_shape}")
        return image[:channels].float() / 255

    return Extractor(network.name, network.sha256, "none; values from 0 to 1", prepare, network, network.classify, device)


def _own_module(name: str, device: str) -> Extractor:
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    specification = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if specification is None or specification.loader is None:
        raise reject("features", name, "FILE.py:NAME of a file that exists")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if not callable(getattr(module, attribute, None)):
        raise reject("features", name, f"{path} defines no {attribute}")
    network: nn.Module = getattr(module, attribute)()
    network = network.to(device).eval().requires_grad_(False)
    sha256 = _state_sha256(network, path)
    return Extractor(name, sha256, "the module's own", lambda image: image, network, getattr(network, "classify", None), device)


def _state_sha256(network: nn.Module, code: Path) -> str:
    digest = hashlib.sha256(bytes.fromhex(file_sha256(code)))
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights_file(given: Path | None, name: str, url: str) -> Path:
    """File of weights: the one given, or that of torch's cache."""
    path = given or Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file():
        raise InputError(f"weights: no file {path}; fetch {url} to that place or pass --weights FILE; {WITHOUT_WEIGHTS}")
    return path


def _model_folder(name: str, weights: Path | None, hub_name: str) -> Path:
    """Folder of a transformers model: the one given, or that of Hugging Face's cache."""
    if weights is not None:
        if not (weights / "config.json").is_file():
            raise reject("weights", str(weights), f"the folder of a transformers model, such as `hf download {hub_name}` fetches")
        return weights
    try:
        return Path(snapshot_download(hub_name, local_files_only=True))
    except (OSError, HFValidationError) as error:
        fetch = f"`hf download {hub_name}` puts it there, or pass --weights FOLDER"
        raise InputError(f"weights: {name} needs {hub_name}, which is not in Hugging Face's cache; {fetch}; {WITHOUT_WEIGHTS}") from error


def _load(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"weights: {folder} holds no whole {kind.__name__} ({str(error).splitlines()[0]})") from error


def _load_processor(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"weights: {folder} needs the image processor's preprocessor_config.json ({str(error).splitlines()[0]})"
        ) from error


def _processed(processor: Any) -> Callable[[Tensor], Tensor]:
    return lambda image: processor(images=Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"][0]


def _folder_sha256(folder: Path) -> str:
    """Hash of a model's weights: of the file, or of the hashes of several, in the order of their names."""
    hashes = [file_sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
