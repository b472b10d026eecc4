"""Helpers that compare. Each one is called ``assert_*`` and raises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One file of reference vectors: arrays by key, ``meta`` as a dict."""

    def __init__(self, name: str):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.options = self.meta["options"]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        value = torch.from_numpy(np.array(self.arrays[key]))
        return value if dtype is None else value.to(dtype)

    def f64(self, key: str) -> Tensor:
        """The float64 twin of ``key`` where there is one, else ``key`` in float64."""
        twin = f"{key}__f64"
        return self.tensor(twin if twin in self.arrays else key, torch.float64)


def golden_cases(piece: str) -> list[str]:
    """Every case of a piece, as names for :class:`Golden`."""
    cases = sorted(f"{piece}/{path.stem}" for path in (GOLDEN / piece).glob("*.npz"))
    assert cases, f"no golden vectors for {piece}"
    return cases


def assert_golden64(actual: Tensor, golden: Golden, key: str) -> None:
    """A float64 result equals the reference up to 1e-9 of its largest entry."""
    expected = golden.f64(key)
    assert actual.dtype == torch.float64, f"{key}: compare in float64, got {actual.dtype}"
    assert actual.shape == expected.shape, (
        f"{key}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    )
    error = (actual.detach() - expected).abs().max().item() if expected.numel() else 0.0
    bound = 1e-9 * expected.abs().max().item() + 1e-13
    assert error <= bound, f"{key}: max error {error:.3e} > {bound:.3e}"


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Bit-equal values of one dtype and shape."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_close64(actual: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    """Float64 values that differ by rounding only: 1e-10 of ``scale`` times the values."""
    torch.testing.assert_close(actual, expected, rtol=1e-10 * scale, atol=1e-12 * scale)


def assert_message(error: BaseException, *parts: str) -> None:
    """The error contract: every part appears, and no tensor is printed in full."""
    text = str(error)
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in {text!r}"
    assert len(text) < 500, f"message of {len(text)} characters"
