"""``eval_card.json``: everything that someone needs to trust, or to repeat, a figure."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

import dpsims
from dpsims.errors import DataError
from dpsims_reference.config_json import to_dict
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.evaluation.features import kernel_subsets
from dpsims_reference.evaluation.protocol import Instruments, Measurement, Protocol, device_name
from dpsims_reference.sampling import TrainedGenerator

CARD = "eval_card.json"
VERSION = 1
_NUMBER, _TEXT, _OBJECT, _LIST = (int, float), (str,), (dict,), (list,)
# path of every entry that a card of version 1 has, and the kinds it may be of
_SCHEMA: dict[str, tuple[type, ...]] = {
    "card_version": (int,),
    "figures": _OBJECT,
    "num_images": (int,),
    "num_diversity_maps": (int,),
    "protocol": _OBJECT,
    "protocol.batch_size": (int,),
    "protocol.samples_per_map": (int,),
    "protocol.seed": (int,),
    "kernel": (dict, type(None)),
    "extractors": _LIST,
    "segmenters": _LIST,
    "distances": _LIST,
    "classes": _OBJECT,
    "classes.names": _LIST,
    "classes.iou": _OBJECT,
    "speed": (dict, type(None)),
    "data.split": _TEXT,
    "data.fingerprint": _TEXT,
    "data.image_size": _LIST,
    "run.config_sha256": _TEXT,
    "run.seed": (int,),
    "run.step": (int, type(None)),
    "run.manifest_sha256": (str, type(None)),
    "versions.dpsims": _TEXT,
    "versions.torch": _TEXT,
    "versions.python": _TEXT,
    "device": _TEXT,
    "processes": (int,),
    "date": _TEXT,
}


def build_card(
    trained: TrainedGenerator,
    dataset: ImageDataset,
    instruments: Instruments,
    protocol: Protocol,
    found: Measurement,
    *,
    split: str,
    device: str,
    processes: int = 1,
) -> dict[str, Any]:
    """The card of a measurement, as JSON values."""
    config, speed = to_dict(trained.config), found.speed
    return {
        "card_version": VERSION,
        "figures": {name: _json_number(value) for name, value in found.figures.items()},
        "num_images": found.num_images,
        "num_diversity_maps": found.num_diversity_maps,
        "pixels": "8 bits per channel",
        "protocol": dataclasses.asdict(protocol),
        "kernel": _kernel_facts(instruments, protocol, found.num_images),
        "extractors": [each.facts for each in instruments.extractors],
        "segmenters": [each.facts for each in instruments.segmenters],
        "distances": [{"name": each.name, **each.facts} for each in instruments.distances],
        "classes": {
            "names": list(dataset.spec.names),
            "iou": {
                name: [_json_number(value) for value in scores.per_class_iou.tolist()]
                for name, scores in found.scores.items()
            },
        },
        "speed": None
        if speed is None
        else {**speed._asdict(), "image_size": list(speed.image_size)},
        "data": {
            "split": split,
            "fingerprint": dataset.fingerprint(),
            "image_size": list(dataset.image_size),
        },
        "run": {
            "config_sha256": config_sha256(config),
            "seed": trained.config.seed,
            "step": trained.step,
            "manifest_sha256": trained.manifest_sha256,
        },
        "versions": {
            "dpsims": dpsims.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": device_name(device),
        "processes": processes,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def _kernel_facts(
    instruments: Instruments, protocol: Protocol, count: int
) -> dict[str, int] | None:
    if not (instruments.extractors and protocol.kernel_distance):
        return None
    subsets, size = kernel_subsets(count, protocol.kernel_subset_size)
    return {"subsets": subsets, "subset_size": size}


def _json_number(value: float) -> float | None:
    """JSON has no NaN; a class that occurs nowhere has no IoU."""
    return None if math.isnan(value) else value


def config_sha256(config: dict[str, Any]) -> str:
    """A hash of a configuration's values, whatever their order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def check_card(card: object, *, source: str = "card") -> None:
    """Raise unless ``card`` has every entry that a card has, of the right kind.

    Raises:
        DataError: An entry is missing or of another kind, or the card is of a newer version; the
            message names the entry.
    """
    for path, kinds in _SCHEMA.items():
        value = card
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                msg = f"{source}: must have the entry {path}; got none"
                raise DataError(msg)
            value = value[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in kinds)
            msg = f"{source}: {path} must be {names}; got {type(value).__name__}"
            raise DataError(msg)
    assert isinstance(card, dict)
    if card["card_version"] > VERSION:
        msg = f"{source}: card_version must be at most {VERSION}; got {card['card_version']}"
        raise DataError(msg)
    for name, value in card["figures"].items():
        if "/" not in name or (value is not None and not isinstance(value, _NUMBER)):
            msg = f"{source}: figures must be numbers by figure/network; got {name!r}: {value!r}"
            raise DataError(msg)


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Check a card and write it.

    Raises:
        DataError: An entry is missing or of another kind.
    """
    check_card(card, source=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_card(path: Path) -> dict[str, Any]:
    """Read and check a card.

    Raises:
        DataError: The file is missing or no card.
    """
    try:
        card = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path}: must be an evaluation card; got {error!r:.100}"
        raise DataError(msg) from error
    check_card(card, source=str(path))
    return card
