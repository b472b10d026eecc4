"""Where every random number of a run comes from: (seed, purpose, numbers), never a global state.

A resumed run therefore needs no saved random state, and an evaluation cannot disturb the training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that depends on all of its arguments."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))


def build_seeded(seed: int, name: str, build: Callable[[], M], device: torch.device) -> M:
    """Build a module with a seeded global generator, which is put back.

    Channels last is faster.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, f"weights-{name}"))
        module = build()
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
