"""Generators for inference: everything that can be computed once, computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from dpsims.errors import DTypeError
from dpsims.nn._prepared_attention import PreparedInjector, PreparedSelfAttention
from dpsims.nn._prepared_pyramid import PreparedLabelConv2d, PreparedPyramid
from dpsims.nn._prepared_spade import PreparedSPADE, PreparedSPADEResBlock
from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims.nn.labels import LabelConv2d
from dpsims.nn.pyramid import LabelMapPyramid
from dpsims.nn.spade import SPADE
from dpsims.nn.spade_block import SPADEResBlock
from dpsims.nn.spectral import fold_spectral_norm_


def prepare_for_inference(module: nn.Module) -> nn.Module:
    r"""A copy of a module that computes the same images in evaluation with less work.

    Everything that depends on weights alone is computed here, once, wherever it stands in the
    module:

    - spectral normalisation is baked into the weights;
    - :class:`~dpsims.nn.SPADE`: the recorded statistics of its batch norm and the ``1 +`` of its
      scale go into the convolution behind it, so that the output is one product and one sum;
    - :class:`~dpsims.nn.SPADEResBlock`: the same; the shortcut's 1x1 convolution goes into the
      shift of the shortcut's SPADE, and the first convolutions of its SPADEs become one;
    - :class:`~dpsims.nn.CrossAttentionNoiseInjector`: the queries' projection goes into the keys,
      the output's projection and the gate into the values;
    - :class:`~dpsims.nn.SelfAttention2d`: the gate goes into the output's projection;
    - :class:`~dpsims.nn.LabelMapPyramid`: its batch norms go into the convolutions beside them;
    - :class:`~dpsims.nn.LabelConv2d`: the table that it looks labels up in is kept.

    Args:
        module: A generator, or any other module. It is not changed.

    Returns:
        The copy, in evaluation mode and without gradients for its weights. Its parts are called as
        before. A part that stands for a SPADEResBlock also has ``encode(maps)``, which computes
        what the first maps of a condition contribute, and takes the result as ``encoded=``;
        ``expect(shapes)``, which computes what a whole and a small map of such sizes need; and
        ``expect_labels()``, which computes what conditions need that end in a label map.

    Raises:
        DTypeError: Not a module.
        InputError: From the copy's own ``train()``: folded weights cannot be trained.

    Note:
        Parts of other classes and instance norms stay as they are, and so do subclasses of those
        above with all that is in them.
        The result is that of ``module.eval()`` up to rounding, whatever mode ``module`` is in.
        On CUDA, kernels of ``dpsims.ops`` run where nothing asks for a gradient. Weights are
        folded in float32 or better and stored in their own dtype. Copies, pickles and
        ``.to()`` of the result work; its ``state_dict`` is its own.

    Source:
        Not in the paper: exact algebra on the layers of its Table S2.

    Example:
        >>> import torch
        >>> block = SPADEResBlock(8, 4, 5).eval()
        >>> features, cond = torch.randn(2, 8, 6, 12), torch.randn(2, 5, 6, 12)
        >>> prepared = prepare_for_inference(block)
        >>> torch.allclose(prepared(features, cond), block(features, cond), atol=1e-5)
        True
    """
    if not isinstance(module, nn.Module):
        found = type(module).__name__
        msg = f"prepare_for_inference: module must be a torch.nn.Module; got {found}"
        raise DTypeError(msg)
    copied = fold_spectral_norm_(copy.deepcopy(module)).requires_grad_(False).eval()
    return _prepared(copied, {})


_MAKERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    SPADE: PreparedSPADE,
    SPADEResBlock: PreparedSPADEResBlock,
    CrossAttentionNoiseInjector: PreparedInjector,
    SelfAttention2d: PreparedSelfAttention,
    LabelConv2d: PreparedLabelConv2d,
    LabelMapPyramid: PreparedPyramid,
}


def _prepared(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with every known part replaced; a part that stands twice stays shared."""
    if module in done:
        return done[module]
    maker = _MAKERS.get(type(module))
    # noted first: a module may hold itself through a loop of parts
    done[module] = module
    if maker is not None:
        done[module] = maker(module)
        return done[module]
    # a subclass may use the parts of its base in any way
    if isinstance(module, tuple(_MAKERS)):
        return module
    for name, part in module._modules.items():
        if part is not None:
            module._modules[name] = _prepared(part, done)
    return module
