"""The only door to packages that an import of dpsims must not load."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str | None, purpose: str) -> ModuleType:
    """Import ``module`` now, or say how to install it.

    Args:
        module: Dotted module name, such as ``"timm"``.
        extra: The extra of dpsims that brings it, or ``None`` for a core dependency.
        purpose: What needs it, in the caller's words; opens the error message.

    Returns:
        The imported module.

    Raises:
        ModuleNotFoundError: The package is not installed. Any other failure inside the package is
            raised as it is: a broken installation must not look like a missing one.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        wanted = "dpsims" if extra is None else f"dpsims[{extra}]"
        msg = f"{purpose} needs the package {package!r}; install it with: pip install '{wanted}'"
        raise ModuleNotFoundError(msg, name=error.name) from None
