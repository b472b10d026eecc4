"""Checks that the stand-ins share: an option that does nothing here must be an error."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from dpsims.errors import DTypeError, InputError


def refuse_unknown(owner: str, options: Iterable[str], supported: Collection[str]) -> None:
    """Raise :class:`~dpsims.errors.InputError` for the first option that is not supported."""
    for name in options:
        close = difflib.get_close_matches(name, supported, n=1)
        hint = f"; nearest: {close[0]}" if close else ""
        msg = f"{owner}: options must be among {', '.join(supported)}{hint}; got {name!r:.80}"
        raise InputError(msg)


def check_flag(owner: str, name: str, value: object) -> bool:
    """A bool, or the 0 or 1 that command lines make of one."""
    if not isinstance(value, int) or value not in (0, 1):
        msg = f"{owner}: {name} must be a bool; got {value!r:.80}"
        raise DTypeError(msg)
    return bool(value)
