"""What follows the convolutions of a label pyramid, level by level."""

from __future__ import annotations

from torch import Tensor, nn

from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims.nn.norm import make_norm


class ConvBlock(nn.Module):
    """What follows the 3x3 convolution in Table S2's "Conv block"."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.norm = make_norm("LabelMapPyramid", channels, norm, affine=True)
        self.activation = nn.GELU()
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.project(self.activation(self.norm(hidden)))


class AttentionBlock(nn.Module):
    """What follows the 3x3 convolution in Table S2's "Pyramid block"."""

    def __init__(
        self,
        channels: int,
        token_dim: int | None,
        norm: str,
        attn_dim: int | None,
        self_attention: bool,
        impl: str,
    ) -> None:
        super().__init__()

        def make() -> nn.Module:
            return make_norm("LabelMapPyramid", channels, norm, affine=True)

        self.norm = make()
        self.activation = nn.GELU()
        self.inject: nn.Module | None = None
        self.inject_norm: nn.Module | None = None
        if token_dim is not None:
            self.inject = CrossAttentionNoiseInjector(
                channels, token_dim, attn_dim=attn_dim, impl=impl
            )
            self.inject_norm = make()
        self.attend = (
            SelfAttention2d(channels, attn_dim=attn_dim, impl=impl) if self_attention else None
        )
        self.attend_norm = make()
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor, tokens: Tensor | None) -> Tensor:
        """From the normalised and activated map on; what stands before it sees no token."""
        hidden = self._injected(hidden, tokens)
        if self.attend is not None:
            hidden = self.activation(self.attend(hidden))
        return self.project(self.attend_norm(hidden))

    def _injected(self, hidden: Tensor, tokens: Tensor | None) -> Tensor:
        if self.inject is None or self.inject_norm is None:
            return hidden
        return self.activation(self.inject_norm(self.inject(hidden, tokens)))
