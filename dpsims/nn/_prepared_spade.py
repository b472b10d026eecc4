"""SPADE and its residual block for inference: one scale and one shift per value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims.nn._folding import Prepared, make_conv, norm_as_affine, wide
from dpsims.nn._spade_inputs import Condition, check_spade_inputs, enlarged
from dpsims.nn.joined import convolve_joined
from dpsims.nn.spade import SPADE, SPADEResBlock

_SLOPE = 0.2


class _Modulations(Prepared):
    """The convolutions of several SPADEs that read one condition.

    Each SPADE is given with the norm of its features, which is folded in if it can be, and with a
    1x1 convolution behind it, which is folded into the shift.
    """

    def __init__(
        self, parts: Sequence[tuple[SPADE, nn.Module, nn.Conv2d | None]], ignore_index: int | None
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        folded = [_fold(*part) for part in parts]
        self.splits = [
            (spade.channels, len(w) - spade.channels)
            for (spade, _, _), (w, _) in zip(parts, folded, strict=True)
        ]
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

    def encode(self, maps: Condition) -> Tensor:
        """The part of the first convolution that reads these maps, the first ones of several."""
        maps = [maps] if isinstance(maps, Tensor) else maps
        channels = sum(m.shape[1] for m in maps)
        weight = self.first.weight[:, :channels]
        return convolve_joined(maps, weight, self.first.bias, self.ignore_index)

    def forward(self, cond: Condition, encoded: Tensor | None) -> list[Tensor]:
        """What each SPADE reads."""
        maps = [cond] if isinstance(cond, Tensor) else cond
        if encoded is None:
            out = convolve_joined(maps, self.first.weight, self.first.bias, self.ignore_index)
        else:
            channels = sum(m.shape[1] for m in maps)
            weight = self.first.weight[:, -channels:]
            out = convolve_joined(maps, weight, None, self.ignore_index, base=encoded)
        if self.modulations:
            # `out` is new: at least one map was added to what was encoded
            out = F.relu_(out)
        return list(out.split(self.widths, 1))

    def scale_and_shift(self, index: int, read: Tensor) -> tuple[Tensor, Tensor]:
        """Of one SPADE."""
        both = self.modulations[index](read) if self.modulations else read
        scale, shift = both.split(self.splits[index], 1)
        return scale, shift


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
        scale, shift = self.modulate.scale_and_shift(0, read)
        return _affine(enlarged(self.norm(features), upsample), scale, shift)


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
        maps = enlarged(self.norm_0(features), upsample)
        scale, shift = self.modulate.scale_and_shift(0, reads[0])
        hidden = self.conv_0(F.leaky_relu_(_affine(maps, scale, shift), _SLOPE))
        scale, shift = self.modulate.scale_and_shift(1, reads[1])
        hidden = F.leaky_relu_(_affine(self.norm_1(hidden), scale, shift), _SLOPE)
        out: Tensor = self.conv_1(hidden)
        if self.conv_s is None:
            return out.add_(enlarged(features, upsample))
        scale, shift = self.modulate.scale_and_shift(2, reads[2])
        return out.add_(shift).add_(self.conv_s(maps * scale))


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


def _affine(maps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, maps, scale).to(maps.dtype)
