"""Every public name is in the API page, with an example and with what goes in and out.

``test_release.py`` looks at summaries, arguments and sources.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

from dpsims import errors

ROOT = Path(__file__).parents[1]
API = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
PARSER = doctest.DocTestParser()


def listed() -> list[str]:
    """Full names of what the API page shows."""
    found, module = [], ""
    for directive, name in re.findall(
        r"^\.\. (currentmodule|autofunction|autoclass):: (\S+)$", API, re.MULTILINE
    ):
        if directive == "currentmodule":
            module = name
        else:
            found.append(f"{module}.{name}")
    return found


def resolved(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def is_container(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, tuple)


def moves_tensors(value: object) -> bool:
    """Whether a tensor goes in or out of a function, or of a public method of a class."""
    callables = [value]
    if inspect.isclass(value):
        methods = {name: f for name, f in vars(value).items() if inspect.isfunction(f)}
        callables = [f for name, f in methods.items() if not name.startswith("_")]
        callables += [methods[name] for name in ("__init__", "__call__") if name in methods]
    return any("Tensor" in str(inspect.signature(called)) for called in callables)


def sections(value: object) -> set[str]:
    return set(re.findall(r"^([A-Z]\w+):$", inspect.getdoc(value) or "", re.MULTILINE))


ERRORS = [name for name, value in vars(errors).items() if inspect.isclass(value)]
CALLABLES = [name for name in listed() if not is_container(resolved(name))]
CONTAINERS = [name for name in listed() if is_container(resolved(name))]


def test_the_api_page_shows_every_public_name_once():
    shown = Counter(listed())
    assert [name for name, times in shown.items() if times > 1] == []
    public = (ROOT / "tests" / "public_names.txt").read_text().split()
    packages = ("data", "losses", "metrics", "nn")
    wanted = {name for name in public if name.startswith(tuple(f"dpsims.{p}." for p in packages))}
    assert wanted - set(shown) == set()
    assert len(wanted) > 50
    assert ".. automodule:: dpsims.errors\n   :members:" in API


@pytest.mark.parametrize("name", CALLABLES)
def test_a_docstring_says_what_can_go_wrong_and_shows_a_use(name):
    value = resolved(name)
    assert {"Raises", "Source", "Example"} <= sections(value)
    assert PARSER.get_examples(inspect.getdoc(value))
    if inspect.signature(value).parameters:
        assert "Args" in sections(value)


@pytest.mark.parametrize("name", [n for n in CALLABLES if moves_tensors(resolved(n))])
def test_a_docstring_gives_shapes_and_units_of_tensors(name):
    value = resolved(name)
    assert {"Shape", "Note"} <= sections(value)
    note = inspect.getdoc(value).partition("\nNote:\n")[2].partition("\n\n")[0]
    assert "Units:" in note


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_result_describes_its_fields_and_shows_one(name):
    value = resolved(name)
    assert PARSER.get_examples(inspect.getdoc(value))
    source = inspect.getsource(value)
    for field in value._fields:
        beside = re.search(rf'^    {field}: [^\n]+\n    """', source, re.MULTILINE)
        assert f"\n    {field}: " in inspect.getdoc(value) or beside, field


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_has_an_example(name):
    assert PARSER.get_examples(inspect.getdoc(getattr(errors, name)))
