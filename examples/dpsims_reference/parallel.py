"""One process or many: what a training step and a loop ask of whatever runs them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from dpsims._optional import require
from dpsims.errors import InputError

T = TypeVar("T")


class Shard(NamedTuple):
    """Rows ``first``, ``first + stride``, ... of a batch that is split into ``stride`` parts.

    Rows are dealt in turn, so that the first half of every part lies in the first half of the
    batch, and a part of a part is again such a part.
    """

    first: int = 0
    stride: int = 1

    def rows(self, whole: Tensor) -> Tensor:
        """This part of ``whole``, along its first axis."""
        return whole[self.first :: self.stride]

    def part(self, number: int, parts: int) -> Shard:
        """The ``number``-th of ``parts`` parts of this part."""
        return Shard(self.first + self.stride * number, self.stride * parts)


class Parallel:
    """One process: everything is torch as it is.

    Subclass it to run the same steps and the same loop under a framework for many processes. Every
    process must make the same calls in the same order.

    Args:
        device: Where the networks live.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.rank, self.world_size = 0, 1

    @property
    def shard(self) -> Shard:
        """Which rows of every batch belong to this process."""
        return Shard(self.rank, self.world_size)

    def wrap(self, module: Callable[..., T]) -> Callable[..., T]:
        """What to call instead of ``module`` so that its gradients are averaged."""
        return module

    def no_sync(self, wrapped: Callable[..., Any]) -> AbstractContextManager[Any]:
        """Forward and backward passes in which the gradients of ``wrapped`` stay local."""
        del wrapped
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        loss.backward()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes, the same on all of them."""
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """The whole batch from every process's rows."""
        return rows

    def barrier(self) -> None:
        """Wait for the others."""

    def close(self) -> None:
        """Leave the others."""

    def mean(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means over the processes, in one message."""
        if self.world_size == 1:
            return terms
        values = torch.stack([value.float() for value in terms.values()])
        means = self.sum(values) / self.world_size
        return dict(zip(terms, means.unbind(), strict=True))

    def any(self, flag: bool | Tensor) -> bool:
        """Whether the flag is set on one process or more."""
        if self.world_size == 1:
            return bool(flag)
        return bool(self.sum(torch.as_tensor(flag, device=self.device).float()) > 0)


class FabricParallel(Parallel):
    """The processes that ``torchrun`` or ``fabric run`` has started, through Lightning Fabric.

    Gradients are averaged by DistributedDataParallel. Buffers are not broadcast: the ones that
    training reads (the vectors of spectral norms) follow from the weights and are the same
    everywhere, and a broadcast before the second of two forward passes would overwrite what the
    first one's backward pass still needs.

    Args:
        device: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL), one device per process.
        timeout: Seconds that a process waits for the others before all of them fail.
    """

    def __init__(self, device: str = "cpu", *, timeout: float = 1800.0) -> None:
        require("lightning_fabric", extra="train", purpose="training on many devices")
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy

        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        try:
            self.fabric = Fabric(
                accelerator=device,
                devices=local,
                num_nodes=world // local,
                # the run's own optim.precision sets the autocast
                precision="32-true",
                strategy=DDPStrategy(
                    timeout=timedelta(seconds=timeout),
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                ),
                plugins=[TorchElasticEnvironment()],
            )
        except ValueError as error:
            msg = f"FabricParallel: the options of fabric run must fit; got: {error}"
            raise InputError(msg) from error
        # with fabric run, the constructor has already done it
        if not self.fabric._launched:
            self.fabric.launch()
        super().__init__(self.fabric.device)
        self.rank, self.world_size = self.fabric.global_rank, self.fabric.world_size

    def wrap(self, module: Callable[..., T]) -> Callable[..., T]:
        """``module`` behind DistributedDataParallel, unless it is sharded."""
        if _is_sharded(module):
            return module
        if not isinstance(module, nn.Module):
            msg = f"FabricParallel.wrap: module must be a module; got {type(module).__name__}"
            raise InputError(msg)
        return self.fabric.setup_module(module, move_to_device=False)

    def no_sync(self, wrapped: Callable[..., Any]) -> AbstractContextManager[Any]:
        """As for one process; see the base class."""
        if _is_sharded(wrapped):
            return _unreduced(wrapped)
        return self.fabric.no_backward_sync(cast("Any", wrapped))

    def backward(self, loss: Tensor) -> None:
        """As for one process, and average the gradients over the processes."""
        self.fabric.backward(loss)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes, the same on all of them."""
        total: Any = self.fabric.all_reduce(value.clone(), reduce_op="sum")
        return cast("Tensor", total)

    def gather(self, rows: Tensor) -> Tensor:
        """The whole batch from every process's rows."""
        # (world, B, ...), whose rows were dealt in turn
        parts: Any = self.fabric.all_gather(rows.contiguous())
        return parts.transpose(0, 1).flatten(0, 1)

    def barrier(self) -> None:
        """Wait for the others."""
        self.fabric.barrier()

    def close(self) -> None:
        """Leave the others; no message can be sent after it."""
        torch.distributed.destroy_process_group()


def _is_sharded(module: object) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


@contextlib.contextmanager
def _unreduced(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def start_processes(device: str, *, timeout: float = 1800.0) -> Parallel:
    """This process alone, or as one of those that a launcher has started.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        timeout: As in :class:`FabricParallel`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return FabricParallel(device, timeout=timeout)
    return Parallel(device)
