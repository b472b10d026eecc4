"""An import of dpsims loads only what the core needs, and does nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpsims

ROOT = Path(__file__).parents[1]
# timm is a core dependency, but takes seconds to import and is needed by the backbone alone
BLOCKED = [
    "lightning",
    "lpips",
    "matplotlib",
    "scipy",
    "skimage",
    "sklearn",
    "timm",
    "torchmetrics",
    "torchvision",
    "triton",
]


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("imports_worker.py"), *BLOCKED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_every_module_and_public_name_loads_without_the_optional_packages(report):
    files = {path.stem for path in (ROOT / "dpsims").rglob("*.py")} - {"__init__", "_triton"}
    assert {name.rpartition(".")[2] for name in report["modules"]} >= files
    assert report["names"] == dpsims.__all__
    assert report["blocked but loaded"] == []


def test_importing_dpsims_alone_loads_nothing_heavy(report):
    heavy = {"torch", "numpy", "einops", "jaxtyping", "safetensors"}
    assert "dpsims" in report["loaded first"]
    assert not heavy & set(report["loaded first"])


def test_an_import_writes_no_file_and_uses_no_network_and_no_gpu(report):
    assert report["side effects"] == []
    assert report["cuda"] is False


def test_public_names_are_listed_once_and_are_the_sub_packages_own():
    assert len(set(dpsims.__all__)) == len(dpsims.__all__)
    assert set(dir(dpsims)) == set(dpsims.__all__)
    for home, names in dpsims._HOMES.items():
        package = getattr(dpsims, home.rpartition(".")[2])
        for name in names:
            assert getattr(dpsims, name) is getattr(package, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dpsims' has no attribute 'NoSuchPart'"):
        _ = dpsims.NoSuchPart
    assert not hasattr(dpsims, "_no_such_private")
