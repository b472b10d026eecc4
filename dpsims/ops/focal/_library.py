"""The focal loss as an operator, and the eager path that has its gradient after one pass.

``torch.ops.dpsims.pixel_focal`` reads the logits once; its gradient,
``torch.ops.dpsims.pixel_focal_gradient``, reads them again and writes once. Both trace under
``torch.compile`` and export. Eagerly, :class:`_InOnePass` has the gradient written by the pass
that computes the loss.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpsims.errors import InputError
from dpsims.ops.focal import _cpu
from dpsims.ops.focal._closed_form import pixel_focal_gradient as differentiable_gradient
from dpsims.ops.focal._targets import FocalSpec, focal_targets, loss_dtype, pixel_upstream

_SPEC = (
    "Tensor labels, Tensor? class_weights, float gamma, float smoothing, int? ignore_index, "
    "int num_classes, int? target, str reduction"
)


def _contract(device: torch.device) -> ModuleType:
    """The module with ``forward``, ``backward`` and ``scale_`` for tensors of ``device``."""
    if device.type == "cpu":
        return _cpu
    from dpsims.ops.focal import _triton

    return _triton


@torch.library.custom_op(
    "dpsims::pixel_focal", mutates_args=(), schema=f"(Tensor logits, {_SPEC}) -> Tensor"
)
def _forward(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None, *options: Any
) -> Tensor:
    spec = FocalSpec(*options)
    return _contract(logits.device).forward(logits, labels, class_weights, spec)


@torch.library.custom_op(
    "dpsims::pixel_focal_gradient",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor logits, {_SPEC}) -> Tensor",
)
def _backward(
    upstream: Tensor, logits: Tensor, labels: Tensor, class_weights: Tensor | None, *options: Any
) -> Tensor:
    grad, spec = torch.empty_like(logits), FocalSpec(*options)
    _contract(logits.device).backward(upstream, logits, labels, class_weights, spec, grad)
    return grad


@_forward.register_fake
def _(logits: Tensor, labels: Tensor, class_weights: Tensor | None, *options: Any) -> Tensor:
    each = FocalSpec(*options).reduction == "none"
    dtype = loss_dtype(logits.dtype)
    return logits.new_empty(labels.shape if each else (), dtype=dtype)


@_backward.register_fake
def _(upstream: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, class_weights, *options = inputs
    ctx.save_for_backward(logits, labels, class_weights)
    ctx.spec = FocalSpec(*options)


def _derive(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, class_weights = ctx.saved_tensors
    grad = _gradient(upstream, logits, labels, class_weights, ctx.spec)
    return (grad, *(None,) * (2 + len(ctx.spec)))


_forward.register_autograd(_derive, setup_context=_save)


def _gradient(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    spec: FocalSpec,
) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.dpsims.pixel_focal_gradient(
            upstream, logits, labels, class_weights, *spec
        )
    # a second derivative is wanted, which only the closed form in plain torch has
    targets = focal_targets(labels, class_weights, spec, logits.dtype)
    pixels = pixel_upstream(upstream, targets.valid, spec.reduction)
    return differentiable_gradient(
        logits, targets.ids, targets.weights, pixels, spec.gamma, spec.smoothing
    )


class _InOnePass(torch.autograd.Function):
    """The reduced loss; its gradient is there when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        class_weights: Tensor | None,
        spec: FocalSpec,
        inplace: bool,
    ) -> Tensor:
        grad = logits.detach() if inplace else torch.empty_like(logits)
        loss = _contract(logits.device).forward(logits, labels, class_weights, spec, grad)
        ctx.inplace, ctx.spec, ctx.grad = inplace, spec, grad
        if inplace:
            # whoever saved the logits for a gradient must learn that they are gone
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(grad)
        else:
            ctx.save_for_backward(logits, labels, class_weights)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # reading them raises where the graph was freed, or the logits written to since
        saved = ctx.saved_tensors
        handed_out = ctx.grad is None
        if ctx.inplace and (handed_out or torch.is_grad_enabled()):
            reason = "a second backward pass" if handed_out else "second derivatives"
            msg = f"pixel_focal_loss: inplace must be False for {reason}; got True"
            raise InputError(msg)
        if handed_out or torch.is_grad_enabled():
            logits, labels, class_weights = saved
            grad = _gradient(upstream, logits, labels, class_weights, ctx.spec)
            return grad, None, None, None, None
        # whoever receives the gradient may write to it: it is handed out once
        grad, ctx.grad = ctx.grad, None
        _contract(grad.device).scale_(grad, upstream)
        return grad, None, None, None, None


def fused_focal(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    spec: FocalSpec,
    *,
    inplace: bool = False,
) -> Tensor:
    """The reduced loss, by the fastest way that its gradient allows."""
    one_pass = (
        logits.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(logits) in (Tensor, torch.nn.Parameter)
        and spec.reduction != "none"
        # before a loss scaler has its say, gradients of float16 would underflow
        and logits.dtype is not torch.float16
    )
    if one_pass:
        return _InOnePass.apply(logits, labels, class_weights, spec, inplace)
    return torch.ops.dpsims.pixel_focal(logits, labels, class_weights, *spec)
