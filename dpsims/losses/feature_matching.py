"""Feature matching: make a discriminator's features of fake images those of real ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dpsims._checks import check_bool, check_number, check_tensor
from dpsims._levels import check_levels
from dpsims.errors import DTypeError, InputError


def feature_matching_loss(
    fake_features: Sequence[Float[Tensor, "B _ _ _"]],
    real_features: Sequence[Float[Tensor, "B _ _ _"]],
    *,
    paired: bool = True,
    level_weights: Sequence[float] | None = None,
) -> Float[Tensor, ""]:
    r"""Distance between the feature maps of fake and of real images, level by level.

    Args:
        fake_features: Feature maps of fake images, one per level: of a
            :class:`dpsims.nn.ConditionedBackbone`, or layers of any discriminator.
        real_features: The same maps of real images. Constants: no gradient reaches them.
        paired: Whether image ``i`` of both batches should look alike, as in image translation:
            the mean absolute difference. ``False`` compares only the averages over the batch: the
            mean squared difference, for generators without a target image.
        level_weights: One factor per level, not negative. ``None`` takes the mean of all levels.
    Shape:
        - both: one ``(B, C_l, h_l, w_l)`` per level, the same shapes; output a scalar, float32 or
          float64
    Raises:
        InputError: No level, another number of levels, shapes or devices differ, a weight is
            negative or one is missing.
        DTypeError: Not lists of floating-point maps; ``paired`` is not a bool.

    Note:
        Units: those of the features; conditioned features have variance 1, so a distance of 1 is
        large. Each level is divided by its own number of entries. Cost: ``O(B C h w)`` per level.
        Gradients: any order, to the fake features.
    Source:
        Paired: Wang et al., CVPR 2018 (pix2pixHD), Eq. (4). Not paired: Salimans et al., NeurIPS
        2016, Sec. 3.1. Not used by DP-SIMS. Theirs -> ours: D_k^(i), f -> levels,
        N_i -> entries of a level. Not in the papers: the mean over levels, the mean over features.

    Example:
        >>> fake = [torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 4, 4)]
        >>> real = [torch.ones(2, 4, 8, 8), torch.full((2, 8, 4, 4), 3.0)]
        >>> feature_matching_loss(fake, real)
        tensor(2.)
    """
    owner = "feature_matching_loss"
    check_bool(owner, "paired", paired)
    _check_counts(owner, fake_features, real_features)
    widths = _widths(fake_features)
    check_levels(owner, "fake_features", fake_features, widths)
    check_levels(owner, "real_features", real_features, widths, like=fake_features[0])
    costs = []
    for level, (fake, real) in enumerate(zip(fake_features, real_features, strict=True)):
        _, _, height, width = fake.shape
        check_tensor(owner, f"real_features[{level}]", real, "B C H W", H=height, W=width)
        costs.append(_distance(fake, real.detach(), paired))
    weights = _level_weights(owner, level_weights, len(costs))
    return torch.stack([weight * cost for weight, cost in zip(weights, costs, strict=True)]).sum()


def _distance(fake: Tensor, real: Tensor, paired: bool) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(fake.dtype, real.dtype), torch.float32)
    fake, real = fake.to(dtype), real.to(dtype)
    if paired:
        difference = (fake - real).abs()
    else:
        difference = ((fake - real).sum(0) / max(1, len(fake))).square()
    # an empty batch costs 0, not 0/0
    return difference.sum() / max(1, difference.numel())


def _check_counts(owner: str, fake_features: object, real_features: object) -> None:
    """Raise where one list is shorter than the other; the shorter one is to blame."""
    named = {"fake_features": fake_features, "real_features": real_features}
    counts = {name: len(maps) for name, maps in named.items() if isinstance(maps, list | tuple)}
    if len(set(counts.values())) > 1:
        name = min(counts, key=lambda key: counts[key])
        msg = f"{owner}: {name} must hold {max(counts.values())} maps, one per level; "
        raise InputError(msg + f"got {counts[name]}")


def _widths(maps: object) -> list[int]:
    """The widths that a list of maps has, for the check of everything else."""
    if not isinstance(maps, list | tuple) or not maps:
        return [1]
    return [m.shape[1] if isinstance(m, Tensor) and m.ndim > 1 else 1 for m in maps]


def _level_weights(owner: str, weights: object, num_levels: int) -> Sequence[float]:
    if weights is None:
        return [1 / num_levels] * num_levels
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        msg = f"{owner}: level_weights must be a sequence of numbers; got {type(weights).__name__}"
        raise DTypeError(msg)
    if len(weights) != num_levels:
        msg = f"{owner}: level_weights must hold {num_levels} numbers, one per level; "
        msg += f"got {len(weights)}"
        raise InputError(msg)
    for level, weight in enumerate(weights):
        check_number(owner, f"level_weights[{level}]", weight, minimum=0)
    return weights
