"""Tries backbones one after the other, as a process of its own: a crash costs one of them.

``python -m benchmarks.backbone_trial NAME...`` prints two JSON objects a model, each on a line:
what timm says of it, and what came of it. It ends with the first model that fails;
:mod:`benchmarks.backbones` starts it, reads it and goes on behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.backbone_list import OPTIONS
from dpsims.errors import BackboneError
from dpsims.nn._timm import pyramid_doublings
from dpsims.nn.backbone import ConditionedBackbone
from dpsims_reference.planning.live import Meter


def main() -> None:
    """Try every model, each within the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--gib", type=float, required=True)
    options = parser.parse_args()
    limit = int(options.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for name in options.names:
        # nobody handles it: it ends the process, also inside an operator
        signal.alarm(options.seconds)
        print(json.dumps(describe(name)), flush=True)
        result = try_model(name, options.size, options.batch, options.repeats)
        print(json.dumps(result), flush=True)


def describe(name: str) -> dict[str, Any]:
    """What timm says of an architecture without building it."""
    import timm

    tags = timm.list_pretrained(f"{name}.*")
    configs: list[Any] = [timm.models.get_pretrained_cfg(tag) for tag in tags]
    licences = Counter(config.license or "not stated" for config in configs)
    return {
        "name": name,
        "family": timm.model_entrypoint(name).__module__.rpartition(".")[2],
        "pretrained_tags": len(tags),
        "licences": dict(sorted(licences.items())),
        "options": OPTIONS.get(name, {}),
    }


def try_model(name: str, size: int, batch: int, repeats: int) -> dict[str, Any]:
    """What came of one architecture."""
    torch.manual_seed(0)
    backbone = build(name)
    network, rule = backbone._extractor, backbone._sizes
    side = max(size, rule.minimum)
    images = (torch.rand(batch, 3, side, side) * 2 - 1).requires_grad_()
    seen = calibrate(backbone, images)
    before = fingerprint(network)
    with Meter() as meter:
        maps = backbone.train()(images)
        loss_of(maps).backward()
    shapes = [tuple(features.shape) for features in maps]
    del maps
    broken = [
        *broken_shapes(backbone, seen, shapes, batch),
        *broken_freezing(network, images.grad, unchanged=fingerprint(network) == before),
    ]
    forward, both = seconds(backbone, images, repeats)
    return {
        "works": not broken,
        "reason": "; ".join(broken),
        "image_size": side,
        "network_size": list(seen),
        "resized_to": rule.resize and list(rule.resize),
        "padded_to": rule.multiple,
        "minimum_size": rule.minimum,
        "reductions": list(backbone.reductions),
        "channels": list(backbone.channels),
        "map_sizes": [list(shape[2:]) for shape in shapes],
        "one_scale": backbone._pyramid,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "forward_seconds": forward,
        "both_seconds": both,
        "peak_bytes": meter.peak,
    }


def build(name: str) -> ConditionedBackbone:
    """The backbone with random weights and as many levels as the network has, up to four."""
    options = OPTIONS.get(name, {})
    refusals = []
    for levels in (4, 3, 2, 1):
        try:
            return ConditionedBackbone(name, pretrained=False, num_levels=levels, **options)
        except BackboneError as error:
            refusals.append(error)
    raise refusals[0]


@torch.no_grad()
def calibrate(backbone: ConditionedBackbone, images: Tensor) -> tuple[int, ...]:
    """Give batch norms the statistics of their inputs, as training would have.

    With the statistics that they start from, random networks grow their maps up to 1e8, where
    every non-linearity is flat. Tables that a network makes for an image size are made here, too.

    Returns:
        The size of the images that reached the network.
    """
    network = backbone._extractor
    seen: list[tuple[int, ...]] = []
    handle = network.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:]))
    )
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    backbone(images)
    for norm in norms:
        norm.eval()
    handle.remove()
    return seen[0]


def loss_of(maps: list[Tensor]) -> Tensor:
    """A scalar whose gradient batch normalisation does not cancel."""
    return sum((features.pow(3).sum() for features in maps), torch.zeros(()))


def fingerprint(network: nn.Module) -> str:
    """Hash of every byte of parameters and buffers, those outside ``state_dict`` included."""
    digest = hashlib.sha256()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def broken_shapes(
    backbone: ConditionedBackbone,
    seen: tuple[int, ...],
    shapes: list[tuple[int, ...]],
    batch: int,
) -> list[str]:
    """What is wrong with the maps, against what the backbone says of itself."""
    broken = []
    if [shape[:2] for shape in shapes] != [(batch, width) for width in backbone.channels]:
        broken.append(f"maps {shapes} are not (B, C, h, w) with C in {backbone.channels}")
    areas = [shape[2] * shape[3] for shape in shapes]
    if areas != sorted(areas, reverse=True):
        broken.append(f"maps {shapes} do not run from fine to coarse")
    for axis in (0, 1):
        sizes = [shape[2 + axis] for shape in shapes]
        if not are_nominal(seen[axis], backbone.reductions, sizes, one_scale=backbone._pyramid):
            pixels = f"{seen[axis]} pixels and strides {backbone.reductions}"
            broken.append(f"maps of {sizes} do not belong to {pixels}")
    return broken


def are_nominal(
    side: int, reductions: Sequence[int], sizes: Sequence[int], *, one_scale: bool
) -> bool:
    """Whether sizes are what strides make of an image: rounded either way, less the borders.

    Convolutions without padding (Inception) lose up to four pixels of a map. The pyramid of a
    network of one scale is exact: 4, 2, 1 and 1/2 times the patches.
    """
    if one_scale:
        patches = sizes[-2]
        doublings = pyramid_doublings(len(sizes))
        wanted = [patches * 2**times if times >= 0 else -(-patches // 2) for times in doublings]
        return list(sizes) == wanted and are_nominal(
            side, reductions[-2:-1], [patches], one_scale=False
        )
    return all(
        side // reduction - 4 <= size <= -(-side // reduction)
        for reduction, size in zip(reductions, sizes, strict=True)
    )


def broken_freezing(network: nn.Module, gradient: Tensor | None, *, unchanged: bool) -> list[str]:
    """Which promises of a frozen network do not hold after training mode and a backward pass."""
    broken = []
    if any(module.training for module in network.modules()):
        broken.append("the network left evaluation mode")
    if not unchanged:
        broken.append("a parameter or buffer changed")
    if any(parameter.grad is not None for parameter in network.parameters()):
        broken.append("a parameter got a gradient")
    if gradient is None or not bool(gradient.isfinite().all()):
        broken.append("the gradient of the image is not finite")
    elif not bool(gradient.abs().sum() > 0):
        broken.append("the gradient of the image is zero")
    return broken


def seconds(backbone: ConditionedBackbone, images: Tensor, repeats: int) -> tuple[float, float]:
    """Median CPU time of a forward pass, and of forward and backward together."""
    forward, both = [], []
    for _ in range(repeats):
        start = time.process_time()
        loss = loss_of(backbone(images))
        forward.append(time.process_time() - start)
        loss.backward()
        both.append(time.process_time() - start)
    return statistics.median(forward), statistics.median(both)


if __name__ == "__main__":
    main()
