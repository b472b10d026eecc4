"""The injection of few tokens into a feature map, and the choice of how to run it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dpsims._checks import check_choice, check_tensor
from dpsims.errors import InputError
from dpsims.ops import _impl
from dpsims.ops._impl import ResolvedImpl
from dpsims.ops._launch import power_of_two
from dpsims.ops.attention import _library, _reference

_CHOICES = ("auto", "reference", "fused")
INJECTOR_CHOICES = ("auto", "reference", "sdpa", "folded", "fused")
# what fits into the registers and the shared memory of one program, on small GPUs too
_MAX_CHANNELS, _MAX_TOKENS, _MAX_BYTES = 256, 64, 8192
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve_injection_impl(
    impl: str = "auto",
    *,
    device_type: str,
    dtype: torch.dtype,
    channels: int,
    num_tokens: int,
    has_triton: bool,
) -> ResolvedImpl:
    """Say which implementation :func:`inject_tokens` runs, and why.

    Pure: it reads nothing but its arguments.

    Args:
        impl: What the caller asked for: ``"auto"``, ``"reference"`` or ``"fused"``.
        device_type: Where the feature map lies, such as ``"cuda"``.
        dtype: Dtype of the feature map, or float64 if any other input is float64.
        channels: Width ``C`` of the feature map.
        num_tokens: Number ``T`` of tokens.
        has_triton: Whether the package ``triton`` can compile for that device.

    Raises:
        InputError: ``impl`` is unknown, or names an implementation that cannot run.

    Source:
        Not from the paper.

    Example:
        >>> sizes = {"dtype": torch.bfloat16, "channels": 64, "num_tokens": 8, "has_triton": True}
        >>> resolve_injection_impl(device_type="cuda", **sizes).impl
        'fused'
        >>> resolve_injection_impl(device_type="cpu", **sizes)
        ResolvedImpl(impl='reference', reason="the fused kernel needs device type 'cuda'")
    """
    check_choice("inject_tokens", "impl", impl, _CHOICES)
    obstacle = _obstacle(device_type, dtype, channels, num_tokens, has_triton)
    if impl == "reference":
        return ResolvedImpl(impl, "asked for")
    if obstacle is None:
        reason = "one kernel reads the map once and writes it once"
        return ResolvedImpl("fused", reason if impl == "auto" else "asked for")
    if impl == "fused":
        msg = f"inject_tokens: impl must be 'auto' or 'reference' here: {obstacle}; got 'fused'"
        raise InputError(msg)
    return ResolvedImpl("reference", obstacle)


def resolve_injector_impl(
    impl: str = "auto",
    *,
    device_type: str,
    dtype: torch.dtype,
    channels: int,
    attn_dim: int,
    num_tokens: int,
    has_triton: bool,
) -> ResolvedImpl:
    """Say how a :class:`dpsims.nn.CrossAttentionNoiseInjector` runs, and why.

    Pure: it reads nothing but its arguments. ``"reference"`` and ``"sdpa"`` project every pixel
    and attend as in :func:`attention`. ``"folded"`` and ``"fused"`` project nothing but the
    tokens and end in :func:`inject_tokens`. ``"auto"`` is ``"fused"`` where the kernel can run.
    Elsewhere it is ``"folded"`` as long as ``5 T C <= 6 d (C + T)``, which is ``T <= 1.5 C`` for
    ``d = C / 2``, except in half precision on a GPU; and then ``"sdpa"``. Measured on a CPU, the
    two are equally fast there.

    Args:
        impl: What the caller asked for.
        device_type: Where the feature map lies, such as ``"cuda"``.
        dtype: Dtype of the feature map, or float64 if any other input is float64.
        channels: Width ``C`` of the feature map.
        attn_dim: Width ``d`` of queries, keys and values.
        num_tokens: Number ``T`` of tokens.
        has_triton: Whether the package ``triton`` can compile for that device.

    Raises:
        InputError: ``impl`` is unknown, or names an implementation that cannot run.

    Source:
        Not from the paper.

    Example:
        >>> where = {"device_type": "cpu", "dtype": torch.float32, "has_triton": False}
        >>> resolve_injector_impl(channels=64, attn_dim=32, num_tokens=8, **where).impl
        'folded'
        >>> resolve_injector_impl(channels=64, attn_dim=32, num_tokens=100, **where).impl
        'sdpa'
    """
    check_choice("CrossAttentionNoiseInjector", "impl", impl, INJECTOR_CHOICES)
    if impl not in ("auto", "fused"):
        return ResolvedImpl(impl, "asked for")
    obstacle = _obstacle(device_type, dtype, channels, num_tokens, has_triton)
    if obstacle is None:
        reason = "one kernel reads the map once and writes it once"
        return ResolvedImpl("fused", reason if impl == "auto" else "asked for")
    if impl == "fused":
        msg = (
            f"CrossAttentionNoiseInjector: impl must be 'auto', 'reference', 'sdpa' or 'folded' "
            f"here: {obstacle}; got 'fused'"
        )
        raise InputError(msg)
    if device_type not in ("cpu", "meta") and dtype in (torch.float16, torch.bfloat16):
        return ResolvedImpl("sdpa", f"{obstacle}; folded, the map would be copied to float32")
    if 5 * num_tokens * channels <= 6 * attn_dim * (channels + num_tokens):
        return ResolvedImpl("folded", f"{obstacle}; few tokens need few operations")
    return ResolvedImpl("sdpa", f"{obstacle}; many tokens are cheaper in a narrow attention")


def inject_tokens(
    features: Float[Tensor, "B C H W"],
    keys: Float[Tensor, "B T C"],
    biases: Float[Tensor, "B T"],
    values: Float[Tensor, "B T C"],
    *,
    impl: str = "auto",
) -> Float[Tensor, "B C H W"]:
    r"""Add to every pixel a mean of the values, weighted by how well their keys match.

    :math:`y_n = h_n + \sum_t \mathrm{softmax}_t(h_n \cdot k_t + b_t)\, v_t`. With the keys and
    values of :func:`fold_tokens` this is gated cross-attention with all of its projections. Values
    of 0 return the features exactly.

    Args:
        features: Feature map, in any memory layout.
        keys: What the features are compared with, one per token.
        biases: What is added to the logits, one per token.
        values: What is added to the features, one per token.
        impl: ``"reference"`` is the equation in plain torch, ``"fused"`` a kernel for CUDA devices
            that reads the map once and writes it once; ``"auto"`` is as in
            :func:`resolve_injection_impl`.

    Shape:
        - features ``(B, C, H, W)``; keys and values ``(B, T, C)``; biases ``(B, T)``; output
          ``(B, C, H, W)`` in the dtype and memory format of ``features``
        - ``"fused"``: nothing in float64; ``C`` up to 256, ``T`` up to 64, and their product up to
          4096 in bfloat16 and 2048 else, where each counts as the next power of two from 16 on

    Raises:
        InputError: A wrong rank or size, different devices, or an ``impl`` that cannot run.
        DTypeError: Not floating point.

    Note:
        Units: logits in nats.
        Precision: logits and softmax in float32 or better, whatever autocast says; the fused
        kernel rounds the weights and the values to bfloat16 where the features are bfloat16.
        Cost: ``O(B H W T C)``; ``"reference"`` holds the ``B H W T`` weights, in float32.
        Gradients: any order. With ``"fused"`` the first order is one kernel and a small sum in a
        fixed order; with ``create_graph=True`` it is computed in plain torch.
        ``torch.func.vmap`` needs ``"reference"``.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2, Eqs. (1)-(2), with the projections folded.
        Theirs -> ours: h_i -> features; n_k -> T. The paper has no such form.

    Example:
        >>> features, zeros = torch.randn(2, 8, 16, 32), torch.zeros(2, 5, 8)
        >>> out = inject_tokens(features, torch.randn(2, 5, 8), torch.randn(2, 5), zeros)
        >>> torch.equal(out, features)
        True
    """
    _check(features, keys, biases, values)
    resolved = resolve_injection_impl(
        impl,
        device_type=features.device.type,
        dtype=deciding_dtype(features, keys, biases, values),
        channels=features.shape[1],
        num_tokens=keys.shape[1],
        has_triton=has_triton_for(features.device.type),
    ).impl
    with _reference.without_autocast(features.device):
        run = _library.inject if resolved == "fused" else _reference.inject
        return run(features, keys, biases, values)


def _check(features: Tensor, keys: Tensor, biases: Tensor, values: Tensor) -> None:
    owner = "inject_tokens"
    check_tensor(owner, "features", features, "B C H W")
    batch, channels = features.shape[:2]
    check_tensor(owner, "keys", keys, "B T C", like=features, B=batch, C=channels)
    tokens = keys.shape[1]
    check_tensor(owner, "biases", biases, "B T", like=features, B=batch, T=tokens)
    check_tensor(owner, "values", values, "B T C", like=features, B=batch, T=tokens, C=channels)


def _obstacle(
    device_type: str, dtype: torch.dtype, channels: int, num_tokens: int, has_triton: bool
) -> str | None:
    """What keeps the fused kernel from running, if anything."""
    if device_type != "cuda":
        return "the fused kernel needs device type 'cuda'"
    if not has_triton:
        return "the fused kernel needs the package triton and compute capability 8.0"
    if dtype not in _FUSED_DTYPES:
        return "the fused kernel takes float32, bfloat16 and float16"
    if channels > _MAX_CHANNELS:
        return f"the fused kernel takes at most {_MAX_CHANNELS} channels"
    if num_tokens > _MAX_TOKENS:
        return f"the fused kernel takes at most {_MAX_TOKENS} tokens"
    # the products are of bfloat16, or of float32 in place of float16 too
    size = 2 if dtype == torch.bfloat16 else 4
    if size * max(16, power_of_two(channels)) * max(16, power_of_two(num_tokens)) > _MAX_BYTES:
        return (
            f"the fused kernel cannot hold {num_tokens} tokens of {channels} channels in {dtype}"
        )
    return None


def deciding_dtype(features: Tensor, *others: Tensor) -> torch.dtype:
    """The features' dtype, or float64 if anything is: what the choice depends on."""
    return torch.float64 if any(x.dtype == torch.float64 for x in others) else features.dtype


def has_triton_for(device_type: str) -> bool:
    """Whether the fused kernels can be compiled for the current device of a type."""
    return device_type == "cuda" and _has_triton()


def _has_triton() -> bool:
    # without a driver there are only tensors without values, for which no kernel runs
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return _impl.HAS_TRITON and torch.cuda.get_device_capability() >= (8, 0)


# asked while tracing and then constant: torch.compiler.assume_constant_result does no more than
# this, but its call imports the whole compiler
_has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]
