"""What the official data sets share: folders, checks of a download, and OASIS's cuts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpsims._checks import check_bool, check_choice
from dpsims._optional import require
from dpsims.data import LabelSpec
from dpsims.errors import DataError
from dpsims_reference.data.files import MAX_PIXELS, regular_files, shown
from dpsims_reference.data.paired import Arrays, Pair, PairedDataset, nearest
from dpsims_reference.data.sample import Sample, check_index, random_below

Split = Literal["train", "heldout"]
# OASIS squeezes to 286 pixels and cuts 256
CUT_256_OF_286 = 286 / 256


class Kind(NamedTuple):
    """One kind of file: its folder below the root, and how every name ends."""

    folder: str
    suffix: str

    def path(self, root: Path, name: str) -> Path:
        """The file of the sample ``name``."""
        return root / self.folder / f"{name}{self.suffix}"


@dataclass(frozen=True)
class Release:
    """One split of a published data set.

    Attributes:
        title: Its name.
        page: Where it can be downloaded.
        num_images: How many images the split has.
        images: Image files.
        labels: Label maps.
        instances: Instance maps, or ``None``.
        by_city: Files lie one folder deeper, in one for each city.
        numbered: Format of the names where they are numbers from 1 on; else empty.

    Source:
        Not from the paper: facts of the data sets.
    """

    title: str
    page: str
    num_images: int
    images: Kind
    labels: Kind
    instances: Kind | None = None
    by_city: bool = False
    numbered: str = ""


class OfficialDataset(PairedDataset):
    """An official data set, read from the folders of its download.

    Training samples are squeezed to ``load_scale`` times ``image_size``, cut at a random place and
    mirrored half of the time; ``view`` squeezes the whole image to ``image_size``.

    Args:
        root: The folder that holds the release's folders.
        release: Which files belong to it.
        spec: What the ids in the files mean.
        image_size: Height and width of every sample.
        load_scale: By how much training images are larger than ``image_size`` before the cut.
        flip: Mirror half of the training samples.
        partial: Accept a release with images missing, as long as every image has its maps.
        max_pixels: Largest file that is unpacked.

    Raises:
        DataError: Files are missing; the message counts them, names the first ten and says where
            to get them.
        InputError: An argument is out of range.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.1, for the sizes; the cuts are those of Schönfeld et al.,
        "You Only Need Adversarial Supervision for Semantic Image Synthesis" (OASIS), ICLR 2021,
        which the paper follows without saying so.
    """

    def __init__(
        self,
        root: str | Path,
        release: Release,
        spec: LabelSpec,
        *,
        image_size: Sequence[int],
        load_scale: float,
        flip: bool = True,
        partial: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(spec, image_size=image_size, flip=flip, max_pixels=max_pixels)
        check_bool(self._owner, "partial", partial)
        self.root, self.release = Path(root), release
        height, width = (round(load_scale * length) for length in self.image_size)
        self.load_size = (height, width)
        # one array instead of 100 000 paths: loader processes share it
        self._names = np.array(_complete_names(self.root, release, partial=partial))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Name of sample ``index``, without suffix; with its city where there is one."""
        return str(self._names[check_index(self._owner, index, len(self))])

    def pair(self, index: int) -> Pair:
        """The files of sample ``index``."""
        name, release = str(self._names[index]), self.release
        instances = release.instances and release.instances.path(self.root, name)
        image, labels = release.images, release.labels
        return Pair(image.path(self.root, name), labels.path(self.root, name), instances)

    def settings(self) -> tuple[object, ...]:
        """Release, classes and sizes."""
        return self.release.title, self.spec.to_dict(), self.image_size, self.load_size

    def draw(self, index: int, generator: torch.Generator) -> Sample:
        """Sample ``index``, cut at a random place and mirrored half of the time."""
        arrays = self.read(index)
        top, left = (
            random_below(load - size + 1, generator)
            for load, size in zip(self.load_size, self.image_size, strict=True)
        )
        mirrored = self.flip and random_below(2, generator) == 1
        return self._cut(arrays, self.load_size, (top, left), mirrored=mirrored)

    def view(self, index: int) -> Sample:
        """Sample ``index``, whole."""
        return self._cut(self.read(index), self.image_size, (0, 0), mirrored=False)

    def _cut(
        self, arrays: Arrays, size: tuple[int, int], corner: tuple[int, int], *, mirrored: bool
    ) -> Sample:
        """Squeeze to ``size``, cut, mirror: image and maps together."""
        purpose = "resizing images"
        functional = require(
            "torchvision.transforms.v2.functional", extra="train", purpose=purpose
        )
        wrap = require("torchvision.tv_tensors", extra="train", purpose=purpose)
        old_height, old_width = arrays.labels.shape
        rows = nearest(0, old_height, size[0], old_height)
        cols = nearest(0, old_width, size[1], old_width)

        def squeezed(ids: Tensor) -> Tensor:
            # not resize(): that takes a corner of every new pixel, not its middle
            return wrap.Mask(ids[rows][:, cols])

        image = wrap.Image(torch.from_numpy(arrays.image).permute(2, 0, 1))
        bicubic = functional.InterpolationMode.BICUBIC
        parts = [
            functional.resize(image, list(size), interpolation=bicubic, antialias=True),
            squeezed(arrays.labels),
        ]
        if arrays.instances is not None:
            parts.append(squeezed(torch.from_numpy(arrays.instances)))
        parts = [functional.crop(part, *corner, *self.image_size) for part in parts]
        if mirrored:
            parts = [functional.horizontal_flip(part) for part in parts]
        pixels, labels, *instances = (part.as_subclass(Tensor).contiguous() for part in parts)
        return Sample(pixels.float() / 127.5 - 1, labels, instances[0] if instances else None)


def split_of(owner: str, split: Split, train: str, heldout: str) -> str:
    """The official name of a split."""
    check_choice(owner, "split", split, ("train", "heldout"))
    return train if split == "train" else heldout


def _complete_names(root: Path, release: Release, *, partial: bool) -> list[str]:
    """Names of all samples, in order; a DataError says which files are missing."""
    kinds = [k for k in (release.images, release.labels, release.instances) if k is not None]
    where = (
        f"expected in {', '.join(kind.folder for kind in kinds)} below {shown(root)}; "
        f"download: {release.page}"
    )
    try:
        found = {k: set(_names(root / k.folder, k.suffix, by_city=release.by_city)) for k in kinds}
    except DataError as error:
        msg = f"{error} ({release.title} is {where})"
        raise DataError(msg) from error
    names = set[str]().union(*found.values())
    if release.numbered and not partial:
        names |= {release.numbered.format(n + 1) for n in range(release.num_images)}
    missing = [f"{n}{k.suffix}" for k in kinds for n in sorted(names - found[k])]
    if missing:
        first = ", ".join(shown(name, length=80) for name in missing[:10])
        msg = f"{release.title}: {len(missing)} files are missing: {first} ({where})"
        raise DataError(msg)
    if not names or (len(names) < release.num_images and not partial):
        msg = (
            f"{release.title}: {len(names)} of {release.num_images} images are there ({where}); "
            "partial=True accepts a part"
        )
        raise DataError(msg)
    return sorted(names)


def _names(folder: Path, suffix: str, *, by_city: bool = False) -> Iterable[str]:
    """Names below ``folder``, without suffix."""
    # the folder is its own root: it may be a link to another disk, its files may not
    if not by_city:
        return [name[: -len(suffix)] for name in regular_files(folder, folder, (suffix,))]
    if not folder.is_dir():
        msg = f"{shown(folder)}: no such folder"
        raise DataError(msg)
    cities = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return [f"{city}/{name}" for city in cities for name in _names(folder / city, suffix)]
