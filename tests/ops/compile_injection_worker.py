"""Compile the injection's kernels for a GPU that need not be here; the interpreter must be off."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpsims.ops.attention import _triton


def compiled(name, dtype):
    forward = name == "forward"
    kernel = _triton._inject_kernel if forward else _triton._gradients_kernel
    features = torch.empty(1, 64, 64, 64, dtype=dtype, device="meta")
    blocks = (_triton.forward_blocks if forward else _triton.backward_blocks)(features, 8)
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    half = dtype == torch.bfloat16
    constants = {**blocks, "FLAT": True, "HALF": half, "EMULATED": False, "fx": 1, "ox": 1}
    constants |= {"SCALE": forward, "GELU": forward}
    pointers = dict.fromkeys(("features", "out", "grad"), "*bf16" if half else "*fp32")
    pointers |= dict.fromkeys(("keys", "biases", "values", "packed", "scale"), "*fp32")
    signature = {
        key: "constexpr" if key in constants else pointers.get(key, "i32")
        for key in kernel.arg_names
    }
    constants = {key: value for key, value in constants.items() if key in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    for name in ("forward", "backward"):
        for dtype in (torch.bfloat16, torch.float32):
            found = compiled(name, dtype)
            # what a program may hold on the smallest GPUs that run it
            assert found.metadata.shared <= 99 * 1024, (name, dtype, found.metadata.shared)
            assert "cubin" in found.asm, (name, dtype)
            sys.stdout.write(f"{name} {dtype} compiled\n")
