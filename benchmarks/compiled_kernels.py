"""What Triton's compiler makes of the kernels for an H100 or H200, which need not be here.

Every kernel is launched by its own host code on maps without values, at the paper's sizes, and
only compiled. The PTX says how many bytes a thread reads and writes at a time, the assembler how
many registers it takes and what it spills. None of it is a speed.

    python -m benchmarks.compiled_kernels --json benchmarks/results/compiled_kernels.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# a batch of 8 images at 256x256: sides of the levels with attention, widths and sides of blocks
ATTENDED = (64, 32, 16, 8)
BLOCKS = ((1024, 8), (1024, 16), (512, 32), (256, 64), (128, 128), (64, 256))
CLASSES = {"ade20k": 152, "coco_stuff": 184, "cityscapes": 36}
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[a-zA-Z_]\w*(?:::\w+)*)*?(?:\.v(\d))?\.b(\d+)")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global [^;]*?, (?:0x)?([0-9a-f]+)")


class Row(NamedTuple):
    """One compiled kernel."""

    kernel: str
    case: str
    dtype: str
    layout: str
    loads: dict[int, int]
    """How many instructions read so many bytes at a time, for every thread."""
    stores: dict[int, int]
    registers: int
    spilled: int
    """Bytes a thread spills."""
    shared: int
    """Bytes of shared memory of a program."""
    warps: int


class _Target:
    """Stands for the driver of a GPU that is not here."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class compiled:  # noqa: N801  used as a function
    """Collect what launches compile instead of running it."""

    def __init__(self) -> None:
        self.kernels: list[Any] = []

    def __enter__(self) -> list[Any]:
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        driver.set_active(_Target())
        self.run = run = JITFunction.run

        def only_compile(function: Any, *args: Any, **options: Any) -> Any:
            kernel = run(function, *args, **(options | {"warmup": True}))
            self.kernels.append(kernel)
            return kernel

        JITFunction.run = only_compile
        return self.kernels

    def __exit__(self, *_: object) -> None:
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        JITFunction.run = self.run
        driver._active = None


def maps(*size: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Maps without values."""
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def focal_cases(
    dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The focal loss and its gradient on the logits of the paper's data sets."""
    from dpsims.ops.focal import _triton
    from dpsims.ops.focal._targets import FocalSpec

    for name, channels in CLASSES.items():
        width = 512 if name == "cityscapes" else 256
        logits = maps(8, channels, 256, width, dtype=dtype, layout=layout)
        labels = torch.empty(8, 256, width, dtype=torch.uint8, device="meta")
        weights = torch.empty(channels, device="meta")
        spec = FocalSpec(2.0, 0.0, 255, channels - 1, None, "mean")
        run = functools.partial(_triton.forward, logits, labels, weights, spec, logits)
        yield f"{name}, {channels} channels, 256x{width}", run


def tail_cases(
    dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The SPADE tail of every block, of features as they are and enlarged."""
    from dpsims.ops.spade_tail import _triton

    for channels, side in BLOCKS:
        for upsample in (1, 2):
            small = side // upsample
            x = maps(8, channels, small, small, dtype=dtype, layout=layout)
            m = maps(8, 2 * channels, side, side, dtype=dtype, layout=layout)
            run = functools.partial(_run_tail, _triton, x, m, upsample)
            yield f"{channels} channels, {small}x{small} to {side}x{side}", run


def _run_tail(kernels: Any, x: Tensor, m: Tensor, upsample: int) -> None:
    mean, var = kernels.moments(x)
    out, signs = kernels.apply(x, m, mean, var, 1e-5, 0.2, upsample, True)
    sums = kernels.sums(out, x, m, signs, mean, var, 1e-5, 0.2, upsample)
    kernels.gradients(out, x, m, signs, mean, var, sums, 1e-5, 0.2, upsample)
    kernels.modulate(x, m, 0.2, upsample)


def injection_cases(
    dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The noise injection of every level."""
    from dpsims.ops.attention import _triton

    for side in ATTENDED:
        features = maps(8, 64, side, side, dtype=dtype, layout=layout)
        packed = torch.empty(8, 8, 129, device="meta")
        keys, values, biases = packed.split([64, 64, 1], 2)
        tokens = (keys, biases.squeeze(2), values)
        run = functools.partial(_run_injection, _triton, features, tokens)
        yield f"64 channels, 8 tokens, {side}x{side}", run


def _run_injection(kernels: Any, features: Tensor, tokens: tuple[Tensor, Tensor, Tensor]) -> None:
    kernels.inject(features, *tokens)
    kernels.inject(features, *tokens, scale=torch.empty(64, device="meta"), gelu=True)
    kernels.inject_gradients(features, features, *tokens)


CASES = {"focal": focal_cases, "spade_tail": tail_cases, "attention": injection_cases}


def resources(kernel: Any) -> tuple[int, int]:
    """Registers of a thread and the bytes that it spills, as the assembler says."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert spilled
    assert registers
    return int(registers[1]), int(spilled[1])


def accesses(ptx: str, kind: str) -> dict[int, int]:
    """How many instructions load or store so many bytes of global memory at a time."""
    found = Counter(
        int(many or 1) * int(bits) // 8
        for what, many, bits in _ACCESS.findall(ptx)
        if what == kind
    )
    if kind == "ld":
        found.update(int(size, 16) for size in _COPY.findall(ptx))
    return dict(sorted(found.items()))


def rows(
    folder: str, dtype: torch.dtype, layout: torch.memory_format, most: int | None = None
) -> Iterator[Row]:
    """The kernels of a folder of ``dpsims/ops``, of at most so many cases."""
    for case, run in itertools.islice(CASES[folder](dtype, layout), most):
        with compiled() as kernels:
            run()
        for kernel in kernels:
            yield Row(
                kernel.metadata.name,
                case,
                str(dtype)[6:],
                "channels last" if layout is torch.channels_last else "contiguous",
                accesses(kernel.asm["ptx"], "ld"),
                accesses(kernel.asm["ptx"], "st"),
                *resources(kernel),
                kernel.metadata.shared,
                kernel.metadata.num_warps,
            )


def main() -> None:
    """Compile, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", choices=[*CASES], action="append")
    parser.add_argument("--dtype", choices=[str(dtype)[6:] for dtype in DTYPES], action="append")
    parser.add_argument("--first", action="store_true", help="the first case of a folder only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for folder in options.folder or CASES:
        for dtype in [d for d in DTYPES if str(d)[6:] in (options.dtype or str(d))]:
            for layout in LAYOUTS:
                for row in rows(folder, dtype, layout, 1 if options.first else None):
                    found.append(row._asdict())
                    print(*row, sep=" | ", flush=True)
    if options.json:
        lines = ",\n".join(json.dumps(row) for row in found)
        options.json.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
