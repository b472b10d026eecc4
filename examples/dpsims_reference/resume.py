"""What a checkpoint of a run holds, and whether a run may continue from it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpsims.errors import IncompatibleCheckpointError
from dpsims_reference.batches import norm_images
from dpsims_reference.checkpoints import (
    Checkpoint,
    load_module_,
    load_optimizer_,
    optimizer_tensors,
)
from dpsims_reference.config import Config
from dpsims_reference.config_json import to_dict

if TYPE_CHECKING:
    from dpsims_reference.trainer import Trainer

# settings that change no number of a run
_ALWAYS_FREE = {
    "config.data.workers",
    "config.data.root",
    "config.discriminator.checkpoint_decoder",
}


def captured(trainer: Trainer) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Everything that decides how a run goes on: tensors by group, and JSON values.

    No random state is among it, for none is used (see :mod:`dpsims_reference.randomness`), no
    position in the data, for the step decides it, and no loss scale, for bfloat16 needs none.
    """
    optim_g, state_g = optimizer_tensors(trainer.update.generator_optimizer)
    optim_d, state_d = optimizer_tensors(trainer.update.discriminator_optimizer)
    ema_tensors, ema_state = trainer.ema.state()
    tensors = {
        "generator": trainer.generator.state_dict(),
        "discriminator": trainer.discriminator.state_dict(),
        "objective": trainer.objective.state_dict(),
        "ema": ema_tensors,
        "optimizer_generator": optim_g,
        "optimizer_discriminator": optim_d,
    }
    return tensors, {
        **_settings(trainer),
        "spec": trainer.dataset.spec.to_dict(),
        "diversity_hinge": trainer.objective.diversity_hinge,
        "optimizer_generator": state_g,
        "optimizer_discriminator": state_d,
        "ema": ema_state,
        "seconds": trainer.seconds,
        "best": trainer.best.state(),
        "machine": machine(trainer.device),
    }


def _settings(trainer: Trainer) -> dict[str, Any]:
    return {
        "config": to_dict(trainer.config),
        "data": trainer.dataset.fingerprint(),
        "backbone": trainer.discriminator.identity,
        "norm_images": norm_images(trainer.config, trainer.parallel.world_size),
    }


def restore_(trainer: Trainer, checkpoint: Checkpoint, *, allow: tuple[str, ...] = ()) -> None:
    """Put :func:`captured`'s values back; arguments and errors as of :meth:`Trainer.restore`."""
    state, tensors = checkpoint.state, checkpoint.tensors
    check_same_run(state, _settings(trainer), allow=allow)
    warn_of_other_machine(state.get("machine"), machine(trainer.device))
    load_module_(trainer.generator, tensors["generator"], name="generator")
    load_module_(trainer.discriminator, tensors["discriminator"], name="discriminator")
    load_module_(trainer.objective, tensors["objective"], name="objective")
    trainer.ema.load(tensors["ema"], state["ema"])
    for name in ("generator", "discriminator"):
        optimizer = getattr(trainer.update, f"{name}_optimizer")
        load_optimizer_(optimizer, tensors[f"optimizer_{name}"], state[f"optimizer_{name}"])
    trainer.objective.diversity_hinge = state["diversity_hinge"]
    trainer.best.load(state.get("best"))
    trainer.step, trainer.seconds = checkpoint.step, state["seconds"]


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


def machine(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of a run besides its settings."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def warn_of_other_machine(saved: dict[str, Any] | None, present: dict[str, Any]) -> None:
    """Warn that the run will not go on bit for bit, and why; older checkpoints do not say."""
    if saved is not None and (changed := differences(saved, present)):
        told = ", ".join(f"{name} {saved.get(name)} -> {present[name]}" for name in changed)
        text = f"Trainer: the resumed run will not be equal in every bit: {told}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
