"""Which implementation of the SPADE tail runs, and why."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dpsims._checks import check_choice
from dpsims.errors import InputError
from dpsims.ops import _impl
from dpsims.ops._impl import ResolvedImpl, is_transformed

_CHOICES = ("auto", "reference", "closed_form", "fused")
_FUSED = (torch.float16, torch.bfloat16, torch.float32)
_CLOSED_FORM = (torch.float32, torch.float64)
# below, the calls of an autograd.Function cost more than the passes that it saves on a CPU
_SMALL = 2**18


def resolve_spade_tail_impl(
    impl: str = "auto",
    *,
    device: str = "cpu",
    dtypes: Collection[torch.dtype] = (torch.float32,),
    size: int | None = None,
    has_triton: bool = True,
    compiling: bool = False,
    transformed: bool = False,
) -> ResolvedImpl:
    """Say which implementation :func:`spade_tail` runs, and why.

    Pure: it reads nothing but its arguments.

    Args:
        impl: What the caller asked for.
        device: Type of the device of the maps.
        dtypes: Those of features and modulation.
        size: Number of features. ``None`` decides by the other arguments alone.
        has_triton: Whether triton is installed.
        compiling: Whether ``torch.compile`` is tracing.
        transformed: Whether the features are under a ``torch.func`` transform.

    Raises:
        InputError: ``impl`` is unknown, or names an implementation that cannot run.

    Source:
        Not from the paper.

    Example:
        >>> resolve_spade_tail_impl(device="cuda", dtypes=[torch.bfloat16]).impl
        'fused'
        >>> resolve_spade_tail_impl(device="cpu", size=64).impl
        'reference'
    """
    check_choice("spade_tail", "impl", impl, _CHOICES)
    obstacles = {
        "reference": None,
        "closed_form": _closed_form_obstacle(dtypes, transformed),
        "fused": _fused_obstacle(device, dtypes, has_triton, transformed),
    }
    if impl != "auto":
        if obstacles[impl] is not None:
            msg = (
                f"spade_tail: impl must be one that can run here; got {impl!r}, {obstacles[impl]}"
            )
            raise InputError(msg)
        return ResolvedImpl(impl, "asked for")
    if obstacles["fused"] is None:
        return ResolvedImpl("fused", "Triton kernels read and write every map once")
    if device != "cpu":
        return ResolvedImpl("reference", f"the kernels do not run: {obstacles['fused']}")
    if obstacles["closed_form"] is not None:
        return ResolvedImpl("reference", obstacles["closed_form"])
    if compiling:
        return ResolvedImpl("reference", "a compiler fuses the equation by itself")
    if size is not None and size < _SMALL:
        return ResolvedImpl("reference", f"below {_SMALL} features, calls cost more than passes")
    return ResolvedImpl("closed_form", "fewer passes over the maps than autograd makes")


def _closed_form_obstacle(dtypes: Collection[torch.dtype], transformed: bool) -> str | None:
    if transformed:
        return "torch.func needs plain operations"
    if len(set(dtypes)) > 1 or not set(dtypes) <= set(_CLOSED_FORM):
        return "the closed form needs float32 or float64 maps of one dtype"
    return None


def _fused_obstacle(
    device: str, dtypes: Collection[torch.dtype], has_triton: bool, transformed: bool
) -> str | None:
    if device != "cuda":
        return f"the kernels need a CUDA device, not {device}"
    if not has_triton:
        return "triton is not installed"
    if not set(dtypes) <= set(_FUSED):
        return "the kernels take float16, bfloat16 and float32"
    return "torch.func needs plain operations" if transformed else None


def resolve_for(impl: str, *maps: Tensor, size: int | None = None) -> str:
    """The implementation for these maps; ``size`` as in :func:`resolve_spade_tail_impl`."""
    compiling = torch.compiler.is_compiling()
    if compiling:
        # it decides nothing there, and to compare it would tie the graph to a batch
        size = None
    elif impl == "auto" and maps[0].device.type == "cpu" and size is not None and size < _SMALL:
        # the same answer sooner: on maps of a few pixels the other questions would be felt
        return "reference"
    return resolve_spade_tail_impl(
        impl,
        device=maps[0].device.type,
        dtypes=[value.dtype for value in maps],
        size=size,
        has_triton=_impl.HAS_TRITON,
        compiling=compiling,
        # a compiler cannot trace the question
        transformed=not compiling and is_transformed(*maps),
    ).impl
