"""Small copies of the official data sets: their folders, names and ids, none of their pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

# ids in the files; the place of an id is also the grey level of its pixels, times LEVEL
LEVEL = 60
ADE_IDS = (0, 1, 13, 150)
COCO_IDS = (255, 0, 17, 181)
CITYSCAPES_IDS = (0, 7, 24, 33)


def blocks(ids, *, height=96, width=128, seed=0, side=16):
    """A map of blocks of random ids; every id occurs."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(np.arange((height // side) * (width // side)) % len(ids))
    coarse = np.array(ids)[places].reshape(height // side, width // side)
    return np.kron(coarse, np.ones((side, side), int)).astype(np.uint8)


def painted(labels, ids):
    """A picture that shows a map: place of the id, times LEVEL, in all channels."""
    places = np.searchsorted(np.sort(ids), labels)
    ranks = np.argsort(np.argsort(ids))
    grey = np.argsort(ranks)[places] * LEVEL
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def save(path: Path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def write_ade20k(root: Path, *, train=3, val=2) -> Path:
    for split, kind, count in (("training", "train", train), ("validation", "val", val)):
        for n in range(1, count + 1):
            name, labels = f"ADE_{kind}_{n:08d}", blocks(ADE_IDS, seed=n)
            picture = painted(labels, ADE_IDS)
            save(root / "images" / split / f"{name}.jpg", picture, quality=95)
            save(root / "annotations" / split / f"{name}.png", labels)
    return root


def write_coco_stuff(root: Path, *, train=3, val=2) -> Path:
    for split, first, count in (("train2017", 9, train), ("val2017", 139, val)):
        annotations = []
        for n in range(count):
            number, labels = first + 16 * n, blocks(COCO_IDS, seed=n)
            name, picture = f"{number:012d}", painted(labels, COCO_IDS)
            save(root / split / f"{name}.jpg", picture, quality=95)
            save(root / "stuffthingmaps" / split / f"{name}.png", labels)
            annotations += coco_annotations(number, labels)
        write_instances(root, split, annotations)
    return root


def write_instances(root: Path, split: str, annotations: list) -> None:
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def coco_annotations(number: int, labels) -> list:
    """One person in the left half, one in the right, a dog anywhere, and a crowd of persons."""
    height, width = labels.shape
    half = width // 2
    left = [0, 0, half, 0, half, height, 0, height]
    right = [half, 0, width, 0, width, height, half, height]
    whole = [0, 0, width, 0, width, height, 0, height]
    objects = [(1, [left], 0), (1, [right], 0), (18, [whole], 0)]
    crowd = {"counts": [0, height * width], "size": [height, width]}
    return [
        {
            "id": 100 * number + n,
            "image_id": number,
            "category_id": category,
            "segmentation": rings,
            "iscrowd": iscrowd,
            "area": 1.0,
            "bbox": [0, 0, 1, 1],
        }
        for n, (category, rings, iscrowd) in enumerate([*objects, (1, crowd, 1)])
    ]


def write_cityscapes(root: Path, *, train=3, val=2) -> Path:
    cities = {"train": ("aachen", "zurich"), "val": ("frankfurt",)}
    for split, count in (("train", train), ("val", val)):
        for n in range(count):
            city = cities[split][n % len(cities[split])]
            name = f"{city}_{n:06d}_000019"
            labels = blocks(CITYSCAPES_IDS, height=64, width=128, seed=n)
            picture = painted(labels, CITYSCAPES_IDS)
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", picture)
            folder = root / "gtFine" / split / city
            save(folder / f"{name}_gtFine_labelIds.png", labels)
            save(folder / f"{name}_gtFine_color.png", picture)
            save(folder / f"{name}_gtFine_instanceIds.png", cityscapes_instances(labels))
            (folder / f"{name}_gtFine_polygons.json").write_text("{}", encoding="utf-8")
    return root


def cityscapes_instances(labels):
    """Persons (24) of the left and of the right half are two objects; bicycles (33) a group."""
    ids = labels.astype(np.int32)
    half = labels.shape[1] // 2
    ids[:, :half][labels[:, :half] == 24] = 24000
    ids[:, half:][labels[:, half:] == 24] = 24001
    return ids.astype(np.uint16)
