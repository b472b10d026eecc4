"""Which image sizes a network takes: what timm offers, and what runs on meta tensors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpsims._checks import check_ints
from dpsims.errors import BackboneError, InputError

OWNER = "ConditionedBackbone"
# what timm and torch raise for a size that does not fit
SIZE_ERRORS = (AssertionError, RuntimeError, ValueError)


@dataclass(frozen=True)
class SizeRule:
    """What happens to images before the network sees them."""

    resize: tuple[int, int] | None = None
    multiple: int = 1
    minimum: int = 1


def check_input_size(input_size: Sequence[int] | None) -> tuple[int, int] | None:
    """The size as a pair of ints, or ``None``."""
    if input_size is None:
        return None
    check_ints(OWNER, "input_size", input_size)
    if len(input_size) != 2:
        msg = f"{OWNER}: input_size must be (height, width); got {tuple(input_size)}"
        raise InputError(msg)
    return input_size[0], input_size[1]


def size_options(
    classifier: nn.Module, config: Any, input_size: Sequence[int] | None
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Arguments for timm, and the size that images must be resized to.

    Decided by the names of the constructor's arguments and by ``fixed_input_size`` alone.
    """
    accepted = _arguments(type(classifier))
    size, native = check_input_size(input_size), tuple(config.input_size[1:])
    if size is not None:
        if config.fixed_input_size and "img_size" in accepted:
            return {"img_size": size}, size
        if config.fixed_input_size and size != native:
            msg = f"{OWNER}: input_size must be {native} for this model; got {size}"
            raise BackboneError(msg)
        return {}, size
    dynamic = [name for name in ("dynamic_img_size", "dynamic_img_pad") if name in accepted]
    if "dynamic_img_pad" in dynamic:
        return dict.fromkeys(dynamic, True), None
    if config.fixed_input_size and "strict_img_size" in accepted:
        return {"strict_img_size": False}, None
    return {}, native if config.fixed_input_size else None


def _arguments(kind: type[nn.Module]) -> set[str]:
    """Names that a constructor takes, those included that it hands on to the one above it."""
    names: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base).parameters
        names |= set(parameters)
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            break
    return names


def find_size_rule(
    network: nn.Module, native: tuple[int, int], *, finest: int, coarsest: int, minimum: int
) -> SizeRule:
    """Ask a network on the meta device which images it takes.

    Args:
        network: The extractor, on the meta device.
        native: The size of the network's own training images.
        finest: Smallest stride of its maps.
        coarsest: Largest stride of its maps.
        minimum: Smallest height and width worth asking for.

    Returns:
        The smallest side it takes, and the smallest of 1, ``finest``, ``coarsest`` and that side
        which sizes must be padded to a multiple of. A network that takes none of these gets images
        of its native size; so does one that cannot run without values.
    """
    network = network.eval()
    for side in range(minimum, max(*native, minimum) + 1, max(minimum // 4, 1)):
        refusal = _refusal(network, side, side)
        if refusal is None:
            break
        if needs_values(refusal):
            return SizeRule(resize=native)
    else:
        return SizeRule(resize=native)
    # neither whole strides nor a square, not even after padding
    height, width = 5 * side // 2 + 1, 13 * side // 4 + 3
    for multiple in sorted({1, finest, coarsest, side}):
        if _refusal(network, height + -height % multiple, width + -width % multiple) is None:
            return SizeRule(multiple=multiple, minimum=side)
    return SizeRule(resize=native)


def check_takes(network: nn.Module, name: str, size: tuple[int, int]) -> None:
    """Raise unless a network on the meta device takes images of a size, as far as it can tell."""
    refusal = _refusal(network.eval(), *size)
    if refusal is not None and not needs_values(refusal):
        raise refused_size(name, size, refusal)


def refused_size(name: str, size: tuple[int, int], reason: Exception) -> BackboneError:
    """The error for a size that a network cannot be built for or run with."""
    told = f" ({reason!s:.150})" if str(reason) else ""
    msg = f"{OWNER}: input_size must be a size that {name} takes; got {size}{told}"
    return BackboneError(msg)


@torch.no_grad()
def _refusal(network: nn.Module, height: int, width: int) -> Exception | None:
    """What the network says against images of a size."""
    try:
        network(torch.empty(1, 3, height, width, device="meta"))
    except SIZE_ERRORS as error:
        return error
    return None


def needs_values(error: Exception | None) -> bool:
    """Whether an operator failed for want of values, which says nothing about sizes."""
    return "meta tensors" in str(error).lower()
