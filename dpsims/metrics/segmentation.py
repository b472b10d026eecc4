"""How well a segmenter finds the label map again in the image made from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from dpsims._checks import check_int, check_label_values, check_tensor
from dpsims._optional import require
from dpsims.errors import InputError


class SegmentationScores(NamedTuple):
    """What :meth:`SegmentationConsistency.compute` returns.

    Source:
        Not from the paper: a container.

    Example:
        >>> metric = SegmentationConsistency(2)
        >>> metric.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))
        >>> scores = metric.compute()
        >>> scores.pixel_accuracy, scores.per_class_iou.tolist()
        (0.5, [0.5, 0.0])
    """

    miou: float
    """Mean intersection over union of the classes that occur."""
    pixel_accuracy: float
    """Fraction of labelled pixels with the right class."""
    per_class_iou: Float64[Tensor, " K"]
    """One value per class; NaN for classes that occur neither in labels nor in predictions."""
    classes_present: int
    """Number of classes that the mean is over."""


class SegmentationConsistency(nn.Module):
    """Collect predicted and true label maps, then score their agreement.

    A thin layer over ``torchmetrics.classification.MulticlassConfusionMatrix``, which counts
    pixels and adds the counts up over processes. The mean is over classes of the whole set, as in
    segmentation benchmarks, never over images.

    Args:
        num_classes: Number ``K`` of classes.
        ignore_index: Id of unlabelled pixels; what is predicted there does not count. A class of
            this id never counts.

    Shape:
        - :meth:`update` takes predicted and true ids ``(B, H, W)``, integer

    Raises:
        InputError: ``num_classes`` is below 2.
        DTypeError: A number has another type.
        ModuleNotFoundError: torchmetrics is not installed.

    Note:
        Units: fractions from 0 to 1. Cost: ``K * K`` int64 counts; divisions in float64, where
        ``MulticlassJaccardIndex`` rounds counts to float32. Move it with ``.to()``. It waits for
        the device at every update, to check the ids. In a distributed run :meth:`compute` is a
        collective call.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.1, the mIoU of segmentation networks on generated images.

    Example:
        >>> metric = SegmentationConsistency(3)
        >>> predicted = torch.tensor([[[0, 0], [1, 1]]])
        >>> metric.update(predicted, torch.tensor([[[0, 0], [0, 255]]]))
        >>> scores = metric.compute()
        >>> round(scores.miou, 4), scores.classes_present
        (0.3333, 2)
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255) -> None:
        super().__init__()
        owner = "SegmentationConsistency"
        check_int(owner, "num_classes", num_classes, minimum=2)
        check_int(owner, "ignore_index", ignore_index, minimum=None)
        classification = require("torchmetrics.classification", extra="metrics", purpose=owner)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = classification.MulticlassConfusionMatrix(
            num_classes, ignore_index=ignore_index, validate_args=False
        )

    def update(self, predicted: Int[Tensor, "B H W"], labels: Int[Tensor, "B H W"]) -> None:
        """Add a batch of maps.

        Args:
            predicted: Class id of every pixel, such as ``logits.argmax(1)``.
            labels: The label maps that the images were made from, with ``ignore_index``.

        Raises:
            InputError: Shapes or devices differ, or an id is out of range (names its position).
            DTypeError: An argument is no integer tensor.
        """
        owner = "SegmentationConsistency.update"
        counts = self.confusion.confmat
        check_tensor(owner, "labels", labels, "B H W", kind="integer", like=counts)
        check_tensor(owner, "predicted", predicted, "B H W", kind="integer", like=counts)
        if predicted.shape != labels.shape:
            shapes = f"{tuple(predicted.shape)} and {tuple(labels.shape)}"
            msg = f"{owner}: predicted must have the shape of labels; got {shapes}"
            raise InputError(msg)
        # read on the host, for a message on every device
        check_label_values(owner, "labels", labels.cpu(), self.num_classes, self.ignore_index)
        check_label_values(owner, "predicted", predicted.cpu(), self.num_classes, None)
        if len(labels):
            self.confusion.update(predicted.long(), labels.long())

    def compute(self) -> SegmentationScores:
        """Return the scores of all maps, over all processes.

        Raises:
            InputError: There was no labelled pixel.
        """
        with self.confusion.sync_context():
            counts = self.confusion.confmat.double()
        hits = counts.diagonal()
        labelled = counts.sum()
        if not bool(labelled > 0):
            msg = "SegmentationConsistency.compute: labels must have labelled pixels; got none"
            raise InputError(msg)
        union = counts.sum(dim=0) + counts.sum(dim=1) - hits
        if 0 <= self.ignore_index < self.num_classes:
            union[self.ignore_index] = 0
        present = union > 0
        iou = torch.where(present, hits / union, torch.nan)
        accuracy = float(hits.sum() / labelled)
        return SegmentationScores(float(iou[present].mean()), accuracy, iou, int(present.sum()))

    def reset(self) -> None:
        """Forget all maps."""
        self.confusion.reset()
