"""The two networks of the paper's Fréchet distances, from files on this disk."""

from __future__ import annotations

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsims._optional import require
from dpsims.errors import BackboneError
from dpsims_reference.evaluation.extractors import FeatureExtractor
from dpsims_reference.evaluation.weight_files import WeightFile, fill_, read_weights
from dpsims_reference.evaluation_options import IMAGENET_MEAN, IMAGENET_STD

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
_INCEPTION_HASH = "6726825d"
_SWAV_FILE = "swav_800ep_pretrain.pth.tar"
_SWAV_URL = f"https://dl.fbaipublicfiles.com/deepcluster/{_SWAV_FILE}"
_SWAV_SIZE = 224


def inception_v3(weights: Path | None = None, *, antialias: bool = False) -> FeatureExtractor:
    """Inception-v3's 2048 pooled features, those of FID, from a file on this disk.

    Args:
        weights: The file of torch-fidelity, ``.pth`` or ``.safetensors``. ``None`` looks where
            torch-fidelity and torchmetrics put it, ``$TORCH_HOME/hub/checkpoints``. Any other
            Inception's features are named after its hash, since their FID is another figure.
        antialias: Resize with antialiasing, torchmetrics' default, instead of as TensorFlow 1
            and the published figures do. The name says which.

    Raises:
        BackboneError: There is no such file (the message says where to put it), or it is damaged
            or another network's.
        ModuleNotFoundError: torchmetrics or torch-fidelity is not installed.
    """
    owner = "inception_v3"
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = path if weights is None else Path(weights)
    file = read_weights(owner, path, advice=f"from {_INCEPTION_URL}")
    require("torch_fidelity", extra="metrics", purpose=owner)
    fid = require("torchmetrics.image.fid", extra="metrics", purpose=owner)
    try:
        network = fid.NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=["2048"],
            feature_extractor_weights_path=_own_bytes(file),
            antialias=antialias,
        )
    except RuntimeError as error:
        msg = f"{owner}: weights must be those of FID's Inception-v3; got {path} ({error!s:.80})"
        raise BackboneError(msg) from error
    name = "inception_v3" + ("_antialias" if antialias else "")
    if not file.sha256.startswith(_INCEPTION_HASH):
        name += f"@{file.sha256[:8]}"
    how = "with antialiasing" if antialias else "as TensorFlow 1"
    return FeatureExtractor(
        _FromBytes(network),
        name=name,
        num_features=2048,
        resize=f"bilinear {how} to 299 x 299",
        weights=file.origin,
        kind="fid",
    )


def _own_bytes(file: WeightFile) -> io.BytesIO:
    """The tensors alone: torch-fidelity unpickles, and so would run, whatever it is given."""
    buffer = io.BytesIO()
    torch.save(file.tensors, buffer)
    buffer.seek(0)
    return buffer


class _FromBytes(nn.Module):
    """Images in [-1, 1] for a network that takes bytes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8))


def swav_resnet50(weights: Path) -> FeatureExtractor:
    """Pooled features of the ResNet-50 that SwAV trained without labels (Table S7).

    Args:
        weights: SwAV's checkpoint. Heads beside the ResNet are left out. The name carries the
            file's hash, since there is more than one such checkpoint.

    Raises:
        BackboneError: There is no such file (the message says where to get it), or it is damaged
            or another network's.
    """
    owner = "swav_resnet50"
    file = read_weights(owner, Path(weights), advice=f"from {_SWAV_URL}")
    timm = require("timm", extra=None, purpose=owner)
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model("resnet50", pretrained=False, num_classes=0)
    fill_(owner, network, file)
    return FeatureExtractor(
        _ShortSide(network),
        name=f"swav_resnet50@{file.sha256[:8]}",
        num_features=2048,
        resize=f"bilinear with antialiasing, the shorter side to {_SWAV_SIZE}",
        weights=file.origin,
    )


class _ShortSide(nn.Module):
    """Resize the shorter side and normalise, as Morozov et al. (ICLR 2021) do."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        scale = _SWAV_SIZE / min(images.shape[-2:])
        size = tuple(round(side * scale) for side in images.shape[-2:])
        resized = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.network(((resized.clamp(-1, 1) + 1) / 2 - self.mean) / self.std)
