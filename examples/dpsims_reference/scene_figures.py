"""Street scenes as tensors, and what measures images of them: for short scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsims._checks import check_int
from dpsims.data import LabelSpec
from dpsims.metrics import frechet_distance, l1_distance, pairwise_diversity
from dpsims_reference.data.scenes import StreetScenes
from dpsims_reference.data.scenes.canvas import CLASS_COLORS, CLASS_NAMES
from dpsims_reference.evaluation.extractors import PooledFeatures
from dpsims_reference.figures import captioned_grid, label_pictures, save_image, to_uint8
from dpsims_reference.segmenting import SegmentationNet, score_segmenter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where scenes go unless something else is asked for."""

_BATCH, _SHOWN = 16, 8


class Scenes(NamedTuple):
    """Images in [-1, 1] and their label maps."""

    images: Float[Tensor, "B 3 H W"]
    labels: Int64[Tensor, "B H W"]


def stack_scenes(
    count: int,
    looks: Sequence[str],
    *,
    seed: int = 0,
    size: int = 64,
    device: torch.device | str = DEVICE,
) -> Scenes:
    """``count`` streets with their label maps; street ``i`` in look ``i`` of ``looks``, in turn.

    Args:
        count: Number of streets.
        looks: Names of :attr:`StreetScenes.look_names`.
        seed: Another seed gives other streets.
        size: Height and width.
        device: Where the tensors go.

    Raises:
        InputError: A size too small, or no such look.
    """
    scenes = StreetScenes(count, image_size=(size, size), seed=seed)
    samples = [scenes.render(i, 0, look=looks[i % len(looks)]) for i in range(count)]
    images = torch.stack([sample.image for sample in samples])
    labels = torch.stack([sample.labels for sample in samples]).long()
    return Scenes(images.to(device), labels.to(device))


class SceneReport:
    """Pictures and figures of images that were made from the same streets in several ways.

    Args:
        real: Real scenes with their maps: the segmenter learns from them, and the Fréchet distance
            is the distance to their images.
        labels: The label map of every image that is to be added, of other streets.
        segmenter_steps: Training steps of the segmenter.
    """

    def __init__(
        self, real: Scenes, labels: Int64[Tensor, "B H W"], *, segmenter_steps: int = 200
    ) -> None:
        self.labels = labels
        self.segmenter = _segmenter(real, segmenter_steps)
        self._extractor = PooledFeatures().to(labels.device).eval()
        self._features = self._pooled(real[0])
        maps = label_pictures(LabelSpec(len(CLASS_NAMES), palette=CLASS_COLORS), labels[:_SHOWN])
        self.rows: list[tuple[str, Sequence[NDArray[np.uint8]]]] = [("label map", maps)]
        self.figures: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def add(
        self, name: str, samples: Sequence[Float[Tensor, "B 3 H W"]], *, show: bool = True
    ) -> None:
        """Measure one or more images of every map; the first streets' go into the picture.

        ``mIoU`` compares the map with what the segmenter sees, and ``Frechet`` is on pooled
        features of EfficientNet-Lite1 (not FID; small sets only rank); both are of the first
        image of each map. ``between noises`` is the mean difference of pixels over all pairs of
        images of one map.
        """
        data = samples[0], self.labels.to(torch.uint8)
        scores, _ = score_segmenter(self.segmenter, data, len(CLASS_NAMES))
        distance = frechet_distance(self._features, self._pooled(samples[0]), warn_rank=False)
        self.figures[name] = {"mIoU": scores.miou, "Frechet": distance}
        if len(samples) > 1:
            difference = pairwise_diversity(torch.stack(list(samples)), l1_distance).mean()
            self.figures[name]["between noises"] = float(difference)
        for number, images in enumerate(samples if show else ()):
            caption = f"{name}, {number + 1}" if len(samples) > 1 else name
            pictures = list(to_uint8(images[:_SHOWN]))
            self.rows.append((caption.replace(", ", "\n"), pictures))

    @torch.no_grad()
    def add_noises(
        self,
        name: str,
        generator: nn.Module,
        latent_dim: int,
        *,
        num_noises: int = 4,
        show: bool = True,
    ) -> None:
        """Add what ``generator(labels, noise)`` makes in evaluation mode, of the same noises."""
        rng = torch.Generator().manual_seed(0)
        shape = (num_noises, len(self.labels), latent_dim)
        noises = torch.randn(shape, generator=rng).to(self.labels.device)
        training = generator.training
        generator.eval()
        self.add(name, [self._render(generator, noise) for noise in noises], show=show)
        generator.train(training)

    def _render(self, generator: nn.Module, noise: Tensor) -> Tensor:
        parts = zip(self.labels.split(_BATCH), noise.split(_BATCH), strict=True)
        return torch.cat([generator(*part) for part in parts])

    def write(self, out: Path) -> None:
        """Write ``samples.png`` and ``figures.json``, and print the figures as a table."""
        save_image(out / "samples.png", captioned_grid(self.rows))
        text = json.dumps(self.figures, indent=1) + "\n"
        (out / "figures.json").write_text(text, encoding="utf-8")
        columns = list(dict.fromkeys(key for row in self.figures.values() for key in row))
        print(f"{'':<24}" + "".join(f"{column:>16}" for column in columns))
        for name, row in self.figures.items():
            cells = (f"{row[key]:16.3f}" if key in row else 16 * " " for key in columns)
            print(f"{name:<24}" + "".join(cells))

    @torch.no_grad()
    def _pooled(self, images: Tensor) -> Tensor:
        return torch.cat([self._extractor(part) for part in images.split(_BATCH)]).double()


def _segmenter(scenes: Scenes, steps: int) -> SegmentationNet:
    """One that knows real scenes as they are."""
    check_int("SceneReport", "segmenter_steps", steps)
    images, labels = scenes
    net = SegmentationNet(len(CLASS_NAMES)).to(images.device).train()
    optimizer = torch.optim.Adam(net.decoder.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (8,), device=images.device)
        loss = F.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()
