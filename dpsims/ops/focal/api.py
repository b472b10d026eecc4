"""Which implementation a focal loss takes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpsims._checks import check_choice, check_int
from dpsims.errors import InputError
from dpsims.ops import _impl
from dpsims.ops._impl import ResolvedImpl, is_transformed
from dpsims.ops.focal._closed_form import pixel_focal
from dpsims.ops.focal._library import fused_focal
from dpsims.ops.focal._reference import pixel_focal_reference
from dpsims.ops.focal._targets import FocalSpec, focal_targets, reduce_pixels

FocalImpl = Literal["auto", "reference", "closed_form", "fused"]
Mode = Literal["eager", "compile", "transform"]


FOCAL_IMPLS = ("auto", "reference", "closed_form", "fused")
# more would leave a program of the kernel too few pixels to read in one go
MAX_CHANNELS = 2048


def resolve_focal_impl(
    impl: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_channels: int = 2,
    mode: Mode = "eager",
) -> ResolvedImpl:
    """Say which implementation :func:`dpsims.losses.pixel_focal_loss` runs, and why.

    It reads nothing but its arguments and whether Triton is installed.

    Args:
        impl: What the caller asked for.
        device: Where the logits are.
        dtype: Their dtype.
        num_channels: Their channels.
        mode: ``"compile"`` under ``torch.compile``, ``"transform"`` inside ``torch.func``.

    Raises:
        InputError: ``impl`` is unknown, or names an implementation that cannot run.

    Note:
        ``"fused"`` is on CUDA a Triton kernel, on CPU a loop over blocks that stay in cache. Where
        it cannot run, ``"auto"`` takes ``"closed_form"``: the same gradient in plain torch,
        which ``torch.compile`` fuses on CPU.
    Source:
        Not from the paper.

    Example:
        >>> resolve_focal_impl("auto", device="cpu").impl
        'fused'
        >>> resolve_focal_impl("auto", device="cpu", mode="compile").impl
        'closed_form'
    """
    owner = "pixel_focal_loss"
    check_choice(owner, "impl", impl, FOCAL_IMPLS)
    check_choice(owner, "mode", mode, ("eager", "compile", "transform"))
    check_int(owner, "num_channels", num_channels)
    kind = torch.device(device).type
    obstacle = _obstacle(kind, dtype, num_channels, mode)
    if impl == "fused" and obstacle:
        msg = f"{owner}: impl must be 'auto', 'reference' or 'closed_form' {obstacle}; got 'fused'"
        raise InputError(msg)
    if impl != "auto":
        return ResolvedImpl(impl, "asked for")
    if obstacle:
        return ResolvedImpl("closed_form", f"the fused loss does not run {obstacle}")
    if kind == "cpu" and mode == "compile":
        return ResolvedImpl("closed_form", "on CPU torch.compile fuses it further")
    return ResolvedImpl("fused", "reads the logits once for the loss and its gradient")


def _obstacle(kind: str, dtype: torch.dtype, num_channels: int, mode: str) -> str | None:
    if mode == "transform":
        return "inside torch.func"
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"on {kind} devices"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"with {dtype} on CUDA"
    if num_channels > MAX_CHANNELS:
        return f"with more than {MAX_CHANNELS} channels on CUDA"
    return None if _impl.HAS_TRITON else "on CUDA without Triton"


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    spec: FocalSpec,
    *,
    impl: str = "auto",
    inplace: bool = False,
) -> Tensor:
    """The reduced loss of checked arguments."""
    resolved = resolve_focal_impl(
        impl,
        device=logits.device,
        dtype=logits.dtype,
        num_channels=logits.shape[1],
        mode=_mode(logits, labels),
    )
    if inplace:
        _check_inplace(logits, spec, resolved)
    if resolved.impl == "fused":
        return fused_focal(logits, labels, class_weights, spec, inplace=inplace)
    targets = focal_targets(labels, class_weights, spec, logits.dtype)
    form = pixel_focal_reference if resolved.impl == "reference" else pixel_focal
    loss = form(logits, targets.ids, targets.weights, spec.gamma, spec.smoothing)
    return reduce_pixels(loss, targets.valid, spec.reduction)


def _mode(*tensors: Tensor) -> Mode:
    if torch.compiler.is_compiling():
        return "compile"
    return "transform" if is_transformed(*tensors) else "eager"


def _check_inplace(logits: Tensor, spec: FocalSpec, resolved: ResolvedImpl) -> None:
    if resolved.impl != "fused" and not torch.compiler.is_compiling():
        obstacle = f"where impl is {resolved.impl!r} ({resolved.reason})"
    elif logits.is_leaf and logits.requires_grad:
        obstacle = "for a leaf that requires grad: its values would be lost"
    elif logits.dtype is torch.float16:
        obstacle = "for float16, whose gradients underflow before a scaler acts"
    elif spec.reduction == "none":
        obstacle = "with reduction='none', where each pixel has its own factor to come"
    elif any(s == 0 and n > 1 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        obstacle = "for expanded logits, whose entries share memory"
    else:
        return
    msg = f"pixel_focal_loss: inplace must be False {obstacle}; got True"
    raise InputError(msg)
