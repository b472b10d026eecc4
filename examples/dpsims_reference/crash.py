"""The folder that a run leaves when a value is no longer finite, and what can be told from it.

``crash-step-N`` holds a checkpoint of the networks as they were when the loss was found to be bad,
with the batch, the terms and the configuration, and ``report.txt``. All random numbers of a step
follow from the seed and the step's number, so nothing else is needed to run it again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from dpsims.errors import CheckpointError, NonFiniteError
from dpsims_reference.batches import Batch
from dpsims_reference.checkpoints import Checkpoint, CheckpointStore, load_module_
from dpsims_reference.config import Config
from dpsims_reference.config_json import from_dict, to_dict
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.finite import Finding, StepNonFiniteError, scan, watch
from dpsims_reference.generator import build_generator
from dpsims_reference.networks import ImageGenerator, PixelDiscriminator
from dpsims_reference.objective import Objective
from dpsims_reference.randomness import build_seeded
from dpsims_reference.steps import TrainingStep


class Networks(NamedTuple):
    """What a step needs beside its batch."""

    generator: ImageGenerator
    discriminator: PixelDiscriminator
    objective: Objective
    config: Config

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The three modules by name."""
        return {name: getattr(self, name) for name in self._fields[:3]}


class StepReport(NamedTuple):
    """What a step was found to be.

    Attributes:
        step: Its number.
        error: What it raised, or ``None``: then it ran through.
        findings: Where values are not finite; what was there before the step comes first, then
            activations and gradients in the order in which they were computed.
    """

    step: int
    error: str | None
    findings: list[Finding]

    def __str__(self) -> str:
        lines = [f"step {self.step}: {self.error or 'ran through with finite losses'}"]
        if self.findings:
            lines += [f"first: {self.findings[0]}"]
            lines += [f"  then {finding}" for finding in self.findings[1:20]]
        else:
            lines += ["every parameter, input, activation and gradient is finite"]
        if len(self.findings) > 20:
            lines += [f"  and {len(self.findings) - 20} more"]
        return "\n".join(lines)


def examine_step(networks: Networks, batch: Batch, step: int) -> StepReport:
    """Run one step with a learning rate of 0 and report where values stop being finite.

    No weight changes; batch-norm statistics and spectral-norm vectors move as in any step.
    """
    config = networks.config
    still = replace(config, optim=replace(config.optim, lr=0.0))
    update = TrainingStep(networks.generator, networks.discriminator, networks.objective, still)
    before = scan(networks.modules, _batch_tensors(batch), gradients=False)
    error = None
    with watch(networks.modules) as seen:
        try:
            update(batch, step)
        except NonFiniteError as caught:
            error = str(caught)
    after = [f for f in scan(networks.modules, {}) if f.kind == "gradient"]
    return StepReport(step, error, [*before, *seen, *after])


def dump_crash(
    folder: Path, networks: Networks, batch: Batch, step: int, error: NonFiniteError
) -> NonFiniteError:
    """Write ``folder/crash-step-N`` and give the error to raise, which names the first finding.

    Of several processes each writes its own part of the batch, the others ``crash-step-N-rank-R``.

    Args:
        folder: The run's folder.
        networks: The networks as they are; D is already updated if G's half failed.
        batch: The step's batch.
        step: The step's number.
        error: What the step raised.
    """
    rank = distributed.get_rank() if _is_distributed() else 0
    target = folder / (f"crash-step-{step}" + (f"-rank-{rank}" if rank else ""))
    report = StepReport(
        step, str(error), scan(networks.modules, _batch_tensors(batch), gradients=True)
    )
    try:
        _save(target, networks, batch, step, error)
    except CheckpointError as problem:
        # the fault itself matters more than a full disk
        return NonFiniteError(f"step {step}: {error}; the state could not be saved: {problem}")
    if not _is_distributed():
        # the step again, under watch; of several processes none may go alone
        report = report._replace(findings=examine_step(networks, batch, step).findings)
    text = f"{report}\n\nreplay with: python -m dpsims_reference replay {target}\n"
    (target / "report.txt").write_text(text, encoding="utf-8")
    first = f"first: {report.findings[0]}; " if report.findings else ""
    return NonFiniteError(f"step {step}: {error}; {first}everything is in {target}")


def _save(
    target: Path, networks: Networks, batch: Batch, step: int, error: NonFiniteError
) -> None:
    terms = error.terms if isinstance(error, StepNonFiniteError) else {}
    with CheckpointStore(target) as store:
        store.save(
            step,
            {name: module.state_dict() for name, module in networks.modules.items()}
            | {"batch": _batch_tensors(batch)},
            {
                "config": to_dict(networks.config),
                "backbone": networks.discriminator.identity,
                # as text: JSON has no NaN
                "diversity_hinge": repr(networks.objective.diversity_hinge),
                "error": str(error),
                "terms": {name: repr(value) for name, value in terms.items()},
                "random": {"seed": networks.config.seed, "step": step},
            },
        )


def replay_crash(folder: Path, *, device: str = "cpu") -> StepReport:
    """Run the step of a ``crash-step-N`` folder again.

    Raises:
        CheckpointError: The folder holds no sound dump.
        IncompatibleCheckpointError: The backbone's weights are not those of the run.
    """
    checkpoint = CheckpointStore.read_latest(folder)
    if checkpoint is None or "batch" not in checkpoint.tensors:
        msg = f"replay: folder must be a crash-step-N folder of a run; got {folder}"
        raise CheckpointError(msg)
    networks = _read_networks(checkpoint, device)
    tensors = checkpoint.tensors["batch"]
    batch = Batch(tensors["images"], tensors["labels"], tensors.get("extra"))
    return examine_step(networks, batch.to(torch.device(device)), checkpoint.step)


def _read_networks(checkpoint: Checkpoint, device: str) -> Networks:
    config: Config = from_dict(Config, checkpoint.state["config"])
    place = torch.device(device)
    generator = build_seeded(config.seed, "generator", lambda: build_generator(config), place)
    discriminator = build_seeded(
        config.seed, "discriminator", lambda: build_discriminator(config), place
    )
    objective = build_seeded(
        config.seed, "objective", lambda: Objective(config, discriminator), place
    )
    hinge = checkpoint.state["diversity_hinge"]
    objective.diversity_hinge = None if hinge == "None" else float(hinge)
    networks = Networks(generator, discriminator, objective, config)
    for name, module in networks.modules.items():
        load_module_(module, checkpoint.tensors[name], name=name, allow_nonfinite=True)
    return networks


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _batch_tensors(batch: Batch) -> dict[str, Any]:
    tensors: dict[str, Tensor | None] = {name: getattr(batch, name) for name in Batch._fields}
    return {name: value for name, value in tensors.items() if value is not None}
