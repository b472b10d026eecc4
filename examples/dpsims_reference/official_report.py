"""Looks through an official data set before anyone trains on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dpsims.data import LabelSpec
from dpsims.errors import DataError
from dpsims_reference.config import DataConfig
from dpsims_reference.data.files import shown
from dpsims_reference.data.official import OfficialDataset, Split
from dpsims_reference.data.paired import PresenceScan
from dpsims_reference.data.scan_progress import ScanProgress
from dpsims_reference.datasets import official_dataset
from dpsims_reference.presets import preset

_SPLITS: tuple[Split, ...] = ("train", "heldout")


def check_official(name: str, root: Path, *, workers: int = 0, partial: bool = False) -> str:
    """Check that both splits are complete, read every label map, and say what they hold.

    Args:
        name: ``"ade20k"``, ``"coco_stuff"`` or ``"cityscapes"``.
        root: The folder that training would get as ``data.root``.
        workers: Processes that read the maps.
        partial: Accept a download with images missing.

    Returns:
        Problems, and for each class the share of the images that hold it.

    Source:
        Not from the paper: printed by ``python -m dpsims_reference check-data``.
    """
    config = replace(preset(name).data, partial=partial)
    problems, shares = list[str](), dict[str, list[float]]()
    spec: LabelSpec | None = None
    for split in _SPLITS:
        try:
            dataset = _opened(config, root, split, problems)
            dataset.scan = PresenceScan(workers=workers, progress=ScanProgress())
            found = dataset.presence().double().mean(0).tolist()
        except DataError as error:
            problems.append(str(error))
            continue
        shares[f"{split} ({len(dataset)})"], spec = found, dataset.spec
    lines = [f"{shown(root)}: {name}"]
    lines += [f"  problem: {problem}." for problem in problems] or ["  no problems found"]
    if spec is not None:
        lines += ["", "% of images with a class, of " + " and ".join(shares)]
        for class_id, class_name in enumerate(spec.names):
            if class_id != spec.ignore_index:
                values = "".join(f"{100 * share[class_id]:>8.2f}" for share in shares.values())
                lines.append(f"{class_id:>5}{values}  {class_name}")
    return "\n".join(lines)


def _opened(config: DataConfig, root: Path, split: Split, problems: list[str]) -> OfficialDataset:
    """The data set; without instances, and with a problem more, where only they are missing."""
    plain = official_dataset(replace(config, instances=False), root, split)
    if config.instances:
        try:
            official_dataset(config, root, split)
        except DataError as error:
            problems.append(f"{error}; train with --data.no-instances to do without")
    return plain
