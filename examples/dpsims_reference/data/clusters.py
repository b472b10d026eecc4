"""Clusters of features, folded into one linear score per class."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpsims._optional import require
from dpsims.errors import DataError

LEVEL_WEIGHTS = (0.5, 1.0, 0.7, 1.4)
"""Standard deviation of all components of a level together; the last level is colour.

With more weight on the coarse level, objects get a ring around them that no object has.
"""
_NUM_COMPONENTS = 12
_ROUNDS = 30


def fit_scores(
    pixels: Float[Tensor, "P C"], widths: list[int], num_classes: int, *, seed: int
) -> dict[str, Tensor]:
    """Cluster pixels and return each class's score as a linear function of the raw features.

    Standardising, projecting and measuring the distance to a centroid are affine up to a term that
    all classes share, so one weight per class and channel is all that is left of them.

    Args:
        pixels: Raw features, the levels side by side.
        widths: Channels of each level.
        num_classes: Number of clusters.
        seed: Seed of k-means++.

    Raises:
        DataError: The last level, colour in [-1, 1], has fewer distinct values than clusters.
    """
    # the network's own padding makes even one colour look varied, so colours are counted
    distinct = len(torch.unique((pixels[:, -widths[-1] :] * 127.5).round(), dim=0))
    if distinct < num_classes:
        msg = f"the images hold {distinct} distinct colors, fewer than {num_classes} classes"
        raise DataError(msg)
    pixels = pixels.double()
    projections, parts = [], []
    for level, weight in zip(pixels.split(widths, dim=1), LEVEL_WEIGHTS, strict=True):
        matrix, offset = _principal_components(level, weight)
        projections.append((matrix, offset))
        parts.append(level @ matrix + offset)
    points = torch.cat(parts, dim=1).float()
    clusters: Any = require("sklearn.cluster", extra="photos", purpose="clustering features")
    fitted = clusters.KMeans(num_classes, n_init=1, max_iter=_ROUNDS, random_state=seed).fit(
        points.numpy()
    )
    centers = torch.from_numpy(fitted.cluster_centers_).double()
    counts = torch.bincount(torch.from_numpy(fitted.labels_).long(), minlength=num_classes)
    centers = centers[counts.argsort(descending=True, stable=True)]
    # -|x - c|^2 / 2 without the term that does not depend on the class: x.c - |c|^2 / 2
    bias = -0.5 * centers.square().sum(1)
    scores = {}
    sizes = [matrix.shape[1] for matrix, _ in projections]
    for n, (part, (matrix, offset)) in enumerate(
        zip(centers.split(sizes, dim=1), projections, strict=True)
    ):
        scores[f"level{n}"] = (part @ matrix.T).float()
        bias = bias + part @ offset
    scores["bias"] = bias.float()
    return scores


def _principal_components(level: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The affine map that standardises, projects, and gives a total deviation of ``weight``."""
    mean, deviation = level.mean(0), level.std(0, correction=0)
    # a constant channel says nothing, and must not be divided by zero
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0)
    standardised = (level - mean) * scale
    covariance = standardised.T @ standardised / len(level)
    variances, directions = torch.linalg.eigh(covariance)
    kept = min(_NUM_COMPONENTS, level.shape[1])
    total = variances[-kept:].sum().clamp(min=1e-12).sqrt()
    matrix = scale[:, None] * directions[:, -kept:] * (weight / total)
    return matrix, -mean @ matrix
