"""Gated attention on feature maps: over noise tokens, and over the map itself."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims._checks import check_choice, check_int, check_tensor
from dpsims.ops.attention import (
    attention,
    fold_tokens,
    inject_tokens,
    resolve_attention_impl,
    resolve_injector_impl,
)
from dpsims.ops.attention._reference import pixels_come_first
from dpsims.ops.attention.injection import INJECTOR_CHOICES, deciding_dtype, has_triton_for


class CrossAttentionNoiseInjector(nn.Module):
    r"""Blend noise tokens into a feature map by gated cross-attention.

    Every pixel attends over ``tokens`` and adds what it reads:
    :math:`y = h + \eta W_o\,\mathrm{attn}(h, w)`. The scalar gate :math:`\eta` starts at 0, so a
    new injector returns its input exactly.

    Args:
        channels: Width ``C`` of the feature map.
        token_dim: Width ``D`` of a noise token (paper: 256).
        attn_dim: Width ``d`` of queries, keys and values. ``None`` means ``channels // 2``, at
            least 1.
        impl: ``"reference"`` and ``"sdpa"`` project every pixel and attend as
            :func:`dpsims.ops.attention.attention` does; ``"folded"`` multiplies the projections
            into the tokens, in plain torch; ``"fused"`` does so with one kernel for the map, on
            CUDA devices. ``"auto"`` is as in
            :func:`dpsims.ops.attention.resolve_injector_impl`.

    Shape:
        - features ``(B, C, H, W)``; tokens ``(B, T, D)``, same device; output ``(B, C, H, W)`` in
          the memory format of ``features``

    Raises:
        InputError: A size below 1; an input has the wrong rank or width; batch sizes differ; an
            ``impl`` that cannot run.
        DTypeError: An argument of the wrong type.

    Note:
        Units: dimensionless, logits in nats; normalise the latent before the mapper, tokens are
        used as given.
        Cost: ``O(B H W C T)`` for ``"folded"`` and ``"fused"``, else ``O(B H W (C d + T d))``;
        ``"reference"`` and ``"folded"`` also hold ``B H W T`` weights. ``channels_last`` maps need
        no copy. ``"folded"`` and ``"fused"`` read the weights of the four layers and do not call
        these layers, so hooks on them do not run.
        Gradients: as :func:`dpsims.ops.attention.attention`; any order for ``"folded"`` and
        ``"fused"``. While the gate is 0 only the gate learns: the projections' gradients are
        exactly 0.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2, Eqs. (1)-(2), Fig. S1, Table S2 ("channel divider 2").
        Theirs -> ours: h_i -> features, w -> tokens, n_k -> T, d_w -> D, d_q -> d, eta_i -> gate.
        Not in the paper: the output projection W_o (nothing else fits the shapes), and that keys
        and values have no bias (the softmax and W_o's bias make them redundant).

    Example:
        >>> inject = CrossAttentionNoiseInjector(channels=8, token_dim=4)
        >>> features, tokens = torch.randn(2, 8, 16, 32), torch.randn(2, 5, 4)
        >>> torch.equal(inject(features, tokens), features)  # the gate is closed
        True
    """

    def __init__(
        self, channels: int, token_dim: int, *, attn_dim: int | None = None, impl: str = "auto"
    ) -> None:
        super().__init__()
        owner = "CrossAttentionNoiseInjector"
        check_int(owner, "token_dim", token_dim)
        self.attn_dim = _attn_dim(owner, channels, attn_dim)
        check_choice(owner, "impl", impl, INJECTOR_CHOICES)
        self.channels = channels
        self.token_dim = token_dim
        self.impl = impl
        self.query = nn.Conv2d(channels, self.attn_dim, 1)
        self.key = nn.Linear(token_dim, self.attn_dim, bias=False)
        self.value = nn.Linear(token_dim, self.attn_dim, bias=False)
        self.output = nn.Conv2d(self.attn_dim, channels, 1)
        # one entry and not a scalar, which FSDP refuses
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, features: Float[Tensor, "B C H W"], tokens: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B C H W"]:
        """Return the features with the tokens blended in."""
        owner = "CrossAttentionNoiseInjector"
        check_tensor(owner, "features", features, "B C H W", C=self.channels)
        batch = features.shape[0]
        check_tensor(owner, "tokens", tokens, "B T D", like=features, B=batch, D=self.token_dim)
        impl = self._resolve(features, tokens)
        if impl in ("folded", "fused"):
            plain = "reference" if impl == "folded" else impl
            return inject_tokens(features, *fold_tokens(self, tokens), impl=plain)
        q = rearrange(self.query(features), "B d H W -> B (H W) d")
        read = attention(q, self.key(tokens), self.value(tokens), impl=impl)
        read = rearrange(read, "B (H W) d -> B d H W", H=features.shape[2])
        if features.is_contiguous():
            # the view above is channels_last, and so would be what joins the features: slow to add
            read = read.contiguous()
        return _gated_residual(features, self.output(read), self.gate)

    def _resolve(self, features: Tensor, tokens: Tensor) -> str:
        device_type = features.device.type
        return resolve_injector_impl(
            self.impl,
            device_type=device_type,
            dtype=deciding_dtype(features, tokens, self.gate),
            channels=self.channels,
            attn_dim=self.attn_dim,
            num_tokens=tokens.shape[1],
            has_triton=has_triton_for(device_type),
        ).impl

    def extra_repr(self) -> str:
        """Name the options that the layers do not show."""
        return f"attn_dim={self.attn_dim}, impl={self.impl!r}"


class SelfAttention2d(nn.Module):
    r"""Let every pixel of a feature map attend over all pixels of its image.

    :math:`y = h + \eta W_o\,\mathrm{attn}(h, h)` with a scalar gate :math:`\eta` that starts at 0,
    so a new module returns its input exactly.

    Args:
        channels: Width ``C`` of the feature map.
        attn_dim: Width ``d`` of queries, keys and values. ``None`` means ``channels // 2``, at
            least 1.
        impl: Attention implementation, as in :func:`dpsims.ops.attention.attention`.

    Shape:
        - features ``(B, C, H, W)``; output ``(B, C, H, W)`` in the memory format of ``features``

    Raises:
        InputError: A size below 1, or features of the wrong rank or width.
        DTypeError: An argument of the wrong type.

    Note:
        Units: dimensionless, logits in nats.
        Cost: ``O(B (H W)^2 d)``; ``"reference"`` also holds ``B (H W)^2`` weights.
        Neither contiguous nor ``channels_last`` maps are copied, and the queries, keys and values
        lie as torch's fast kernels want them, which on CUDA also ask for half precision and a
        ``d`` divisible by 8. The two layers are read and not called, so hooks on them do not run.
        Gradients: as :func:`dpsims.ops.attention.attention`.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2 ("residual self-attention block"), Table S2 ("channel
        divider 2"). Theirs -> ours: d_q -> d. Not in the paper: the gate, as in Eq. (2).

    Example:
        >>> attend = SelfAttention2d(channels=8)
        >>> features = torch.randn(2, 8, 16, 32)
        >>> torch.equal(attend(features), features)  # the gate is closed
        True
    """

    def __init__(self, channels: int, *, attn_dim: int | None = None, impl: str = "auto") -> None:
        super().__init__()
        self.attn_dim = _attn_dim("SelfAttention2d", channels, attn_dim)
        resolve_attention_impl(impl)
        self.channels = channels
        self.impl = impl
        self.qkv = nn.Conv2d(channels, 3 * self.attn_dim, 1, bias=False)
        self.output = nn.Conv2d(self.attn_dim, channels, 1)
        # one entry and not a scalar, which FSDP refuses
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return the features with what each pixel reads from the others."""
        check_tensor("SelfAttention2d", "features", features, "B C H W", C=self.channels)
        qkv = self._project(features)
        q, k, v = qkv.unsqueeze(1).chunk(3, 3)
        read = attention(q, k, v, impl=self.impl).squeeze(1)
        return _gated_residual(features, self._join(read, features), self.gate)

    def _project(self, features: Tensor) -> Tensor:
        """Queries, keys and values by one product, side by side at every pixel."""
        weight = self.qkv.weight.flatten(1)
        pixels = features.flatten(2).mT
        # the fast kernels want the entries of a query side by side, and the product writes them so
        # from either memory format: no copy is left to make
        if pixels_come_first(features):
            return F.linear(pixels, weight)
        return pixels @ weight.mT.expand(features.shape[0], -1, -1)

    def _join(self, read: Tensor, features: Tensor) -> Tensor:
        """What the pixels read, in the width and memory format of the features."""
        weight, bias = self.output.weight.flatten(1), self.output.bias
        if pixels_come_first(features) or bias is None:
            update = F.linear(read, weight, bias).mT
        else:
            weights = weight.expand(features.shape[0], -1, -1)
            update = torch.baddbmm(bias.unsqueeze(1), weights, read.mT)
        return update.unflatten(2, features.shape[2:])

    def extra_repr(self) -> str:
        """Name the options that the layers do not show."""
        return f"attn_dim={self.attn_dim}, impl={self.impl!r}"


def _attn_dim(owner: str, channels: int, attn_dim: int | None) -> int:
    check_int(owner, "channels", channels)
    if attn_dim is None:
        return max(1, channels // 2)
    check_int(owner, "attn_dim", attn_dim)
    return attn_dim


def _gated_residual(features: Tensor, update: Tensor, gate: nn.Parameter) -> Tensor:
    dtype = features.dtype
    return torch.addcmul(features, gate.to(dtype), update.to(dtype))
