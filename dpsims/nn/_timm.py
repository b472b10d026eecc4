"""What timm says about a model, turned into everything a backbone needs to be built."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dpsims._checks import check_int, check_ints, check_number
from dpsims._optional import require
from dpsims.errors import BackboneError, DTypeError, InputError
from dpsims.nn._image_sizes import (
    OWNER,
    SIZE_ERRORS,
    SizeRule,
    check_input_size,
    check_takes,
    find_size_rule,
    needs_values,
    refused_size,
    size_options,
)


@dataclass(frozen=True)
class Plan:
    """How to build one feature extractor, and what to expect of it."""

    name: str
    options: dict[str, Any]
    channels: tuple[int, ...]
    map_reductions: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: SizeRule
    classifier_names: frozenset[str]

    @property
    def reductions(self) -> tuple[int, ...]:
        """Nominal strides of the maps that the backbone returns."""
        return nominal_reductions(self.map_reductions)

    @property
    def pyramid(self) -> bool:
        """Whether all maps have one scale, so that the library makes a pyramid of them."""
        return is_single_scale(self.map_reductions)

    def pixel_transform(self, value_range: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Scale and shift that take pixels from ``value_range`` to what the network was fed."""
        if not isinstance(value_range, Sequence) or len(value_range) != 2:
            msg = f"{OWNER}: value_range must be (lowest, highest); got {value_range!r}"
            raise InputError(msg)
        low, high = value_range
        check_number(OWNER, "value_range[0]", low)
        check_number(OWNER, "value_range[1]", high, above=low)
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64)[..., None, None]
        scale = 1 / ((high - low) * std)
        shift = (-low / (high - low) - mean) / std
        return scale.to(torch.get_default_dtype()), shift.to(torch.get_default_dtype())

    def build(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Build the extractor, random or filled by timm's own loader."""
        create = load_timm().create_model
        if tensors is None:
            return create(self.name, pretrained=False, features_only=True, **self.options)
        # timm's loader changes the dictionary it is given, and keeps it
        overlay = {"state_dict": dict(tensors)}
        network = create(
            self.name,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            features_only=True,
            **self.options,
        )
        network.pretrained_cfg["state_dict"] = None
        return network


def load_timm() -> ModuleType:
    """Import timm now."""
    return require("timm", extra=None, purpose=OWNER)


def pyramid_doublings(num_levels: int) -> list[int]:
    """How often each level of a single-scale network is doubled: ..., 2, 1, 0, -1 (halved)."""
    return [num_levels - 2 - level for level in range(num_levels)]


def is_single_scale(reductions: Sequence[int]) -> bool:
    """Whether there are several maps, all of one stride."""
    return len(reductions) > 1 and len(set(reductions)) == 1


def nominal_reductions(reductions: tuple[int, ...]) -> tuple[int, ...]:
    """Strides after the pyramid, if one is made, rounded up."""
    if not is_single_scale(reductions):
        return reductions
    doublings = pyramid_doublings(len(reductions))
    return tuple(math.ceil(r / 2.0**d) for r, d in zip(reductions, doublings, strict=True))


def plan_model(
    name: str,
    out_indices: Sequence[int] | None,
    *,
    num_levels: int,
    input_size: Sequence[int] | None,
) -> Plan:
    """Plan the extractor of a timm name, from networks without values."""
    timm = load_timm()
    config = timm.models.get_pretrained_cfg(_check_name(timm, name))
    classifier = _without_values(timm, name)
    options, resize = size_options(classifier, config, input_size)
    network = _extractor(timm, name, options, check_input_size(input_size))
    info: Any = network.feature_info
    reductions = [int(value) for value in info.reduction(list(range(len(info))))]
    chosen = _choose_maps(name, reductions, out_indices, num_levels)
    taken = tuple(reductions[index] for index in chosen)
    sizes = SizeRule(resize=resize)
    if resize is None:
        least = max([*nominal_reductions(taken), *(config.min_input_size or ())[1:]])
        native = tuple(config.input_size[1:])
        sizes = find_size_rule(
            network, native, finest=reductions[0], coarsest=reductions[-1], minimum=least
        )
    return Plan(
        name=f"{config.architecture}.{config.tag}" if config.tag else name,
        options={**options, "out_indices": chosen},
        channels=tuple(int(info.channels(index)) for index in chosen),
        map_reductions=taken,
        mean=tuple(config.mean),
        std=tuple(config.std),
        sizes=sizes,
        classifier_names=frozenset(classifier.state_dict()),
    )


def plan_module(
    module: nn.Module, out_indices: object, *, input_size: Sequence[int] | None
) -> Plan:
    """Describe an extractor that timm has already built."""
    info: Any = getattr(module, "feature_info", None)
    config = getattr(module, "pretrained_cfg", None)
    if not callable(getattr(info, "channels", None)) or not isinstance(config, dict):
        msg = (
            f"{OWNER}: model must be a timm name or a module from "
            f"timm.create_model(..., features_only=True); got {type(module).__name__}"
        )
        raise BackboneError(msg)
    if out_indices is not None:
        msg = (
            f"{OWNER}: out_indices must be None for a module, which has its own; got {out_indices}"
        )
        raise InputError(msg)
    return Plan(
        name=str(config.get("architecture") or type(module).__name__),
        options={},
        channels=tuple(info.channels()),
        map_reductions=tuple(info.reduction()),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        sizes=SizeRule(resize=check_input_size(input_size)),
        classifier_names=frozenset(),
    )


def _without_values(timm: ModuleType, name: str, **options: Any) -> nn.Module:
    """The network on the meta device."""
    try:
        with torch.device("meta"):
            network: nn.Module = timm.create_model(name, pretrained=False, **options)
    except SIZE_ERRORS as error:
        if not needs_values(error):
            raise
        # timm before 1.0.28 reads numbers while it builds some networks
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            network = timm.create_model(name, pretrained=False, **options).to("meta")
    return network


def _extractor(
    timm: ModuleType, name: str, options: Mapping[str, Any], size: tuple[int, int] | None
) -> nn.Module:
    """The extractor without weights; it takes images of ``size``, if one is asked for."""
    try:
        network = _without_values(timm, name, features_only=True, **options)
    except SIZE_ERRORS as error:
        if size is not None:
            raise refused_size(name, size, error) from error
        msg = f"{OWNER}: model must offer feature maps; got {name!r} ({error!s:.150})"
        raise BackboneError(msg) from error
    if size is not None:
        check_takes(network, name, size)
    return network


def _check_name(timm: ModuleType, name: object) -> str:
    if not isinstance(name, str):
        msg = f"{OWNER}: model must be a timm name or a module; got {type(name).__name__}"
        raise DTypeError(msg)
    if any(mark in name for mark in ":/\\"):
        msg = f"{OWNER}: model must be a plain timm name, without a scheme or a path; got {name!r}"
        raise BackboneError(msg)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" (closest: {', '.join(close)})" if close else ""
        msg = (
            f"{OWNER}: model must be a name that timm {timm.__version__} knows{hint}; got {name!r}"
        )
        raise BackboneError(msg)
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        listed = ", ".join(known[:8]) or architecture
        msg = f"{OWNER}: model must have a tag that timm knows, as in {listed}; got {name!r}"
        raise BackboneError(msg)
    return name


def _choose_maps(
    name: str, reductions: list[int], out_indices: Sequence[int] | None, num_levels: int
) -> tuple[int, ...]:
    """The maps to take: as asked, else the deepest map of each of the coarsest scales."""
    count = len(reductions)
    scales = sorted(set(reductions))
    listed = f"{scales[0]} each" if len(scales) == 1 else ", ".join(map(str, reductions))
    exists = f"{name} has maps 0 to {count - 1}, reductions {listed}"
    if out_indices is not None:
        check_ints(OWNER, "out_indices", out_indices, minimum=None)
        chosen = tuple(out_indices)
        if list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < count:
            msg = f"{OWNER}: out_indices must rise within range ({exists}); got {chosen}"
            raise BackboneError(msg)
        return chosen
    check_int(OWNER, "num_levels", num_levels)
    if len(scales) == 1 and num_levels <= count:
        # one scale, as in a plain transformer: blocks at evenly spread depths, the last included
        return tuple(count * (level + 1) // num_levels - 1 for level in range(num_levels))
    if num_levels > len(scales):
        most = count if len(scales) == 1 else len(scales)
        msg = f"{OWNER}: num_levels must be at most {most} ({exists}); got {num_levels}"
        raise BackboneError(msg)
    deepest = {reduction: index for index, reduction in enumerate(reductions)}
    return tuple(deepest[scale] for scale in scales[-num_levels:])
