"""Run the injection's kernels in Triton's interpreter, on the cases of one file.

A process of its own, with TRITON_INTERPRET=1, because a kernel is interpreted or compiled for as
long as it is loaded. The arguments are the file of cases and the file for the results.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Traffic:
    """How often the kernels read and write the entries of a tensor."""

    def __init__(self) -> None:
        from triton.runtime.interpreter import interpreter_builder

        self.reads: list[Any] = []
        self.writes: list[Any] = []
        load, store = (
            interpreter_builder.create_masked_load,
            interpreter_builder.create_masked_store,
        )

        def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
            self.reads.append(pointers.data[mask.data.astype(bool)])
            return load(pointers, mask, *rest)

        def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.writes.append(pointers.data[mask.data.astype(bool)])
            return store(pointers, value, mask, *rest)

        interpreter_builder.create_masked_load = counted_load
        interpreter_builder.create_masked_store = counted_store

    def per_entry(self, log: list[Any], tensor: Tensor) -> float:
        first, size = tensor.data_ptr(), tensor.element_size()
        addresses = np.concatenate(log)
        inside = (addresses >= first) & (addresses < first + tensor.numel() * size)
        return float(inside.sum()) / tensor.numel()


def main(source: str, target: str) -> None:
    from dpsims.ops.attention import _triton

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    traffic = Traffic()
    results = []
    for grad, features, *tokens in torch.load(source):
        traffic.reads, traffic.writes = [], []
        out = _triton.inject(features, *tokens)
        counts = [
            traffic.per_entry(traffic.reads, features),
            traffic.per_entry(traffic.writes, out),
        ]
        traffic.reads, traffic.writes = [], []
        gradients = _triton.inject_gradients(grad, features, *tokens)
        counts += [traffic.per_entry(traffic.reads, x) for x in (features, grad)]
        counts.append(traffic.per_entry(traffic.writes, gradients[0]))
        result = {"out": out, "gradients": gradients, "counts": counts}
        result["few programs"] = with_few_programs(grad, features, *tokens)
        result["closed"] = _triton.inject(features, *tokens[:2], 0 * tokens[2])
        results.append(result)
    results[-1] |= with_nan(features, tokens)
    torch.save(results, target)


def with_few_programs(*args: Tensor) -> tuple[Tensor, Tensor]:
    from dpsims.ops.attention import _triton

    programs, _triton._PROGRAMS = _triton._PROGRAMS, 1
    try:
        return _triton.inject_gradients(*args)
    finally:
        _triton._PROGRAMS = programs


def with_nan(features: Tensor, tokens: list[Tensor]) -> dict[str, Tensor]:
    from dpsims.ops.attention import _triton

    bad, keys = features.clone(), tokens[0].clone()
    bad[0, 0, 0, 1] = keys[0, 0, 0] = torch.nan
    return {
        "with nan": _triton.inject(bad, *tokens),
        "with nan token": _triton.inject(features, keys, *tokens[1:]),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
