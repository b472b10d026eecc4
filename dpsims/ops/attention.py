"""Scaled dot-product attention: the paper's equation, and torch's kernel for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dpsims._checks import check_choice, check_tensor, values_are_readable
from dpsims.errors import DTypeError, InputError
from dpsims.ops._impl import ResolvedImpl

AttentionImpl = Literal["auto", "reference", "sdpa"]

_CHOICES = ("auto", "reference", "sdpa", "fused")
# numbers in the widest vector register of a CPU (AVX-512)
_CPU_LANES = 16


def resolve_attention_impl(impl: str = "auto") -> ResolvedImpl:
    """Say which implementation :func:`attention` runs, and why.

    Pure: it reads nothing but its arguments.

    Args:
        impl: What the caller asked for.

    Raises:
        InputError: ``impl`` is unknown, or names an implementation that cannot run.

    Source:
        Not from the paper.

    Example:
        >>> resolve_attention_impl("auto").impl
        'sdpa'
    """
    check_choice("attention", "impl", impl, _CHOICES)
    if impl == "fused":
        msg = (
            "attention: impl must be 'auto', 'reference' or 'sdpa', for this version has no fused "
            "kernel; got 'fused'"
        )
        raise InputError(msg)
    if impl == "auto":
        return ResolvedImpl("sdpa", "torch's kernel never holds the (N, T) weights when it can")
    return ResolvedImpl(impl, "asked for")


def attention(
    q: Float[Tensor, "B ... N d"],
    k: Float[Tensor, "B ... T d"],
    v: Float[Tensor, "B ... T d"],
    *,
    impl: str = "auto",
) -> Float[Tensor, "B ... N d"]:
    r"""Read from ``v`` what each query finds among the keys.

    :math:`\mathrm{softmax}(q k^\top / \sqrt d)\, v`, with the softmax in float32 or better.
    Every output vector is a weighted mean of the rows of ``v``.

    Args:
        q: Queries.
        k: Keys, one per token.
        v: Values, one per token.
        impl: ``"reference"`` is the equation in plain torch; ``"sdpa"`` is torch's
            ``scaled_dot_product_attention``; ``"auto"`` is as in :func:`resolve_attention_impl`.

    Shape:
        - q ``(B, N, d)``; k and v ``(B, T, d)``; output ``(B, N, d)``
        - or with a heads axis: q ``(B, heads, N, d)``, k and v ``(B, heads, T, d)``
        - one dtype and device; the output has q's dtype, under autocast too

    Raises:
        InputError: A wrong rank or size, different devices, or an ``impl`` that cannot run.
        DTypeError: Not floating point, or different dtypes.

    Note:
        Units: logits in nats.
        Cost: ``O(B heads N T d)``; ``"reference"`` holds the ``B heads N T`` weights.
        Gradients: any order with ``"reference"``; with ``"sdpa"`` the first, further ones only
        if the kernel that torch picks has them.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2, Eq. (1).
        Theirs -> ours: Q, K, V -> q, k, v; n_k -> T; d_q -> d.

    Example:
        >>> q, k, v = torch.randn(2, 6, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
        >>> torch.equal(attention(q, k, v), v.expand(2, 6, 4))  # one token: nothing to choose
        True
    """
    _check(q, k, v)
    resolved = resolve_attention_impl(impl).impl
    with _without_autocast(q.device):
        return _sdpa(q, k, v) if resolved == "sdpa" else _reference(q, k, v)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    with_heads = isinstance(q, Tensor) and q.dim() == 4
    layout = "B heads {} d" if with_heads else "B {} d"
    check_tensor("attention", "q", q, layout.format("N"))
    sizes: dict[str, Any] = {"B": q.shape[0], "d": q.shape[-1]}
    if with_heads:
        sizes["heads"] = q.shape[1]
    check_tensor("attention", "k", k, layout.format("T"), like=q, **sizes)
    check_tensor("attention", "v", v, layout.format("T"), like=q, T=k.shape[-2], **sizes)
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            msg = f"attention: {name} must have q's dtype {q.dtype}; got {value.dtype}"
            raise DTypeError(msg)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    # autocast would send float32 logits to float16, where 300 * 300 * 64 / 8 is infinite
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    compute = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(compute) * q.shape[-1] ** -0.5) @ k.to(compute).mT
    return (logits.softmax(-1) @ v.to(compute)).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # torch takes its slow path for 3-D inputs on CPU and wherever the last stride is not 1
    q4, k4, v4 = (_last_contiguous(x if x.dim() == 4 else x.unsqueeze(1)) for x in (q, k, v))
    read = F.scaled_dot_product_attention(q4, k4, v4)
    if q.device.type == "cpu" and k.shape[-2] < _CPU_LANES:
        read = _with_nan(q4.detach(), k4.detach(), read)
    return read if q.dim() == 4 else read.squeeze(1)


def _with_nan(q: Tensor, k: Tensor, read: Tensor) -> Tensor:
    """NaN for queries without any logit, which torch 2.15 answers with 0 on CPU.

    It does so where the keys do not fill a vector register.
    """
    # a sum sees every NaN, and is far cheaper than isnan().any()
    bad = (q.sum(-1, keepdim=True) + k.sum((-2, -1))[..., None, None]).isnan()
    if values_are_readable(bad) and not bool(bad.any()):
        return read
    return torch.where(bad, torch.nan, read)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
