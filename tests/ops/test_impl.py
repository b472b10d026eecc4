"""What the choices of an implementation ask of the world."""

import pytest
import torch

from dpsims.ops import _impl
from dpsims.ops._impl import is_installed, is_transformed


def test_packages_are_looked_for_without_being_imported(monkeypatch):
    assert is_installed("torch")
    for name in ("no_such_package", "no_such_package.part"):
        assert not is_installed(name)
    for found in (None, object()):
        monkeypatch.setattr(_impl.importlib.util, "find_spec", lambda name, spec=found: spec)
        assert is_installed("anything") is (found is not None)

    for error in (ModuleNotFoundError, ValueError):

        def blocked(name, error=error):
            raise error(name)

        monkeypatch.setattr(_impl.importlib.util, "find_spec", blocked)
        assert is_installed("anything") is False


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_are_seen_in_any_place(transform):
    seen, plain = [], torch.ones(3)

    def look(x):
        seen.append([is_transformed(x), is_transformed(plain, x), is_transformed(plain)])
        return x.sum()

    x = torch.ones(2, 3)
    getattr(torch.func, transform)(look)(x)
    assert seen == [[True, True, False]]
    assert not is_transformed(x)
    assert not is_transformed()
