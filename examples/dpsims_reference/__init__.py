"""The reference DP-SIMS model and trainer, composed of public parts of dpsims."""

from __future__ import annotations

import importlib
from typing import Any

_HOME_OF = {
    "Config": "config",
    "Discriminator": "discriminator",
    "Generator": "generator",
    "Objective": "objective",
    "Trainer": "trainer",
    "TrainingStep": "steps",
    "build_discriminator": "discriminator",
    "build_generator": "generator",
    "load_generator": "sampling",
    "preset": "presets",
}

__all__ = [*_HOME_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"dpsims_reference.{_HOME_OF[name]}"), name)
    msg = f"module 'dpsims_reference' has no attribute {name!r}"
    raise AttributeError(msg)
