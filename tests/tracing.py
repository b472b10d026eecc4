"""Compiling for tests: one graph or an error, counted, and compared with eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend


class CountingBackend:
    """Count the graphs and run them eagerly.

    Args:
        name: ``"aot_eager"`` also traces the backward, as a compiler does; ``"eager"`` is faster.
    """

    def __init__(self, name: str = "aot_eager") -> None:
        self.graphs = 0
        self._build = lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return self._build(graph, inputs)


def free_sizes() -> AbstractContextManager[object]:
    """Let no two sizes count as one because they are equal in the first call."""
    return torch.fx.experimental._config.patch(use_duck_shape=False)


def one_graph(function: Any, backend: Any, **options: Any) -> Any:
    """``function``, compiled; a graph break is an error."""
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def assert_near(actual: list[Tensor], expected: list[Tensor], share: float) -> None:
    """Every tensor is off by at most a share of its largest entry, or of one."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if not other.is_floating_point():
            assert torch.equal(one, other)
            continue
        assert torch.equal(one.isfinite(), other.isfinite())
        gap = (one - other).detach().double().nan_to_num().abs()
        bound = share * max(1.0, float(other.detach().abs().max() if other.numel() else 0))
        worst = float(gap.max()) if gap.numel() else 0.0
        assert worst <= bound, f"off by {worst:.3e}, allowed {bound:.3e}"
