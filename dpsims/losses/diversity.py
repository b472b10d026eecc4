"""Keep images of one label map apart when their latents are apart."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpsims._checks import (
    check_bool,
    check_choice,
    check_number,
    check_tensor,
    values_are_readable,
)
from dpsims.errors import InputError

Norm = Literal["mean", "sum"]

# smallest mean distance between two latents that is divided by; latents differ by about 1
_MIN_DISTANCE = 1e-6


def diversity_ratio(
    features_a: Float[Tensor, "B C H W"],
    features_b: Float[Tensor, "B C H W"],
    latents_a: Float[Tensor, "B Z"],
    latents_b: Float[Tensor, "B Z"],
    *,
    norm: Norm = "mean",
) -> Float[Tensor, " B"]:
    r"""How far two outputs lie apart, per distance of their latents.

    For each sample, :math:`\lVert f_a - f_b \rVert_1 / \lVert z_a - z_b \rVert_1`.

    Args:
        features_a: Generator features (or images) for ``latents_a``.
        features_b: The same for ``latents_b`` and the same label maps.
        latents_a: Latents as the generator takes them. Whether they lie on a sphere changes the
            scale of the ratio, and nothing is normalised here.
        latents_b: Latents that differ from ``latents_a`` in every sample.
        norm: ``"mean"`` averages over the elements in both norms, so that the ratio does not
            depend on resolution; ``"sum"`` is the formula as printed, ``C * H * W / Z`` times
            larger.

    Shape:
        - features ``(B, C, H, W)``, latents ``(B, Z)``; output ``(B,)``, float32 or better

    Raises:
        InputError: Shapes or devices differ, or (eager mode on CPU) two latents are equal; the
            message lists the samples.
        DTypeError: An input that is not a floating-point tensor.

    Note:
        Units: feature units per latent unit. A mean latent distance below 1e-6 counts as 1e-6, so
        that value and gradient stay finite where equal latents cannot be seen (CUDA, compiled).
        Cost: ``O(B C H W)``. Gradients: first order, to both features, none to the latents; where
        two features are equal the sub-gradient is 0. NaN propagates.

    Source:
        Berrada et al., CVPR 2024, Eq. (6). Theirs -> ours: G^f(z_1, t) -> features_a, z_1 ->
        latents_a. Not in the paper: whether a norm is a sum or a mean, and the smallest distance.

    Example:
        >>> features, latents = torch.randn(2, 4, 8, 8), torch.randn(2, 16)
        >>> diversity_ratio(features, features, latents, -latents)
        tensor([0., 0.])
    """
    return _ratio("diversity_ratio", features_a, features_b, latents_a, latents_b, norm)


def hinge_diversity_loss(
    features_a: Float[Tensor, "B C H W"],
    features_b: Float[Tensor, "B C H W"],
    latents_a: Float[Tensor, "B Z"],
    latents_b: Float[Tensor, "B Z"],
    *,
    threshold: float,
    norm: Norm = "mean",
) -> Float[Tensor, ""]:
    r"""Penalise two outputs that lie closer together than ``threshold`` times their latents.

    The mean over the batch of :math:`\max(0, \tau - r)`, with :math:`r` from
    :func:`diversity_ratio`. A sample beyond the threshold adds exactly 0 and has no gradient.

    Args:
        features_a: Generator features before the last convolution, for ``latents_a``.
        features_b: The same for ``latents_b`` and the same label maps.
        latents_a: Latents as the generator takes them.
        latents_b: Latents that differ from ``latents_a`` in every sample.
        threshold: Ratio from which on nothing is asked, 0 or more; see
            :func:`diversity_threshold`, and give both functions the same ``norm``.
        norm: As in :func:`diversity_ratio`.

    Shape:
        - features ``(B, C, H, W)``, latents ``(B, Z)``; output: scalar, float32 or better; 0 for
          an empty batch

    Raises:
        InputError: As :func:`diversity_ratio`; ``threshold`` negative or not finite.
        DTypeError: An input that is not a floating-point tensor, a threshold that is not a number.

    Note:
        Units: those of the ratio; the loss lies in ``[0, threshold]``.
        Cost: ``O(B C H W)``. Gradients: first order, to both features, none to the latents. Equal
        features have loss ``threshold`` and sub-gradient 0: a generator whose noise gates are
        still closed learns nothing from this loss until another loss opens them. NaN propagates.

    Source:
        Berrada et al., CVPR 2024, Eq. (6), App. B.3 (weight 10). Theirs -> ours: tau_div ->
        threshold. Not in the paper: hinge per sample, then mean over the batch.

    Example:
        >>> features, latents = torch.randn(2, 4, 8, 8), torch.randn(2, 16)
        >>> hinge_diversity_loss(features, features, latents, -latents, threshold=0.5)
        tensor(0.5000)
    """
    check_number("hinge_diversity_loss", "threshold", threshold, minimum=0)
    ratio = _ratio("hinge_diversity_loss", features_a, features_b, latents_a, latents_b, norm)
    # relu, not clamp: its gradient at ratio == threshold is 0 in every version of torch
    return F.relu(threshold - ratio).sum() / max(ratio.shape[0], 1)


def diversity_threshold(
    features: Float[Tensor, "B C H W"],
    latents: Float[Tensor, "B Z"],
    *,
    norm: Norm = "mean",
    as_printed: bool = False,
) -> Float[Tensor, ""]:
    r"""Mean :func:`diversity_ratio` over the pairs of a batch: a threshold for the hinge loss.

    Average the results over the batches of a training set. Different label maps in the batch give
    the paper's formula; one label map repeated gives the distance that the loss itself sees.

    Args:
        features: Generator features before the last convolution.
        latents: The latents they were made from.
        norm: As in :func:`diversity_ratio`.
        as_printed: Divide by ``B * B``, as if a sample had ratio 0 to itself, instead of by the
            number of pairs.

    Shape:
        - features ``(B, C, H, W)``, latents ``(B, Z)``, ``B >= 2``; output: scalar, float32 or
          better

    Raises:
        InputError: A batch below 2, shapes or devices that differ, or (eager mode on CPU) no two
            latents that differ.
        DTypeError: An input that is not a floating-point tensor, ``as_printed`` not a bool.

    Note:
        Units: those of the ratio; no gradient.
        A pair of equal latents is left out, and is not counted unless ``as_printed``. If no pair
        is left where values cannot be read (CUDA, compiled), the result is NaN, or 0 with
        ``as_printed``.
        Cost: ``O(B^2 C H W)`` time, memory of one more batch of features.

    Source:
        Berrada et al., CVPR 2024, Eq. (7). Theirs -> ours: tau_div -> the result. The
        printed sum runs over i = j too, where it is 0/0: those pairs are left out.

    Example:
        >>> features, latents = torch.randn(3, 4, 8, 8), torch.randn(3, 16)
        >>> threshold = diversity_threshold(features, latents)
        >>> literal = diversity_threshold(features, latents, as_printed=True)
        >>> torch.allclose(literal, threshold * 6 / 9)
        True
    """
    owner = "diversity_threshold"
    check_tensor(owner, "features", features, "B C H W")
    batch = features.shape[0]
    check_tensor(owner, "latents", latents, "B Z", like=features, B=batch)
    check_choice(owner, "norm", norm, ("mean", "sum"))
    check_bool(owner, "as_printed", as_printed)
    if batch < 2:
        msg = f"{owner}: features must hold at least 2 samples; got {batch}"
        raise InputError(msg)
    features, latents = features.detach(), latents.detach()
    terms, counts = [], []
    for index in range(batch - 1):
        # one row of the upper triangle at a time: all pairs at once would hold B^2 feature maps
        distances = _mean_distance(features[index + 1 :], features[index])
        gaps = _mean_distance(latents[index + 1 :], latents[index])
        terms.append(torch.where(gaps == 0, 0, distances / gaps.clamp_min(_MIN_DISTANCE)).sum())
        counts.append((gaps != 0).sum())
    total, pairs = torch.stack(terms).sum(), torch.stack(counts).sum()
    if values_are_readable(latents) and not bool(pairs):
        msg = f"{owner}: latents must hold at least two that differ; got {batch} equal ones"
        raise InputError(msg)
    mean = total * (2 / batch**2) if as_printed else total / pairs
    return mean * _norm_factor(norm, features, latents)


def _ratio(
    owner: str,
    features_a: Tensor,
    features_b: Tensor,
    latents_a: Tensor,
    latents_b: Tensor,
    norm: Norm,
) -> Tensor:
    check_tensor(owner, "features_a", features_a, "B C H W")
    b, c, h, w = features_a.shape
    check_tensor(owner, "features_b", features_b, "B C H W", like=features_a, B=b, C=c, H=h, W=w)
    check_tensor(owner, "latents_a", latents_a, "B Z", like=features_a, B=b)
    z = latents_a.shape[1]
    check_tensor(owner, "latents_b", latents_b, "B Z", like=features_a, B=b, Z=z)
    check_choice(owner, "norm", norm, ("mean", "sum"))
    latents_a, latents_b = latents_a.detach(), latents_b.detach()
    _check_latents_differ(owner, latents_a, latents_b)
    gaps = _mean_distance(latents_a, latents_b).clamp_min(_MIN_DISTANCE)
    ratio = _mean_distance(features_a, features_b) / gaps
    return ratio * _norm_factor(norm, features_a, latents_a)


def _check_latents_differ(owner: str, latents_a: Tensor, latents_b: Tensor) -> None:
    if not (values_are_readable(latents_a) and values_are_readable(latents_b)):
        return
    equal = (latents_a == latents_b).all(dim=1)
    if bool(equal.any()):
        found = equal.nonzero().flatten().tolist()
        listed = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
        msg = (
            f"{owner}: latents_b must differ from latents_a in every sample; "
            f"got equal latents in {len(found)} of {len(equal)} samples: {listed}"
        )
        raise InputError(msg)


def _mean_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference per sample, in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    distance = (first.to(dtype) - second.to(dtype)).abs()
    return distance.mean(dim=tuple(range(1, distance.ndim)))


def _norm_factor(norm: Norm, features: Tensor, latents: Tensor) -> float:
    return 1.0 if norm == "mean" else features.shape[1:].numel() / latents.shape[1]
