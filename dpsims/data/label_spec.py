"""What the ids of a label map mean: number, names, colours, and ids in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from dpsims._checks import check_int, check_label_values, check_tensor
from dpsims.data._label_checks import (
    RGB,
    as_int64,
    checked_id_map,
    checked_names,
    checked_palette,
    parsed_id,
    shortened,
)
from dpsims.errors import DTypeError, InputError

_IGNORED_COLOR: RGB = (0, 0, 0)
# names and colours are made for every class: a bad number in a file must not fill the memory
_MAX_CLASSES = 1 << 16
# ids spread wider than this are looked up by bisection instead of in a table
_TABLE_SIZE = 1 << 16
_KEYS = ("num_classes", "ignore_index", "id_map", "names", "palette")


@dataclass(frozen=True, init=False)
class LabelSpec:
    """Describe the semantic classes of a data set once, for reading, drawing and saving.

    Class ids run from 0 to ``num_classes - 1``. Files often hold other ids; ``id_map`` says which
    class each of them is, and which are unlabelled.

    Args:
        num_classes: Number ``K`` of classes.
        ignore_index: Id of unlabelled pixels. An id below ``num_classes`` makes that class
            unlabelled; 255 must lie outside the classes, since it is the default.
        id_map: Class id, or ``ignore_index``, of every id that a file may hold. ``None`` means
            that files hold class ids already.
        names: One name per class. ``None`` means ``"class 0"``, ``"class 1"``, ...
        palette: One RGB colour per class, 0 to 255. ``None`` takes well-separated colours that
            depend on the class id only.

    Shape:
        - :meth:`map_ids` keeps the shape of its ids, :meth:`colorize` gives ``(H, W, 3)`` bytes of
          a map ``(H, W)``

    Raises:
        InputError: A size, an id, a name or a colour is out of range.
        DTypeError: An argument has another type.

    Note:
        Units: colours are 8-bit RGB. The object is immutable (treat ``id_map`` as read-only),
        compares by value and can be pickled.

    Source:
        Not from the paper. Its data sets: 183 classes (COCO-Stuff), 151 (ADE-20K) and 35
        (Cityscapes), Sec. 4.1. The default colours follow the additive recurrence of Roberts,
        "The Unreasonable Effectiveness of Quasirandom Sequences" (2018), in three dimensions.

    Example:
        >>> spec = LabelSpec(2, id_map={7: 0, 8: 1, 0: 255}, names=["road", "sidewalk"])
        >>> spec.map_ids(torch.tensor([[7, 8], [0, 7]]))
        tensor([[  0,   1],
                [255,   0]], dtype=torch.uint8)
        >>> LabelSpec.from_dict(spec.to_dict()) == spec
        True
    """

    num_classes: int
    ignore_index: int
    # a dict cannot be hashed; equal specs still hash alike
    id_map: dict[int, int] | None = field(hash=False)
    names: tuple[str, ...]
    palette: tuple[RGB, ...]

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        id_map: Mapping[int, int] | None = None,
        names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
    ) -> None:
        check_int("LabelSpec", "num_classes", num_classes)
        check_int("LabelSpec", "ignore_index", ignore_index, minimum=-(2**63))
        if num_classes > _MAX_CLASSES or ignore_index >= 2**63:
            msg = (
                f"LabelSpec: num_classes must be at most {_MAX_CLASSES} and ignore_index below "
                f"2**63; got {num_classes} and {ignore_index}"
            )
            raise InputError(msg)
        if ignore_index == 255 < num_classes:
            msg = (
                "LabelSpec: ignore_index must not be 255 with more than 255 classes, class 255 "
                f"would be lost (use -1); got num_classes={num_classes}"
            )
            raise InputError(msg)
        values = {
            "num_classes": num_classes,
            "ignore_index": ignore_index,
            "id_map": checked_id_map(id_map, num_classes, ignore_index),
            "names": checked_names(names, num_classes),
            "palette": checked_palette(palette, num_classes),
        }
        # the dataclass is frozen: its own __setattr__ refuses
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def map_ids(self, ids: Int[Tensor, "*shape"] | np.ndarray[Any, Any]) -> Int[Tensor, "*shape"]:
        """Turn the ids of a file into class ids.

        Args:
            ids: Integer map as read from a file, of any shape; a tensor or a NumPy array.

        Returns:
            A new tensor on the same device, uint8 where every class id and ``ignore_index`` fit,
            else int64.

        Raises:
            InputError: Some ids are not known; the message lists them.
            DTypeError: ``ids`` holds no integers.
        """
        flat = as_int64(ids)
        source = self._file_ids()
        pairs = torch.tensor(sorted(source.items()), device=flat.device)
        known, classes = pairs[:, 0].contiguous(), pairs[:, 1].to(self._dtype())
        lowest, highest = min(source), max(source)
        inside = (flat >= lowest) & (flat <= highest)
        if highest - lowest < _TABLE_SIZE:
            slots = known.new_full((highest - lowest + 1,), -1)
            slots[known - lowest] = torch.arange(len(known), device=flat.device)
            slot = slots[torch.where(inside, flat - lowest, 0)]
        else:
            slot = torch.searchsorted(known, flat).clamp_(max=len(known) - 1)
            inside &= known[slot] == flat
        unknown = ~inside | (slot < 0)
        if bool(unknown.any()):
            raise InputError(self._unknown_message(flat[unknown]))
        return classes[slot]

    def colorize(self, labels: Int[Tensor, "*B H W"]) -> UInt8[Tensor, "*drawn"]:
        """Draw label maps in the palette's colours; unlabelled pixels are black.

        Args:
            labels: Class ids, one map ``(H, W)`` or a batch ``(B, H, W)``.

        Returns:
            uint8 RGB: ``(H, W, 3)`` for one map, as image writers want it; ``(B, 3, H, W)`` for a
            batch.

        Raises:
            InputError: An id that is neither a class nor ``ignore_index``, another rank, or no
                pixels.
            DTypeError: ``labels`` is not an integer tensor.
        """
        if not isinstance(labels, Tensor):
            msg = f"LabelSpec.colorize: labels must be a torch.Tensor; got {type(labels).__name__}"
            raise DTypeError(msg)
        if labels.dim() not in (2, 3):
            shape = tuple(labels.shape)
            msg = f"LabelSpec.colorize: labels must have shape (H, W) or (B, H, W); got {shape}"
            raise InputError(msg)
        classes = as_int64(labels, owner="LabelSpec.colorize", name="labels")
        layout = "H W" if labels.dim() == 2 else "B H W"
        check_tensor("LabelSpec.colorize", "labels", classes, layout, kind="integer")
        check_label_values(
            "LabelSpec.colorize", "labels", classes.cpu(), self.num_classes, self.ignore_index
        )
        colors = torch.tensor(
            [*self.palette, _IGNORED_COLOR], dtype=torch.uint8, device=labels.device
        )
        classes = torch.where(classes == self.ignore_index, self.num_classes, classes)
        drawn = colors[classes]
        return drawn if labels.dim() == 2 else drawn.permute(0, 3, 1, 2).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary of plain values that JSON can hold; ids in files become strings."""
        id_map = None if self.id_map is None else sorted(self.id_map.items())
        return {
            "num_classes": self.num_classes,
            "ignore_index": self.ignore_index,
            "id_map": None if id_map is None else {str(key): to for key, to in id_map},
            "names": list(self.names),
            "palette": [list(color) for color in self.palette],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelSpec:
        """Build the spec that :meth:`to_dict` described.

        Args:
            values: Its result, before or after JSON. Keys other than ``"num_classes"`` may be
                absent.

        Raises:
            InputError: A key is unknown, ``"num_classes"`` is missing, or a value is out of range.
            DTypeError: A value has another type.
        """
        if not isinstance(values, Mapping):
            msg = f"LabelSpec.from_dict: values must be a mapping; got {type(values).__name__}"
            raise DTypeError(msg)
        unknown = [key for key in values if key not in _KEYS]
        if unknown or "num_classes" not in values:
            msg = (
                "LabelSpec.from_dict: values must have the key 'num_classes' and no keys besides "
                f"{', '.join(_KEYS)}; got {shortened(list(values))}"
            )
            raise InputError(msg)
        options = {key: values[key] for key in _KEYS[1:] if key in values}
        if isinstance(options.get("id_map"), Mapping):
            options["id_map"] = {parsed_id(key): to for key, to in options["id_map"].items()}
        return cls(values["num_classes"], **options)

    def _file_ids(self) -> dict[int, int]:
        if self.id_map is not None:
            return self.id_map
        return {i: i for i in (*range(self.num_classes), self.ignore_index)}

    def _dtype(self) -> torch.dtype:
        fits = self.num_classes <= 256 and 0 <= self.ignore_index <= 255
        return torch.uint8 if fits else torch.int64

    def _unknown_message(self, unknown: Tensor) -> str:
        ids = shortened(unknown.unique().tolist())
        if self.id_map is None:
            rule = (
                f"lie in [0, {self.num_classes}) or be {self.ignore_index}, the ignored id (else "
                "describe the file with id_map)"
            )
        else:
            rule = f"be keys of id_map (add them, with {self.ignore_index} to ignore them)"
        return f"LabelSpec.map_ids: ids must {rule}; got {ids}"
