"""What each option of torch is worth on this CPU, for the networks of the tiny preset.

Run it with ``python benchmarks/cpu_options.py --json benchmarks/results/cpu_options.json``.
Variants take turns, round after round; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpsims.nn import fold_spectral_norm_
from dpsims_reference.config import Config
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.generator import build_generator
from dpsims_reference.presets import preset

Work = Callable[[], Any]


def inference(config: Config, batch: int) -> dict[str, Work]:
    """Images of the generator, with and without each option."""
    generator = build_generator(config).eval()
    size = (batch, *config.data.image_size)
    labels = torch.randint(config.data.num_classes, size)
    latents = torch.randn(batch, config.generator.latent_dim)

    def images(model: nn.Module, dtype: torch.dtype | None = None) -> Work:
        def work() -> Tensor:
            context = torch.autocast("cpu", dtype) if dtype else nullcontext()
            with torch.no_grad(), context:
                return model(labels, latents).images

        return work

    folded = fold_spectral_norm_(copy.deepcopy(generator))
    last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    return {
        "eager": images(generator),
        "spectral norm folded": images(folded),
        "folded, channels last": images(last),
        "folded, bfloat16 autocast": images(folded, torch.bfloat16),
    }


def decoder(config: Config, batch: int) -> dict[str, Work]:
    """Forward and backward of the discriminator, in both memory formats."""
    config = replace(
        config, discriminator=replace(config.discriminator, pretrained=False, weights=None)
    )
    network = build_discriminator(config)
    images = torch.rand(batch, 3, *config.data.image_size) * 2 - 1

    def step(memory_format: torch.memory_format) -> Work:
        model = copy.deepcopy(network).to(memory_format=memory_format)
        given = images.to(memory_format=memory_format)

        def work() -> None:
            model.zero_grad()
            model(given).square().mean().backward()

        return work

    return {
        "contiguous": step(torch.contiguous_format),
        "channels last": step(torch.channels_last),
    }


def seconds(work: Work) -> float:
    """Processor time of one call, which other processes hardly change."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(works: dict[str, Work], rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each variant, and its speed relative to the first one."""
    for work in works.values():
        work()
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        # another one begins in every round
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(seconds(works[name]))
    first = times[names[0]]
    return [
        {
            "variant": name,
            "seconds": round(statistics.median(found), 5),
            "speed": round(statistics.median(a / b for a, b in zip(first, found, strict=True)), 3),
        }
        for name, found in times.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    tiny = preset("tiny")
    normed = replace(tiny, generator=replace(tiny.generator, spectral_norm=True))
    report: dict[str, Any] = {"benchmark": "cpu_options", "batch": options.batch, "results": {}}
    parts = {"generator, inference": inference, "discriminator, forward and backward": decoder}
    for title, build in parts.items():
        rows = measure(build(normed, options.batch), options.rounds)
        report["results"][title] = rows
        print(title)
        for row in rows:
            print(f"  {row['variant']:<28} {1000 * row['seconds']:9.1f} ms  {row['speed']:6.2f}x")
    if options.json is not None:
        report |= {
            "rounds": options.rounds,
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "date": time.strftime("%Y-%m-%d"),
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
