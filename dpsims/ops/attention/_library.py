"""The operator of the fused injection: schema, shapes, gradients, and the contract on CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsims.ops._launch import triton_kernel
from dpsims.ops.attention import _reference

_KERNELS = "dpsims.ops.attention._triton"
_TOKENS = "Tensor features, Tensor keys, Tensor biases, Tensor values"


def _inject_cpu(features: Tensor, keys: Tensor, biases: Tensor, values: Tensor) -> Tensor:
    with _reference.without_autocast(features.device):
        out = _reference.inject(features, keys, biases, values)
    return torch.empty_like(features).copy_(out)


def _inject_fake(features: Tensor, *_others: Any) -> Tensor:
    return torch.empty_like(features)


def _folded_cpu(
    features: Tensor,
    keys: Tensor,
    biases: Tensor,
    values: Tensor,
    scale: Tensor | None,
    gelu: bool,
) -> Tensor:
    with _reference.without_autocast(features.device):
        out = _reference.inject(features, keys, biases, values, scale)
    return torch.empty_like(features).copy_(F.gelu(out) if gelu else out)


def _gradients_cpu(
    grad: Tensor, features: Tensor, keys: Tensor, biases: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    compute = _reference.injection_dtype(features, keys, biases, values)
    tokens = (x.to(compute) for x in (keys, biases, values))
    with _reference.without_autocast(features.device):
        gradients = _reference.inject_gradients(grad, features, *tokens)
    to_features, to_keys, to_biases, to_values = gradients
    packed = torch.cat([to_keys, to_values, to_biases.unsqueeze(2)], 2)
    return torch.empty_like(features).copy_(to_features), packed


def _gradients_fake(
    grad: Tensor,
    features: Tensor,
    *tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, channels = tokens[0].shape
    compute = _reference.injection_dtype(features, *tokens)
    packed = features.new_empty((batch, num_tokens, 2 * channels + 1), dtype=compute)
    return torch.empty_like(features), packed


inject = torch.library.custom_op(
    "dpsims::inject_tokens",
    _inject_cpu,
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TOKENS}) -> Tensor",
)
# for folded weights, without a gradient
inject_folded = torch.library.custom_op(
    "dpsims::inject_folded",
    _folded_cpu,
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TOKENS}, Tensor? scale, bool gelu) -> Tensor",
)
# gives the gradients of the keys, the values and the biases side by side
inject_gradients = torch.library.custom_op(
    "dpsims::inject_tokens_backward",
    _gradients_cpu,
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, {_TOKENS}) -> (Tensor, Tensor)",
)
inject.register_kernel("cuda")(triton_kernel(_KERNELS, "inject"))
inject_gradients.register_kernel("cuda")(triton_kernel(_KERNELS, "inject_gradients"))
inject_folded.register_kernel("cuda")(triton_kernel(_KERNELS, "inject"))
inject.register_fake(_inject_fake)
inject_folded.register_fake(_inject_fake)
inject_gradients.register_fake(_gradients_fake)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    features, keys, biases, values = ctx.saved_tensors
    # asked for with create_graph=True: what the kernel computes has no gradient of its own
    if torch.is_grad_enabled():
        with _reference.without_autocast(grad.device):
            return _reference.inject_gradients(grad, features, keys, biases, values)
    to_features, packed = inject_gradients(grad, features, keys, biases, values)
    channels = features.shape[1]
    to_keys, to_values, to_biases = packed.split([channels, channels, 1], 2)
    return (
        to_features,
        to_keys.to(keys.dtype),
        to_biases.squeeze(2).to(biases.dtype),
        to_values.to(values.dtype),
    )


inject.register_autograd(_backward, setup_context=_save)
