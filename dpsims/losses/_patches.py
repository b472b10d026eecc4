"""What :mod:`dpsims.losses.contrastive` computes, without argument checks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

# vectors whose largest entry is below this shrink towards 0 instead of reaching length 1;
# gradients grow by its inverse, which float16 must be able to hold
_MIN_ENTRY = 1e-6
_MIN_ENTRY_FLOAT16 = 1e-3


def draw_positions(
    features: Tensor,
    count: int,
    generator: torch.Generator | None,
    shard: tuple[int, int] = (0, 1),
) -> Int[Tensor, "B P"]:
    """Up to ``count`` distinct flat positions per image, in random order.

    With ``shard=(i, n)`` they are rows ``i, i + n, ...`` of what ``n`` times as many images get.
    """
    batch, total = features.shape[0], features.shape[-2] * features.shape[-1]
    device = features.device if generator is None else generator.device
    index, parts = shard
    if generator is None:
        # torch cannot trace `generator=None` beside a symbolic size
        drawn = torch.rand(batch * parts, total, device=device)
    else:
        drawn = torch.rand(batch * parts, total, generator=generator, device=device)
    order = drawn[index::parts].argsort(dim=1)
    return order[:, :count].to(features.device)


def gather_pixels(features: Tensor, positions: Tensor) -> Float[Tensor, "B P C"]:
    """The vectors of a map at flat positions."""
    pixels = rearrange(features, "b c h w -> b (h w) c")
    return pixels.gather(1, positions[:, :, None].expand(-1, -1, features.shape[1]))


def patch_nce(
    queries: Float[Tensor, "G P D"],
    positives: Float[Tensor, "G P D"],
    negatives: Float[Tensor, "G N D"],
    *,
    temperature: float,
    normalize: bool,
    excluded: Tensor | None = None,
) -> Float[Tensor, "G P"]:
    """Loss of every query; the queries of a group share negatives but those in ``excluded``."""
    dtype = torch.float32
    for vectors in (queries, positives, negatives):
        dtype = torch.promote_types(dtype, vectors.dtype)
    with _without_autocast(queries.device):
        queries, positives, negatives = (
            _unit_vectors(vectors, dtype) if normalize else vectors.to(dtype)
            for vectors in (queries, positives, negatives)
        )
        same = (queries * positives).sum(dim=2, keepdim=True)
        different = queries @ negatives.mT
        if excluded is not None:
            different = different.masked_fill(excluded, -torch.inf)
        logits = torch.cat([same, different], dim=2) / temperature
        # the positive is class 0
        return -logits.log_softmax(dim=2)[:, :, 0]


def _unit_vectors(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors of length 1, with finite values and gradients for every finite input."""
    smallest = _MIN_ENTRY_FLOAT16 if vectors.dtype == torch.float16 else _MIN_ENTRY
    vectors = vectors.to(dtype)
    # squares cannot overflow after it. The result does not depend on the scale: no gradient
    scale = vectors.detach().abs().amax(dim=-1, keepdim=True).clamp_min(smallest)
    vectors = vectors / scale
    return vectors / vectors.square().sum(dim=-1, keepdim=True).clamp_min(1).sqrt()


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
