"""``make demo``: learn two photographs in a few minutes, then show what was learnt."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpsims_reference.batches import collate, train_batches
from dpsims_reference.config import Config
from dpsims_reference.data.sample import ImageDataset, Sample
from dpsims_reference.datasets import Split, build_splits
from dpsims_reference.evaluation import Evaluator, format_figures
from dpsims_reference.figures import (
    captioned_grid,
    label_pictures,
    plot_curves,
    save_image,
    to_uint8,
)
from dpsims_reference.logs import read_log
from dpsims_reference.presets import preset
from dpsims_reference.randomness import derive_generator
from dpsims_reference.trainer import Trainer

_NOISES = 4
_TIMED_STEPS, _TRAINING_SHARE, _MOST_STEPS = 18, 0.94, 3000


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    minutes: float = 8.0,
    steps: int | None = None,
    num_images: int = 96,
) -> None:
    """Train ``tiny`` on two photographs and write pictures and figures to ``out``.

    Args:
        out: Folder of the run; an earlier demo in it is replaced.
        seed: Seed of the run.
        minutes: Longest training time.
        steps: Training steps; ``None`` takes as many as fit into ``minutes`` on this machine.
        num_images: Images per figure.
    """
    config = replace(preset("tiny"), seed=seed)
    clear(out)
    started = time.perf_counter()
    print("labelling two photographs with pretrained features ...")
    datasets = build_splits(config.data)
    if steps is None:
        steps = fitting_steps(config, datasets["train"], 60 * minutes)
    config = replace(config, optim=replace(config.optim, steps=steps))
    evaluator = Evaluator(config, num_images=num_images, datasets=datasets)
    trainer = Trainer(config, datasets["train"], out)
    before = evaluator.measure(trainer.averaged_generator())
    waited = time.perf_counter() - started
    print(f"ready after {waited:.0f} s; training {steps} steps, at most {minutes:g} minutes")
    trainer.run(save_every=config.optim.steps, picture_every=400, max_seconds=60 * minutes)
    after = evaluator.measure(trainer.averaged_generator())
    write_results(trainer, datasets, before, after, out)
    trainer.store.close()


def fitting_steps(config: Config, dataset: ImageDataset, seconds: float) -> int:
    """How many training steps fit into ``seconds`` here, measured on a few throw-away steps.

    The learning rate falls to its end over the steps of a run, so a run that is cut off by the
    clock would end too early: the number must be known before.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, dataset, Path(folder))
        trainer.objective.diversity_hinge = 0.0
        batches = train_batches(dataset, config)
        times = []
        for step in range(_TIMED_STEPS):
            started = time.perf_counter()
            trainer.update(next(batches), step)
            trainer.ema.update(trainer.generator)
            times.append(time.perf_counter() - started)
        trainer.store.close()
    # the first steps allocate; grids, and a machine that slows down as it warms, take the reserve
    pace = statistics.median(times[len(times) // 3 :])
    return min(max(int(_TRAINING_SHARE * seconds / pace), 1), _MOST_STEPS)


def clear(out: Path) -> None:
    """Remove an earlier run's files from ``out``: nothing else."""
    for pattern in ("checkpoints/*/*", "samples/*.png", "tensorboard/*", "log.jsonl"):
        for path in out.glob(pattern):
            if path.is_file():
                path.unlink()
    for path in out.glob("checkpoints/*"):
        if path.is_dir():
            path.rmdir()


def write_results(
    trainer: Trainer,
    datasets: dict[Split, ImageDataset],
    before: dict[str, Any],
    after: dict[str, Any],
    out: Path,
) -> None:
    """The grid, the curves, the table and the figures as JSON."""
    save_image(out / "grid.png", demo_grid(trainer, datasets))
    plot_curves(out / "curves.png", read_log(out / "log.jsonl"))
    heading = (
        f"{trainer.step} steps in {trainer.seconds / 60:.1f} minutes on "
        f"{torch.get_num_threads()} threads ({platform.machine()}, torch {torch.__version__})"
    )
    table = format_figures(before, after, names=("start", "end"))
    text = f"# What the demo learnt\n\n{heading}, seed {trainer.config.seed}.\n\n{table}\n"
    (out / "figures.md").write_text(text, encoding="utf-8")
    record = {
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "seed": trainer.config.seed,
        "start": before,
        "end": after,
    }
    (out / "figures.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\nlook at {out / 'grid.png'} and {out / 'curves.png'}")


def demo_grid(trainer: Trainer, datasets: dict[Split, ImageDataset]) -> Any:
    """Label map, real image and samples: training crops, held-out crops, edited maps."""
    train, heldout = datasets["train"], datasets["heldout"]
    shown = [_crop(train, p, "demo-train") for p in range(4)]
    shown += [_crop(heldout, p, "demo-heldout") for p in range(3)]
    edited = edited_maps([sample.labels for sample in shown])
    labels = torch.stack([sample.labels for sample in shown] + edited)
    rows: list[tuple[str, Any]] = [
        ("label map", label_pictures(train.spec, labels)),
        ("real", [*to_uint8(collate(shown, instances=False).images), *([None] * len(edited))]),
    ]
    model = trainer.averaged_generator()
    rng = derive_generator(trainer.config.seed, "demo-latents")
    latents = model.sample_latents(_NOISES, generator=rng)
    noise = model.sample_noise(len(labels), labels.shape[-2:], generator=rng)
    with torch.no_grad():
        for index in range(_NOISES):
            repeated = latents[index].expand(len(labels), -1)
            images = model(labels, repeated, None, noise).images
            rows.append((f"noise {index + 1}", list(to_uint8(images))))
    return captioned_grid(rows)


def _crop(dataset: ImageDataset, position: int, purpose: str) -> Sample:
    rng = derive_generator(0, purpose, position)
    return dataset.draw(int(torch.randint(len(dataset), (), generator=rng)), rng)


def edited_maps(maps: list[Tensor]) -> list[Tensor]:
    """Two maps that no photograph has: a disc of another class, and a mirror image.

    Args:
        maps: Label maps ``(H, W)`` to make them from.
    """
    base = maps[1]
    height, width = base.shape
    rows = torch.arange(height)[:, None] - 0.6 * height
    columns = torch.arange(width)[None, :] - 0.5 * width
    disc = rows.square() + columns.square() < (0.22 * height) ** 2
    other = maps[0].flatten().mode().values
    left = base[:, : width // 2]
    return [torch.where(disc, other, base), torch.cat((left, left.flip(1)), 1)]
