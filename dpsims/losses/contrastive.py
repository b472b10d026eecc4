"""Pull a fake patch towards the real patch at the same place, away from other real patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import (
    check_bool,
    check_choice,
    check_generator,
    check_int,
    check_ints,
    check_number,
    check_tensor,
)
from dpsims._levels import check_levels
from dpsims.losses._patches import draw_positions, gather_pixels, patch_nce


def info_nce(
    queries: Float[Tensor, "P D"],
    positives: Float[Tensor, "P D"],
    negatives: Float[Tensor, "*P N D"],
    *,
    temperature: float = 0.3,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""Cross-entropy of picking each query's positive among its negatives.

    With :math:`s_j` the dot products of a query with its positive (:math:`j = 0`) and its ``N``
    negatives, :math:`-\log(e^{s_0/\tau} / \sum_{j=0}^{N} e^{s_j/\tau})`.

    Args:
        queries: One embedding per patch.
        positives: The embedding each query should match.
        negatives: What each query should not match: one set for all queries, or one for each.
        temperature: Divides the similarities (paper: 0.3); smaller looks at harder negatives.
        normalize: Whether vectors get length 1 first, so that similarities are cosines.
        reduction: ``"mean"`` or ``"sum"`` over the queries, or ``"none"``.

    Shape:
        - queries and positives ``(P, D)``, negatives ``(N, D)`` or ``(P, N, D)``; output: scalar,
          ``(P,)`` with ``reduction="none"``; float32 or better. ``P`` may be 0: the loss is 0.

    Raises:
        InputError: Shapes or devices that do not fit, ``temperature`` not positive, an unknown
            ``reduction``.
        DTypeError: An input that is not a floating-point tensor, ``normalize`` not a bool.

    Note:
        Units: nats; with ``normalize``, in ``[0, log(1 + N exp(2 / temperature))]``.
        Cost: ``O(P N D)``. Gradients: any order, to all three inputs; detach what must not learn.
        A vector whose largest entry is below 1e-6 (float16: 1e-3) is divided by that number and,
        if then shorter than 1, left so: a zero vector has similarity 0, and no gradient grows by
        more than 1e6 (1e3).
        NaN propagates. Runs in float32 or better, under autocast too.

    Source:
        Berrada et al., CVPR 2024, Eq. (5). Theirs -> ours: v -> queries, v+ -> positives, v_n- ->
        negatives, tau -> temperature. Not in the paper: the normalisation, as in Park et al., ECCV
        2020 (``normalize=False`` is Eq. (5) as printed), and the mean over queries.

    Example:
        >>> vectors = torch.ones(5, 8)
        >>> info_nce(vectors, vectors, vectors[:3])  # all alike: log(3 + 1)
        tensor(1.3863)
    """
    owner = "info_nce"
    # the queries' axis is called B: it may be empty
    check_tensor(owner, "queries", queries, "B D")
    count, dim = queries.shape
    check_tensor(owner, "positives", positives, "B D", like=queries, B=count, D=dim)
    if isinstance(negatives, Tensor) and negatives.ndim == 3:
        check_tensor(owner, "negatives", negatives, "B N D", like=queries, B=count, D=dim)
    else:
        check_tensor(owner, "negatives", negatives, "N D", like=queries, D=dim)
    check_number(owner, "temperature", temperature, above=0)
    check_bool(owner, "normalize", normalize)
    check_choice(owner, "reduction", reduction, ("mean", "sum", "none"))
    shared = negatives.ndim == 2
    loss = patch_nce(
        queries[None] if shared else queries[:, None],
        positives[None] if shared else positives[:, None],
        negatives[None] if shared else negatives,
        temperature=temperature,
        normalize=normalize,
    ).flatten()
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(count, 1)


class PatchInfoNCE(nn.Module):
    """Contrast patches of a fake image with those of its real twin, at several feature scales.

    At every level both maps are projected, some positions are drawn per image, and each fake patch
    must recognise the real patch at its own position among other patches of the same real image.
    The projectors are trained with the generator.

    Args:
        channels: Widths of the feature maps, one per level (paper: VGG19 at 1/4, 1/8 and 1/16).
        embed_dim: Width of the embedding (paper: 256).
        num_patches: Number of distinct positions drawn per image and level, if the map has them.
        num_negatives: Number of negatives per patch (paper: 128), if the map has them: distinct
            positions, never the patch's own.
        temperature: As in :func:`info_nce` (paper: 0.3).
        normalize: As in :func:`info_nce`.
        num_conv_blocks: Number of 3x3 convolutions, each with GELU, before the two linear layers
            (paper: 3). 0 leaves the linear layers only.

    Shape:
        - fake_features, real_features: one ``(B, channels[l], h_l, w_l)`` per level, of the same
          sizes; output: scalar, float32 or better. ``B`` may be 0: the loss is 0.

    Raises:
        InputError: A count below 1 (``num_conv_blocks``: below 0), ``temperature`` not positive,
            another number of maps than ``channels``, maps whose sizes or devices do not fit.
        DTypeError: A count or part of ``shard`` that is not an int, ``normalize`` not a bool, not
            a list of floating-point maps, ``generator`` not a ``torch.Generator``.

    Note:
        Units: nats; the sum over levels of the mean over images and patches. A 1x1 map has no
        negatives and adds exactly 0 without gradient.
        Cost: the convolutions run on whole maps, ``O(B C^2 h w)``; the rest on ``num_patches +
        num_negatives`` positions. Gradients: any order, to the fake features and the projectors;
        none to the real features, which are detached.
        Random positions come from ``generator``, of any device, or from torch's default one, which
        is the only one that ``torch.compile(fullgraph=True)`` can trace.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.3, Eq. (5), App. A.1 ("three convolutional blocks and two
        linear layers"), Table S2. Theirs -> ours: H_g -> fake_features, H_x -> real_features, N ->
        num_negatives, d_v -> embed_dim. Not in the paper: 3x3 kernels, GELU, 128 queries, one draw
        of negatives for all queries of an image, no gradient to H_x.

    Example:
        >>> loss = PatchInfoNCE([4, 8], embed_dim=16, num_patches=5, num_negatives=7)
        >>> fake = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
        >>> loss(fake, [torch.randn_like(level) for level in fake]).shape
        torch.Size([])
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        embed_dim: int = 256,
        num_patches: int = 128,
        num_negatives: int = 128,
        temperature: float = 0.3,
        normalize: bool = True,
        num_conv_blocks: int = 3,
    ) -> None:
        super().__init__()
        owner = "PatchInfoNCE"
        check_ints(owner, "channels", channels)
        check_int(owner, "embed_dim", embed_dim)
        check_int(owner, "num_patches", num_patches)
        check_int(owner, "num_negatives", num_negatives)
        check_number(owner, "temperature", temperature, above=0)
        check_bool(owner, "normalize", normalize)
        check_int(owner, "num_conv_blocks", num_conv_blocks, minimum=0)
        self.channels = list(channels)
        self.num_patches = num_patches
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.normalize = normalize
        self.convs = nn.ModuleList(_conv_blocks(width, num_conv_blocks) for width in channels)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim))
            for width in channels
        )

    def forward(
        self,
        fake_features: Sequence[Float[Tensor, "B _ _ _"]],
        real_features: Sequence[Float[Tensor, "B _ _ _"]],
        *,
        generator: torch.Generator | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Float[Tensor, ""]:
        """Sum over levels of the mean loss of the drawn patches.

        ``shard=(i, n)`` says that these maps are rows ``i, i + n, ...`` of a batch of ``n`` parts:
        ``generator`` then gives each image the positions that it has in the whole batch.
        """
        owner = "PatchInfoNCE"
        check_levels(owner, "fake_features", fake_features, self.channels)
        check_levels(owner, "real_features", real_features, self.channels, like=fake_features[0])
        for level, (fake, real) in enumerate(zip(fake_features, real_features, strict=True)):
            height, width = fake.shape[-2:]
            name = f"real_features[{level}]"
            check_tensor(owner, name, real, "B C H W", H=height, W=width)
        check_generator(owner, "generator", generator)
        _check_shard(owner, shard)
        losses = [
            self._level_loss(level, fake, real.detach(), generator, shard)
            for level, (fake, real) in enumerate(zip(fake_features, real_features, strict=True))
        ]
        return torch.stack(losses).sum()

    def _level_loss(
        self,
        level: int,
        fake: Tensor,
        real: Tensor,
        generator: torch.Generator | None,
        shard: tuple[int, int],
    ) -> Tensor:
        conv, mlp = self.convs[level], self.mlps[level]
        patches = draw_positions(fake, self.num_patches, generator, shard)
        # one more than needed: each patch drops its own position, or else the last one
        others = draw_positions(fake, self.num_negatives + 1, generator, shard)
        fake, real = conv(fake), conv(real)
        excluded = patches[:, :, None] == others[:, None, :]
        excluded[:, :, -1] |= ~excluded.any(dim=2)
        loss = patch_nce(
            mlp(gather_pixels(fake, patches)),
            mlp(gather_pixels(real, patches)),
            mlp(gather_pixels(real, others)),
            temperature=self.temperature,
            normalize=self.normalize,
            excluded=excluded,
        )
        return loss.sum() / max(loss.numel(), 1)


def _check_shard(owner: str, shard: tuple[int, int]) -> None:
    index, parts = shard
    check_int(owner, "shard[0]", index, minimum=0)
    check_int(owner, "shard[1]", parts, minimum=index + 1)


def _conv_blocks(channels: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers)
