"""Which data set a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dpsims.errors import InputError
from dpsims_reference.config import DataConfig
from dpsims_reference.data.folder import FolderDataset
from dpsims_reference.data.label_file import read_label_spec
from dpsims_reference.data.photos import PhotoCrops
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.data.scenes import StreetScenes

Split = Literal["train", "heldout"]
_HELDOUT = "heldout"


def build_splits(config: DataConfig) -> dict[Split, ImageDataset]:
    """Both parts of the data that ``config`` names, or the only one that there is.

    Photographs are labelled once for both.
    """
    train = build_dataset(config, split="train")
    if isinstance(train, PhotoCrops):
        return {"train": train, "heldout": train.part("heldout")}
    if isinstance(train, FolderDataset) and not (train.root / _HELDOUT).is_dir():
        return {"train": train}
    return {"train": train, "heldout": build_dataset(config, split="heldout")}


def build_dataset(config: DataConfig, *, split: Split = "train") -> ImageDataset:
    """The training or the held-out part of the data that ``config`` names.

    ``photos`` holds out the right part of each photograph, ``scenes`` draws other scenes, and a
    folder holds out its own folder ``heldout``, which again has ``images`` and ``labels``.

    Raises:
        InputError: A folder is wanted and no root is given, or the number of classes is not that
            of the scenes.
        DataError: The folder's files do not fit together.
    """
    if config.name == "photos":
        return PhotoCrops(
            config.photos,
            num_classes=config.num_classes,
            crop_size=config.image_size[0],
            split=split,
            seed=config.seed,
        )
    if config.name == "scenes":
        seed = 2 * config.seed + (split == "heldout")
        scenes = StreetScenes(config.num_scenes, image_size=config.image_size, seed=seed)
        if scenes.spec.num_classes != config.num_classes:
            msg = (
                f"build_dataset: data.num_classes must be {scenes.spec.num_classes} for scenes; "
                f"got {config.num_classes}"
            )
            raise InputError(msg)
        return scenes
    if config.root is None:
        msg = "build_dataset: data.root must name a folder with images/ and labels/; got None"
        raise InputError(msg)
    root = Path(config.root)
    spec = read_label_spec(root / "labels.json", num_classes=config.num_classes)
    part = root / _HELDOUT if split == "heldout" else root
    return FolderDataset(part, spec, image_size=config.image_size)
