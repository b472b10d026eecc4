"""Runs of the benchmarks with made-up numbers."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Place, Variant, plain
from benchmarks.results import CaseResult, RunResult, VariantResult

PLACE = Place(torch.device("cpu"), "smoke", compiled=False)


def doubling_case(name="case", *variants, reference=None, **options):
    """A case that asks for ``2 x``; ``variants`` beside a right one called ``plain``."""
    right = Variant("plain", lambda: plain(lambda inputs: 2 * inputs["x"]))
    return Case(
        component="focal",
        name=name,
        inputs=lambda rng: {"x": torch.randn(5, generator=rng)},
        variants=(right, *variants),
        reference=reference or (lambda inputs: (2 * inputs["x"].double(),)),
        tolerance=1e-5,
        baseline="plain",
        **options,
    )


def variant_result(name, *seconds, **options):
    status = "ok" if seconds else options.pop("status", "not available")
    options.setdefault("error", 1e-7 if seconds else None)
    return VariantResult(name, status, seconds=list(seconds), **options)


def case_result(component, name, *variants, axes=None, **options):
    return CaseResult(
        component=component,
        name=name,
        axes=axes or {},
        baseline=options.pop("baseline", variants[0].name),
        tolerance=1e-4,
        unit="float32",
        flops=options.pop("flops", 0),
        bytes=options.pop("bytes", 1000),
        process=0,
        variants=list(variants),
    )


def run_result(*cases, **options):
    run = RunResult(
        profile="cpu",
        date="2026-01-02",
        commit="a" * 40,
        dirty=False,
        device={"type": "cpu", "name": "Test CPU"},
        threads=1,
        versions={"torch": "2.11", "triton": "none"},
        clock="process CPU time",
        processes=[{"ceilings": {"copy": 1e9, "float32": 1e10}}],
        cases=list(cases),
    )
    for name, value in options.items():
        setattr(run, name, value)
    return run


def passing_run():
    """One that meets every gate that needs no GPU."""
    return run_result(
        case_result(
            "generator",
            "OASIS 256x256 b1 fp32",
            variant_result("naive", 9.0, 9.0),
            variant_result("prepared", 4.5, 4.5),
            axes={"model": "OASIS 256x256", "batch": 1, "dtype": "fp32", "compiled": 0},
            flops=10**9,
        ),
        case_result(
            "generator",
            "OASIS 64x64 tiny b1 fp32",
            variant_result("naive", 0.3, 0.3),
            variant_result("prepared", 0.08, 0.08),
            axes={"model": "OASIS 64x64 tiny", "batch": 1, "dtype": "fp32", "compiled": 0},
            flops=10**7,
        ),
        case_result(
            "generator",
            "OASIS 64x64 tiny b8 fp32",
            variant_result("naive", 2.4, 2.4),
            variant_result("prepared", 0.6, 0.6),
            axes={"model": "OASIS 64x64 tiny", "batch": 8, "dtype": "fp32", "compiled": 0},
            flops=10**8,
        ),
        *(
            case_result(
                "focal",
                f"{name} b1",
                variant_result("one-hot", 1.1, 1.1, peak_bytes=900),
                variant_result("dpsims", 0.1, 0.1, peak_bytes=105),
                axes={"channels": channels, "dtype": "fp32", "logits_bytes": 100},
            )
            for name, channels in (("ade20k", 152), ("cityscapes", 36))
        ),
        case_result(
            "training",
            "G through D 256x256 b1 fp32",
            variant_result("all gradients", 6.0, 6.1),
            variant_result("frozen D", 4.0, 4.0),
        ),
        not_run={"focal/ade20k b8 bf16": "needs a CUDA device"},
    )
