"""Train with Hugging Face accelerate: the reference step, in a loop of your own.

    accelerate launch --num_processes 2 examples/accelerate_loop.py --out runs/accelerate_loop

``TrainingStep`` asks six things of what runs it; the class below answers them with accelerate.
Plain ``python`` is one process, and gives the same losses. Time: four minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from dpsims_reference import Config, Objective, TrainingStep, preset
from dpsims_reference.batches import train_batches
from dpsims_reference.datasets import build_dataset
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.figures import captioned_grid, label_pictures, save_image, to_uint8
from dpsims_reference.generator import build_generator
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


def train(config: Config, steps: int, data: Any, parallel: Parallel) -> tuple[Any, list[Any]]:
    """Run some steps; the generator, and the losses of every step."""
    torch.manual_seed(config.seed)
    generator = build_generator(config).to(parallel.device)
    discriminator = build_discriminator(config).to(parallel.device)
    objective = Objective(config, discriminator).to(parallel.device)
    step = TrainingStep(generator, discriminator, objective, config, parallel=parallel)
    batches = train_batches(data, config, shard=parallel.shard)
    losses = []
    for number in range(steps):
        terms = parallel.mean(step(next(batches).to(parallel.device), number))
        losses.append({name: float(value) for name, value in terms.items()})
        if parallel.rank == 0 and number % 20 == 0:
            print(f"step {number}, processes: {parallel.world_size},", losses[-1])
    return generator, losses


@torch.no_grad()
def picture(config: Config, dataset: Any, generator: Any) -> Any:
    """Label maps, real crops and two noises, in rows."""
    batch = next(train_batches(dataset, replace(config, seed=config.seed + 1)))
    maps = label_pictures(dataset.spec, batch.labels)
    rows = [("label map", maps), ("real", list(to_uint8(batch.images)))]
    for number in (1, 2):
        latents = torch.randn(1, generator.latent_dim).expand(len(batch.labels), -1)
        rows.append((f"noise {number}", list(to_uint8(generator(batch.labels, latents).images))))
    return captioned_grid(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    args = parser.parse_args(argv)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    parallel = AccelerateParallel(accelerator)
    config = replace(preset("tiny"), seed=args.seed)
    config = replace(config, objective=replace(config.objective, diversity_threshold=0.1))
    dataset = build_dataset(config.data)
    generator, losses = train(config, args.steps, dataset, parallel)
    if parallel.rank == 0:
        save_image(args.out / "samples.png", picture(config, dataset, generator.cpu().eval()))
        values = {name: [terms[name] for terms in losses] for name in losses[0]}
        figures = {n: [v[0], fmean(v[:20]), fmean(v[-20:])] for n, v in values.items()}
        for name, row in figures.items():
            print(f"{name:14s} first {row[0]:.6f}, start {row[1]:.4f}, end {row[2]:.4f}")
        (args.out / "figures.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
