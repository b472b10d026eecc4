"""Strict JSON: what was written is what comes back, and nothing else is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dpsims.errors import CorruptCheckpointError, DTypeError, InputError

STATE_LIMIT = 1 << 26
_DEPTH = 64


def check_json(owner: str, name: str, value: object, depth: int = 0) -> None:
    """Raise unless ``value`` comes back from JSON exactly as it is.

    Raises:
        DTypeError: A type that JSON does not have, tuples and keys that are no text included.
        InputError: NaN, infinite, too large or too deep.
    """
    if depth > _DEPTH:
        msg = f"{owner}: {name[:80]}... must be nested at most {_DEPTH} deep; got deeper"
        raise InputError(msg)
    if isinstance(value, float) and not math.isfinite(value):
        msg = f"{owner}: {name} must be finite (JSON has no such number); got {value}"
        raise InputError(msg)
    # type() rather than isinstance(): an enum or a numpy number would come back as something else
    if value is None or type(value) in (bool, float, str):
        return
    if type(value) is int:
        if value.bit_length() > 4096:
            msg = f"{owner}: {name} must have at most 4096 bits; got {value.bit_length()}"
            raise InputError(msg)
    elif type(value) is list:
        for index, entry in enumerate(value):
            check_json(owner, f"{name}[{index}]", entry, depth + 1)
    elif type(value) is dict:
        for key, entry in value.items():
            if type(key) is not str:
                msg = f"{owner}: {name} must have text as keys; got {key!r:.80}"
                raise DTypeError(msg)
            check_json(owner, f"{name}[{key!r}]", entry, depth + 1)
    else:
        kind = type(value).__name__
        msg = f"{owner}: {name} must be a JSON value (lists, not tuples); got {kind}"
        raise DTypeError(msg)


def encode_json(owner: str, name: str, value: object) -> bytes:
    """``value`` as JSON, after :func:`check_json`; key order does not matter."""
    check_json(owner, name, value)
    data = json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    if len(data) > STATE_LIMIT:
        msg = f"{owner}: {name} must fit into {STATE_LIMIT} bytes of JSON; got {len(data)}"
        raise InputError(msg)
    return data


def decode_json(owner: str, file: Path, data: bytes) -> Any:
    """Read strict JSON: no duplicate keys, no NaN, no nesting without end.

    Raises:
        CorruptCheckpointError: It is not.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        msg = f"{owner}: {file} must hold strict JSON; got {str(error)[:100]}"
        raise CorruptCheckpointError(msg) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a duplicate key"
        raise ValueError(msg)
    return found


def _refuse_constant(name: str) -> None:
    msg = f"the constant {name}"
    raise ValueError(msg)
