"""FSDP: every process holds a share of the weights and gathers them while it computes.

The frozen backbones are the simple case: no gradient, no optimiser, no checkpoint, and the same
bytes on every device. The generator can be sharded too, for loops of one's own: the trainer does
not do it, since its averaged generator and its checkpoints need whole weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dpsims.errors import InputError
from dpsims.nn import ConditionedBackbone
from dpsims_reference.generator import Generator
from dpsims_reference.networks import PixelDiscriminator
from dpsims_reference.objective import Objective
from dpsims_reference.parallel import Parallel


def shard_backbones_(
    discriminator: PixelDiscriminator, objective: Objective, parallel: Parallel
) -> None:
    """Share the frozen networks of D and of the contrastive loss between all processes.

    Call it before the first forward pass, and move no module afterwards. Outputs and the
    gradients of the images stay the same.

    Args:
        discriminator: Its backbone.
        objective: Its perceptual network, where it has one.
        parallel: The processes.

    Raises:
        InputError: There is only one process.
    """
    mesh = _mesh(parallel)
    for backbone in (*discriminator.modules(), *objective.modules()):
        if isinstance(backbone, ConditionedBackbone) and backbone.frozen:
            network = backbone._extractor
            _shard_(network, _blocks(network), mesh)


def shard_generator_(generator: Generator, objective: Objective, parallel: Parallel) -> None:
    """Share the weights that G's half trains, with their gradients and Adam's moments.

    Build :class:`~dpsims_reference.TrainingStep` after it: the optimiser must see the shares, and
    the step then wraps neither network again. Save with :func:`whole_tensors`.

    Args:
        generator: G.
        objective: Its contrastive projector, where it has one.
        parallel: The processes.

    Raises:
        InputError: There is only one process.
    """
    mesh = _mesh(parallel)
    _shard_(generator, [*generator.blocks, generator.pyramid], mesh)
    if objective.contrastive is not None:
        _shard_(objective.contrastive, [], mesh)


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded module with whole tensors; all processes must call this."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in module.state_dict().items()
    }


def _mesh(parallel: Parallel) -> DeviceMesh:
    if parallel.world_size == 1:
        msg = "sharding: parallel must have at least 2 processes; got 1"
        raise InputError(msg)
    return init_device_mesh(parallel.device.type, (parallel.world_size,))


def _shard_(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Gather ``blocks`` one at a time, and all that is left with ``module``."""
    # torch shards no channels-last weights
    module.to(memory_format=torch.contiguous_format)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists and chains: a backbone's repeated layers."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return [child for child in module if next(child.parameters(), None) is not None]
    return [block for child in module.children() for block in _blocks(child)]
