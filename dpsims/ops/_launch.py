"""What every kernel must know of its maps before it starts: strides, distances and the device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def map_strides(value: Tensor) -> tuple[int, ...]:
    """The strides of a map ``(..., H, W)``; in a column of pixels the last one leads down it.

    The stride of an axis of one entry means nothing to torch, but a kernel that takes all pixels
    in one run steps by the last one.
    """
    *others, row, column = value.stride()
    return (*others, row, row if value.shape[-1] == 1 else column)


def is_flat(value: Tensor) -> bool:
    """Whether the last of :func:`map_strides` leads through all pixels of a map."""
    height, width = value.shape[-2:]
    return height == 1 or width == 1 or value.stride(-2) == width * value.stride(-1)


def reach(value: Tensor) -> int:
    """The distance of an image's last entry from its first."""
    pairs = zip(value.shape[1:], value.stride()[1:], strict=True)
    return sum((size - 1) * stride for size, stride in pairs)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Let kernels run on a device: by themselves they take the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def triton_kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that imports triton, which is loaded when the function first runs."""

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    return run


def ceil_div(number: int, by: int) -> int:
    """How many parts of size ``by`` hold a number of things."""
    return -(-number // by)


def power_of_two(size: int) -> int:
    """The smallest power of two from a size on."""
    return 1 << (size - 1).bit_length()
