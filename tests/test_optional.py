"""The door to packages that an import of dpsims must not load."""

from __future__ import annotations

import json
import sys

import pytest

from dpsims._optional import require


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_an_installed_module_is_returned():
    assert require("json", extra=None, purpose="a test") is json
    assert require("json.decoder", extra="train", purpose="a test") is json.decoder


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.inner"])
def test_a_missing_package_names_the_extra_that_brings_it(module):
    with pytest.raises(ModuleNotFoundError) as caught:
        require(module, extra="metrics", purpose="FrechetFeatureDistance")
    assert str(caught.value) == (
        "FrechetFeatureDistance needs the package 'no_such_package'; "
        "install it with: pip install 'dpsims[metrics]'"
    )
    assert caught.value.name == "no_such_package"
    # the traceback of the failed import adds nothing
    assert caught.value.__suppress_context__


def test_a_missing_core_dependency_names_dpsims_itself():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dpsims'$"):
        require("no_such_package", extra=None, purpose="ConditionedBackbone")


def test_a_missing_part_of_an_installed_package_says_so(folder):
    with pytest.raises(ModuleNotFoundError, match="needs the package 'json'"):
        require("json.no_such_part", extra="train", purpose="a test")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import no_such_dependency", ModuleNotFoundError, "No module named 'no_such_dependency'"),
        ("raise OSError('libfoo.so: not found')", OSError, "libfoo.so: not found"),
        ("raise ImportError('wrong version')", ImportError, "wrong version"),
        ("raise ModuleNotFoundError('nameless')", ModuleNotFoundError, "nameless"),
        ("def (", SyntaxError, "invalid syntax"),
    ],
    ids=["its-own-dependency", "shared-library", "version", "nameless", "syntax"],
)
def test_a_broken_package_does_not_look_like_a_missing_one(folder, source, error, message):
    (folder / "broken_package.py").write_text(source)
    with pytest.raises(error, match=message) as caught:
        require("broken_package", extra="metrics", purpose="a test")
    assert type(caught.value) is error
    assert "pip install" not in str(caught.value)
