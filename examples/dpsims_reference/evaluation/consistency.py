"""Does a segmenter find the label map again in the image? mIoU, accuracy, confusion matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64, Integer
from torch import Tensor

from dpsims.data import LabelSpec
from dpsims.errors import InputError
from dpsims.metrics import SegmentationConsistency
from dpsims_reference.evaluation.segmenters import Segmenter


class Scores(NamedTuple):
    """What one segmenter says of one set of images."""

    miou: float
    pixel_accuracy: float
    per_class_iou: Float64[Tensor, " K"]
    confusion: Int64[Tensor, "K K"]
    """Pixels, rows by the label map's class and columns by the segmenter's."""


class ConsistencyPair:
    """One segmenter's scores of the generated images, and of the real ones as the ceiling.

    Args:
        segmenter: What finds the classes.
        spec: The classes of the label maps.
        device: Where the pixels are counted.

    Raises:
        InputError: The segmenter was made for another number of classes.
    """

    def __init__(self, segmenter: Segmenter, spec: LabelSpec, *, device: str = "cpu") -> None:
        if segmenter.num_classes != spec.num_classes:
            msg = (
                f"Segmenter {segmenter.name}: num_classes must be the data set's "
                f"{spec.num_classes}; got {segmenter.num_classes}"
            )
            raise InputError(msg)
        self.segmenter, self.ignored = segmenter, spec.ignore_index
        known = segmenter.known.to(device)
        if 0 <= self.ignored < spec.num_classes:
            known[self.ignored] = False
        self.known = known
        self._counts = {
            real: SegmentationConsistency(spec.num_classes, ignore_index=spec.ignore_index).to(
                device
            )
            for real in (True, False)
        }

    def add(
        self,
        images: Float[Tensor, "B 3 H W"],
        labels: Integer[Tensor, "B H W"],
        *,
        real: bool,
    ) -> None:
        """Add images in [-1, 1] with the maps that they should show."""
        labels = labels.to(self.known.device).long()
        inside = (labels >= 0) & (labels < len(self.known))
        counted = inside & self.known[torch.where(inside, labels, 0)]
        labels = torch.where(counted, labels, self.ignored)
        self._counts[real].update(self.segmenter(images).to(labels.device), labels)

    def scores(self, *, real: bool) -> Scores:
        """The scores over all processes; a collective call."""
        metric = self._counts[real]
        found = metric.compute()
        with metric.confusion.sync_context():
            confusion = metric.confusion.confmat.cpu().clone()
        return Scores(found.miou, found.pixel_accuracy, found.per_class_iou.cpu(), confusion)

    def figures(self, fake: Scores, real: Scores) -> dict[str, float]:
        """Both sets' means, under the segmenter's name."""
        name = self.segmenter.name
        return {
            f"miou/{name}": fake.miou,
            f"miou_real/{name}": real.miou,
            f"pixel_accuracy/{name}": fake.pixel_accuracy,
            f"pixel_accuracy_real/{name}": real.pixel_accuracy,
        }
