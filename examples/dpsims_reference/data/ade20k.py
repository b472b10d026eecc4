"""ADE20K, as the scene parsing challenge publishes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpsims.data import LabelSpec
from dpsims_reference.data.class_names import ADE20K_NAMES, ADE20K_PALETTE
from dpsims_reference.data.files import MAX_PIXELS
from dpsims_reference.data.official import (
    CUT_256_OF_286,
    Kind,
    OfficialDataset,
    Release,
    Split,
    split_of,
)

_COUNTS = {"training": 20_210, "validation": 2_000}
_NAMES = {"training": "ADE_train_{:08d}", "validation": "ADE_val_{:08d}"}


def ade20k_spec() -> LabelSpec:
    """The 151 classes of ADE20K: 1 to 150 of the challenge, and 0, "other", unlabelled.

    Source:
        Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017, with the colours of
        https://github.com/CSAILVision/sceneparsing; 151 classes: Berrada et al., CVPR 2024,
        Sec. 4.1.
    """
    return LabelSpec(151, ignore_index=0, names=ADE20K_NAMES, palette=ADE20K_PALETTE)


class ADE20K(OfficialDataset):
    """ADE20K, 20 210 training and 2 000 validation images.

    ``root`` is ``ADEChallengeData2016``, with ``images/training/``, ``annotations/training/`` and
    the same for ``validation``. There are no instance maps.

    Args:
        root: The folder.
        split: ``"train"`` or ``"heldout"``, which is the validation split.
        image_size: Height and width of every sample.
        flip: Mirror half of the training samples.
        partial: Accept a download with images missing.
        max_pixels: Largest file that is unpacked.

    Shape:
        - image ``(3, H, W)`` float32 in [-1, 1]; labels ``(H, W)`` uint8; no instances

    Raises:
        DataError: Files are missing or damaged.
        InputError: An argument is out of range.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.1: 256x256, no instances. Resizing to 286, random cut
        and flip: OASIS, ICLR 2021.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Split = "train",
        image_size: Sequence[int] = (256, 256),
        flip: bool = True,
        partial: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        part = split_of("ADE20K", split, "training", "validation")
        release = Release(
            title=f"ADE20K {part}",
            page="http://sceneparsing.csail.mit.edu",
            num_images=_COUNTS[part],
            images=Kind(f"images/{part}", ".jpg"),
            labels=Kind(f"annotations/{part}", ".png"),
            numbered=_NAMES[part],
        )
        super().__init__(
            root,
            release,
            ade20k_spec(),
            image_size=image_size,
            load_scale=CUT_256_OF_286,
            flip=flip,
            partial=partial,
            max_pixels=max_pixels,
        )
