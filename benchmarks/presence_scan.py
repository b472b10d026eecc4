"""How fast class_presence reads label maps from files, by number of worker processes.

Run it with ``python benchmarks/presence_scan.py --json benchmarks/results/presence_scan.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpsims.data import LabelSpec
from dpsims_reference.data.folder import FolderDataset
from dpsims_reference.data.paired import PresenceScan

_COCO_IMAGES = 118_287
_CLASSES = 183
_DISTINCT = 50


def write_masks(root: Path, count: int, height: int, width: int) -> None:
    """Label maps with a dozen regions of wavy borders; every fiftieth is the same."""
    for kind in ("images", "labels"):
        (root / kind).mkdir()
    rows, cols = np.mgrid[:height, :width]
    for number in range(min(count, _DISTINCT)):
        rng = np.random.default_rng(number)
        far = np.full((height, width), np.inf)
        ids = np.zeros((height, width), np.uint8)
        for class_id in rng.integers(0, _CLASSES, 12):
            row, col = rng.integers(height), rng.integers(width)
            wave = 9 * np.sin(cols / rng.integers(3, 12)) + 9 * np.sin(rows / rng.integers(3, 12))
            distance = np.hypot(rows - row, cols - col) + wave
            ids[distance < far] = class_id
            far = np.minimum(far, distance)
        Image.fromarray(ids).save(root / "labels" / f"{number:06d}.png")
        # a scan never reads it
        Image.new("RGB", (1, 1)).save(root / "images" / f"{number:06d}.png")
    for number in range(_DISTINCT, count):
        for kind in ("images", "labels"):
            source = root / kind / f"{number % _DISTINCT:06d}.png"
            shutil.copyfile(source, root / kind / f"{number:06d}.png")


def seconds(root: Path, workers: int) -> float:
    """Wall time of one whole scan without a cache."""
    dataset = FolderDataset(root, LabelSpec(_CLASSES), image_size=(256, 256))
    dataset.scan = PresenceScan(workers=workers)
    started = time.perf_counter()
    presence = dataset.presence()
    taken = time.perf_counter() - started
    assert bool(presence.any(1).all())
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640))
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        write_masks(folder, options.images, *options.size)
        size = sum(path.stat().st_size for path in (folder / "labels").iterdir())
        seconds(folder, 0)
        taken = {
            workers: [seconds(folder, workers) for _ in range(options.repeats)]
            for workers in options.workers
        }
    finally:
        shutil.rmtree(folder)
    rows = []
    for workers, times in taken.items():
        pace = options.images / statistics.median(times)
        minutes = _COCO_IMAGES / pace / 60
        print(f"workers {workers}: {pace:7.0f} maps per second, {minutes:5.1f} min for COCO-Stuff")
        rows.append({"workers": workers, "maps_per_second": round(pace, 1), "seconds": times})
    if options.json is not None:
        report = {
            "benchmark": "presence_scan",
            "images": options.images,
            "size": list(options.size),
            "bytes_per_map": round(size / options.images),
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "results": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
