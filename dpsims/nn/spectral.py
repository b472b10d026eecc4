"""Spectral normalisation of whole models: put on, read, refresh, bake in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from dpsims._checks import check_generator, check_int
from dpsims.errors import DTypeError, InputError
from dpsims.nn._spectral_norm import SpectralNorm
from dpsims.nn.labels import LabelConv2d

M = TypeVar("M", bound=nn.Module)

_LAYERS = (nn.Linear, _ConvNd, LabelConv2d)


def spectral_normalize_(
    module: M,
    *,
    skip: Iterable[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> M:
    r"""Divide the weight of every convolution and linear layer by its largest singular value.

    Done in place, as a parametrization: ``layer.weight`` becomes the normalised weight, the one
    that is trained moves to ``layer.parametrizations.weight.original`` (the same parameter, so an
    optimizer keeps it). A second call changes nothing.

    Args:
        module: Any model, or one layer.
        skip: Modules inside it to leave alone, with all that is in them.
        generator: Source of the starting vectors. ``None`` means torch's global one, as for the
            weights of any new layer.

    Returns:
        ``module`` itself.

    Raises:
        DTypeError: ``module`` or an entry of ``skip`` is not a module, or ``generator`` is no
            generator.
        InputError: A layer whose weight is parametrized by something else, or not yet initialised.

    Note:
        Weights that need no gradient, such as those of a frozen backbone, stay as they are.
        In training every use of ``layer.weight``, so every forward of the layer, first takes one
        step of the power method; look at the weight with :func:`effective_weight`, which takes
        none. In evaluation nothing changes. Fifteen steps are taken here. The vectors ``u`` and
        ``v`` are buffers in float32 or better, also after ``.to(torch.bfloat16)``. A zero weight
        stays zero. ``copy.deepcopy`` and ``state_dict`` work, pickling the module does not.
        Cost: two matrix-vector products and one scaling of each weight. Gradients: any order,
        with ``v`` as a constant.

    Source:
        Miyato et al., ICLR 2018, Alg. 1; on every layer of both networks in Berrada et al., CVPR
        2024, Sec. A.1. Kernels are matrices of ``out_channels`` rows, as in OASIS.

    Example:
        >>> model = spectral_normalize_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
        >>> _ = refresh_spectral_norm_(model, iterations=200)
        >>> torch.linalg.matrix_norm(effective_weight(model[0]).flatten(1), 2).item().__round__(3)
        1.0
    """
    _check_module("spectral_normalize_", module)
    check_generator("spectral_normalize_", "generator", generator)
    if not isinstance(skip, Iterable):
        _check_module("spectral_normalize_", skip, "skip")
    skipped: set[int] = set()
    for outer in skip:
        _check_module("spectral_normalize_", outer, "skip")
        skipped.update(id(inner) for inner in outer.modules())
    # all layers are checked before the first one is changed
    for layer, weight in _plain_layers(module, skipped):
        dim = 1 if isinstance(layer, _ConvTransposeNd) else 0
        norm = SpectralNorm(weight, dim, generator)
        # "unsafe" skips a trial run, which would take a step of the power method
        parametrize.register_parametrization(layer, "weight", norm, unsafe=True)
    return module


def fold_spectral_norm_(module: M) -> M:
    """Bake every normalised weight in and remove the normalisation.

    Args:
        module: What :func:`spectral_normalize_` was called on, or a part of it.

    Returns:
        ``module`` itself, whose outputs in evaluation stay the same.

    Raises:
        DTypeError: Not a module.

    Note:
        Parameters keep their identity; the unnormalised values are lost. Takes no step of the
        power method.

    Source:
        Not from the paper.

    Example:
        >>> layer = spectral_normalize_(nn.Linear(4, 3)).eval()
        >>> before = layer.weight.clone()
        >>> torch.equal(fold_spectral_norm_(layer).weight, before)
        True
    """
    _check_module("fold_spectral_norm_", module)
    for layer in list(module.modules()):
        if _norms(layer):
            # in training mode, reading the weight would take a step
            _chain(layer).eval()
            _own_class(layer)
            parametrize.remove_parametrizations(layer, "weight")
    return module


def refresh_spectral_norm_(module: M, *, iterations: int = 20) -> M:
    """Let the power method catch up with weights that changed without a forward.

    Needed after the weights were averaged or set by hand: the vectors still belong to others, and
    the norm that they measure is too small.

    Args:
        module: What :func:`spectral_normalize_` was called on, or a copy of it.
        iterations: Steps of the power method. The default is ample for averaged weights; random
            ones, whose singular values lie close together, need some hundred.

    Returns:
        ``module`` itself.

    Raises:
        DTypeError: Not a module, or ``iterations`` is no integer.
        InputError: ``iterations`` below 1.

    Source:
        Not from the paper.

    Example:
        >>> average = spectral_normalize_(nn.Linear(4, 3)).eval()
        >>> with torch.no_grad():
        ...     _ = average.parametrizations.weight.original.normal_()
        >>> _ = refresh_spectral_norm_(average, iterations=200)
        >>> torch.linalg.matrix_norm(average.weight, 2).item().__round__(3)
        1.0
    """
    _check_module("refresh_spectral_norm_", module)
    check_int("refresh_spectral_norm_", "iterations", iterations)
    for layer in module.modules():
        for norm in _norms(layer):
            norm.advance(_chain(layer).original, iterations)
    return module


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight that a layer computes with, read without side effects.

    Args:
        layer: A layer with a ``weight``, normalised by :func:`spectral_normalize_` or not.

    Shape:
        - output: that of ``layer.weight``

    Returns:
        The weight, attached to the graph of its parameter.

    Raises:
        DTypeError: Not a module.
        InputError: A module without ``weight``.

    Note:
        Units: a normalised weight has the largest singular value 1.
        In training, a forward of the layer first takes one step of the power method and so uses a
        slightly different weight.

    Source:
        Not from the paper.

    Example:
        >>> layer = spectral_normalize_(nn.Linear(4, 3))
        >>> torch.equal(effective_weight(layer), effective_weight(layer))
        True
    """
    _check_module("effective_weight", layer, "layer")
    if not _norms(layer):
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            msg = f"effective_weight: layer must have a weight; got {type(layer).__name__}"
            raise InputError(msg)
        return weight
    weight = _chain(layer).original
    for step in _chain(layer):
        weight = step.scaled(weight) if isinstance(step, SpectralNorm) else step(weight)
    return weight


def _plain_layers(module: nn.Module, skipped: set[int]) -> list[tuple[nn.Module, nn.Parameter]]:
    """The layers to normalise, with their weights."""
    layers: list[tuple[nn.Module, nn.Parameter]] = []
    for name, layer in module.named_modules():
        if not isinstance(layer, _LAYERS) or id(layer) in skipped or _norms(layer):
            continue
        weight = layer._parameters.get("weight")
        if weight is None or isinstance(weight, UninitializedParameter):
            kind = "no plain parameter" if weight is None else "not initialised yet"
            msg = (
                "spectral_normalize_: module must hold layers with an initialised, "
                f"unparametrized weight; got {name or 'itself'!r}, whose weight is {kind}"
            )
            raise InputError(msg)
        if weight.requires_grad:
            layers.append((layer, weight))
    return layers


def _chain(layer: nn.Module) -> parametrize.ParametrizationList:
    return cast(
        "parametrize.ParametrizationList", cast("nn.ModuleDict", layer.parametrizations)["weight"]
    )


def _own_class(layer: nn.Module) -> None:
    """Part a layer from the class that its deep copies share.

    That class holds the property ``weight``, which torch deletes on removal: the copies would be
    left without a weight.
    """
    shared = type(layer)
    layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _norms(layer: nn.Module) -> list[SpectralNorm]:
    if not parametrize.is_parametrized(layer, "weight"):
        return []
    return [step for step in _chain(layer) if isinstance(step, SpectralNorm)]


def _check_module(owner: str, module: object, name: str = "module") -> None:
    if not isinstance(module, nn.Module):
        rule = "hold torch.nn.Module entries" if name == "skip" else "be a torch.nn.Module"
        msg = f"{owner}: {name} must {rule}; got {type(module).__name__}"
        raise DTypeError(msg)
