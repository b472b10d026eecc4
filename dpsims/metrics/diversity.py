"""How different the samples of one label map are."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Callable
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from dpsims._checks import check_choice, check_tensor
from dpsims._optional import require
from dpsims.errors import BackboneError, DTypeError, InputError

# torchvision's ImageNet checkpoints, by lpips' name of the network
_TRUNKS = {
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "vgg": "vgg16-397923af.pth",
}


def pairwise_diversity(
    samples: Float[Tensor, "S B 3 H W"], distance: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, " B"]:
    """Average a distance over all pairs of samples of each label map.

    Args:
        samples: ``S`` images of each of ``B`` label maps, RGB in [-1, 1].
        distance: Gives the distance of two batches of images, one value per image, such as
            :func:`l1_distance` or the result of :func:`lpips_distance`.

    Shape:
        - samples ``(S, B, 3, H, W)``, ``S`` at least 2; output ``(B,)``

    Raises:
        InputError: Wrong shape, fewer than 2 samples, or the distance gives another shape.
        DTypeError: ``samples`` is no floating-point tensor, ``distance`` no callable.

    Note:
        Units: those of the distance; 0 means that the noise is ignored. Cost: ``S (S - 1) / 2``
        calls of ``distance``. Differentiable if the distance is.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.3 and Table 9: the mean LPIPS distance across 20 images
        from the same label map, averaged over label maps.

    Example:
        >>> samples = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1, 1).expand(3, 2, 3, 4, 4)
        >>> pairwise_diversity(samples, l1_distance)  # (1 + 2 + 1) / 3
        tensor([1.3333, 1.3333])
    """
    check_tensor("pairwise_diversity", "samples", samples, "S B C H W", C=3)
    if not callable(distance):
        msg = f"pairwise_diversity: distance must be callable; got {type(distance).__name__}"
        raise DTypeError(msg)
    if len(samples) < 2:
        msg = f"pairwise_diversity: samples must hold at least 2 per map; got {len(samples)}"
        raise InputError(msg)
    distances = []
    for first, second in combinations(samples.unbind(), 2):
        distances.append(distance(first, second))
        check_tensor(
            "pairwise_diversity", "distance's result", distances[-1], "B", B=samples.shape[1]
        )
    return torch.stack(distances).mean(dim=0)


def l1_distance(
    images_a: Float[Tensor, "B C H W"], images_b: Float[Tensor, "B C H W"]
) -> Float[Tensor, " B"]:
    """Mean absolute difference of two batches of images, one value per image.

    Args:
        images_a: One batch.
        images_b: The other batch.

    Shape:
        - images_a, images_b ``(B, C, H, W)``; output ``(B,)``, float32 or better

    Raises:
        InputError: Shapes or devices differ.
        DTypeError: Not floating-point tensors.

    Note:
        Units: those of the pixels, 2 at most for images in [-1, 1]. Any order of gradients.

    Source:
        Not from the paper: a distance that needs no network.

    Example:
        >>> l1_distance(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5))
        tensor([0.5000])
    """
    _check_pair("l1_distance", images_a, images_b)
    # the difference of two float16 numbers may overflow
    dtype = torch.promote_types(torch.promote_types(images_a.dtype, images_b.dtype), torch.float32)
    return (images_a.to(dtype) - images_b.to(dtype)).abs().mean(dim=(1, 2, 3))


def lpips_distance(
    net: Literal["alex", "squeeze", "vgg"] = "alex",
    *,
    weights: str | PathLike[str] | None = None,
) -> nn.Module:
    """Build the LPIPS distance of the ``lpips`` package, without downloading anything.

    ``lpips`` brings the weights of its small linear layers; the ImageNet network below them is a
    file of torchvision that you fetch once. Without the file this raises: a random network would
    give numbers that look right.

    Args:
        net: The network: ``"alex"`` (what most papers report), ``"squeeze"`` or ``"vgg"``.
        weights: File with the network's ImageNet weights, ``.pth`` or ``.safetensors``. ``None``
            looks where torchvision puts it, ``$TORCH_HOME/hub/checkpoints``.

    Shape:
        - what is returned takes two batches ``(B, 3, H, W)`` and gives ``(B,)``

    Returns:
        A frozen Module in eval mode, called with two batches of images in [-1, 1]. Move it with
        ``.to()``.

    Raises:
        InputError: ``net`` is none of the three.
        DTypeError: ``weights`` is no path.
        BackboneError: The file is absent, damaged or of another network; names it.
        ModuleNotFoundError: lpips or torchvision is not installed.

    Note:
        Units: LPIPS v0.1. Cost: two forward passes of the network per call. Gradients reach the
        images. Files of torchvision carry a hash in their names, which is checked.

    Source:
        Zhang et al., CVPR 2018, as used by Berrada et al., CVPR 2024, Table 9.

    Example:
        >>> lpips_distance("alex", weights="no/such/alexnet.pth")
        Traceback (most recent call last):
            ...
        dpsims.errors.BackboneError: lpips_distance: weights must be ... no/such/alexnet.pth
    """
    check_choice("lpips_distance", "net", net, tuple(_TRUNKS))
    if weights is not None and not isinstance(weights, str | PathLike):
        msg = f"lpips_distance: weights must be a path; got {type(weights).__name__}"
        raise DTypeError(msg)
    path = Path(torch.hub.get_dir()) / "checkpoints" / _TRUNKS[net]
    path = path if weights is None else Path(weights)
    state = _trunk_state(path)
    lpips = require("lpips", extra="metrics", purpose="lpips_distance")
    # the network is built with random numbers, then filled
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # lpips 0.1.4 calls torchvision with arguments that are deprecated since 0.13
        warnings.simplefilter("ignore", UserWarning)
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    wanted = model.net.state_dict()
    found = {key: state.get(f"features.{key.partition('.')[2]}") for key in wanted}
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.shape != wanted[key].shape:
            msg = f"lpips_distance: weights must be those of {_TRUNKS[net]}; got {path}"
            raise BackboneError(msg)
    model.net.load_state_dict(found)
    return _LpipsDistance(model)


class _LpipsDistance(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> _LpipsDistance:
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self, images_a: Float[Tensor, "B 3 H W"], images_b: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, " B"]:
        check_tensor("lpips_distance", "images_a", images_a, "B C H W", C=3)
        _check_pair("lpips_distance", images_a, images_b)
        distances: Tensor = self.model(images_a, images_b)
        return distances.flatten()


def _check_pair(owner: str, images_a: Tensor, images_b: Tensor) -> None:
    check_tensor(owner, "images_a", images_a, "B C H W")
    check_tensor(owner, "images_b", images_b, "B C H W", like=images_a)
    if images_a.shape != images_b.shape:
        shapes = f"{tuple(images_b.shape)} and {tuple(images_a.shape)}"
        msg = f"{owner}: images_b must have the shape of images_a; got {shapes}"
        raise InputError(msg)


def _trunk_state(path: Path) -> dict[str, Tensor]:
    owner = "lpips_distance"
    if not path.is_file():
        msg = (
            f"{owner}: weights must be the file of torchvision, from "
            f"https://download.pytorch.org/models/; got no file at {path}"
        )
        raise BackboneError(msg)
    hashed = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if hashed and hashlib.sha256(path.read_bytes()).hexdigest()[:8] != hashed[1]:
        msg = f"{owner}: weights must have the hash in their name (fetch them again); got {path}"
        raise BackboneError(msg)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        msg = f"{owner}: weights must be a readable checkpoint; got {path} ({error!s:.80})"
        raise BackboneError(msg) from error
    if not isinstance(state, dict):
        msg = f"{owner}: weights must hold a state dict; got {type(state).__name__} in {path}"
        raise BackboneError(msg)
    return state
