"""Where every random number of a run comes from: (seed, purpose, numbers), never a global state.

A resumed run therefore needs no saved random state, and an evaluation cannot disturb the training.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that depends on all of its arguments."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))
