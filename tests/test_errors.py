"""Every error of dpsims is one a caller would catch anyway."""

from __future__ import annotations

import inspect
import pickle

import pytest

from dpsims import errors

BASES = {
    "InputError": ValueError,
    "DTypeError": TypeError,
    "BackboneError": ValueError,
    "DataError": RuntimeError,
    "NonFiniteError": ArithmeticError,
    "CheckpointError": RuntimeError,
    "CorruptCheckpointError": errors.CheckpointError,
    "UnsafeCheckpointError": errors.CheckpointError,
    "IncompatibleCheckpointError": errors.CheckpointError,
    "DistributedError": RuntimeError,
}


def test_the_hierarchy_is_complete():
    defined = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert {name: value.__base__ for name, value in defined.items()} == BASES


@pytest.mark.parametrize("name", BASES)
def test_the_built_in_handler_catches_it_with_its_message(name):
    error = getattr(errors, name)
    base = next(c for c in error.__mro__ if c.__module__ == "builtins")
    with pytest.raises(base, match=r"^part: argument must be 3; got 4$"):
        raise error("part: argument must be 3; got 4")


@pytest.mark.parametrize("name", BASES)
def test_it_travels_between_processes(name):
    error = getattr(errors, name)("part: argument must be 3; got 4")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.args == error.args


def test_siblings_are_told_apart():
    siblings = [errors.InputError, errors.DTypeError, errors.BackboneError, errors.DataError]
    for one in siblings:
        assert not any(issubclass(one, other) for other in siblings if other is not one)
