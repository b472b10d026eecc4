"""Segmentation networks of any make, as functions from images to class ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from dpsims._checks import check_int, check_ints, check_tensor
from dpsims.errors import DTypeError, InputError
from dpsims_reference.evaluation_options import IMAGENET_MEAN, IMAGENET_STD

_OWNER = "Segmenter"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")
Network = Callable[[Tensor], Any]


class Segmenter:
    """A segmentation network as a function from images in [-1, 1] to the data set's class ids.

    Args:
        network: Called with resized, normalised images ``(B, 3, h, w)``; gives logits
            ``(B, C, h', w')``, integer ids ``(B, h', w')``, or a dictionary with one of them under
            ``"out"``.
        name: Goes into the names of the figures and pictures; without blanks.
        num_classes: Number ``K`` of classes of the data set.
        ids: For each of the network's ``C`` classes the class of the data set, or ``None`` for a
            class that the data set lacks, which is then never predicted. ``None`` stands for the
            ids 0 to K - 1 themselves.
        size: Height and width that the network sees; ``None`` leaves the images' own.
        mean: Mean of the images in [0, 1], by channel (default: ImageNet's).
        std: Their deviation.
        weights: Where the network is from; goes on the evaluation card.

    Raises:
        InputError: An argument is out of range.
        DTypeError: ``network`` is no callable.

    Note:
        Classes of the data set that ``ids`` leaves out cannot be predicted; ``known`` is False
        for them, and their pixels do not count. That is how networks with 19 classes of
        Cityscapes, or with ADE-20K's 150 of 151, are meant to be scored.
    """

    def __init__(
        self,
        network: Network,
        *,
        name: str,
        num_classes: int,
        ids: Sequence[int | None] | None = None,
        size: Sequence[int] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        weights: dict[str, str] | None = None,
    ) -> None:
        if not callable(network):
            msg = f"{_OWNER}: network must be callable; got {type(network).__name__}"
            raise DTypeError(msg)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            msg = f"{_OWNER}: name must be made of letters, digits, _, ., @ and -; got {name!r}"
            raise InputError(msg)
        check_int(_OWNER, "num_classes", num_classes, minimum=2)
        if size is not None:
            check_ints(_OWNER, "size", size)
        if (size is not None and len(size) != 2) or len(mean) != 3 or len(std) != 3:
            msg = f"{_OWNER}: size must have 2 entries, mean and std 3; got {size}, {mean}, {std}"
            raise InputError(msg)
        if not all(value > 0 for value in std):
            msg = f"{_OWNER}: std must be above 0; got {tuple(std)}"
            raise InputError(msg)
        self.network, self.name, self.num_classes = network, name, num_classes
        self.size = None if size is None else (size[0], size[1])
        self.mean, self.std = tuple(mean), tuple(std)
        self.ids = _checked_ids(ids, num_classes)
        self.weights = dict(weights or {})
        self.known = torch.zeros(num_classes, dtype=torch.bool)
        self.known[[to for to in self.ids if to is not None]] = True

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Int64[Tensor, "B H W"]:
        """The class of every pixel.

        Raises:
            InputError: The network's result has another shape or number of classes, or holds an
                id that ``ids`` does not map.
        """
        check_tensor(_OWNER, "images", images, "B C H W", C=3)
        height, width = images.shape[-2:]
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        inputs = (images.clamp(-1, 1) + 1) / 2
        if self.size is not None:
            inputs = F.interpolate(inputs, self.size, mode="bilinear", antialias=True)
        found = self.network((inputs - mean) / std)
        found = found["out"] if isinstance(found, dict) and "out" in found else found
        if isinstance(found, Tensor) and found.dim() == 4:
            return self._from_logits(found, len(images), (height, width))
        return self._from_ids(found, len(images), (height, width))

    def _from_logits(self, logits: Tensor, count: int, size: tuple[int, int]) -> Tensor:
        owner, classes = f"{_OWNER} {self.name}", len(self.ids)
        check_tensor(owner, "the network's logits", logits, "B C H W", B=count, C=classes)
        logits = logits.float()
        if not bool(logits.isfinite().all()):
            msg = f"{owner}: the network's logits must be finite; got NaN or infinite ones"
            raise InputError(msg)
        if tuple(logits.shape[-2:]) != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        kept = [index for index, to in enumerate(self.ids) if to is not None]
        table = torch.tensor([self.ids[index] for index in kept], device=logits.device)
        return table[logits[:, kept].argmax(1)]

    def _from_ids(self, ids: object, count: int, size: tuple[int, int]) -> Tensor:
        owner = f"{_OWNER} {self.name}"
        check_tensor(owner, "the network's ids", ids, "B H W", B=count, kind="integer")
        assert isinstance(ids, Tensor)
        table = torch.tensor([-1 if to is None else to for to in self.ids], device=ids.device)
        ids = ids.long()
        inside = (ids >= 0) & (ids < len(table))
        mapped = torch.where(inside, table[ids.clamp(0, len(table) - 1)], -1)
        if bool((mapped < 0).any()):
            wrong = ids[mapped < 0].unique().tolist()[:10]
            msg = f"{owner}: the network's ids must be mapped to classes by ids; got {wrong}"
            raise InputError(msg)
        if tuple(mapped.shape[-2:]) == size:
            return mapped
        # nearest-exact takes the pixel under the centre
        return F.interpolate(mapped[:, None].double(), size, mode="nearest-exact")[:, 0].long()

    @property
    def facts(self) -> dict[str, object]:
        """What an evaluation card says of the segmenter."""
        return {
            "name": self.name,
            "size": None if self.size is None else list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "network_classes": len(self.ids),
            "scored_classes": int(self.known.sum()),
            "weights": self.weights,
        }


def _checked_ids(ids: Sequence[int | None] | None, num_classes: int) -> tuple[int | None, ...]:
    if ids is None:
        return tuple(range(num_classes))
    for index, to in enumerate(ids):
        if to is None:
            continue
        check_int(_OWNER, f"ids[{index}]", to, minimum=0)
        if to >= num_classes:
            msg = f"{_OWNER}: ids[{index}] must be below num_classes={num_classes}; got {to}"
            raise InputError(msg)
    if all(to is None for to in ids):
        msg = f"{_OWNER}: ids must map at least one class; got {ids!r:.80}"
        raise InputError(msg)
    return tuple(ids)
