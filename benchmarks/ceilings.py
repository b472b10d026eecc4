"""What the device can do at best: bytes copied and matrices multiplied per second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.cases import Inputs, Outputs, Run
from benchmarks.measure import Clock, band, interleave

_ROUNDS = 20
# (copied bytes, side of the matrices) large enough to fill the device
_SIZES = {"cpu": (2**27, 768), "cuda": (2**30, 8192)}
_SMOKE_SIZES = (2**20, 64)


def measure_ceilings(
    device: torch.device, clock: Clock, *, smoke: bool = False
) -> dict[str, float]:
    """Rates of this process on this device.

    Args:
        device: What to measure.
        clock: The clock that the cases use.
        smoke: Tiny sizes.

    Returns:
        ``copy`` in bytes read plus bytes written per second; ``float32``, and on CUDA ``tf32`` and
        ``bfloat16``, in operations per second of a matrix product.
    """
    size, side = _SMOKE_SIZES if smoke else _SIZES[device.type]
    ceilings = {"copy": _copy_rate(size, device, clock)}
    ceilings["float32"] = _product_rate(side, torch.float32, device, clock)
    if device.type == "cuda":
        with _tf32():
            ceilings["tf32"] = _product_rate(side, torch.float32, device, clock)
        ceilings["bfloat16"] = _product_rate(side, torch.bfloat16, device, clock)
    return ceilings


def floor_seconds(flops: int | None, moved: int, unit: str, ceilings: dict[str, float]) -> float:
    """The shortest time in which the device could do the work; 0 where nothing was counted."""
    rate = ceilings.get(unit, ceilings["float32"])
    return max((flops or 0) / rate, moved / ceilings["copy"])


def _copy_rate(size: int, device: torch.device, clock: Clock) -> float:
    target = torch.empty(size // 4, device=device)

    def run(inputs: Inputs) -> Outputs:
        return (target.copy_(inputs["source"]),)

    source = {"source": torch.randn(size // 4, device=device)}
    return 2 * size / _median(run, source, clock)


def _product_rate(side: int, dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)

    def run(inputs: Inputs) -> Outputs:
        return (torch.mm(inputs["left"], inputs["right"], out=result),)

    return 2 * side**3 / _median(run, {"left": left, "right": right}, clock)


def _median(run: Run, inputs: Inputs, clock: Clock) -> float:
    runs = {"only": run}
    # the first rounds load code and raise clocks
    interleave(runs, lambda _: inputs, clock, rounds=3, budget=0)
    taken = interleave(runs, lambda _: inputs, clock, rounds=_ROUNDS, budget=5)
    # a rate must stay finite on a clock with coarse ticks
    return max(band(taken["only"]).median, 1e-9)


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
