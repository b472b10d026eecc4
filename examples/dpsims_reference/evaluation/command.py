"""``evaluate`` on the command line: instruments from options, then card, table and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from dpsims.errors import InputError
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.datasets import Split, build_splits
from dpsims_reference.evaluation import diversity
from dpsims_reference.evaluation.card import CARD, build_card, write_card
from dpsims_reference.evaluation.extractors import FeatureExtractor, efficientnet_lite1
from dpsims_reference.evaluation.pictures import (
    plot_class_iou,
    plot_confusion,
    write_confusion,
    write_sheet,
)
from dpsims_reference.evaluation.pretrained_extractors import inception_v3, swav_resnet50
from dpsims_reference.evaluation.processes import joined_processes
from dpsims_reference.evaluation.protocol import Instruments, Measurement, measure
from dpsims_reference.evaluation.segmenter_files import load_segmenter, read_ids
from dpsims_reference.evaluation.segmenters import Segmenter
from dpsims_reference.evaluation_options import FeatureName, InstrumentOptions, Protocol
from dpsims_reference.sampling import TrainedGenerator, load_generator


def build_instruments(
    options: InstrumentOptions, dataset: ImageDataset, *, device: str
) -> Instruments:
    """Read every network from this disk.

    Raises:
        BackboneError: Weights are missing; the message says where to put them.
        DataError: The segmenter's file is missing or no program.
        InputError: ``swav`` is wanted without its weights.
    """
    segmenters = _segmenters(options, dataset, device)
    extractors = tuple(_extractor(name, options) for name in options.features)
    distances = [diversity.pixels()]
    if options.lpips != "none":
        weights = options.lpips_weights
        distances.append(diversity.lpips(options.lpips, weights=weights, device=device))
    if "efficientnet_lite1" in options.features:
        distances.append(diversity.features(device))
    return Instruments(extractors, segmenters, tuple(distances))


def _extractor(name: FeatureName, options: InstrumentOptions) -> FeatureExtractor:
    if name == "efficientnet_lite1":
        return efficientnet_lite1()
    if name == "swav":
        if options.swav_weights is None:
            msg = "evaluate: swav_weights must name SwAV's checkpoint for swav; got None"
            raise InputError(msg)
        return swav_resnet50(options.swav_weights)
    return inception_v3(options.inception_weights, antialias=name.endswith("_antialias"))


def _segmenters(
    options: InstrumentOptions, dataset: ImageDataset, device: str
) -> tuple[Segmenter, ...]:
    num_classes = dataset.spec.num_classes
    if options.segmenter is not None:
        found = load_segmenter(
            options.segmenter,
            num_classes=num_classes,
            device=device,
            ids=None if options.segmenter_ids is None else read_ids(options.segmenter_ids),
            size=options.segmenter_size,
            mean=options.segmenter_mean,
            std=options.segmenter_std,
        )
        return (found,)
    labeller = getattr(dataset, "labeller", None)
    if labeller is None:
        return ()
    labeller.to(device)
    weights = {"sha256": str(labeller.backbone.weights_sha256)}
    return (
        Segmenter(
            lambda images: labeller.predict(2 * images - 1),
            name="pseudo_labeller",
            num_classes=num_classes,
            # it takes images in [-1, 1]
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            weights=weights,
        ),
    )


def evaluate_run(
    run: Path,
    out: Path,
    options: InstrumentOptions,
    protocol: Protocol,
    *,
    split: Split | Literal["auto"] = "auto",
    device: str = "cpu",
) -> Measurement:
    """Measure a run, print the table, write card and pictures to ``out``.

    Under ``torchrun`` every process measures its share, and the first one writes.
    """
    with joined_processes(device) as (process, device):
        trained = load_generator(run, device=device)
        splits = build_splits(trained.config.data)
        if split == "auto":
            split = "heldout" if "heldout" in splits else "train"
        if split not in splits:
            msg = f"evaluate: split must be one of {sorted(splits)}; got {split!r}"
            raise InputError(msg)
        dataset = splits[split]
        instruments = build_instruments(options, dataset, device=device)
        found = measure(trained, dataset, instruments, protocol, process=process, device=device)
        if process.rank == 0:
            card = build_card(
                trained,
                dataset,
                instruments,
                protocol,
                found,
                split=split,
                device=device,
                processes=process.world_size,
            )
            write_card(out / CARD, card)
            _write_pictures(out, trained, dataset, found, protocol)
            print(f"{format_card(card)}\n\nwritten to {out}")
    return found


def _write_pictures(
    out: Path,
    trained: TrainedGenerator,
    dataset: ImageDataset,
    found: Measurement,
    protocol: Protocol,
) -> None:
    write_sheet(out / "sheet.png", trained, dataset, seed=protocol.seed)
    for name, scores in found.scores.items():
        real = found.real_scores[name]
        plot_class_iou(out / f"class_iou-{name}.png", dataset.spec, scores, real, segmenter=name)
        plot_confusion(out / f"confusion-{name}.png", dataset.spec, scores, segmenter=name)
        write_confusion(out / f"confusion-{name}.csv", dataset.spec, scores)


def format_card(card: dict[str, Any]) -> str:
    """The figures of a card as a Markdown table."""
    run, data = card["run"], card["data"]
    lines = [
        f"step {run['step']}, {card['num_images']} images of {data['split']}, "
        f"{card['num_diversity_maps']} maps for the diversity",
        "",
        "| figure | network | value |",
        "|---|---|---|",
    ]
    for name, value in card["figures"].items():
        figure, _, network = name.partition("/")
        lines.append(f"| {figure.replace('_', ' ')} | {network} | {value:.4g} |")
    speed = card["speed"]
    if speed is not None:
        where = f"{speed['device']}, batch {speed['batch_size']}"
        lines.append(f"| images per second | {where} | {speed['images_per_second']:.4g} |")
    return "\n".join(lines)
