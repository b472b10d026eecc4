"""Buffers that stay in float32 or better when a model is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


class WideBuffers(nn.Module):
    """Base of modules whose floating-point buffers must not become float16 or bfloat16.

    ``.to(torch.bfloat16)`` on such a module, or on a parent, moves the buffers but keeps their
    dtype: a running average in bfloat16 loses every update below 0.4 %.

    Source:
        Not from the paper.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Any = self._buffers[name]
            if old is not None and new.dtype in _HALF:
                self._buffers[name] = old.to(new.device)
        return self
