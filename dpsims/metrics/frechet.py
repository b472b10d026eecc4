"""Frechet distance between two sets of images in the features of a network of your choice."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_bool, check_int, check_tensor
from dpsims._optional import require
from dpsims.errors import DTypeError, InputError
from dpsims.metrics._gaussian import Gaussian, root, squared_distance


def frechet_distance(
    features_a: Float[Tensor, "N D"], features_b: Float[Tensor, "M D"], *, warn_rank: bool = True
) -> float:
    r"""Squared Frechet distance of the Gaussians that fit two sets of feature vectors.

    :math:`\|\mu_a - \mu_b\|^2 + \mathrm{tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2})`

    Args:
        features_a: One feature vector per row.
        features_b: The other set; may have another number of rows.
        warn_rank: Warn when a set has no more rows than columns: its covariance is then singular
            and the distance far too large to compare with others.

    Shape:
        - features_a ``(N, D)``, features_b ``(M, D)``, same device; ``N`` and ``M`` at least 2

    Returns:
        The distance, at least 0.

    Raises:
        InputError: Wrong shapes, fewer than 2 rows, or a feature that is not finite (names its
            row).
        DTypeError: Not floating-point tensors, or ``warn_rank`` is no bool.
        NonFiniteError: The features are so large that the distance overflows.

    Warns:
        UserWarning: A set has no more rows than columns.

    Note:
        Units: squared units of the features. Cost: ``O((N + M) D^2 + D^3)`` in float64, about 10 s
        at ``D = 2048`` on a CPU. The trace of the square root is the sum of the singular values of
        the product of two factors, so that no complex or negative root can appear. Not
        differentiable.

    Source:
        Heusel et al., NeurIPS 2017, Eq. 6; the measure "FID" of the paper's Tables 1 to 3 with the
        features of Inception-v3. Covariances divide by ``N - 1``.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
        >>> round(frechet_distance(features, features + torch.tensor([3.0, 4.0])), 6)
        25.0
    """
    check_bool("frechet_distance", "warn_rank", warn_rank)
    gaussians = []
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        check_tensor("frechet_distance", name, features, "N D")
        width = features_a.shape[1]
        check_tensor("frechet_distance", name, features, "N D", like=features_a, D=width)
        _check_finite("frechet_distance", name, features)
        _check_count("frechet_distance", name, len(features), width, warn_rank)
        values = features.detach().double()
        mean = values.mean(dim=0)
        factor = (values - mean) / (len(values) - 1) ** 0.5
        if len(factor) > width:
            factor = torch.linalg.qr(factor, mode="r").R
        gaussians.append(Gaussian(mean, factor))
    return squared_distance("frechet_distance", *gaussians)


class FrechetFeatureDistance(nn.Module):
    """Collect images batch by batch, then compare real and generated ones.

    A thin layer over ``torchmetrics.image.fid.FrechetInceptionDistance``, which keeps the sums in
    float64 and adds them up over processes. The numbers of two different feature networks cannot
    be compared, so the name of the features goes with every result; only those of Inception-v3
    may be called FID.

    Args:
        extractor: Network from images ``(B, 3, H, W)`` in [-1, 1] to features ``(B, D)``. It runs
            in eval mode without gradients; afterwards its mode is what it was.
        name: What the features are, such as ``"tf_efficientnet_lite0 pooled"``.
        num_features: Width ``D``. ``None`` asks the extractor's ``num_features``.
        warn_rank: As in :func:`frechet_distance`.

    Shape:
        - :meth:`update` takes images ``(B, 3, H, W)``, :meth:`compute` gives a number

    Raises:
        InputError: ``name`` is empty, or the number of features is not known.
        DTypeError: ``extractor`` is no Module, ``name`` no text.
        ModuleNotFoundError: torchmetrics is not installed.

    Note:
        Units: squared units of the features. Cost: ``D^2`` float64 sums for each side, ``O(D^3)``
        per result. Move it with ``.to()``. It waits for the device at every update, to check the
        values. In a distributed run :meth:`compute` is a collective call.

    Source:
        Heusel et al., NeurIPS 2017, Eq. 6; Berrada et al., CVPR 2024, Table S7, for other features
        than those of Inception-v3.

    Example:
        >>> pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> metric = FrechetFeatureDistance(pool, name="mean color", num_features=3)
        >>> images = torch.linspace(-1, 1, 8 * 3 * 4).reshape(8, 3, 2, 2)
        >>> metric.update(images, real=True)
        >>> metric.update(images.flip(0), real=False)
        >>> {key: round(value, 6) for key, value in metric.result().items()}
        {'frechet_distance/mean color': 0.0}
    """

    def __init__(
        self,
        extractor: nn.Module,
        *,
        name: str,
        num_features: int | None = None,
        warn_rank: bool = True,
    ) -> None:
        super().__init__()
        owner = "FrechetFeatureDistance"
        for argument, value, kind in (("extractor", extractor, nn.Module), ("name", name, str)):
            if not isinstance(value, kind):
                msg = f"{owner}: {argument} must be a {kind.__name__}; got {type(value).__name__}"
                raise DTypeError(msg)
        if not name:
            msg = f"{owner}: name must say which features are compared; got ''"
            raise InputError(msg)
        if num_features is None:
            num_features = getattr(extractor, "num_features", None)
            if num_features is None:
                msg = f"{owner}: num_features must be given where the extractor has none; got None"
                raise InputError(msg)
        check_int(owner, "num_features", num_features)
        check_bool(owner, "warn_rank", warn_rank)
        fid = require("torchmetrics.image.fid", extra="metrics", purpose=owner)
        self.name = name
        self.num_features = num_features
        self.warn_rank = warn_rank
        self.extractor = extractor
        self.moments = fid.FrechetInceptionDistance(feature=_Given(num_features), normalize=True)

    def update(self, images: Float[Tensor, "B 3 H W"], *, real: bool) -> None:
        """Add a batch of images to one of the two sets.

        Args:
            images: RGB in [-1, 1]; clamp what a generator gives.
            real: Which set they belong to.

        Raises:
            InputError: Wrong shape or range, or the extractor gives features of another shape, or
                some that are not finite (names the image).
            DTypeError: ``images`` or the features are no floating-point tensor.
        """
        owner = "FrechetFeatureDistance.update"
        check_tensor(owner, "images", images, "B C H W", C=3)
        check_bool(owner, "real", real)
        if len(images) == 0:
            return
        _check_finite(owner, "images", images)
        low, high = (float(end) for end in images.detach().aminmax())
        if low < -1 or high > 1:
            msg = f"{owner}: images must lie in [-1, 1] (clamp them); got [{low:g}, {high:g}]"
            raise InputError(msg)
        features = self._extracted(images)
        check_tensor(owner, "the extractor's features", features, "B D", D=self.num_features)
        check_tensor(owner, "the extractor's features", features, "B D", B=len(images))
        _check_finite(owner, "the extractor's features", features)
        self.moments.update(features, real=real)

    def compute(self) -> float:
        """Return the distance between the two sets, over all processes.

        Raises:
            InputError: A set has fewer than 2 images.
            NonFiniteError: The features are so large that the distance overflows.

        Warns:
            UserWarning: A set has no more images than features, and ``warn_rank`` is set.
        """
        owner = "FrechetFeatureDistance.compute"
        gaussians = []
        with self.moments.sync_context():
            for name in ("real", "fake"):
                count = int(getattr(self.moments, f"{name}_features_num_samples"))
                _check_count(owner, f"the {name} images", count, self.num_features, self.warn_rank)
                total = getattr(self.moments, f"{name}_features_sum")
                products = getattr(self.moments, f"{name}_features_cov_sum")
                mean = total / count
                covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
                gaussians.append(Gaussian(mean, root(owner, covariance)))
        return squared_distance(owner, *gaussians)

    def result(self) -> dict[str, float]:
        """Return :meth:`compute` under a key that names the features, for logs."""
        return {f"frechet_distance/{self.name}": self.compute()}

    def reset(self) -> None:
        """Forget all images."""
        self.moments.reset()

    @torch.no_grad()
    def _extracted(self, images: Tensor) -> Tensor:
        modes = [(module, module.training) for module in self.extractor.modules()]
        self.extractor.eval()
        try:
            features: Tensor = self.extractor(images)
        finally:
            for module, training in modes:
                module.training = training
        return features


class _Given(nn.Module):
    """What torchmetrics takes for a network; the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check_finite(owner: str, name: str, values: Tensor) -> None:
    bad = (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten()
    if len(bad):
        msg = f"{owner}: {name} must be finite; got a value that is not in row {int(bad[0])}"
        raise InputError(msg)


def _check_count(owner: str, name: str, count: int, width: int, warn_rank: bool) -> None:
    if count < 2:
        msg = f"{owner}: {name} must be at least 2; got {count}"
        raise InputError(msg)
    if warn_rank and count <= width:
        msg = f"{owner}: {name} are {count} for {width} features: rank deficient, far too large"
        warnings.warn(msg, UserWarning, stacklevel=3)
