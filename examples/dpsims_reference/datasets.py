"""Which data set a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dpsims.data import LabelSpec
from dpsims.errors import InputError
from dpsims_reference.config import OFFICIAL, DataConfig
from dpsims_reference.data.ade20k import ADE20K
from dpsims_reference.data.cityscapes import Cityscapes
from dpsims_reference.data.coco_stuff import COCOStuff
from dpsims_reference.data.folder import FolderDataset
from dpsims_reference.data.label_file import read_label_spec
from dpsims_reference.data.official import OfficialDataset
from dpsims_reference.data.paired import PairedDataset, PresenceScan
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


def build_dataset(
    config: DataConfig, *, split: Split = "train", scan: PresenceScan | None = None
) -> ImageDataset:
    """The training or the held-out part of the data that ``config`` names.

    ``photos`` holds out the right part of each photograph, ``scenes`` draws other scenes, the
    official data sets hold out their validation split, and a folder its own folder ``heldout``,
    which again has ``images`` and ``labels``.

    Args:
        config: The data.
        split: Which part.
        scan: How label maps in files are scanned for their classes.

    Raises:
        InputError: Files are wanted and no root is given, or the number of classes or the ignored
            id is not that of the data.
        DataError: The files do not fit together.
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
        _check_agreement(config, scenes.spec)
        return scenes
    dataset = _from_files(config, split)
    _check_agreement(config, dataset.spec)
    dataset.scan = scan or PresenceScan()
    return dataset


def _from_files(config: DataConfig, split: Split) -> PairedDataset:
    if config.root is None:
        wanted = "the data set" if config.name in OFFICIAL else "a folder with images/ and labels/"
        msg = f"build_dataset: data.root must name {wanted}; got None"
        raise InputError(msg)
    root = Path(config.root)
    if config.name in OFFICIAL:
        return official_dataset(config, root, split)
    spec = read_label_spec(root / "labels.json", num_classes=config.num_classes)
    part = root / _HELDOUT if split == "heldout" else root
    return FolderDataset(part, spec, image_size=config.image_size)


def official_dataset(config: DataConfig, root: Path, split: Split) -> OfficialDataset:
    """The official data set that ``config`` names, in ``root``.

    Raises:
        InputError: Instances are wanted of ADE20K.
        DataError: Files are missing.
    """
    size, partial = config.image_size, config.partial
    if config.name == "ade20k":
        if config.instances:
            msg = "build_dataset: data.instances must be False, ADE20K has none; got True"
            raise InputError(msg)
        return ADE20K(root, split=split, image_size=size, partial=partial)
    kind = COCOStuff if config.name == "coco_stuff" else Cityscapes
    return kind(root, split=split, image_size=size, instances=config.instances, partial=partial)


def _check_agreement(config: DataConfig, spec: LabelSpec) -> None:
    """Raise unless the configuration has the numbers of the data."""
    for name, wanted in (("num_classes", spec.num_classes), ("ignore_index", spec.ignore_index)):
        if getattr(config, name) != wanted:
            msg = (
                f"build_dataset: data.{name} must be {wanted} for {config.name}; "
                f"got {getattr(config, name)}"
            )
            raise InputError(msg)
