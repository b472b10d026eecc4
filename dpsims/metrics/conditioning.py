"""What feature conditioning makes of a backbone's maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_tensor
from dpsims.errors import DTypeError
from dpsims.metrics._tables import text_table

_OWNER = "conditioning_report"


class FeatureStatistics(NamedTuple):
    """Four figures of one feature map.

    Attributes:
        mean: Of all values.
        std: Of all values.
        kurtosis: Fourth standardised moment of all values: 3 for a normal distribution, more if
            few values dwarf the rest. NaN for a constant map.
        effective_rank: Number of directions that the pixels' vectors really use, between 1 and the
            number of channels; 0 for a constant map.

    Source:
        Effective rank: Roy and Vetterli, EUSIPCO 2007, on the eigenvalues of the covariance.

    Example:
        >>> FeatureStatistics(mean=0.0, std=1.0, kurtosis=3.0, effective_rank=40.0).kurtosis
        3.0
    """

    mean: float
    std: float
    kurtosis: float
    effective_rank: float


class ConditioningLevel(NamedTuple):
    """One level of a backbone.

    Attributes:
        channels: Width of the map.
        size: Height and width of the map.
        before: The network's own map.
        after: The conditioned map.

    Source:
        Not from the paper.

    Example:
        >>> raw, conditioned = FeatureStatistics(9, 40, 90, 3), FeatureStatistics(0, 1, 3, 40)
        >>> ConditioningLevel(64, (16, 16), before=raw, after=conditioned).after.effective_rank
        40
    """

    channels: int
    size: tuple[int, int]
    before: FeatureStatistics
    after: FeatureStatistics


class ConditioningReport(NamedTuple):
    """What :func:`conditioning_report` found, fine to coarse.

    Attributes:
        levels: One entry per level.

    Source:
        Not from the paper.

    Example:
        >>> raw, conditioned = FeatureStatistics(9, 40, 90, 3), FeatureStatistics(0, 1, 3, 40)
        >>> report = ConditioningReport((ConditioningLevel(64, (16, 16), raw, conditioned),))
        >>> len(report.numbers()) > 0
        True
    """

    levels: tuple[ConditioningLevel, ...]

    def numbers(self) -> dict[str, float]:
        """Every figure by a name that suits a log."""
        return {
            f"features_{when}/level{index}_{name}": value
            for index, level in enumerate(self.levels)
            for when in ("before", "after")
            for name, value in getattr(level, when)._asdict().items()
        }

    def table(self) -> str:
        """Everything as aligned text, before and after in one cell."""
        rows = []
        for index, level in enumerate(self.levels):
            cells = [f"{index}: {level.channels}x{level.size[0]}x{level.size[1]}"]
            for old, new in zip(level.before, level.after, strict=True):
                cells.append(f"{old:.3g} -> {new:.3g}")
            rows.append(cells)
        return text_table(("level", "mean", "std", "kurtosis", "effective rank"), rows)


@torch.no_grad()
def conditioning_report(
    backbone: nn.Module, images: Float[Tensor, "B 3 H W"]
) -> ConditioningReport:
    """Describe the maps of a conditioned backbone before and after conditioning.

    Features of a pre-trained network may sit in few channels and few values; a discriminator then
    sees little of them. The report shows whether conditioning has spread them.

    Args:
        backbone: A :class:`dpsims.nn.ConditionedBackbone`, or any module whose ``conditioners``
            are a ``ModuleList`` with one module per level.
        images: What to look at; take a training batch.

    Shape:
        - images ``(B, 3, H, W)``, ``B`` at least 1

    Returns:
        A :class:`ConditioningReport` with a ``table()`` to print and ``numbers()`` to log.

    Raises:
        InputError: Images of the wrong shape.
        DTypeError: ``backbone`` has no conditioners; images are no floating-point tensor.

    Note:
        Units: dimensionless. The network runs in evaluation mode. The conditioners run in the mode
        they are in, on copies: in training mode with the statistics of ``images``, else with the
        recorded ones; nothing of the module changes. Covariances are float64.
        Cost: one forward pass, and ``O(C^3)`` per level for the eigenvalues.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.1 and Table 5, where conditioning is an ablation; the
        figures are ours.

    Example:
        >>> from dpsims.nn import ConditionedBackbone
        >>> backbone = ConditionedBackbone("test_resnet", pretrained=False)
        >>> report = conditioning_report(backbone, torch.rand(2, 3, 64, 64) * 2 - 1)
        >>> len(report.levels), abs(report.levels[0].after.mean) < 1e-5
        (4, True)
    """
    conditioners = getattr(backbone, "conditioners", None)
    if not isinstance(backbone, nn.Module) or not isinstance(conditioners, nn.ModuleList):
        kind = type(backbone).__name__
        msg = f"{_OWNER}: backbone must be a module with a ModuleList conditioners; got {kind}"
        raise DTypeError(msg)
    check_tensor(_OWNER, "images", images, "batch C H W", C=3)
    copies = [deepcopy(conditioner) for conditioner in conditioners]
    maps: dict[int, Tensor] = {}

    def keep(level: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
        maps[level] = inputs[0].detach().clone()

    hooks = [
        conditioner.register_forward_pre_hook(partial(keep, level))
        for level, conditioner in enumerate(conditioners)
    ]
    try:
        with _evaluation(backbone):
            backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    return ConditioningReport(
        tuple(_level(maps[level], condition) for level, condition in enumerate(copies))
    )


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each part's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _level(features: Tensor, condition: nn.Module) -> ConditioningLevel:
    size = (features.shape[-2], features.shape[-1])
    before, after = _statistics(features), _statistics(condition(features))
    return ConditioningLevel(features.shape[1], size, before, after)


def _statistics(features: Tensor) -> FeatureStatistics:
    wide = features.double()
    centred = wide - wide.mean()
    variance = centred.square().mean()
    kurtosis = centred.square().square().mean() / variance.square()
    rank = _effective_rank(wide)
    return FeatureStatistics(
        *(float(value) for value in (wide.mean(), variance.sqrt(), kurtosis, rank))
    )


def _effective_rank(features: Tensor) -> Tensor:
    """Exponential of the entropy of the covariance's eigenvalues, as shares of their sum."""
    pixels = features.movedim(1, 0).flatten(1)
    pixels = pixels - pixels.mean(1, keepdim=True)
    covariance = pixels @ pixels.mT / pixels.shape[1]
    total = covariance.trace()
    # eigvalsh refuses what is not finite
    if not bool(total.isfinite()) or not bool(total > 0):
        return total * 0
    shares = torch.linalg.eigvalsh(covariance / total).clamp_min(0)
    return torch.special.entr(shares / shares.sum()).sum().exp()
