"""The label pyramid for inference: norms and activations in what stands beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims.nn._folding import Prepared, fold_norm_before, fold_norm_behind, take_over
from dpsims.nn._label_lookup import autocast_like_conv, code_table, label_table
from dpsims.nn._prepared_attention import PreparedInjector, PreparedSelfAttention
from dpsims.nn._pyramid_blocks import AttentionBlock
from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims.nn.labels import LabelConv2d
from dpsims.nn.pyramid import LabelMapPyramid

_MAX_ID = 2**15


class PreparedLabelConv2d(Prepared, LabelConv2d):
    """A :class:`LabelConv2d` that keeps its table, and looks the table's rows up too."""

    table: Tensor
    code_of: Tensor | None

    def __init__(self, source: LabelConv2d) -> None:
        take_over(self, source)
        weight = source.weight[:, : source.num_classes]
        self.register_buffer("table", label_table(weight, source.bias))
        self.register_buffer("code_of", None)
        # one far-off id would make a table of all that lie between
        if abs(source.ignore_index or 0) <= _MAX_ID:
            ids = (source.num_classes, source.ignore_index, weight.device)
            self.code_of, self.low, self.high = code_table(*ids)

    def _codes(self, labels: Tensor) -> Tensor:
        # exporters differ in what they make of negative indices
        if self.code_of is None or torch.compiler.is_exporting():
            return super()._codes(labels)
        codes = self.code_of[labels.long().clamp(self.low, self.high)]
        return F.pad(codes, (self.kernel_size // 2,) * 4, value=self.num_classes)

    def _table(self, weight: Tensor) -> Tensor:  # noqa: ARG002
        return autocast_like_conv(self.table)


class PreparedPyramid(Prepared, LabelMapPyramid):
    """:class:`dpsims.nn.LabelMapPyramid` that projects its tokens for all levels at once."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, source: LabelMapPyramid) -> None:
        """Fold in place: the source is a copy."""
        take_over(self, source)
        for index, part in enumerate(self.blocks):
            # what the blocks are made of is the pyramid's own affair: Any
            block: Any = part
            conv: Any = self.convs[index]
            block.norm = fold_norm_behind(conv, block.norm)
            if type(conv) is LabelConv2d:
                self.convs[index] = PreparedLabelConv2d(conv)
            if type(block) is AttentionBlock:
                self.blocks[index] = _PreparedBlock(block)
        injectors = self._injectors()
        weights = [injector.weight for injector in injectors]
        self.register_buffer("weight", torch.cat(weights) if weights else None)
        biases = [injector.bias for injector in injectors]
        self.register_buffer("bias", torch.cat(biases) if biases else None)

    def _injectors(self) -> list[PreparedInjector]:
        parts = [getattr(block, "inject", None) for block in self.blocks]
        return [part for part in parts if isinstance(part, PreparedInjector)]

    def _given_tokens(
        self, attended: list[AttentionBlock], tokens: Tensor | None
    ) -> Sequence[Tensor | None]:
        if self.weight is None or tokens is None:
            return super()._given_tokens(attended, tokens)
        widths = [len(injector.weight) for injector in self._injectors()]
        reads = iter(F.linear(tokens, self.weight, self.bias).split(widths, 2))
        return [
            next(reads) if isinstance(block.inject, PreparedInjector) else tokens
            for block in attended
        ]


class _PreparedBlock(Prepared, AttentionBlock):
    """A block that is given what its injector makes of the tokens."""

    def __init__(self, source: Any) -> None:
        take_over(self, source)
        if type(source.inject) is CrossAttentionNoiseInjector:
            self.inject = PreparedInjector(source.inject, source.inject_norm)
            if self.inject.scale is not None:
                self.inject_norm = nn.Identity()
        if type(source.attend) is SelfAttention2d:
            self.attend = PreparedSelfAttention(source.attend)
        self.attend_norm = fold_norm_before(source.attend_norm, source.project)

    def _injected(self, hidden: Tensor, tokens: Tensor | None) -> Tensor:
        if tokens is None or not isinstance(self.inject, PreparedInjector):
            return super()._injected(hidden, tokens)
        if isinstance(self.inject_norm, nn.Identity):
            return self.inject.inject(hidden, tokens, gelu=True)
        assert self.inject_norm is not None
        return self.activation(self.inject_norm(self.inject.inject(hidden, tokens)))
