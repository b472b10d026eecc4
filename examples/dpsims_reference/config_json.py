"""Configurations as JSON values, and back with every type checked."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal

from dpsims.errors import InputError


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested JSON values (tuples become lists)."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def from_dict(kind: type, values: dict[str, Any], path: str = "config") -> Any:
    """Rebuild a configuration from :func:`to_dict`'s result.

    Raises:
        InputError: A key is unknown or a value has another type; the message names the key.
    """
    if not isinstance(values, dict):
        msg = f"from_dict: {path} must be an object; got {type(values).__name__}"
        raise InputError(msg)
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        msg = f"from_dict: {path} must have only the keys {sorted(hints)}; got {unknown}"
        raise InputError(msg)
    read = {key: _read(hints[key], value, f"{path}.{key}") for key, value in values.items()}
    return kind(**read)


def _read(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type", hint), value, path)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in options:
            return None
        hint = next(option for option in options if option is not type(None))
        return _read(hint, value, path)
    if origin is Literal:
        if value in options:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(kinds) == len(value):
            return tuple(_read(k, v, path) for k, v in zip(kinds, value, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    msg = f"from_dict: {path} must be {hint}; got {value!r}"
    raise InputError(msg)
