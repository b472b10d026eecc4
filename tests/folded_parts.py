"""Let prepared parts run as they would on a CUDA device, by the operators' own form on a CPU."""

from __future__ import annotations

from typing import Any

from dpsims.ops._impl import ResolvedImpl
from dpsims.ops.attention import _library as injection, folded as folded_injection
from dpsims.ops.spade_tail import _library as tail, folded as folded_tail


def take_fused(monkeypatch: Any, *, kernels: bool = False) -> list[str]:
    """Choose the fused operators from now on; the list fills with what was called.

    With ``kernels`` they run as Triton kernels, in the interpreter.
    """
    monkeypatch.setattr(folded_tail, "resolve_for", lambda *_, **__: "fused")
    chosen = ResolvedImpl("fused", "asked for")
    monkeypatch.setattr(folded_injection, "resolve_injection_impl", lambda **_: chosen)
    forms = {"inject_folded": injection.inject_folded, "modulate": tail.modulate}
    if kernels:
        from dpsims.ops.attention import _triton as injection_kernels
        from dpsims.ops.spade_tail import _triton as tail_kernels

        forms = {"inject_folded": injection_kernels.inject, "modulate": tail_kernels.modulate}
    calls: list[str] = []

    def noted(name: str) -> Any:
        def run(*args: Any) -> Any:
            calls.append(name)
            return forms[name](*args)

        return run

    monkeypatch.setattr(injection, "inject_folded", noted("inject_folded"))
    monkeypatch.setattr(tail, "modulate", noted("modulate"))
    return calls
