"""What the noise injection makes of its tokens: keys and values as wide as the feature map."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims._checks import check_tensor
from dpsims.ops.attention._reference import injection_dtype, without_autocast


class Injector(Protocol):
    """The layers of a :class:`dpsims.nn.CrossAttentionNoiseInjector`."""

    query: nn.Conv2d
    key: nn.Linear
    value: nn.Linear
    output: nn.Conv2d
    gate: nn.Parameter


class FoldedTokens(NamedTuple):
    """Tokens as :func:`dpsims.ops.attention.inject_tokens` takes them.

    Attributes:
        keys: ``(B, T, C)``; their products with a pixel's features are its logits.
        biases: ``(B, T)``, added to the logits of every pixel.
        values: ``(B, T, C)``, what a pixel reads.

    Source:
        Not from the paper: its equations with the projections multiplied together.

    Example:
        >>> keys, values = torch.zeros(2, 2, 5, 8)
        >>> FoldedTokens(keys, torch.zeros(2, 5), values).biases.shape
        torch.Size([2, 5])
    """

    keys: Tensor
    biases: Tensor
    values: Tensor


class FoldedWeights(NamedTuple):
    """The layers of an injector as one linear layer on its tokens.

    Attributes:
        weight: ``(2 C + 1, D)``: the keys' rows, the values' rows, and the one of the biases.
        bias: ``(2 C + 1,)``.

    Source:
        Not from the paper: its equations with the projections multiplied together.

    Example:
        >>> FoldedWeights(torch.zeros(17, 4), torch.zeros(17)).weight.shape  # C = 8, D = 4
        torch.Size([17, 4])
    """

    weight: Tensor
    bias: Tensor


def fold_tokens(injector: Injector, tokens: Float[Tensor, "B T D"]) -> FoldedTokens:
    r"""Project tokens, and fold an injector's other layers into what comes out.

    A pixel's logit is linear in its features, so the query's weights can meet the key first; what
    it reads is linear in the values, so the output's weights and the gate can meet these first.
    Nothing is then left to do per pixel but :func:`dpsims.ops.attention.inject_tokens`.

    Args:
        injector: The module whose layers are folded; gradients flow to them.
        tokens: Its noise tokens.

    Shape:
        - tokens ``(B, T, D)``; keys and values ``(B, T, C)``; biases ``(B, T)``; float32 or better

    Raises:
        InputError: Tokens of the wrong rank or width.
        DTypeError: Not floating point.

    Note:
        Units: ``keys`` and ``biases`` give logits in nats, ``values`` are those of the features.
        Cost: ``O(B T d (D + C))``, nothing per pixel. Gradients: any order.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.2, Eqs. (1)-(2).
        Theirs -> ours: w -> tokens, d_q -> d, eta_i -> gate.

    Example:
        >>> from dpsims.nn import CrossAttentionNoiseInjector
        >>> injector = CrossAttentionNoiseInjector(channels=8, token_dim=4)
        >>> [tuple(part.shape) for part in fold_tokens(injector, torch.randn(2, 5, 4))]
        [(2, 5, 8), (2, 5), (2, 5, 8)]
    """
    check_tensor("fold_tokens", "tokens", tokens, "B T D", D=injector.key.in_features)
    with without_autocast(tokens.device):
        query, query_bias, key, value, output, output_bias, gate = _layers(injector, tokens)
        wide = tokens.to(query.dtype)
        projected = F.linear(wide, key) * key.shape[0] ** -0.5
        # the weights of a softmax sum to 1, so what every value holds reaches every pixel once
        values = gate * F.linear(F.linear(wide, value), output, output_bias)
        return FoldedTokens(projected @ query, projected @ query_bias, values)


@torch.no_grad()
def fold_injector_weights(injector: Injector) -> FoldedWeights:
    """Multiply an injector's layers together, once, for inference.

    :func:`project_tokens` then gives what :func:`fold_tokens` gives by a single product.

    Args:
        injector: The module whose layers are folded; it is not changed.

    Shape:
        - weight ``(2 C + 1, D)``, bias ``(2 C + 1)``: the keys' rows, the values' rows, and the
          one of the logits' bias

    Raises:
        AttributeError: ``injector`` lacks one of the layers.

    Note:
        Units: as :func:`fold_tokens`, per unit of a token.
        Cost: ``O(d D C)``. Gradients: none; the result follows no later change of the injector.

    Source:
        As :func:`fold_tokens`.

    Example:
        >>> from dpsims.nn import CrossAttentionNoiseInjector
        >>> injector = CrossAttentionNoiseInjector(channels=8, token_dim=4)
        >>> folded, tokens = fold_injector_weights(injector), torch.randn(2, 5, 4)
        >>> once = project_tokens(folded, tokens)
        >>> torch.allclose(once.keys, fold_tokens(injector, tokens).keys, atol=1e-6)
        True
    """
    with without_autocast(injector.gate.device):
        query, query_bias, key, value, output, output_bias, gate = _layers(injector)
        key = key * key.shape[0] ** -0.5
        weight = torch.cat([query.mT @ key, gate * output @ value, (query_bias @ key)[None]])
        bias = F.pad(gate * output_bias, (query.shape[1], 1))
        dtype = injector.gate.dtype
        return FoldedWeights(weight.to(dtype), bias.to(dtype))


def project_tokens(folded: FoldedWeights, tokens: Float[Tensor, "B T D"]) -> FoldedTokens:
    """Give the keys, biases and values of tokens by one product.

    Args:
        folded: What :func:`fold_injector_weights` gave.
        tokens: Noise tokens.

    Shape:
        - tokens ``(B, T, D)``; keys and values ``(B, T, C)``; biases ``(B, T)``

    Raises:
        InputError: Tokens of the wrong rank or width.
        DTypeError: Not floating point.

    Note:
        Units: as :func:`fold_tokens`. Cost: ``O(B T D C)``. Gradients: any order.

    Source:
        As :func:`fold_tokens`.

    Example:
        >>> folded = FoldedWeights(torch.randn(17, 4), torch.zeros(17))
        >>> project_tokens(folded, torch.randn(2, 5, 4)).values.shape
        torch.Size([2, 5, 8])
    """
    check_tensor("project_tokens", "tokens", tokens, "B T D", D=folded.weight.shape[1])
    with without_autocast(tokens.device):
        compute = injection_dtype(tokens, folded.weight)
        packed = F.linear(*(x.to(compute) for x in (tokens, folded.weight, folded.bias)))
    channels = packed.shape[2] // 2
    keys, values, biases = packed.split([channels, channels, 1], 2)
    return FoldedTokens(keys, biases.squeeze(2), values)


def _layers(injector: Injector, *others: Tensor) -> tuple[Tensor, ...]:
    """Weights and biases as matrices and vectors, in the dtype that all of them fit in."""
    # each weight is read once: reading that of a spectrally normalised layer is a step of its norm
    query, output = injector.query.weight.flatten(1), injector.output.weight.flatten(1)
    key, value, gate = injector.key.weight, injector.value.weight, injector.gate
    # an injector that is not the library's own may have no bias
    query_bias, output_bias = injector.query.bias, injector.output.bias
    query_bias = query.new_zeros(query.shape[0]) if query_bias is None else query_bias
    output_bias = output.new_zeros(output.shape[0]) if output_bias is None else output_bias
    parts = (query, query_bias, key, value, output, output_bias, gate)
    compute = injection_dtype(*parts, *others)
    return tuple(x.to(compute) for x in parts)
