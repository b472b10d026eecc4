"""``labels.json``: what the ids of a folder mean, and which labeller made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpsims._checks import check_int
from dpsims.data import LabelSpec
from dpsims.errors import DataError, InputError

_LABELLER = "labeller"


def read_label_spec(path: str | Path, *, num_classes: int | None = None) -> LabelSpec:
    """Read a folder's ``labels.json``; without the file, ids are classes as they are.

    Args:
        path: The file. It holds what :meth:`dpsims.data.LabelSpec.to_dict` returns; ``"labeller"``
            may name the file of the labeller that made the maps.
        num_classes: The number of classes that is wanted; needed where there is no file.

    Raises:
        InputError: The file has another number of classes, or there is neither file nor number.
        DataError: The file cannot be read.

    Source:
        Not from the paper: the package's own file format.
    """
    path = Path(path)
    if num_classes is not None:
        check_int("read_label_spec", "num_classes", num_classes)
    if not path.exists():
        if num_classes is None:
            msg = f"read_label_spec: num_classes must be given without {path}; got None"
            raise InputError(msg)
        return LabelSpec(num_classes)
    values = _read(path)
    values.pop(_LABELLER, None)
    try:
        spec = LabelSpec.from_dict(values)
    except (ValueError, TypeError) as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from error
    if num_classes is not None and spec.num_classes != num_classes:
        msg = (
            f"read_label_spec: num_classes must be {spec.num_classes}, as {path} says; "
            f"got {num_classes}"
        )
        raise InputError(msg)
    return spec


def labeller_path(root: Path) -> Path | None:
    """The file of the labeller that made the maps of ``root``, if ``labels.json`` names one."""
    path = root / "labels.json"
    name = _read(path).get(_LABELLER) if path.exists() else None
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        msg = f"{path}: labeller must be a file name without folders; got {name!r:.80}"
        raise DataError(msg)
    return root / name


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path}: is not readable JSON ({error!s:.120})"
        raise DataError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path}: must hold a JSON object; got {type(values).__name__}"
        raise DataError(msg)
    return values
