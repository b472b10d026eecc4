"""Figures of a generator: label consistency, Fréchet distance, difference between noises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dpsims.metrics import (
    SegmentationConsistency,
    frechet_distance,
    lpips_distance,
    pairwise_diversity,
)
from dpsims_reference.batches import Batch, collate
from dpsims_reference.config import Config
from dpsims_reference.data.labeller import PseudoLabeller
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.datasets import Split, build_splits
from dpsims_reference.evaluation.extractors import FEATURES, PooledFeatures
from dpsims_reference.networks import ImageGenerator
from dpsims_reference.randomness import derive_generator
from dpsims_reference.sampling import TrainedGenerator

_BATCH = 16


class Reference(NamedTuple):
    """Real samples of one split, and what they score themselves."""

    batch: Batch
    features: Float[Tensor, "N 112"]
    floor: float
    ceiling: dict[str, float]


class Evaluator:
    """Measures generators against the real images of a configuration.

    Built once and used at the start and at the end of a run, so that both figures stand beside the
    same floor and ceiling.

    Args:
        config: The run.
        num_images: Images per figure.
        datasets: The splits by name; ``None`` builds them.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_images: int = 96,
        datasets: Mapping[Split, ImageDataset] | None = None,
    ) -> None:
        self.config = config
        datasets = build_splits(config.data) if datasets is None else datasets
        self.extractor = PooledFeatures().eval()
        self.labeller: PseudoLabeller | None = getattr(datasets["train"], "labeller", None)
        self.references = {
            split: self._reference(dataset, split, num_images)
            for split, dataset in datasets.items()
        }

    @torch.no_grad()
    def _reference(self, dataset: ImageDataset, split: str, count: int) -> Reference:
        batch, other = (self._draw(dataset, split, count, turn) for turn in (0, 1))
        features = self._features(batch.images)
        floor = frechet_distance(features, self._features(other.images), warn_rank=False)
        return Reference(batch, features, floor, self._consistency(batch.images, batch.labels))

    def _draw(self, dataset: ImageDataset, split: str, count: int, turn: int) -> Batch:
        samples = []
        for position in range(count):
            rng = derive_generator(self.config.seed, f"evaluation-{split}", turn, position)
            index = int(torch.randint(len(dataset), (), generator=rng))
            samples.append(dataset.draw(index, rng))
        return collate(samples, instances=self.config.data.instances)

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.extractor(part) for part in images.split(_BATCH)]).double()

    def _consistency(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        if self.labeller is None:
            return {}
        data = self.config.data
        score = SegmentationConsistency(data.num_classes, ignore_index=data.ignore_index)
        for part, wanted in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
            score.update(self.labeller.predict(part.clamp(-1, 1)), wanted)
        found = score.compute()
        return {"miou": float(found.miou), "pixel_accuracy": float(found.pixel_accuracy)}

    @torch.no_grad()
    def measure(self, generator: ImageGenerator, *, with_lpips: bool = False) -> dict[str, Any]:
        """The figures of ``generator`` in evaluation mode, by split."""
        figures: dict[str, Any] = {"features": FEATURES}
        for split, reference in self.references.items():
            first, second = (self._images(generator, reference.batch, split, n) for n in (0, 1))
            figures[split] = {
                "frechet": frechet_distance(
                    reference.features, self._features(first), warn_rank=False
                ),
                "frechet_floor": reference.floor,
                "noise_difference": float((first.clamp(-1, 1) - second.clamp(-1, 1)).abs().mean()),
                "pixels_out_of_range": float((first.abs() > 1).float().mean()),
                **self._consistency(first, reference.batch.labels),
                **{f"{name}_ceiling": value for name, value in reference.ceiling.items()},
            }
            if with_lpips:
                pair = torch.stack([first, second]).clamp(-1, 1)
                figures[split]["lpips"] = float(pairwise_diversity(pair, lpips_distance()).mean())
        return figures

    def _images(self, generator: ImageGenerator, batch: Batch, split: str, which: int) -> Tensor:
        """Images of every map; per-pixel noise, if any, is the same for each ``which``."""
        rng = derive_generator(self.config.seed, f"evaluation-latents-{split}", which)
        latents = generator.sample_latents(len(batch.labels), generator=rng)
        rng = derive_generator(self.config.seed, f"evaluation-noise-{split}")
        noise = generator.sample_noise(len(batch.labels), batch.labels.shape[-2:], generator=rng)
        device = latents.device
        parts = []
        for start in range(0, len(latents), _BATCH):
            rows = slice(start, start + _BATCH)
            parts.append(
                generator(
                    batch.labels[rows].to(device),
                    latents[rows],
                    None if batch.extra is None else batch.extra[rows].to(device),
                    None if noise is None else noise[rows],
                ).images.cpu()
            )
        return torch.cat(parts)


def evaluate(
    trained: TrainedGenerator, *, num_images: int = 96, with_lpips: bool = False
) -> dict[str, Any]:
    """The figures of a trained run."""
    evaluator = Evaluator(trained.config, num_images=num_images)
    return evaluator.measure(trained.generator, with_lpips=with_lpips)


_ROWS = (
    ("miou", "label consistency, mIoU", "{:.3f}", "ceiling", "miou_ceiling"),
    ("pixel_accuracy", "label consistency, pixels", "{:.3f}", "ceiling", "pixel_accuracy_ceiling"),
    ("frechet", "Fréchet distance", "{:.0f}", "floor", "frechet_floor"),
    ("noise_difference", "difference between noises", "{:.3f}", "", ""),
    ("lpips", "LPIPS between noises", "{:.3f}", "", ""),
)


def format_figures(*measured: dict[str, Any], names: tuple[str, ...] = ("value",)) -> str:
    """A Markdown table: one column per measurement, and the floor or ceiling beside it.

    Args:
        *measured: Results of :meth:`Evaluator.measure`.
        names: Their column headings.
    """
    lines = [
        "| figure | maps | " + " | ".join(names) + " | real images |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for key, title, form, kind, bound in _ROWS:
        for split in ("train", "heldout"):
            if key not in measured[0].get(split, {}):
                continue
            cells = [form.format(figures[split][key]) for figures in measured]
            real = f"{form.format(measured[-1][split][bound])} ({kind})" if kind else ""
            lines.append(f"| {title} | {split} | " + " | ".join(cells) + f" | {real} |")
    lines.append(f"\nFréchet distance: on the features {measured[0]['features']}; not FID.")
    return "\n".join(lines)
