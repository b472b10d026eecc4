"""How tests call a row of rules_table.py: on other devices and dtypes, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from rules_part import Part
from torch import Tensor, nn


def leaves(value: Any) -> list[Tensor]:
    """Every tensor in a result; what is no tensor is left out."""
    if isinstance(value, Tensor):
        return [value]
    items = value if isinstance(value, list | tuple) else []
    return [leaf for item in items for leaf in leaves(item)]


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A copy on another device; floating-point tensors in another dtype too."""
    if isinstance(value, Tensor):
        wanted = dtype if value.is_floating_point() else None
        return value.detach().to(device, wanted, copy=True)
    if isinstance(value, list):
        return [moved(item, device, dtype) for item in value]
    return value


def asked_for(part: Part, inputs: dict[str, Any]) -> list[Tensor]:
    """The input tensors that a gradient flows to, which now want one."""
    names = [
        arg.name
        for arg in part.args
        if arg.kind == "float" and f"gradient-{arg.name}" not in part.exceptions
    ]
    return [x.requires_grad_() for name in names for x in leaves(inputs[name])]


def parameters_of(called: Any) -> list[Tensor]:
    """The trained parameters of what a row makes; none of a function."""
    if not isinstance(called, nn.Module):
        return []
    return [parameter for parameter in called.parameters() if parameter.requires_grad]


def total_of(found: list[Tensor]) -> Tensor:
    """A number that depends on every entry; has a graph only where an entry has one."""
    sums = [leaf.double().sin().sum() for leaf in found if leaf.is_floating_point()]
    return torch.stack(sums).sum() if sums else torch.zeros(())
