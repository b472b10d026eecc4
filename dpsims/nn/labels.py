"""Convolution of a label map that never builds the one-hot map, and resizing of label maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims._checks import check_bool, check_int, check_ints, check_label_values, check_tensor
from dpsims.errors import InputError
from dpsims.nn._label_lookup import label_codes, label_table, sum_of_taps

# ids travel as int16, with two more codes for "contributes nothing" and "out of range"
_MAX_CLASSES = 2**15 - 2


class LabelConv2d(nn.Module):
    r"""Convolve the one-hot encoding of a label map without ever building it.

    The numbers are those of :class:`torch.nn.Conv2d` on the one-hot map, with zero padding of
    ``kernel_size // 2``, followed on the channel axis by the ``extra`` maps. Each output pixel
    sums ``kernel_size ** 2`` columns of the weight, picked by the ids under the kernel.

    Args:
        num_classes: Number ``K`` of valid ids, at most 32766.
        out_channels: Width ``C`` of the output.
        kernel_size: Height and width of the kernel.
        stride: Step between output pixels.
        extra_channels: Number ``E`` of real-valued maps that join the labels, such as instance
            offsets or noise.
        ignore_index: Id of pixels that contribute nothing, or ``None``. It may be one of the
            classes.
        bias: Whether to add a learned bias.

    Shape:
        - labels ``(B, H, W)``, uint8, int16, int32 or int64, or a soft map ``(B, K, H, W)``;
          extra ``(B, E, H, W)``; output ``(B, C, H', W')``, channels_last if the weight is

    Raises:
        InputError: A size out of range; a wrong shape; ``extra`` missing or unexpected; on CPU in
            eager mode an id out of range.
        DTypeError: A float map of ids, or another wrong type.

    Note:
        Units: those of the weight.
        Bad ids: in eager mode on CPU an error that names the id and where it is; compiled on CPU
        a ``RuntimeError``; elsewhere every output pixel they touch is NaN.
        Cost: ``O(B H' W' C kernel_size^2)`` additions, whatever ``K`` is.
        Gradients: any order on CPU; the first on other devices, and under ``torch.compile``.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2 and Fig. 3 (the first layer of the label map encoding).
        The lookup is not in the paper. Theirs -> ours: t -> labels, C -> K.

    Example:
        >>> conv = LabelConv2d(num_classes=3, out_channels=8)
        >>> labels = torch.randint(0, 3, (2, 16, 16))
        >>> onehot = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
        >>> torch.allclose(conv(labels), conv(onehot), atol=1e-6)
        True
    """

    def __init__(
        self,
        num_classes: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        extra_channels: int = 0,
        ignore_index: int | None = 255,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(num_classes, out_channels, kernel_size, stride, extra_channels, ignore_index)
        check_bool("LabelConv2d", "bias", bias)
        self.num_classes = num_classes
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.extra_channels = extra_channels
        self.ignore_index = ignore_index
        in_channels = num_classes + extra_channels
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight and the bias as :class:`torch.nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        labels: Integer[Tensor, "B H W"] | Float[Tensor, "B K H W"],
        extra: Float[Tensor, "B E H W"] | None = None,
    ) -> Float[Tensor, "B C H2 W2"]:
        """Convolve a label map, with the extra maps if there are any."""
        soft = isinstance(labels, Tensor) and labels.dim() == 4 and labels.is_floating_point()
        if soft:
            check_tensor("LabelConv2d", "labels", labels, "B K H W", K=self.num_classes)
        else:
            check_tensor("LabelConv2d", "labels", labels, "B H W", kind="integer")
        self._check_extra(labels, extra)
        # read once: a parametrized weight is computed at each access
        weight = self.weight
        if soft:
            maps = labels if extra is None else torch.cat([labels, extra], dim=1)
            return F.conv2d(maps, weight, self.bias, self.stride, self.kernel_size // 2)
        check_label_values("LabelConv2d", "labels", labels, self.num_classes, self.ignore_index)
        codes = self._codes(labels)
        hidden = sum_of_taps(codes, self._table(weight), self.kernel_size, self.stride)
        hidden = rearrange(hidden, "B H W C -> B C H W")
        if not is_channels_last(weight):
            hidden = hidden.contiguous()
        if extra is None:
            return hidden
        extra_weight = weight[:, self.num_classes :]
        return hidden + F.conv2d(extra, extra_weight, None, self.stride, self.kernel_size // 2)

    def _check_extra(self, labels: Tensor, extra: Tensor | None) -> None:
        if (extra is None) != (self.extra_channels == 0):
            got = "None" if extra is None else type(extra).__name__
            rule = f"be a map of {self.extra_channels} channels" if extra is None else "be None"
            msg = (
                f"LabelConv2d: extra must {rule} (extra_channels={self.extra_channels}); got {got}"
            )
            raise InputError(msg)
        if extra is not None:
            batch, height, width = labels.shape[0], labels.shape[-2], labels.shape[-1]
            sizes: dict[str, Any] = {"E": self.extra_channels, "H": height, "W": width}
            check_tensor("LabelConv2d", "extra", extra, "B E H W", like=labels, B=batch, **sizes)

    def _codes(self, labels: Tensor) -> Tensor:
        return label_codes(labels, self.num_classes, self.ignore_index, self.kernel_size // 2)

    def _table(self, weight: Tensor) -> Tensor:
        return label_table(weight[:, : self.num_classes], self.bias)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return (
            f"{self.num_classes}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, extra_channels={self.extra_channels}, "
            f"ignore_index={self.ignore_index}, bias={self.bias is not None}"
        )


def resize_labels(
    labels: Integer[Tensor, "B H W"], size: tuple[int, int]
) -> Integer[Tensor, "B H2 W2"]:
    """Resize a label map by picking, for every new pixel, the old one under its centre.

    Args:
        labels: Integer map; every dtype and id is kept.
        size: New height and width.

    Shape:
        - labels ``(B, H, W)``; output ``(B, *size)``, same dtype

    Raises:
        InputError: A wrong rank, or a size that is not two integers of at least 1.
        DTypeError: Not an integer map.

    Note:
        Units: ids. Exact integer arithmetic; what ``nearest-exact`` means in torch, which refuses
        int64.

    Source:
        Not from the paper.

    Example:
        >>> resize_labels(torch.tensor([[[0, 1], [2, 255]]]), (1, 4))
        tensor([[[  2,   2, 255, 255]]])
    """
    check_tensor("resize_labels", "labels", labels, "B H W", kind="integer")
    check_ints("resize_labels", "size", size)
    if len(size) != 2:
        msg = f"resize_labels: size must be (height, width); got {tuple(size)}"
        raise InputError(msg)
    steps = [old // new for new, old in zip(size, labels.shape[1:], strict=True)]
    # a compiler would tie its graph to sizes that divide
    if not torch.compiler.is_compiling() and tuple(labels.shape[1:]) == tuple(
        step * new for step, new in zip(steps, size, strict=True)
    ):
        y, x = steps
        return labels[:, y // 2 :: y, x // 2 :: x].clone(memory_format=torch.contiguous_format)
    rows, columns = (
        (2 * torch.arange(new, device=labels.device) + 1) * old // (2 * new)
        for new, old in zip(size, labels.shape[1:], strict=True)
    )
    return labels.index_select(1, rows).index_select(2, columns)


def _check_sizes(
    num_classes: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    extra_channels: int,
    ignore_index: int | None,
) -> None:
    owner = "LabelConv2d"
    check_int(owner, "num_classes", num_classes)
    if num_classes > _MAX_CLASSES:
        msg = f"{owner}: num_classes must be at most {_MAX_CLASSES}; got {num_classes}"
        raise InputError(msg)
    check_int(owner, "out_channels", out_channels)
    check_int(owner, "kernel_size", kernel_size)
    check_int(owner, "stride", stride)
    check_int(owner, "extra_channels", extra_channels, minimum=0)
    if ignore_index is not None:
        check_int(owner, "ignore_index", ignore_index, minimum=None)


def is_channels_last(weight: Tensor) -> bool:
    """Whether the layout is channels_last and not the usual one, too."""
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    return channels_last and not weight.is_contiguous()
