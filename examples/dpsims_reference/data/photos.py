"""Random crops of a few real photographs that come inside well-known Python packages."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dpsims._checks import check_choice, check_int, check_ints, check_number
from dpsims._optional import require
from dpsims.data import LabelSpec
from dpsims.errors import DataError, DTypeError, InputError
from dpsims_reference.data.files import read_image
from dpsims_reference.data.labeller import PseudoLabeller
from dpsims_reference.data.sample import Sample, check_index, flip_sample, random_below


class Photo(NamedTuple):
    """Where a photograph is, who took it, and on which terms it may be used.

    Source:
        Not from the paper: credits of the pictures.
    """

    package: str
    file: str
    author: str
    licence: str
    source: str


_CC_BY = "CC BY 2.0, https://creativecommons.org/licenses/by/2.0/"
_SKLEARN, _SKIMAGE = "sklearn.datasets.images", "skimage.data"
PHOTOS = {
    "china": Photo(_SKLEARN, "china.jpg", "danielbuechele", _CC_BY,
                   "https://www.flickr.com/photos/danielbuechele/6061409035/"),
    # scikit-learn's README repeats the other author's name here, but links to vultilion
    "flower": Photo(_SKLEARN, "flower.jpg", "vultilion", _CC_BY,
                    "https://www.flickr.com/photos/vultilion/6056698931/"),
    "astronaut": Photo(_SKIMAGE, "astronaut.png", "NASA", "public domain",
                       "https://flic.kr/p/r9qvLn"),
    "chelsea": Photo(_SKIMAGE, "chelsea.png", "Stefan van der Walt", "CC0", ""),
    "coffee": Photo(_SKIMAGE, "coffee.png", "Rachel Michetti", "CC0",
                    "courtesy of Pikolo Espresso Bar"),
    "rocket": Photo(_SKIMAGE, "rocket.jpg", "SpaceX", "public domain",
                    "https://www.flickr.com/photos/spacexphotos/16511594820/"),
}  # fmt: skip
"""Photographs by name. The credits are those of the packages that carry them."""

_SCALES = (0.5, 0.42, 0.35)
Split = Literal["train", "heldout", "all"]


def load_photo(name: str) -> Float[Tensor, "3 H W"]:
    """A photograph of :data:`PHOTOS`, RGB in [-1, 1].

    Args:
        name: Its name in the table.

    Raises:
        InputError: There is no such name.
        ModuleNotFoundError: The package that carries it is not installed.
        DataError: The installed package does not hold the file.

    Source:
        Not from the paper: a data set that needs no download.
    """
    check_choice("load_photo", "name", name, tuple(PHOTOS))
    pixels = torch.from_numpy(read_image(_photo_path(name)))
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def _photo_path(name: str) -> Path:
    """Where the installed package keeps a photo; the package itself is not imported."""
    package, *folders = PHOTOS[name].package.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        require(package, extra="photos", purpose=f"the photo {name!r}")
        msg = f"load_photo: the photo {name!r} needs a regular installation of {package}"
        raise DataError(msg)
    path = Path(spec.origin).parent.joinpath(*folders, PHOTOS[name].file)
    if not path.is_file():
        msg = f"{path}: this release of {package} has no such photo"
        raise DataError(msg)
    return path


class _Cell(NamedTuple):
    """Where the top left corner of a crop may lie in one scaled photo."""

    photo: int
    top: tuple[float, float]
    left: tuple[float, float]


class PhotoCrops:
    r"""Crops of a few photographs at several scales, with pseudo-labels.

    Every photo is scaled and labelled once, as a whole. Sample ``index`` is a photo, a scale and a
    cell of positions; ``draw`` picks a position in the cell and mirrors half of the crops.

    Args:
        photos: Names of :data:`PHOTOS`.
        num_classes: Number ``K`` of pseudo-classes.
        crop_size: Height and width of a crop, or one number for both.
        scales: Factors on the photos. ``None`` means 0.5, 0.42 and 0.35 for crops of 64 pixels,
            and as much more for larger ones.
        holdout: Share of each photo's width, on the right, that training crops never touch.
        split: ``"train"``, ``"heldout"``, or ``"all"`` for crops of whole photos.
        seed: Seed of the labelling.

    Shape:
        - image ``(3, H, W)`` float32 in [-1, 1]; labels ``(H, W)`` uint8; no instances

    Raises:
        InputError: An argument is out of range, or no crop fits into the part.

    Note:
        Setup runs EfficientNet-Lite1 over the scaled photos, some seconds. The scales that leave
        no room for a crop are left out. ``labeller`` labels other images in the same way.

    Source:
        Not from the paper: a data set that needs no download.
    """

    def __init__(
        self,
        photos: Sequence[str] = ("china", "flower"),
        *,
        num_classes: int = 8,
        crop_size: int | Sequence[int] = 64,
        scales: Sequence[float] | None = None,
        holdout: float = 0.27,
        split: Split = "train",
        seed: int = 0,
    ) -> None:
        owner = "PhotoCrops"
        size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        check_ints(owner, "crop_size", size, minimum=32)
        check_int(owner, "seed", seed, minimum=0)
        check_choice(owner, "split", split, ("train", "heldout", "all"))
        check_number(owner, "holdout", holdout, above=0, below=1)
        if len(size) != 2:
            msg = f"{owner}: crop_size must be a number or (height, width); got {size}"
            raise InputError(msg)
        if isinstance(photos, str) or not photos:
            msg = f"{owner}: photos must be a non-empty sequence of names; got {photos!r}"
            raise DTypeError(msg) if isinstance(photos, str) else InputError(msg)
        if scales is None:
            scales = [scale * max(size) / 64 for scale in _SCALES]
        for scale in scales:
            check_number(owner, "scales", scale, above=0, maximum=8)
        self.image_size, self.seed = (size[0], size[1]), seed
        self.photos, self.scales = tuple(photos), tuple(scales)
        self.split, self.holdout = split, holdout
        self.spec = LabelSpec(num_classes)
        self._images = [
            _scaled(image, scale) for image in map(load_photo, photos) for scale in self.scales
        ]
        self._cells = self._make_cells()
        self.labeller = PseudoLabeller(num_classes, seed=seed).fit(self._images)
        self._labels = [self.labeller.predict(image) for image in self._images]

    def __len__(self) -> int:
        return len(self._cells)

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """A crop from anywhere in cell ``index``, mirrored half of the time."""
        place = torch.rand(2, generator=generator, device=generator.device).tolist()
        sample = self._crop(index, place[0], place[1])
        return flip_sample(sample) if random_below(2, generator) else sample

    def view(self, index: int) -> Sample:
        """The crop in the middle of cell ``index``."""
        return self._crop(index, 0.5, 0.5)

    def part(self, split: Split) -> PhotoCrops:
        """The same photos and labels, cropped in another part; labels nothing anew."""
        check_choice("PhotoCrops.part", "split", split, ("train", "heldout", "all"))
        other = copy.copy(self)
        other.split = split
        other._cells = other._make_cells()
        return other

    def presence(self) -> Bool[Tensor, "num_images K"]:
        """Which classes the middle crop of each cell holds."""
        found = torch.zeros(len(self), self.spec.num_classes, dtype=torch.bool)
        for index in range(len(self)):
            found[index, self.view(index).labels.long().unique()] = True
        return found

    def fingerprint(self) -> str:
        """A hash of the photo files and of all settings."""
        settings = (self.photos, self.scales, self.image_size, self.split, self.holdout, self.seed)
        digest = hashlib.sha256(repr((self.spec.num_classes, *settings)).encode())
        for name in self.photos:
            digest.update(hashlib.sha256(_photo_path(name).read_bytes()).digest())
        return digest.hexdigest()

    def _make_cells(self) -> list[_Cell]:
        cells = []
        height, width = self.image_size
        for number, image in enumerate(self._images):
            rows, cols = image.shape[1:]
            border = round(cols * (1 - self.holdout))
            first, last = {"train": (0, border), "heldout": (border, cols), "all": (0, cols)}[
                self.split
            ]
            if rows < height or last - first < width:
                continue
            tops = _parts(0, rows - height, height)
            lefts = _parts(first, last - width, width)
            cells += [_Cell(number, top, left) for top in tops for left in lefts]
        if not cells:
            msg = (
                f"PhotoCrops: crop_size must fit into the {self.split!r} part (holdout "
                f"{self.holdout}) of a photo at scales {self.scales}; got {self.image_size}"
            )
            raise InputError(msg)
        return cells

    def _crop(self, index: int, down: float, across: float) -> Sample:
        cell = self._cells[check_index("PhotoCrops", index, len(self))]
        height, width = self.image_size
        top = round(cell.top[0] + down * (cell.top[1] - cell.top[0]))
        left = round(cell.left[0] + across * (cell.left[1] - cell.left[0]))
        rows, cols = slice(top, top + height), slice(left, left + width)
        image = self._images[cell.photo][:, rows, cols].clone()
        return Sample(image, self._labels[cell.photo][rows, cols].clone(), None)


def _parts(first: int, last: int, length: int) -> list[tuple[float, float]]:
    """Cut the positions from ``first`` to ``last`` into parts of about half a crop."""
    count = max(1, round((last - first) / (length / 2)))
    step = (last - first) / count
    return [(first + n * step, first + (n + 1) * step) for n in range(count)]


def _scaled(image: Tensor, scale: float) -> Tensor:
    size = (round(image.shape[1] * scale), round(image.shape[2] * scale))
    resized = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    return resized.clamp(-1, 1)
