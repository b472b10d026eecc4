"""An implementation of an operator, and why it was chosen."""

from __future__ import annotations

from typing import NamedTuple


class ResolvedImpl(NamedTuple):
    """An implementation and why it was chosen.

    Source:
        Not from the paper: the library's way to explain ``"auto"``.
    """

    impl: str
    reason: str
