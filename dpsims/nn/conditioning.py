"""Feature conditioning: a contractive non-linearity, then a norm without parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_choice, check_int, check_tensor
from dpsims.errors import DTypeError
from dpsims.nn.norm import make_norm

_NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": nn.Identity(),
}


class FeatureConditioner(nn.Module):
    r"""Squash a feature map, then normalise every channel, without learning anything.

    Features of a pre-trained network differ by orders of magnitude between channels and images.
    The non-linearity bounds them and the norm gives every channel mean 0 and variance 1, so that a
    discriminator can use all of them from the first step.

    Args:
        channels: Width ``C`` of the map.
        nonlinearity: ``"sigmoid"``, ``"tanh"``, ``"identity"`` or any elementwise callable.
        norm: ``"batch"``, ``"sync_batch"`` (one batch over all processes), ``"instance"`` or
            ``"none"``.

    Shape:
        - features ``(B, C, h, w)``; output the same, in the same dtype

    Raises:
        InputError: ``channels`` below 1, an unknown name, features of another width; in training a
            batch of fewer than two values per channel.
        DTypeError: ``nonlinearity`` is neither a name nor callable; features are no floating-point
            tensor.

    Note:
        Units: dimensionless. Training uses batch statistics and records them; evaluation uses the
        recorded ones, which makes the module a fixed elementwise map. The records are the only
        state and belong in a checkpoint. Half precision is computed in float32. A channel that
        saturates everywhere comes out as 0.
        Cost: ``O(B C h w)``. Gradients: any order.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.1, App. A.1, Table 5 ("w/o sigmoid", "w/o norm").
        Theirs -> ours: F -> features, CNL -> nonlinearity. Sec. 3.1 and Table 5 say sigmoid, Table
        S3 says hyperbolic tangent; the ablation decides.

    Example:
        >>> condition = FeatureConditioner(channels=3)
        >>> out = condition(100 * torch.randn(4, 3, 8, 8) + 20)
        >>> bool(out.mean().abs() < 1e-5), bool(out.std() < 1.01), list(condition.parameters())
        (True, True, [])
    """

    def __init__(
        self,
        channels: int,
        *,
        nonlinearity: str | Callable[[Tensor], Tensor] = "sigmoid",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        check_int("FeatureConditioner", "channels", channels)
        if isinstance(nonlinearity, str):
            check_choice("FeatureConditioner", "nonlinearity", nonlinearity, _NONLINEARITIES)
            self.nonlinearity = _NONLINEARITIES[nonlinearity]
        elif callable(nonlinearity):
            self.nonlinearity = nonlinearity
        else:
            msg = (
                "FeatureConditioner: nonlinearity must be a name or a callable; "
                f"got {type(nonlinearity).__name__}"
            )
            raise DTypeError(msg)
        self.channels = channels
        self.norm = make_norm("FeatureConditioner", channels, norm)

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Condition one map."""
        check_tensor("FeatureConditioner", "features", features, "B C h w", C=self.channels)
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        return self.norm(self.nonlinearity(wide)).to(features.dtype)
