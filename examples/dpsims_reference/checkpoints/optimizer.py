"""Optimisers as tensors plus JSON, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpsims.errors import IncompatibleCheckpointError
from dpsims_reference.checkpoints.strict_json import check_json


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors plus JSON, ready for ``CheckpointStore.save``.

    Args:
        optimizer: Adam, or any optimiser that keeps tensors and plain numbers per parameter.

    Returns:
        Tensors named ``"<parameter index>.<entry>"``, and everything else. The tensors are the
        live ones: save them before the next step.

    Raises:
        DTypeError: The optimiser keeps something that is neither a tensor nor JSON.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer_tensors(optimizer)[0])[:3]
        ['0.exp_avg', '0.exp_avg_sq', '0.step']
    """
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in whole["state"].items():
        plain[str(index)] = _take_tensors(f"{index}", entries, tensors)
    groups = [
        _take_tensors(f"group{number}", group, tensors)
        for number, group in enumerate(whole["param_groups"])
    ]
    state = {
        "optimizer": type(optimizer).__name__,
        "tensors": sorted(tensors),
        "state": plain,
        "param_groups": groups,
    }
    check_json("optimizer_tensors", "state", state)
    return tensors, state


def _take_tensors(
    prefix: str, entries: Mapping[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Move the tensors of ``entries`` into ``tensors``; tuples among the rest become lists."""
    rest: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{key}"] = value.detach()
        else:
            rest[key] = list(value) if isinstance(value, tuple) else value
    return rest


def load_optimizer_(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Give an optimiser what :func:`optimizer_tensors` took from one like it, bit for bit.

    Raises:
        IncompatibleCheckpointError: Another kind of optimiser, or other parameters; the optimiser
            is as it was.
    """
    live = optimizer.state_dict()["param_groups"]
    _check_optimizer(optimizer, live, tensors, state)
    whole: dict[int, dict[str, Any]] = {int(i): dict(rest) for i, rest in state["state"].items()}
    groups: list[dict[str, Any]] = [dict(group) for group in state["param_groups"]]
    parameters = [param for group in optimizer.param_groups for param in group["params"]]
    for name, tensor in tensors.items():
        owner, _, key = name.partition(".")
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][key] = tensor
        else:
            whole[int(owner)][key] = _copy_like(tensor, parameters[int(owner)])
    for group, old in zip(groups, live, strict=True):
        for key, value in old.items():
            if isinstance(value, tuple) and isinstance(group.get(key), list):
                group[key] = tuple(group[key])
            group.setdefault(key, value)
    optimizer.load_state_dict({"state": whole, "param_groups": groups})


def _copy_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy, so that steps do not write into the checkpoint, in the parameter's memory order.

    Fused steps walk parameter and state through memory side by side: of two orders they would
    make nonsense.
    """
    if tensor.shape != parameter.shape:
        return tensor.clone()
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _check_optimizer(
    optimizer: torch.optim.Optimizer,
    live: list[dict[str, Any]],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    kind = type(optimizer).__name__
    if state.get("optimizer") != kind:
        _refuse("state", f"be of the optimiser {kind}", state.get("optimizer"))
    if state.get("tensors") != sorted(tensors):
        _refuse("tensors", "be the ones that were saved with this state", sorted(tensors)[:3])
    for key in ("params", "param_names"):
        saved, present = (
            [group.get(key) for group in groups] for groups in (state["param_groups"], live)
        )
        if saved != present and None not in (*saved, *present):
            _refuse("state", f"have the optimiser's {key} in every group", str(saved)[:200])
    parameters = [param for group in optimizer.param_groups for param in group["params"]]
    for name, tensor in tensors.items():
        owner, _, key = name.partition(".")
        if owner.startswith("group"):
            continue
        param = parameters[int(owner)]
        if tensor.ndim and tensor.shape != param.shape:
            _refuse(f"tensors[{name!r}]", f"have shape {tuple(param.shape)}", tuple(tensor.shape))
        # load_state_dict would round to the parameter's dtype
        if key != "step" and tensor.is_floating_point() and tensor.dtype != param.dtype:
            _refuse(f"tensors[{name!r}]", f"have dtype {param.dtype}", tensor.dtype)


def _refuse(name: str, rule: str, found: object) -> None:
    msg = f"load_optimizer_: {name} must {rule}; got {found}"
    raise IncompatibleCheckpointError(msg)
