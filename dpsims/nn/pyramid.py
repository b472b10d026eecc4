"""The label map encoder: a pyramid of conditioning maps with noise in its coarse levels."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Integer
from torch import Tensor, nn

from dpsims._checks import check_bool, check_int, check_tensor
from dpsims.errors import InputError
from dpsims.nn._pyramid_blocks import AttentionBlock, ConvBlock
from dpsims.nn.labels import LabelConv2d


class LabelMapPyramid(nn.Module):
    r"""Encode a label map and noise tokens as one conditioning map per scale.

    Level 0 convolves the label map at full resolution; every further level halves the one before.
    Coarse levels blend in the noise tokens and then attend over the whole map. All gates start at
    0, so a new pyramid ignores its tokens.

    Args:
        num_classes: Number ``K`` of valid ids.
        channels: Width ``C`` of every level (paper: 64).
        token_dim: Width ``D`` of a noise token (paper: 256).
        num_levels: Number of levels.
        image_size: Height of the training images. Together with ``attention_size`` it decides,
            once, which levels carry attention; other sizes then run with the same levels.
        attention_size: Greatest height of a level with attention (paper: 64).
        extra_channels: Number ``E`` of real-valued maps that join the labels.
        ignore_index: Id of unlabelled pixels, which contribute nothing, or ``None``.
        norm: Normalisation, ``"batch"``, ``"sync_batch"``, ``"instance"`` or ``"none"``.
        attn_dim: Width of queries, keys and values. ``None`` means ``channels // 2``.
        self_attention: Whether coarse levels attend over their own map. Without it the activation
            behind it is left out too.
        cross_attention: Whether coarse levels blend in noise tokens. Without it the norm and the
            activation behind it are left out too, and the pyramid takes no tokens.
        impl: Attention implementation, as in :func:`dpsims.ops.attention.attention`.

    Shape:
        - labels ``(B, H, W)`` or a soft map ``(B, K, H, W)``, with ``H`` and ``W`` divisible by
          ``2 ** (num_levels - 1)``; tokens ``(B, T, D)``, ``None`` without cross-attention; extra
          ``(B, E, H, W)``
        - output: a list of maps ``(B, C, H / 2^i, W / 2^i)``, fine to coarse

    Raises:
        InputError: A size out of range; an input of the wrong shape; different batch sizes; a
            height or width that cannot be halved often enough; on CPU an id out of range.
        DTypeError: An argument of the wrong type.

    Note:
        Units: dimensionless.
        Cost: ``O(B H W C^2)`` for the convolutions, ``O(B N^2 C)`` for self-attention on ``N``
        pixels. Gradients: as :class:`dpsims.nn.labels.LabelConv2d` and
        :func:`dpsims.ops.attention.attention`.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2, Fig. 3, Sec. A.1, Table S2 ("Pyramid block", "Conv
        block"); Table 6 leaves out either attention. Theirs -> ours: t -> labels, w -> tokens,
        h_i -> output[i - 1], L -> num_levels. Table S2's order holds where Sec. 3.2 differs.

    Example:
        >>> import torch
        >>> pyramid = LabelMapPyramid(5, channels=8, token_dim=4, num_levels=3, image_size=32)
        >>> labels, tokens = torch.randint(0, 5, (2, 32, 64)), torch.randn(2, 8, 4)
        >>> [tuple(level.shape) for level in pyramid(labels, tokens)]
        [(2, 8, 32, 64), (2, 8, 16, 32), (2, 8, 8, 16)]
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 64,
        token_dim: int = 256,
        num_levels: int = 6,
        image_size: int = 256,
        attention_size: int = 64,
        extra_channels: int = 0,
        ignore_index: int | None = 255,
        norm: str = "batch",
        attn_dim: int | None = None,
        self_attention: bool = True,
        cross_attention: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        owner = "LabelMapPyramid"
        sizes = {"channels": channels, "token_dim": token_dim, "num_levels": num_levels}
        for name, size in (sizes | {"image_size": image_size}).items():
            check_int(owner, name, size)
        check_int(owner, "attention_size", attention_size, minimum=0)
        check_bool(owner, "self_attention", self_attention)
        check_bool(owner, "cross_attention", cross_attention)
        self.channels = channels
        self.token_dim, self.cross_attention = token_dim, cross_attention
        self.step = 2 ** (num_levels - 1)
        if image_size % self.step:
            msg = f"{owner}: image_size must be divisible by {self.step}; got {image_size}"
            raise InputError(msg)
        # a norm that subtracts the mean makes the bias of the convolution before it redundant
        bias = norm == "none"
        first = LabelConv2d(
            num_classes,
            channels,
            extra_channels=extra_channels,
            ignore_index=ignore_index,
            bias=bias,
        )
        self.convs = nn.ModuleList([first])
        self.blocks = nn.ModuleList()
        for level in range(num_levels):
            if level:
                self.convs.append(nn.Conv2d(channels, channels, 3, 2, padding=1, bias=bias))
            self.blocks.append(
                AttentionBlock(
                    channels,
                    token_dim if cross_attention else None,
                    norm,
                    attn_dim,
                    self_attention,
                    impl,
                )
                if image_size // 2**level <= attention_size
                else ConvBlock(channels, norm)
            )

    def forward(
        self,
        labels: Integer[Tensor, "B H W"] | Float[Tensor, "B K H W"],
        tokens: Float[Tensor, "B T D"] | None,
        extra: Float[Tensor, "B E H W"] | None = None,
    ) -> list[Float[Tensor, "B C _ _"]]:
        """Return the conditioning maps, fine to coarse."""
        return self.after_noise(self.before_noise(labels, extra), tokens)

    def before_noise(
        self,
        labels: Integer[Tensor, "B H W"] | Float[Tensor, "B K H W"],
        extra: Float[Tensor, "B E H W"] | None = None,
    ) -> list[Float[Tensor, "B C _ _"]]:
        """What does not depend on the tokens, for :meth:`after_noise`.

        Returns the levels before the first one with attention, fine to coarse, and behind them, if
        there is such a level, the map into which it blends the tokens.
        """
        # the first convolution checks the labels and the extra maps
        hidden = self.convs[0](labels, extra)
        self._check_size(labels)
        levels: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index:
                hidden = self.convs[index](levels[-1])
            if isinstance(block, AttentionBlock):
                return [*levels, block.activation(block.norm(hidden))]
            levels.append(block(hidden))
        return levels

    def after_noise(
        self, maps: list[Float[Tensor, "B C _ _"]], tokens: Float[Tensor, "B T D"] | None
    ) -> list[Float[Tensor, "B C _ _"]]:
        """The conditioning maps, from what :meth:`before_noise` gave."""
        self._check_tokens(maps[-1], tokens)
        attended = [block for block in self.blocks if isinstance(block, AttentionBlock)]
        if not attended:
            return maps
        *levels, hidden = maps
        for block, given in zip(attended, self._given_tokens(attended, tokens), strict=True):
            if block is not attended[0]:
                hidden = block.activation(block.norm(self.convs[len(levels)](levels[-1])))
            levels.append(block(hidden, given))
        return levels

    def _given_tokens(
        self, attended: list[AttentionBlock], tokens: Tensor | None
    ) -> Sequence[Tensor | None]:
        """What each block with attention is given of the tokens."""
        return [tokens] * len(attended)

    def _check_tokens(self, like: Tensor, tokens: Tensor | None) -> None:
        owner = "LabelMapPyramid"
        if self.cross_attention:
            width = self.token_dim
            check_tensor(owner, "tokens", tokens, "B T D", like=like, B=like.shape[0], D=width)
        elif tokens is not None:
            found = type(tokens).__name__
            msg = f"{owner}: tokens must be None without cross_attention; got {found}"
            raise InputError(msg)

    def _check_size(self, labels: Tensor) -> None:
        owner, height, width = "LabelMapPyramid", labels.shape[-2], labels.shape[-1]
        if height % self.step or width % self.step:
            low = [max(1, size // self.step) * self.step for size in (height, width)]
            high = [-(-size // self.step) * self.step for size in (height, width)]
            msg = (
                f"{owner}: labels must have height and width divisible by {self.step} (nearest "
                f"valid sizes: {low[0]}x{low[1]} and {high[0]}x{high[1]}); got {height}x{width}"
            )
            raise InputError(msg)
