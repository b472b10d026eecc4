"""Attention for inference: projections and gates folded into keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims._checks import check_tensor
from dpsims.nn._folding import Prepared, make_conv, norm_as_affine, take_over, wide
from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims.ops.attention import attention
from dpsims.ops.attention.folded import inject_folded


class PreparedInjector(Prepared):
    """:class:`dpsims.nn.CrossAttentionNoiseInjector` that reads the map without projecting it.

    The queries' projection moves into the keys; the output's, the gate and a batch norm that
    follows move into the values. The weights of a pixel add up to 1, so what is constant does too.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None

    def __init__(self, source: CrossAttentionNoiseInjector, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.channels, self.token_dim = source.channels, source.token_dim
        query, output = (wide(conv.weight)[:, :, 0, 0] for conv in (source.query, source.output))
        assert source.query.bias is not None
        assert source.output.bias is not None
        key = wide(source.key.weight) * source.attn_dim**-0.5
        gate = wide(source.gate)
        value, constant = (
            gate * (output @ wide(source.value.weight)),
            gate * wide(source.output.bias),
        )
        affine = None if norm is None else norm_as_affine(norm)
        if affine is not None:
            scale, shift = affine
            value, constant = scale[:, None] * value, scale * constant + shift
        rows = [query.mT @ key, wide(source.query.bias)[None] @ key, value]
        offsets = [constant.new_zeros(self.channels + 1), constant]
        like = source.query.weight
        self.register_buffer("weight", torch.cat(rows).to(like.dtype))
        self.register_buffer("bias", torch.cat(offsets).to(like.dtype))
        self.register_buffer("scale", None if affine is None else affine[0].to(like.dtype))

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """As :class:`dpsims.nn.CrossAttentionNoiseInjector`, then the norm if there was one."""
        owner = "CrossAttentionNoiseInjector"
        check_tensor(owner, "features", features, "B C H W", C=self.channels)
        batch = features.shape[0]
        check_tensor(owner, "tokens", tokens, "B T D", like=features, B=batch, D=self.token_dim)
        return self.inject(features, F.linear(tokens, self.weight, self.bias))

    def inject(self, features: Tensor, read: Tensor, *, gelu: bool = False) -> Tensor:
        """Blend in what ``weight`` and ``bias`` make of the tokens, and activate."""
        keys, biases, values = read.split((self.channels, 1, self.channels), dim=2)
        return inject_folded(features, keys, biases.squeeze(2), values, self.scale, gelu=gelu)


class PreparedSelfAttention(Prepared, SelfAttention2d):
    """:class:`dpsims.nn.SelfAttention2d` with its gate in the output's projection."""

    def __init__(self, source: SelfAttention2d) -> None:
        take_over(self, source)
        gate = wide(source.gate)
        assert source.output.bias is not None
        del self.gate
        self.output = make_conv(
            gate * wide(source.output.weight),
            gate * wide(source.output.bias),
            source.output.weight,
        )

    def forward(self, features: Tensor) -> Tensor:
        """As :class:`dpsims.nn.SelfAttention2d`."""
        check_tensor("SelfAttention2d", "features", features, "B C H W", C=self.channels)
        q, k, v = self._project(features).unsqueeze(1).chunk(3, 3)
        read = attention(q, k, v, impl=self.impl).squeeze(1)
        return (self._join(read, features) + features).to(features.dtype)
