"""SPADE and its residual block for inference: one scale and one shift per value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims.nn._folding import Prepared, make_conv, norm_as_affine, wide
from dpsims.nn._label_lookup import label_table
from dpsims.nn._separable import Spreading, add_spread, is_separable_cheaper, spreading
from dpsims.nn._spade_inputs import Condition, check_spade_inputs, enlarged
from dpsims.nn.joined import convolve_joined
from dpsims.nn.labels import is_channels_last
from dpsims.nn.spade import SPADE
from dpsims.nn.spade_block import SPADEResBlock
from dpsims.ops.spade_tail.folded import is_fused, modulate_folded

_SLOPE = 0.2


class _Modulations(Prepared):
    """The convolutions of several SPADEs that read one condition.

    Each SPADE is given with the norm of its features, which is folded in if it can be, and with a
    1x1 convolution behind it, which is folded into the shift.
    """

    whole: Tensor
    taps: Tensor
    rows: Tensor
    columns: Tensor
    table: Tensor | None

    def __init__(
        self, parts: Sequence[tuple[SPADE, nn.Module, nn.Conv2d | None]], ignore_index: int | None
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        folded = [_fold(*part) for part in parts]
        hidden = [spade.hidden for spade, _, _ in parts if spade.hidden is not None]
        like = parts[0][0].modulation.weight
        self.modulations = nn.ModuleList()
        if hidden:
            firsts = [(wide(conv.weight), wide(_bias(conv))) for conv in hidden]
            for weight, bias in folded:
                self.modulations.append(make_conv(weight, bias, like))
        else:
            firsts = folded
        self.widths = [len(weight) for weight, _ in firsts]
        weights, biases = zip(*firsts, strict=True)
        self.first = make_conv(torch.cat(weights), torch.cat(biases), like)
        self.expected: list[tuple[int, ...]] = []
        self.register_buffer("table", None)

    def expect_labels(self) -> None:
        """Keep the table that label maps are looked up in, where they are the last maps."""
        self.table = label_table(self.first.weight, self.first.bias)

    def expect(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Compute once what conditions of a whole map and a small one of these sizes need.

        Conditions of other sizes work as before.
        """
        (width, *full), (channels, *small) = shapes
        weight = self.first.weight
        kernel = weight.shape[2]
        if not is_separable_cheaper(channels, kernel, small, full):
            return
        self.expected = [tuple(shape) for shape in shapes]
        layout = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
        self.register_buffer("whole", weight[:, :width].contiguous(memory_format=layout))
        taps, rows, columns = spreading(weight[:, width:], small, full)
        self.register_buffer("taps", taps.contiguous())
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def encode(self, maps: Condition) -> Tensor:
        """The part of the first convolution that reads these maps, the first ones of several."""
        maps = [maps] if isinstance(maps, Tensor) else maps
        channels = sum(m.shape[1] for m in maps)
        weight = self.first.weight[:, :channels]
        return convolve_joined(maps, weight, self.first.bias, self.ignore_index)

    def forward(self, cond: Condition, encoded: Tensor | None) -> list[Tensor]:
        """What each SPADE reads."""
        maps = [cond] if isinstance(cond, Tensor) else cond
        if self._is_expected(maps, encoded):
            if encoded is None:
                padding = self.whole.shape[2] // 2
                encoded = F.conv2d(maps[0], self.whole, self.first.bias, padding=padding)
            out = add_spread(encoded, maps[-1], Spreading(self.taps, self.rows, self.columns))
        elif encoded is None:
            given = (self.first.weight, self.first.bias, self.ignore_index)
            out = convolve_joined(maps, *given, table=self.table)
        else:
            channels = sum(m.shape[1] for m in maps)
            weight = self.first.weight[:, -channels:]
            out = convolve_joined(maps, weight, None, self.ignore_index, base=encoded)
        if self.modulations:
            # `out` is new: at least one map was added to what was encoded
            out = F.relu_(out)
        return list(out.split(self.widths, 1))

    def _is_expected(self, maps: Sequence[Tensor], encoded: Tensor | None) -> bool:
        # a compiler would tie its graph to the sizes
        if not self.expected or torch.compiler.is_compiling():
            return False
        shapes = [tuple(value.shape[1:]) for value in maps]
        if encoded is None:
            return shapes == self.expected
        full = tuple(encoded.shape[2:]) == self.expected[0][1:]
        return full and shapes == self.expected[1:]

    def scale_and_shift(self, index: int, read: Tensor) -> Tensor:
        """Of one SPADE, joined."""
        both: Tensor = self.modulations[index](read) if self.modulations else read
        return both


class PreparedSPADE(Prepared):
    """:class:`dpsims.nn.SPADE` with its batch norm folded into its last convolution."""

    def __init__(self, source: SPADE) -> None:
        super().__init__()
        self.channels, self.cond_channels = source.channels, source.cond_channels
        self.ignore_index = source.ignore_index
        self.modulate = _Modulations([(source, source.norm, None)], source.ignore_index)
        self.norm = _rest(source.norm)

    def forward(self, features: Tensor, cond: Condition, *, upsample: int = 1) -> Tensor:
        """As :class:`dpsims.nn.SPADE`."""
        check_spade_inputs(self, "SPADE", features, self.channels, cond, upsample)
        (read,) = self.modulate(cond, None)
        maps, times = _enlarged_if_plain(self.norm(features), upsample)
        both = self.modulate.scale_and_shift(0, read)
        return modulate_folded(maps, both, upsample=times)


class PreparedSPADEResBlock(Prepared):
    """:class:`dpsims.nn.SPADEResBlock` with its norms and shortcut folded into its SPADEs."""

    def __init__(self, source: SPADEResBlock) -> None:
        super().__init__()
        self.in_channels, self.cond_channels = source.in_channels, source.cond_channels
        self.ignore_index = source.ignore_index
        parts: list[tuple[SPADE, nn.Module, nn.Conv2d | None]] = [
            (source.spade_0, source.norm_0, None),
            (source.spade_1, source.norm_1, None),
        ]
        if source.spade_s is not None:
            parts.append((source.spade_s, source.norm_0, source.conv_s))
        self.modulate = _Modulations(parts, source.ignore_index)
        self.norm_0, self.norm_1 = _rest(source.norm_0), _rest(source.norm_1)
        self.conv_0, self.conv_1, self.conv_s = source.conv_0, source.conv_1, source.conv_s

    def expect(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Compute once what conditions of maps of two sizes need; others work as before.

        Args:
            shapes: Channels, height and width of a map of full size, and of a smaller one.
        """
        self.modulate.expect(shapes)

    def expect_labels(self) -> None:
        """Compute once what conditions need that end in a label map; others work as before."""
        self.modulate.expect_labels()

    def encode(self, maps: Condition) -> Tensor:
        """What the first maps of a condition contribute, for many calls with other maps behind.

        Args:
            maps: One or more maps, in the order in which ``cond`` would hold them.
        """
        return self.modulate.encode(maps)

    def forward(
        self,
        features: Tensor,
        cond: Condition,
        *,
        upsample: int = 1,
        encoded: Tensor | None = None,
    ) -> Tensor:
        """As :class:`dpsims.nn.SPADEResBlock`.

        Args:
            features: As there.
            cond: As there; with ``encoded`` only the maps that are not in it.
            upsample: As there.
            encoded: What :meth:`encode` gave for the first maps, for one image or for all.
        """
        owner = "SPADEResBlock"
        if encoded is None:
            check_spade_inputs(self, owner, features, self.in_channels, cond, upsample)
        reads = self.modulate(cond, encoded)
        maps, times = _enlarged_if_plain(self.norm_0(features), upsample)
        both = self.modulate.scale_and_shift(0, reads[0])
        hidden = self.conv_0(modulate_folded(maps, both, slope=_SLOPE, upsample=times))
        both = self.modulate.scale_and_shift(1, reads[1])
        hidden = modulate_folded(self.norm_1(hidden), both, slope=_SLOPE)
        out: Tensor = self.conv_1(hidden)
        if self.conv_s is None:
            return out.add_(enlarged(features, upsample))
        both = self.modulate.scale_and_shift(2, reads[2])
        scale, shift = both[:, : self.in_channels], both[:, self.in_channels :]
        return out.add_(shift).add_(self.conv_s(modulate_folded(maps, scale, upsample=times)))


def _fold(spade: SPADE, norm: nn.Module, behind: nn.Conv2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that gives the scale, then the shift."""
    gamma, beta = wide(spade.modulation.weight).chunk(2)
    gamma_bias, beta_bias = wide(_bias(spade.modulation)).chunk(2)
    gamma_bias = 1 + gamma_bias
    affine = norm_as_affine(norm)
    if affine is not None:
        # statistics may be wider than weights
        scale, shift = (value.to(gamma.dtype) for value in affine)
        beta, beta_bias = beta + gamma * shift.view(-1, 1, 1, 1), beta_bias + gamma_bias * shift
        gamma, gamma_bias = gamma * scale.view(-1, 1, 1, 1), gamma_bias * scale
    if behind is not None:
        matrix = wide(behind.weight)[:, :, 0, 0]
        beta, beta_bias = torch.einsum("oc,chij->ohij", matrix, beta), matrix @ beta_bias
    return torch.cat((gamma, beta)), torch.cat((gamma_bias, beta_bias))


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _rest(norm: nn.Module) -> nn.Module:
    return norm if norm_as_affine(norm) is None else nn.Identity()


def _enlarged_if_plain(maps: Tensor, times: int) -> tuple[Tensor, int]:
    """Maps, and how often their modulation must repeat them: the kernels do so as they read."""
    return (maps, times) if is_fused(maps) else (enlarged(maps, times), 1)
