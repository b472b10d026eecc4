"""Memory and operations of one call."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.cases import Inputs, Run, Variant, copied
from dpsims_reference.planning.live import Meter


class Use(NamedTuple):
    """What one call needs beyond its inputs and weights; ``None`` is not known.

    Attributes:
        peak_bytes: Most bytes alive at once, results included.
        flops: Operations of convolutions, matrix products and attention, 2 per multiply-add.
    """

    peak_bytes: int | None
    flops: int | None


def use_of(variant: Variant, run: Run, inputs: Inputs, device: torch.device) -> Use:
    """Run once and look.

    On CUDA the peak is the allocator's; on a CPU every operator's results are weighed while they
    live, which sees nothing inside a compiled function.

    Args:
        variant: What to look at.
        run: What it has built.
        inputs: Its inputs.
        device: Where it runs.
    """
    flops = None
    peak = None
    if not variant.opaque:
        own = copied(inputs) if variant.consumes else inputs
        with _Extra() as meter:
            run(own)
        flops, peak = meter.flops, meter.peak
    if device.type == "cuda":
        peak = _allocated(run, copied(inputs) if variant.consumes else inputs)
    return Use(peak, flops)


class _Extra(Meter):
    """Counts what is made, and not what an operator is given and writes to."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tree_map_only(Tensor, self._was_there, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _was_there(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            # a later storage may get the same key
            weakref.finalize(storage, self._known.discard, key)
        return tensor


def _allocated(run: Run, inputs: Inputs) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = run(inputs)
    torch.cuda.synchronize()
    del outputs
    return torch.cuda.max_memory_allocated() - before
