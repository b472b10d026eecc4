"""Whether a checkpoint belongs to the run that wants to continue it."""

from __future__ import annotations

from typing import Any

from dpsims.errors import IncompatibleCheckpointError
from dpsims_reference.config import Config, to_dict

# settings that change no number of a run
_ALWAYS_FREE = {
    "config.data.workers",
    "config.data.root",
    "config.discriminator.checkpoint_decoder",
}


def check_same_run(
    state: dict[str, Any], present: dict[str, Any], *, allow: tuple[str, ...] = ()
) -> None:
    """Raise unless a checkpoint's state has the settings of the present run.

    Args:
        state: The checkpoint's state. A setting that it does not know has its default.
        present: The settings now, by the same names.
        allow: Settings that may differ, such as ``"config.optim.steps"``.

    Raises:
        IncompatibleCheckpointError: Others differ; the message names them.
    """
    saved = _filled(state, {"config": to_dict(Config()), "norm_images": present["norm_images"]})
    differing = sorted(set(differences(saved, present)) - set(allow) - _ALWAYS_FREE)
    if not differing:
        return
    msg = "Trainer: a resumed run must have the checkpoint's settings; got others: "
    msg += "; ".join(differing[:10])
    if "norm_images" in differing:
        before, now = saved["norm_images"], present["norm_images"]
        msg += (
            f" (on so many processes a batch norm sees {now} images instead of {before}: use "
            'norm="sync_batch" or as many processes as before, or allow "norm_images")'
        )
    raise IncompatibleCheckpointError(msg)


def _filled(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """``saved`` with the entries that it lacks, at any depth."""
    filled = defaults | saved
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(filled[key], dict):
            filled[key] = _filled(filled[key], default)
    return filled


def differences(saved: dict[str, Any], present: dict[str, Any], path: str = "") -> list[str]:
    """Names of the entries of ``present``, at any depth, that differ in ``saved``."""
    found = []
    for key, value in present.items():
        name = f"{path}.{key}" if path else key
        other = saved.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found += differences(other, value, name)
        elif value != other:
            found.append(name)
    return found
