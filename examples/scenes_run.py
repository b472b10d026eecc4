"""One long run on procedural street scenes, measured all along: the trainer at work on one GPU.

    python examples/scenes_run.py --out runs/scenes --minutes 20

trains at 128x128 against a pretrained EfficientNet-Lite1. Run it again to go on for as long. Every
few minutes it measures the averaged generator on scenes that were never shown: mIoU by a segmenter
trained here on real scenes, beside its own score on real images; Frechet distance; the difference
between noises. It leaves curves.png, figures.json and samples.png in the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dpsims_reference import Config, preset
from dpsims_reference.batches import train_batches
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.data.scenes import CLASS_NAMES
from dpsims_reference.datasets import build_splits
from dpsims_reference.evaluation import Instruments, Protocol, Segmenter, measure
from dpsims_reference.evaluation.diversity import pixels
from dpsims_reference.evaluation.extractors import efficientnet_lite1
from dpsims_reference.evaluation.pictures import write_sheet
from dpsims_reference.sampling import TrainedGenerator
from dpsims_reference.segmenting import SegmentationNet
from dpsims_reference.trainer import Trainer


def scenes_config(size: int, batch_size: int, scenes: int, workers: int) -> Config:
    """``tiny`` grown to a GPU: SPADE with its hidden layer, and the paper's constant rate."""
    tiny = preset("tiny")
    levels = round(math.log2(size // 8)) + 2
    widths = (512, 512, 256, 128, 64, 64)
    return replace(
        tiny,
        generator=replace(
            tiny.generator,
            channels=widths[:levels] if size >= 128 else (64,) * levels,
            pyramid_channels=64 if size >= 128 else 16,
            attention_size=32,
            token_dim=256,
            spade_hidden=128 if size >= 128 else None,
            spade_kernel=3,
            spectral_norm=True,
        ),
        discriminator=replace(tiny.discriminator, full_res_channels=64, head_channels=128),
        optim=replace(
            tiny.optim,
            batch_size=batch_size,
            steps=10**6,
            lr=4e-4,
            final_lr=1.0,
            ema_decay=0.999,
            precision="bf16" if torch.cuda.is_available() else "float32",
        ),
        data=replace(
            tiny.data,
            name="scenes",
            num_classes=len(CLASS_NAMES),
            num_scenes=scenes,
            image_size=(size, size),
            workers=workers,
        ),
    )


def train_segmenter(
    dataset: ImageDataset, config: Config, steps: int, device: torch.device
) -> SegmentationNet:
    """A segmenter of real scenes."""
    torch.manual_seed(0)
    net = SegmentationNet(config.data.num_classes, full_res_channels=32, head_channels=64)
    net.to(device)
    optimizer = torch.optim.Adam(net.decoder.parameters(), lr=2e-3)
    # other draws than those of the generator's training
    batches = train_batches(dataset, replace(config, seed=config.seed + 1))
    net.train()
    for step in range(steps):
        batch = next(batches).to(device)
        loss = F.cross_entropy(net(batch.images), batch.labels.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"segmenter: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    batches.close()
    return net.eval()


def instruments_for(net: SegmentationNet, num_classes: int) -> Instruments:
    """What measures: the segmenter, features of EfficientNet-Lite1, differences of pixels."""
    segmenter = Segmenter(
        lambda images: net(2 * images - 1),
        name="scene_segmenter",
        num_classes=num_classes,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        weights={"source": "trained on real scenes by this script"},
    )
    return Instruments((efficientnet_lite1(),), (segmenter,), (pixels(),))


def plot_history(path: Path, history: list[dict[str, Any]]) -> None:
    """One panel per figure over the training time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [name for name in history[0]["figures"] if "kernel" not in name]
    figure = Figure(figsize=(3.4 * len(names), 2.8), layout="constrained")
    minutes = [record["seconds"] / 60 for record in history]
    colours = mpl.colormaps["tab10"](range(10))
    for index, (axis, name) in enumerate(zip(figure.subplots(1, len(names)), names, strict=True)):
        values = [record["figures"][name] for record in history]
        axis.plot(minutes, values, color=colours[index], marker="o", markersize=3)
        axis.set_title(name.replace("_", " ").replace("/", "\n"), fontsize=9)
        axis.set_xlabel("minutes of training", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, go on."""
    parser = argparse.ArgumentParser(description="One long run on procedural street scenes.")
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--minutes", type=float, default=20.0, help="training time of this call")
    parser.add_argument("--every", type=float, default=2.0, help="minutes between measurements")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=4000, help="streets; each has many looks")
    parser.add_argument("--images", type=int, default=500, help="scenes per measurement")
    parser.add_argument("--segmenter-steps", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = scenes_config(options.size, options.batch_size, options.scenes, options.workers)
    splits = build_splits(config.data)
    net = train_segmenter(splits["train"], config, options.segmenter_steps, device)
    instruments = instruments_for(net, config.data.num_classes)
    protocol = Protocol(num_images=options.images, diversity_maps=20, samples_per_map=4)
    trainer = Trainer(config, splits["train"], options.out, device=str(device))
    if (checkpoint := trainer.store.latest()) is not None:
        trainer.restore(checkpoint)
    record_path = options.out / "figures.json"
    history = json.loads(record_path.read_text()) if record_path.is_file() else []
    end = trainer.seconds + 60 * options.minutes
    while trainer.seconds < end:
        until = min(trainer.seconds + 60 * options.every, end)
        trainer.run(save_every=10**9, picture_every=10**9, max_seconds=until)
        started = time.perf_counter()
        trained = TrainedGenerator(
            trainer.averaged_generator(), config, splits["train"].spec, step=trainer.step
        )
        found = measure(trained, splits["heldout"], instruments, protocol, device=str(device))
        record = {"step": trainer.step, "seconds": trainer.seconds, "figures": found.figures}
        history.append(record)
        record_path.write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        plot_history(options.out / "curves.png", history)
        write_sheet(options.out / "samples.png", trained, splits["heldout"], seed=0)
        took = time.perf_counter() - started
        print(f"step {trainer.step}, {trainer.seconds / 60:.1f} min (measured in {took:.0f} s)")
        for name, value in found.figures.items():
            print(f"  {name:<40} {value:.4g}", flush=True)
    trainer.close()


if __name__ == "__main__":
    main()
