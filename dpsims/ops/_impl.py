"""An implementation of an operator, why it was chosen, and what the choice asks of the world."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor


class ResolvedImpl(NamedTuple):
    """An implementation and why it was chosen.

    Source:
        Not from the paper: the library's way to explain ``"auto"``.
    """

    impl: str
    reason: str


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):
        return False


# looked up once: torch.compile cannot trace the search
HAS_TRITON = is_installed("triton")


def is_transformed(*tensors: Tensor) -> bool:
    """Whether any of the tensors is under a ``torch.func`` transform; a compiler cannot ask."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
