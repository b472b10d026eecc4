"""Every exception that dpsims raises on purpose.

Each one derives from the built-in exception a caller would expect, so ``except ValueError`` keeps
working. Messages read ``"<callable>: <argument> must <rule>; got <value>"``.
"""

from __future__ import annotations


class InputError(ValueError):
    """An argument has the wrong shape, size or value.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> from dpsims import NoiseMapper
        >>> NoiseMapper(latent_dim=0)
        Traceback (most recent call last):
            ...
        dpsims.errors.InputError: NoiseMapper: latent_dim must be at least 1; got 0
    """


class DTypeError(TypeError):
    """An argument has the wrong type or dtype.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(DTypeError, TypeError)
        True
    """


class BackboneError(ValueError):
    """A backbone cannot be built, filled with weights, or used as asked.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(BackboneError, ValueError)
        True
    """


class DataError(RuntimeError):
    """A file or a sample of a data set is unusable; the message names it.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(DataError, RuntimeError)
        True
    """


class NonFiniteError(ArithmeticError):
    """A quantity that must be finite became NaN or infinite.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(NonFiniteError, ArithmeticError)
        True
    """


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(CheckpointError, RuntimeError)
        True
    """


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's bytes are not the bytes that were saved.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(CorruptCheckpointError, CheckpointError)
        True
    """


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint asks for something that loading must never do.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(UnsafeCheckpointError, CheckpointError)
        True
    """


class IncompatibleCheckpointError(CheckpointError):
    """A sound checkpoint does not fit the model, configuration or data at hand.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(IncompatibleCheckpointError, CheckpointError)
        True
    """


class DistributedError(RuntimeError):
    """The processes of a distributed run disagree.

    Source:
        Not from the paper: the library's error contract.

    Example:
        >>> issubclass(DistributedError, RuntimeError)
        True
    """
