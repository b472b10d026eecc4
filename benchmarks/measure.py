"""Clocks, interleaved rounds, and the few statistics taken of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks.cases import Inputs, Run, copied
from dpsims.errors import InputError

# more than the second-level cache of any GPU of today
_FLUSH_BYTES = 2**28
_LEAST_ROUNDS = 3


class Band(NamedTuple):
    """Median, and the 20th and 80th percentile."""

    low: float
    median: float
    high: float


class Clock(Protocol):
    """Takes the time of one call."""

    name: str

    def seconds(self, run: Run, inputs: Inputs) -> float:
        """Run it once."""


class ProcessClock:
    """CPU time of the process, all threads: what another process does on the machine is left out.

    Memory traffic of others still slows a process down, so only ratios of neighbours are quoted.
    """

    name = "process CPU time"

    def seconds(self, run: Run, inputs: Inputs) -> float:
        """Run it once."""
        start = time.process_time()
        run(inputs)
        return time.process_time() - start


class CudaClock:
    """Time between two CUDA events, after the second-level cache was overwritten.

    The flush keeps the device busy while the host queues the call, so that a few launches do not
    count; a long queue of small kernels still shows its gaps.
    """

    name = "CUDA events"

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, run: Run, inputs: Inputs) -> float:
        """Run it once."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush.zero_()
        start.record()
        run(inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


class WallClock:
    """Wall time from an idle CUDA device to an idle one, launches included."""

    name = "wall time"

    def seconds(self, run: Run, inputs: Inputs) -> float:
        """Run it once."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(inputs)
        torch.cuda.synchronize()
        return time.perf_counter() - start


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else ProcessClock()


def interleave(
    runs: Mapping[str, Run],
    draw: Callable[[int], Inputs],
    clock: Clock,
    *,
    rounds: int,
    budget: float,
    least: int = _LEAST_ROUNDS,
    consuming: Collection[str] = (),
) -> dict[str, list[float]]:
    """Time every variant once a round, starting each round with another one.

    Args:
        runs: The variants by name.
        draw: Makes the inputs of a round from its number; all variants of a round share them.
        clock: Takes the times.
        rounds: Most rounds.
        budget: Seconds of wall time after which no further round starts, once there are ``least``.
        least: Rounds that are run whatever they take.
        consuming: Names of those that overwrite their inputs, and so get copies.

    Returns:
        Seconds by name, one entry a round, so that entries of one index can be divided.
    """
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            if index >= least and time.perf_counter() - started > budget:
                break
            inputs = draw(index + 1)
            turn = index % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                own = copied(inputs) if name in consuming else inputs
                samples[name].append(clock.seconds(runs[name], own))
    finally:
        if collecting:
            gc.enable()
    return samples


def band(samples: Sequence[float]) -> Band:
    """Median and 20th and 80th percentile of one or more numbers.

    Raises:
        InputError: No samples.
    """
    if not samples:
        msg = "band: samples must hold at least one number; got none"
        raise InputError(msg)
    if len(samples) == 1:
        return Band(samples[0], samples[0], samples[0])
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return Band(cuts[0], statistics.median(samples), cuts[-1])


def paired_ratio(baseline: Sequence[float], samples: Sequence[float]) -> Band:
    """How many times faster than the baseline: the band of the rounds' own ratios.

    Raises:
        InputError: Different numbers of rounds, or none.
    """
    if len(baseline) != len(samples):
        msg = (
            "paired_ratio: samples must hold as many rounds as the baseline's "
            f"{len(baseline)}; got {len(samples)}"
        )
        raise InputError(msg)
    # a clock with coarse ticks can say 0
    tick = time.get_clock_info("process_time").resolution
    pairs = zip(baseline, samples, strict=True)
    return band([max(slow, tick) / max(fast, tick) for slow, fast in pairs])


def relative_error(outputs: Sequence[Any], expected: Sequence[Any]) -> float:
    """Largest error of any tensor: of its norm, or of one entry against the largest entry.

    The second finds a pixel that was never written, which the first drowns. NaN stays NaN, and
    another number or shape of tensors is an infinite error.
    """
    if [tuple(x.shape) for x in outputs] != [tuple(x.shape) for x in expected]:
        return float("inf")
    worst = 0.0
    for got, true in zip(outputs, expected, strict=True):
        true = true.double()
        gap = got.double() - true
        norm, peak = (float(x) for x in (true.norm(), true.abs().max()))
        for error, scale in ((float(gap.norm()), norm), (float(gap.abs().max()), peak)):
            share = error / scale if scale else error
            if math.isnan(share):
                return share
            worst = max(worst, share)
    return worst
