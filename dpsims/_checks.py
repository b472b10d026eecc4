"""The one wording of every argument check.

Shape, dtype and device checks read metadata only: they cost nothing, never wait for the device,
and trace under ``torch.compile(fullgraph=True)``. Checks of *values* are made where they are
free: eagerly on CPU they raise; compiled on CPU they become ``torch._assert_async``; on CUDA the
caller must make the bad pixel NaN instead of reading out of bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from dpsims.errors import DTypeError, InputError

_LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
Kind = Literal["floating", "integer", "bool", "any"]


def check_tensor(
    owner: str,
    name: str,
    value: object,
    layout: str,
    *,
    kind: Kind = "floating",
    like: Tensor | None = None,
    **sizes: int,
) -> None:
    """Raise unless ``value`` is a dense tensor of the given layout.

    Args:
        owner: The public callable that speaks, such as ``"info_nce"``.
        name: The argument's name.
        value: What the caller passed.
        layout: Axis names separated by blanks, such as ``"B C H W"``. Axis ``B`` may be empty, all
            others need at least one entry.
        kind: ``"floating"``, ``"integer"`` (a label map: uint8, int16, int32 or int64), ``"bool"``
            or ``"any"``.
        like: A tensor whose device must be the same.
        **sizes: Exact sizes of some axes, by axis name.

    Raises:
        DTypeError: Not a tensor, or a dtype of another kind.
        InputError: Wrong rank, a wrong or empty axis, another device, or a sparse tensor.
    """
    if not isinstance(value, Tensor):
        msg = f"{owner}: {name} must be a torch.Tensor; got {type(value).__name__}"
        raise DTypeError(msg)
    axes = layout.split()
    shape = tuple(value.shape)
    fits = len(shape) == len(axes) and all(
        (axis not in sizes or size == sizes[axis]) and (size > 0 or axis == "B")
        for axis, size in zip(axes, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        trailing = "," if len(axes) == 1 else ""
        hollow = any(size == 0 and axis != "B" for axis, size in zip(axes, shape, strict=False))
        empty = " (axes must not be empty)" if hollow else ""
        msg = f"{owner}: {name} must have shape ({wanted}{trailing}){empty}; got {shape}"
        raise InputError(msg)
    _check_kind(owner, name, value, kind)
    if value.layout is not torch.strided:
        msg = f"{owner}: {name} must be a dense tensor; got layout {value.layout}"
        raise InputError(msg)
    if like is not None and value.device != like.device:
        msg = f"{owner}: {name} must be on device {like.device}; got {value.device}"
        raise InputError(msg)


def _check_kind(owner: str, name: str, value: Tensor, kind: Kind) -> None:
    if kind == "floating" and not value.is_floating_point():
        msg = f"{owner}: {name} must have a floating-point dtype; got {value.dtype}"
        raise DTypeError(msg)
    if kind == "integer" and value.dtype not in _LABEL_DTYPES:
        msg = (
            f"{owner}: {name} must hold integer ids (uint8, int16, int32 or int64); "
            f"got {value.dtype}"
        )
        raise DTypeError(msg)
    if kind == "bool" and value.dtype is not torch.bool:
        msg = f"{owner}: {name} must have dtype bool; got {value.dtype}"
        raise DTypeError(msg)


def check_int(owner: str, name: str, value: object, *, minimum: int | None = 1) -> None:
    """Raise unless ``value`` is an ``int`` (not a ``bool``) of at least ``minimum``.

    Raises:
        DTypeError: Another type.
        InputError: Below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{owner}: {name} must be an int; got {value!r:.80} ({type(value).__name__})"
        raise DTypeError(msg)
    if minimum is not None and value < minimum:
        msg = f"{owner}: {name} must be at least {minimum}; got {value!r:.80}"
        raise InputError(msg)


def check_ints(owner: str, name: str, values: object, *, minimum: int | None = 1) -> None:
    """Raise unless ``values`` is a non-empty sequence of ints of at least ``minimum``.

    Raises:
        DTypeError: Not a list or tuple, or an entry of another type.
        InputError: Empty, or an entry below ``minimum``.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        msg = f"{owner}: {name} must be a sequence of ints; got {type(values).__name__}"
        raise DTypeError(msg)
    if not values:
        msg = f"{owner}: {name} must not be empty; got {values!r}"
        raise InputError(msg)
    for index, value in enumerate(values):
        check_int(owner, f"{name}[{index}]", value, minimum=minimum)


def check_number(
    owner: str,
    name: str,
    value: object,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
) -> None:
    """Raise unless ``value`` is a finite ``int`` or ``float`` within the bounds.

    Args:
        owner: The public callable that speaks.
        name: The argument's name.
        value: What the caller passed.
        above: Exclusive lower bound.
        minimum: Inclusive lower bound.
        below: Exclusive upper bound.
        maximum: Inclusive upper bound.

    Raises:
        DTypeError: Another type (``bool`` included).
        InputError: NaN, infinite or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        msg = f"{owner}: {name} must be a number; got {type(value).__name__}"
        raise DTypeError(msg)
    bounds = []
    if above is not None:
        bounds.append((f"> {above:g}", value > above))
    if minimum is not None:
        bounds.append((f">= {minimum:g}", value >= minimum))
    if below is not None:
        bounds.append((f"< {below:g}", value < below))
    if maximum is not None:
        bounds.append((f"<= {maximum:g}", value <= maximum))
    # compared, because math.isfinite raises for an int that no float can hold
    finite = abs(value) <= sys.float_info.max
    if not finite or not all(holds for _, holds in bounds):
        rule = " and ".join(["finite", *(text for text, _ in bounds)])
        msg = f"{owner}: {name} must be {rule}; got {value!r:.80}"
        raise InputError(msg)


def check_bool(owner: str, name: str, value: object) -> None:
    """Raise :class:`~dpsims.errors.DTypeError` unless ``value`` is a ``bool``."""
    if not isinstance(value, bool):
        msg = f"{owner}: {name} must be a bool; got {type(value).__name__}"
        raise DTypeError(msg)


def check_generator(owner: str, name: str, value: object) -> None:
    """Raise :class:`~dpsims.errors.DTypeError` unless ``value`` is a generator or ``None``."""
    if value is not None and not isinstance(value, torch.Generator):
        msg = f"{owner}: {name} must be a torch.Generator; got {type(value).__name__}"
        raise DTypeError(msg)


def check_choice(owner: str, name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Raises:
        InputError: It is not; the message lists the choices.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        msg = f"{owner}: {name} must be one of {listed}; got {value!r:.80}"
        raise InputError(msg)


def values_are_readable(value: Tensor) -> bool:
    """Whether looking at ``value``'s numbers is free: a plain CPU tensor in eager mode."""
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and type(value) in (Tensor, torch.nn.Parameter)
    )


def check_label_values(
    owner: str, name: str, labels: Tensor, num_classes: int, ignore_index: int | None
) -> None:
    """Raise unless every id lies in ``[0, num_classes)`` or is ``ignore_index``.

    On CUDA and on meta tensors nothing is read; callers make bad pixels NaN there.

    Args:
        owner: The public callable that speaks.
        name: The argument's name.
        labels: Integer map of any shape.
        num_classes: Number ``K`` of valid ids.
        ignore_index: The one further id that is allowed, or ``None``.

    Raises:
        InputError: An id out of range; names the first one and its position.
        RuntimeError: The same under ``torch.compile`` on CPU, raised by ``torch._assert_async``.
    """
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    if torch.compiler.is_compiling():
        bad = invalid_labels(labels, num_classes, ignore_index)
        torch._assert_async(~bad.any(), f"{owner}: {name} must be in [0, {num_classes})")
        return
    if not values_are_readable(labels):
        return
    bad = invalid_labels(labels, num_classes, ignore_index)
    if bool(bad.any()):
        position = tuple(int(i) for i in bad.nonzero()[0])
        also = "" if ignore_index is None else f" or the ignored id {ignore_index}"
        msg = (
            f"{owner}: {name} must be in [0, {num_classes}){also}; "
            f"got {int(labels[position])} at {position}"
        )
        raise InputError(msg)


def invalid_labels(labels: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Bool map of the pixels whose id is neither a class nor ``ignore_index``."""
    # compared as int64: 255 and -1 must not wrap around in uint8
    labels = labels.long()
    bad = (labels < 0) | (labels >= num_classes)
    return bad if ignore_index is None else bad & (labels != ignore_index)
