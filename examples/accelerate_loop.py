"""Train with Hugging Face accelerate: the reference step, in a loop of your own.

    accelerate launch --num_processes 2 examples/accelerate_loop.py

The step asks six things of whatever runs it; the class below answers them with accelerate.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from dpsims_reference import (
    Config,
    Objective,
    TrainingStep,
    build_discriminator,
    build_generator,
    preset,
)
from dpsims_reference.batches import train_batches
from dpsims_reference.datasets import build_dataset
from dpsims_reference.parallel import Parallel


class AccelerateParallel(Parallel):
    """The processes of an accelerator."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator.device)
        self.accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes

    def wrap(self, module: Any) -> Any:
        """Average the gradients of ``module``."""
        return self.accelerator.prepare_model(module)

    def no_sync(self, wrapped: Callable[..., Any]) -> AbstractContextManager[Any]:
        """Keep them local for a while."""
        return self.accelerator.no_sync(wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        self.accelerator.backward(loss)

    def sum(self, value: Tensor) -> Tensor:
        """Over the processes."""
        return self.accelerator.reduce(value.clone(), "sum")

    def gather(self, rows: Tensor) -> Tensor:
        """The whole batch, whose rows were dealt in turn."""
        parts = self.accelerator.gather(rows).unflatten(0, (self.world_size, -1))
        return parts.transpose(0, 1).flatten(0, 1)

    def barrier(self) -> None:
        """Wait for the others."""
        self.accelerator.wait_for_everyone()


def train(config: Config, steps: int, *, cpu: bool = False) -> list[dict[str, float]]:
    """Run some steps and return their losses."""
    # see dpsims_reference.parallel for why no buffer is broadcast
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    parallel = AccelerateParallel(Accelerator(cpu=cpu, kwargs_handlers=[ddp]))
    torch.manual_seed(config.seed)
    generator = build_generator(config).to(parallel.device)
    discriminator = build_discriminator(config).to(parallel.device)
    objective = Objective(config, discriminator).to(parallel.device)
    objective.diversity_hinge = 0.1
    step = TrainingStep(generator, discriminator, objective, config, parallel=parallel)
    batches = train_batches(build_dataset(config.data), config, shard=parallel.shard)
    losses = []
    for number in range(steps):
        terms = parallel.mean(step(next(batches).to(parallel.device), number))
        losses.append({name: float(value) for name, value in terms.items()})
        if parallel.rank == 0:
            print(number, losses[-1])
    return losses


if __name__ == "__main__":
    train(preset("tiny"), 100)
