"""Attention for inference: projections and gates folded into keys and values."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims._checks import check_tensor
from dpsims.nn._folding import Prepared, make_conv, norm_as_affine, wide
from dpsims.nn._spectral_norm import without_autocast
from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims.nn.labels import is_channels_last
from dpsims.ops.attention import attention


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
        self.register_buffer(
            "scale", None if affine is None else affine[0].view(-1, 1).to(like.dtype)
        )

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """As :class:`dpsims.nn.CrossAttentionNoiseInjector`, then the norm if there was one."""
        owner = "CrossAttentionNoiseInjector"
        check_tensor(owner, "features", features, "B C H W", C=self.channels)
        batch = features.shape[0]
        check_tensor(owner, "tokens", tokens, "B T D", like=features, B=batch, D=self.token_dim)
        c = self.channels
        read = F.linear(tokens, self.weight, self.bias)
        # logits of 16 bits would lose what the softmax magnifies
        dtype = torch.promote_types(features.dtype, torch.float32)
        keys, offset, values = read.to(dtype).split((c, 1, c), dim=2)
        with without_autocast(features.device.type):
            if is_channels_last(features):
                maps = rearrange(features, "B C H W -> B (H W) C").to(dtype)
                weights = torch.baddbmm(offset.mT, maps, keys.mT).softmax(2)
                base = maps if self.scale is None else maps * self.scale.mT.to(dtype)
                out = torch.baddbmm(base, weights, values).mT
            else:
                maps = features.flatten(2).to(dtype)
                weights = torch.baddbmm(offset, keys, maps).softmax(1)
                base = maps if self.scale is None else maps * self.scale.to(dtype)
                out = torch.baddbmm(base, values.mT, weights)
        return out.unflatten(2, features.shape[2:]).to(features.dtype)


class PreparedSelfAttention(Prepared):
    """:class:`dpsims.nn.SelfAttention2d` with its gate in the output's projection."""

    def __init__(self, source: SelfAttention2d) -> None:
        super().__init__()
        self.channels, self.impl, self.qkv = source.channels, source.impl, source.qkv
        gate = wide(source.gate)
        assert source.output.bias is not None
        self.output = make_conv(
            gate * wide(source.output.weight),
            gate * wide(source.output.bias),
            source.output.weight,
        )

    def forward(self, features: Tensor) -> Tensor:
        """As :class:`dpsims.nn.SelfAttention2d`."""
        check_tensor("SelfAttention2d", "features", features, "B C H W", C=self.channels)
        projected = self.qkv(features)
        # one copy for all three, which the kernel wants in rows
        rows = rearrange(projected, "B (three d) H W -> three B 1 (H W) d", three=3).contiguous()
        read = attention(*rows.unbind(), impl=self.impl)
        read = rearrange(read, "B 1 (H W) d -> B d H W", H=features.shape[2])
        if features.is_contiguous():
            read = read.contiguous()
        return (self.output(read).add_(features)).to(features.dtype)
