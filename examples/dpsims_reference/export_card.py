"""The JSON beside an exported generator: what goes in, what comes out, where it comes from."""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dpsims
from dpsims_reference.config_json import to_dict
from dpsims_reference.evaluation.card import config_sha256
from dpsims_reference.sampling import TrainedGenerator

VERSION = 1


class ExportCheck(NamedTuple):
    """How the file was compared with the run's own generator."""

    batch_sizes: tuple[int, ...]
    largest_difference: float
    """Relative to the largest pixel."""
    tolerance: float


def card_path(out: Path) -> Path:
    """Where the card of ``out`` goes."""
    return out.with_name(f"{out.name}.json")


def build_card(
    trained: TrainedGenerator,
    path: Path,
    format: str,  # noqa: A002
    inputs: dict[str, Tensor],
    check: ExportCheck,
) -> dict[str, Any]:
    """The card of the program in ``path``, as JSON values."""
    spec = trained.spec
    height, width = trained.config.data.image_size
    packages = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    return {
        "card_version": VERSION,
        "file": path.name,
        "format": format,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "inputs": [_input(trained, name, value) for name, value in inputs.items()],
        "outputs": [
            {
                "name": "images",
                "dtype": "float32",
                "shape": ["batch", 3, height, width],
                "values": "RGB meant to lie in [-1, 1]: clamp, then (x + 1) / 2",
            }
        ],
        "classes": list(spec.names),
        "check": {**check._asdict(), "batch_sizes": list(check.batch_sizes)},
        "run": {
            "config_sha256": config_sha256(to_dict(trained.config)),
            "step": trained.step,
            "manifest_sha256": trained.manifest_sha256,
        },
        "versions": {
            "dpsims": dpsims.__version__,
            "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def _input(trained: TrainedGenerator, name: str, value: Tensor) -> dict[str, Any]:
    classes = trained.config.data.num_classes
    values = {
        "labels": f"class ids 0 to {classes - 1}; 255 is a pixel without a class",
        "latents": "standard normal numbers",
        "extra": "instance offsets in [-1, 1], as dpsims.instance_offsets makes them",
        "noise": "standard normal numbers",
    }
    return {
        "name": name,
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": ["batch", *value.shape[1:]],
        "values": values[name],
    }


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Write a card."""
    path.write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
