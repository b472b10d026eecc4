"""What a release promises: versions, names, documentation, and what the wheel holds."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from torch import nn

import dpsims

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "losses", "metrics", "nn")
# one wording of errors, and one door to optional packages, in both packages of the wheel
SHARED_PRIVATE_MODULES = {"dpsims._checks", "dpsims._optional"}


def public(package: str) -> dict[str, object]:
    module = importlib.import_module(f"dpsims.{package}")
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


# --- versions


def test_one_version_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest is not None
    assert newest[1] == dpsims.__version__
    assert str(citation["version"]) == dpsims.__version__


def test_the_citation_names_the_paper_and_its_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
    assert "unofficial" in citation["message"]
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper"
    assert paper["title"] == "Unlocking Pre-trained Image Backbones for Semantic Image Synthesis"
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Berrada", "Verbeek", "Couprie", "Alahari"]
    assert paper["year"] == 2024


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = wheel.namelist()
    info = f"dpsims-{dpsims.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"dpsims", "dpsims_reference", info}
    for folder, package in ((ROOT / "dpsims", "dpsims"), (ROOT / "examples", "dpsims_reference")):
        base = folder.parent if package == "dpsims" else folder
        sources = (base / package).rglob("*.py")
        assert {str(path.relative_to(base)) for path in sources} <= set(names)
    assert {"dpsims/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    code = [name for name in names if not name.startswith(info)]
    assert {Path(name).suffix for name in code} <= {".py", ".typed", ".json"}


def test_the_wheel_says_what_it_needs(wheel):
    info = f"dpsims-{dpsims.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == dpsims.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == project["requires-python"]
    needed = metadata.get_all("Requires-Dist")
    core = [line for line in needed if "extra ==" not in line]
    assert sorted(core) == sorted(project["dependencies"])
    # an upper bound would keep users from the next release of a dependency
    assert not [line for line in needed if "<" in line or "==" in line.partition(";")[0]]
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])


# --- names and documentation


def test_the_public_names_are_the_listed_ones():
    names = {f"dpsims.{name}" for name in dpsims.__all__}
    for package in (*PACKAGES, "errors"):
        names |= {f"dpsims.{package}.{name}" for name in public(package) if name != "annotations"}
    listed = (ROOT / "tests" / "public_names.txt").read_text().split()
    assert listed == sorted(names)


def _documented() -> list[object]:
    return [
        pytest.param(value, id=f"{package}.{name}")
        for package in PACKAGES
        for name, value in sorted(public(package).items())
    ]


def _takes_tensors(value: object) -> bool:
    callables = [value]
    if isinstance(value, type) and issubclass(value, nn.Module) and "forward" in vars(value):
        callables.append(value.forward)
    return any(
        "Tensor" in str(parameter.annotation)
        for called in callables
        for parameter in inspect.signature(called).parameters.values()
    )


@pytest.mark.parametrize("value", _documented())
def test_public_things_say_where_they_come_from_and_how_to_use_them(value):
    text = inspect.getdoc(value)
    summary = text.partition("\n")[0]
    assert summary.endswith(".")
    assert "Source:" in text
    if isinstance(value, type) and issubclass(value, tuple):
        return  # a container of results
    assert "Example:" in text
    assert ">>>" in text
    if _takes_tensors(value):
        assert "Shape:" in text
    parameters = inspect.signature(value).parameters
    described = text.partition("Args:")[2]
    assert [name for name in parameters if f"\n    {name}: " not in described] == []


# --- who may import what


def _imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _private_attributes(path: Path) -> set[str]:
    """``dpsims._x`` and the like, spelled as attributes."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())))
    chains = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    return {chain for chain in chains if re.match(r"dpsims(\.\w+)*\._[a-z]", chain)}


def test_the_reference_model_uses_public_names_only():
    violations = []
    for path in sorted((ROOT / "examples").rglob("*.py")):
        for name in _imported(path):
            package, *inner = name.split(".")
            private = any(part.startswith("_") for part in inner)
            shared = ".".join(name.split(".")[:2]) in SHARED_PRIVATE_MODULES
            # its own private modules are its own business
            if package == "dpsims" and private and not shared:
                violations.append(f"{path.relative_to(ROOT)}: {name}")
        violations += [f"{path.relative_to(ROOT)}: {name}" for name in _private_attributes(path)]
    assert violations == []


def test_the_library_never_imports_the_reference_model():
    files = list((ROOT / "dpsims").rglob("*.py"))
    assert len(files) > 40
    for path in files:
        assert not [n for n in _imported(path) if n.partition(".")[0] == "dpsims_reference"], path
