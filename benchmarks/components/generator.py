"""Inference of whole generators, from a label map to an image."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import (
    Case,
    Inputs,
    Outputs,
    Place,
    Run,
    Variant,
    label_map,
    normal,
    plain,
    random_generator,
    replayed,
    short,
    traced,
    wide,
)
from benchmarks.models import (
    DP_SIMS,
    DP_SIMS_CITYSCAPES,
    DP_SIMS_TINY,
    OASIS,
    OASIS_TINY,
    SMOKE,
    Model,
    built,
    num_weights,
)
from benchmarks.naive import naive_generator
from dpsims.nn import fold_spectral_norm_
from dpsims_reference.prepared import PreparedGenerator, prepare_generator

_FLOAT, _HALF = torch.float32, torch.bfloat16


def cases(place: Place) -> list[Case]:
    """Paper sizes and tiny ones, by batch; those that wait for a compiler apart."""
    if place.profile == "smoke":
        found = [_Setting(place, model, 2, _FLOAT).case() for model in SMOKE]
        return [*found, _SameMap(place, SMOKE[1], 2, _FLOAT).case()]
    if place.profile == "cpu":
        paper = [_Setting(place, model, 1, _FLOAT).case() for model in (OASIS, DP_SIMS)]
        options = itertools.product((OASIS_TINY, DP_SIMS_TINY), (1, 8))
        tiny = [_Setting(place, *option, _FLOAT).case() for option in options]
        noise = _SameMap(place, DP_SIMS_TINY, 1, _FLOAT).case()
        return [*paper, *tiny, noise, _Setting(place, OASIS_TINY, 1, _FLOAT, True).case()]
    every = itertools.product((False, True), (DP_SIMS, OASIS), (1, 8, 64), (_HALF, _FLOAT))
    # float32 at 64 images says nothing that 8 do not
    wanted = [o for o in every if o[3] == _HALF or (o[2] < 64 and not o[0])]
    found = [_Setting(place, m, b, dtype, c).case() for c, m, b, dtype in wanted]
    found += [_Setting(place, DP_SIMS_CITYSCAPES, b, _HALF).case() for b in (1, 8)]
    return found + [_SameMap(place, DP_SIMS, b, _HALF).case() for b in (1, 8)]


@dataclass(frozen=True)
class _Setting:
    """One generator at one batch size, with the compiled variants or without."""

    place: Place
    model: Model
    batch: int
    dtype: torch.dtype
    compiled: bool = False

    def case(self) -> Case:
        name = f"{self.model.name} b{self.batch} {short(self.dtype)}"
        numbers = num_weights(self.model) + 3 * self.batch * self.model.height * self.model.width
        return Case(
            component="generator",
            name=name + (" compiled" if self.compiled else ""),
            inputs=self.inputs,
            variants=self._compiled_variants() if self.compiled else self._variants(),
            reference=self.reference,
            tolerance=self.place.tolerance(self.dtype),
            baseline="naive",
            axes={
                "model": self.model.name,
                "batch": self.batch,
                "dtype": short(self.dtype),
                "compiled": int(self.compiled),
            },
            unit=self.place.unit(self.dtype),
            # weights read once, images written once
            bytes=numbers * self.dtype.itemsize,
            budget=self.place.pick(smoke=1.0, cpu=150.0, gpu=8.0 if self.batch == 64 else 4.0),
            wall=self.batch == 1,
            late=self.compiled,
        )

    def inputs(self, rng: torch.Generator) -> Inputs:
        model = self.model
        return {
            "labels": label_map(rng, model.num_classes, self.batch, model.height, model.width),
            "latents": normal(rng, self.batch, model.latent_dim, dtype=self.dtype),
        }

    def reference(self, drawn: Inputs) -> Outputs:
        network = built(self.model).to(self.place.device, torch.float64)
        return _images(network)(wide(drawn))

    def _variants(self) -> list[Variant]:
        found = [
            Variant("naive", lambda: _images(self._naive())),
            Variant("dpsims", lambda: _images(self._placed(built(self.model)))),
            Variant("prepared", lambda: _images(self._prepared())),
        ]
        if self.place.device.type == "cpu":
            # on CUDA every form but the published one already is
            found.append(Variant("prepared nhwc", lambda: _images(_nhwc(self._prepared()))))
        if self.dtype == _HALF:
            found.append(Variant("naive fp32", lambda: _cast(_images(self._naive(_FLOAT)))))
        if self.place.profile == "gpu" and self.batch == 1:
            found.append(Variant("graph prepared", self._graph, opaque=True))
        if self.model.architecture == "oasis":
            device = self.place.device
            found += [
                Variant(
                    f"peer {name}",
                    functools.partial(peer.generator, self.model, device, self.dtype),
                    functools.partial(peer.true_images, self.model, device),
                )
                for name, peer in self.place.peers.items()
            ]
        return found

    def _compiled_variants(self) -> list[Variant]:
        """The naive form gets what costs nothing: norms folded, memory format chosen."""

        def free() -> nn.Module:
            return self._placed(naive_generator(fold_spectral_norm_(built(self.model))).eval())

        return [
            Variant("naive", lambda: _images(self._naive())),
            Variant("prepared", lambda: _images(self._prepared())),
            Variant("compile naive", lambda: _images(traced(free())), opaque=True),
            Variant("compile prepared", lambda: _images(traced(self._prepared())), opaque=True),
        ]

    def _naive(self, dtype: torch.dtype | None = None) -> nn.Module:
        # as published: no memory format is chosen
        naive = naive_generator(built(self.model)).eval()
        return naive.to(self.place.device, dtype or self.dtype)

    def _prepared(self) -> nn.Module:
        return self._placed(prepare_generator(built(self.model)))

    def _placed(self, network: nn.Module) -> nn.Module:
        network = network.to(self.place.device, self.dtype)
        return _nhwc(network) if self.place.device.type == "cuda" else network

    def _graph(self) -> Run:
        example = self.inputs(random_generator(self.place.device, 0))
        return replayed(_images(self._prepared()), example)


@dataclass(frozen=True)
class _SameMap(_Setting):
    """Many noises for one label map: what no noise reaches may be computed beforehand."""

    def case(self) -> Case:
        case = super().case()
        name = f"{self.model.name} same map b{self.batch} {short(self.dtype)}"
        axes = {**case.axes, "model": f"{self.model.name}, same map"}
        return replace(case, name=name, axes=axes)

    def inputs(self, rng: torch.Generator) -> Inputs:
        # the map of every round is that of the first
        first = super().inputs(random_generator(self.place.device, 3))
        return {**super().inputs(rng), "labels": first["labels"]}

    def _variants(self) -> list[Variant]:
        return [*super()._variants(), Variant("condition kept", self._kept)]

    def _kept(self) -> Run:
        generator: Any = built(self.model)
        prepared: Any = self._placed(PreparedGenerator(generator))
        with torch.no_grad():
            labels = self.inputs(random_generator(self.place.device, 0))["labels"]
            condition = prepared.condition(labels)
        return plain(lambda drawn: prepared.sample(condition, drawn["latents"]).images)


def _nhwc(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def _images(network: Callable[..., Any]) -> Run:
    def function(inputs: Inputs) -> Tensor:
        images: Tensor = network(inputs["labels"], inputs["latents"]).images
        return images

    return plain(function)


def _cast(run: Run) -> Run:
    return lambda inputs: run({**inputs, "latents": inputs["latents"].float()})
