"""Which part of an evaluation this process does, and how the parts come together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed

from dpsims.errors import DistributedError, InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """One process of ``world_size``; a lone process is rank 0 of 1.

    Raises:
        InputError: ``rank`` is not in ``[0, world_size)``.
    """

    rank: int = 0
    """Number of this process."""
    world_size: int = 1
    """Number of processes."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            msg = f"Process: rank must be in [0, {self.world_size}); got {self.rank}"
            raise InputError(msg)

    @classmethod
    def current(cls) -> Process:
        """This process of torch.distributed, or the only one."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``world_size``-th item, from ``rank`` on; may be empty."""
        return items[self.rank :: self.world_size]

    def gather(
        self, positions: Int[Tensor, " N"], rows: Float[Tensor, "N D"]
    ) -> Float[Tensor, "M D"]:
        """The rows of all processes, on the CPU, in the order of their positions.

        The order does not depend on the number of processes, so neither does any sum over it.
        """
        if self.world_size > 1:
            positions, rows = (_gathered(values) for values in (positions, rows))
        return rows.cpu()[positions.cpu().argsort()]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let no process wait for one that has failed.

        Raises:
            DistributedError: The part of another process failed; it tells why.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            others = self._count(failed) - failed
        if others:
            msg = f"evaluate: every process must finish its part; got a failure in {others} others"
            raise DistributedError(msg)

    def _count(self, flag: bool) -> int:
        if self.world_size == 1:
            return int(flag)
        count = torch.tensor(int(flag), device=_wire_device())
        distributed.all_reduce(count)
        return int(count)


def _wire_device() -> torch.device:
    """Where the backend takes tensors from."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def _gathered(values: Tensor) -> Tensor:
    """``values`` of all processes behind each other; the number of rows may differ."""
    device, world_size = _wire_device(), distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    distributed.all_gather(counts, torch.tensor([len(values)], device=device))
    longest = max(int(count) for count in counts)
    padded = values.new_zeros((longest, *values.shape[1:]), device=device)
    padded[: len(values)] = values.to(device)
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)].cpu() for part, n in zip(parts, counts, strict=True)])


@contextmanager
def joined_processes(device: str) -> Iterator[tuple[Process, str]]:
    """Join the group that ``torchrun`` announces, for as long as the block runs.

    Args:
        device: ``"cpu"`` or ``"cuda"``; each process takes the device of its local rank.

    Yields:
        This process and its device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield Process.current(), device
        return
    backend = "gloo"
    if device == "cuda":
        backend, device = "nccl", f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group(backend)
    try:
        yield Process.current(), device
    finally:
        distributed.destroy_process_group()
