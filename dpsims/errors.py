"""Every exception that dpsims raises on purpose.

Each one derives from the built-in exception a caller would expect, so ``except ValueError`` keeps
working. Messages read ``"<callable>: <argument> must <rule>; got <value>"``.
"""

from __future__ import annotations


class InputError(ValueError):
    """An argument has the wrong shape, size or value.

    Source:
        Not from the paper: the library's error contract.
    """


class DTypeError(TypeError):
    """An argument has the wrong type or dtype.

    Source:
        Not from the paper: the library's error contract.
    """


class BackboneError(ValueError):
    """A backbone cannot be built, filled with weights, or used as asked.

    Source:
        Not from the paper: the library's error contract.
    """


class DataError(RuntimeError):
    """A file or a sample of a data set is unusable; the message names it.

    Source:
        Not from the paper: the library's error contract.
    """


class NonFiniteError(ArithmeticError):
    """A quantity that must be finite became NaN or infinite.

    Source:
        Not from the paper: the library's error contract.
    """


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read.

    Source:
        Not from the paper: the library's error contract.
    """


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's bytes are not the bytes that were saved.

    Source:
        Not from the paper: the library's error contract.
    """


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint asks for something that loading must never do.

    Source:
        Not from the paper: the library's error contract.
    """


class IncompatibleCheckpointError(CheckpointError):
    """A sound checkpoint does not fit the model, configuration or data at hand.

    Source:
        Not from the paper: the library's error contract.
    """


class DistributedError(RuntimeError):
    """The processes of a distributed run disagree.

    Source:
        Not from the paper: the library's error contract.
    """
