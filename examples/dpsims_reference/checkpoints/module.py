"""Modules as tensors, and back, with every check before the first copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpsims.errors import IncompatibleCheckpointError, NonFiniteError
from dpsims_reference.checkpoints.strict_json import decode_json, encode_json

_SHOWN = 10


def bare_names(names: Iterable[str]) -> list[str]:
    """Names without what ``DistributedDataParallel`` and ``torch.compile`` put in front.

    ``_orig_mod`` goes wherever it stands; ``module`` goes from the front, if all names have it.
    """
    found = [_without_compile(name) if "_orig_mod" in name else name for name in names]
    while found and all(name.startswith("module.") for name in found):
        found = [name.removeprefix("module.") for name in found]
    return found


def _without_compile(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's ``state_dict`` as tensors under bare names, ready for ``CheckpointStore.save``.

    Extra state that is no tensor becomes its JSON text as a uint8 tensor.

    Raises:
        DTypeError: Extra state that JSON cannot hold.

    Example:
        >>> sorted(module_tensors(torch.compile(nn.Linear(2, 1), backend="eager")))
        ['bias', 'weight']
    """
    state = module.state_dict()
    tensors = {}
    for bare, (name, value) in zip(bare_names(state), state.items(), strict=True):
        if not isinstance(value, Tensor):
            text = encode_json("module_tensors", name, value)
            value = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        tensors[bare] = value
    return tensors


def load_module_(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    allow_nonfinite: bool = False,
) -> None:
    """Copy ``tensors`` into a module, all of them or none.

    Args:
        module: What to fill; wrapped by ``DistributedDataParallel`` or ``torch.compile`` or not.
        tensors: One group of a checkpoint.
        name: The group's name, for errors.
        allow_nonfinite: Whether NaN and infinite values may be loaded.

    Raises:
        IncompatibleCheckpointError: Names, shapes or dtypes differ; the message lists the first
            ten of each kind, and the module is as it was.
        NonFiniteError: A value is NaN or infinite; the module is as it was.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> load_module_(layer, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, name="demo")
        >>> layer(torch.ones(1, 2)).item()
        2.0
    """
    state = module.state_dict()
    saved = dict(zip(bare_names(tensors), tensors.values(), strict=True))
    names = dict(zip(bare_names(state), state, strict=True))
    live = {bare: state[full] for bare, full in names.items()}
    _check_fit("load_module_", name, saved, live)
    if not allow_nonfinite:
        bad = [key for key, value in saved.items() if not _is_finite(value)]
        if bad:
            msg = f"load_module_: {name} must hold finite values; got others in {_listed(bad)}"
            raise NonFiniteError(msg)
    loaded = {}
    for bare, full in names.items():
        value: Any = saved[bare]
        if not isinstance(state[full], Tensor):
            value = decode_json("load_module_", Path(name, bare), bytes(value.tolist()))
        loaded[full] = value
    try:
        module.load_state_dict(loaded)
    except RuntimeError as error:
        msg = f"load_module_: {name} must fit the module; got {str(error)[:300]}"
        raise IncompatibleCheckpointError(msg) from error


def _check_fit(
    owner: str, name: str, saved: Mapping[str, Tensor], live: Mapping[str, Any]
) -> None:
    """Raise unless both have the same names, and tensors of the same shapes and dtypes."""
    both = [key for key in live if key in saved]
    pairs = [(key, saved[key], _as_saved(live[key], saved[key])) for key in both]
    faults = {
        "missing": [key for key in live if key not in saved],
        "unexpected": [key for key in saved if key not in live],
        "shape": [
            f"{key} {tuple(old.shape)} not {tuple(new.shape)}"
            for key, old, new in pairs
            if old.shape != new.shape
        ],
        "dtype": [
            f"{key} {old.dtype} not {new.dtype}"
            for key, old, new in pairs
            if old.dtype != new.dtype
        ],
    }
    if any(faults.values()):
        text = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in faults.items() if keys)
        msg = f"{owner}: {name} must have the module's names, shapes and dtypes; got {text}"
        raise IncompatibleCheckpointError(msg)


def _as_saved(value: Any, saved: Tensor) -> Tensor:
    """What ``value`` looks like in a checkpoint: JSON text has no fixed length."""
    return value if isinstance(value, Tensor) else torch.empty(saved.numel(), dtype=torch.uint8)


def _is_finite(value: Tensor) -> bool:
    # float8 has no isfinite
    if not value.is_floating_point():
        return True
    wide = value if value.itemsize > 1 else value.float()
    return bool(wide.isfinite().all())


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
