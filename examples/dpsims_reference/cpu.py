"""What a run on a CPU does not do."""

from __future__ import annotations

import warnings

import torch


def warn_of_bfloat16(precision: str, device: torch.device) -> None:
    """Say that a run that asks for bfloat16 on a CPU gets float32.

    Without bfloat16 units, which few CPUs have, torch's bfloat16 convolutions take tens of times
    as long as those in float32: a run that did as asked would look as if it hung.

    Args:
        precision: The run's ``optim.precision``.
        device: Where it runs.

    Warns:
        RuntimeWarning: It asks for it.
    """
    if device.type != "cpu" or precision != "bf16":
        return
    text = (
        "Trainer: optim.precision must be 'float32' on a CPU, where bfloat16 convolutions take "
        "tens of times as long; got 'bf16', and the run goes on in float32"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=3)
