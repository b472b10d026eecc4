"""From a latent vector to the noise tokens that the attention modules read."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_int, check_number, check_tensor


def sphere_normalize(
    latents: Float[Tensor, "B Z"], *, radius: float | None = None
) -> Float[Tensor, "B Z"]:
    r"""Scale every latent vector to one length.

    A vector and its positive multiples give the same result. The zero vector stays zero.

    Args:
        latents: One latent vector per sample.
        radius: The length. ``None`` means ``sqrt(Z)``, so that entries have mean square 1. With
            radius 1 the entries of a 64-wide vector are about 0.125, as small as the biases of
            the layer that reads them, and the tokens hardly vary with the latent.

    Shape:
        - latents ``(B, Z)``; output ``(B, Z)``, same dtype

    Raises:
        InputError: A wrong rank, ``Z`` is 0, or ``radius`` is not positive and finite.
        DTypeError: Not floating point.

    Note:
        Units: those of ``radius``. Computed in float32 or better. Gradients: any order.

    Source:
        Berrada et al., CVPR 2024, Sec. A.1. Theirs -> ours: z -> latents, d_z -> Z.
        The printed formula has radius 1; StyleGAN2, which it says it follows, has sqrt(Z).

    Example:
        >>> sphere_normalize(torch.tensor([[3.0, 4.0]]), radius=5.0)
        tensor([[3., 4.]])
    """
    owner = "sphere_normalize"
    check_tensor(owner, "latents", latents, "B Z")
    if radius is None:
        radius = latents.shape[1] ** 0.5
    check_number(owner, "radius", radius, above=0)
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
    # squares of the scaled entries neither overflow nor vanish. The result does not depend on the
    # scale, so it carries no gradient
    scaled = wide / _one_where_zero(wide.detach().abs().amax(dim=1, keepdim=True))
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return (scaled * (radius / _one_where_zero(lengths))).to(latents.dtype)


def _one_where_zero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


class NoiseMapper(nn.Module):
    r"""Map a latent vector to noise tokens with a small MLP.

    The latent is first put on a sphere (:func:`sphere_normalize`). GELU stands between the layers,
    nothing after the last one.

    Args:
        latent_dim: Width ``Z`` of a latent (paper: 64).
        token_dim: Width ``D`` of a token, and of the hidden layers (paper: 256).
        num_tokens: Number ``T`` of tokens.
        depth: Number of linear layers (paper: 3).
        radius: Length of a latent on the sphere; ``None`` means ``sqrt(latent_dim)``.

    Shape:
        - latents ``(B, Z)``; output ``(B, T, D)``

    Raises:
        InputError: A size below 1, a radius that is not positive and finite, or a latent of
            another width.
        DTypeError: An argument of the wrong type.

    Note:
        Units: dimensionless.
        Cost: ``O(B (Z D + (depth - 2) D^2 + T D^2))``. Gradients: any order.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2 ("three-layer MLP"), Sec. A.1, Table S2.
        Theirs -> ours: z -> latents, w -> output, n_k -> T, d_w -> D.
        Not in the paper: the number of tokens, the activation and the hidden width.

    Example:
        >>> NoiseMapper(latent_dim=64, token_dim=16, num_tokens=4)(torch.randn(2, 64)).shape
        torch.Size([2, 4, 16])
    """

    def __init__(
        self,
        latent_dim: int = 64,
        token_dim: int = 256,
        *,
        num_tokens: int = 8,
        depth: int = 3,
        radius: float | None = None,
    ) -> None:
        super().__init__()
        owner = "NoiseMapper"
        check_int(owner, "latent_dim", latent_dim)
        check_int(owner, "token_dim", token_dim)
        check_int(owner, "num_tokens", num_tokens)
        check_int(owner, "depth", depth)
        if radius is not None:
            check_number(owner, "radius", radius, above=0)
        self.latent_dim = latent_dim
        self.token_dim = token_dim
        self.num_tokens = num_tokens
        self.radius = radius
        widths = [latent_dim, *[token_dim] * (depth - 1), num_tokens * token_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, latents: Float[Tensor, "B Z"]) -> Float[Tensor, "B T D"]:
        """Map latents to tokens."""
        check_tensor("NoiseMapper", "latents", latents, "B Z", Z=self.latent_dim)
        tokens: Tensor = self.layers(sphere_normalize(latents, radius=self.radius))
        return tokens.unflatten(1, (self.num_tokens, self.token_dim))

    def extra_repr(self) -> str:
        """Name the sizes."""
        return (
            f"latent_dim={self.latent_dim}, token_dim={self.token_dim}, "
            f"num_tokens={self.num_tokens}, radius={self.radius}"
        )
