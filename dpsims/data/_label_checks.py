"""Checks and defaults of :class:`dpsims.data.LabelSpec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpsims._checks import check_int, check_ints
from dpsims.errors import DTypeError, InputError

RGB = tuple[int, int, int]


def shortened(values: Sequence[object], limit: int = 10) -> str:
    """List the first values as text, and how many there are if they are more."""
    listed = ", ".join(f"{value!r:.30}" for value in values[:limit])
    return f"[{listed}]" if len(values) <= limit else f"[{listed}, ...] ({len(values)} in all)"


def as_int64(ids: object, *, owner: str = "LabelSpec.map_ids", name: str = "ids") -> Tensor:
    """Return an integer tensor or array as an int64 tensor, or say that it is none."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        # a copy: arrays from image readers are read-only, which torch warns about
        return torch.from_numpy(ids.astype(np.int64))
    if isinstance(ids, Tensor) and ids.layout is not torch.strided:
        msg = f"{owner}: {name} must be a dense tensor; got layout {ids.layout}"
        raise InputError(msg)
    if isinstance(ids, Tensor) and not (
        ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool
    ):
        return ids.long()
    got = ids.dtype if isinstance(ids, Tensor | np.ndarray) else type(ids).__name__
    msg = f"{owner}: {name} must be a tensor or array of integers; got {got}"
    raise DTypeError(msg)


def checked_id_map(
    id_map: Mapping[int, int] | None, num_classes: int, ignore_index: int
) -> dict[int, int] | None:
    """Return a copy of the map from file ids to class ids, or say what is wrong with it."""
    if id_map is None:
        return None
    if not isinstance(id_map, Mapping):
        msg = f"LabelSpec: id_map must be a mapping; got {type(id_map).__name__}"
        raise DTypeError(msg)
    if not id_map:
        msg = "LabelSpec: id_map must not be empty; got {}"
        raise InputError(msg)
    for file_id, class_id in id_map.items():
        check_int("LabelSpec", "a key of id_map", file_id, minimum=-(2**63))
        name = f"id_map[{file_id}]"
        check_int("LabelSpec", name, class_id, minimum=None)
        if file_id >= 2**63 or not (0 <= class_id < num_classes or class_id == ignore_index):
            msg = (
                f"LabelSpec: {name} must map a 64-bit id to a class in [0, {num_classes}) or to "
                f"the ignored id {ignore_index}; got {class_id}"
            )
            raise InputError(msg)
    return dict(id_map)


def parsed_id(key: object) -> object:
    """Return the id that a JSON key spells."""
    if not isinstance(key, str):
        return key
    try:
        return int(key)
    except ValueError:
        msg = f"LabelSpec.from_dict: the keys of id_map must be integers; got {key!r:.40}"
        raise InputError(msg) from None


def _check_per_class(name: str, values: object, num_classes: int) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        msg = f"LabelSpec: {name} must be a sequence; got {type(values).__name__}"
        raise DTypeError(msg)
    if len(values) != num_classes:
        msg = f"LabelSpec: {name} must have num_classes={num_classes} entries; got {len(values)}"
        raise InputError(msg)


def checked_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return one name per class, or say what is wrong with the given ones."""
    if names is None:
        return tuple(f"class {i}" for i in range(num_classes))
    _check_per_class("names", names, num_classes)
    for index, name in enumerate(names):
        if not isinstance(name, str):
            msg = f"LabelSpec: names[{index}] must be a str; got {type(name).__name__}"
            raise DTypeError(msg)
    return tuple(names)


def checked_palette(palette: Sequence[Sequence[int]] | None, num_classes: int) -> tuple[RGB, ...]:
    """Return one colour per class, or say what is wrong with the given ones."""
    if palette is None:
        return tuple(_default_color(i) for i in range(num_classes))
    _check_per_class("palette", palette, num_classes)
    for index, color in enumerate(palette):
        check_ints("LabelSpec", f"palette[{index}]", color, minimum=0)
        if len(color) != 3 or max(color) > 255:
            msg = f"LabelSpec: palette[{index}] must be 3 numbers from 0 to 255; got {color!r:.60}"
            raise InputError(msg)
    return tuple((color[0], color[1], color[2]) for color in palette)


def _default_color(class_id: int) -> RGB:
    # the root of x^4 = x + 1 spreads points evenly over a cube, however many there are;
    # starting at 48 keeps every colour apart from the black of unlabelled pixels
    root = 1.22074408460575947536
    red, green, blue = (
        48 + int(208 * ((0.5 + (class_id + 1) / root**axis) % 1)) for axis in (1, 2, 3)
    )
    return red, green, blue
