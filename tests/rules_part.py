"""The columns of the table in rules_table.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arg:
    """One tensor argument, or one list of feature maps.

    Attributes:
        name: Name of the argument.
        layout: Its axes. An axis of the same name in two arguments has one size; ``B`` may be 0.
        kind: ``"float"``, ``"mask"`` (a float map of zeros and ones), ``"int"`` (ids) or
            ``"real"`` (numbers of any dtype but complex).
        fixed: Axes whose size the constructor chose.
        levels: Whether it is a list of maps, one per level.
        ranks: Which ranks are wrong, relative to the layout.
        optional: Whether ``None`` is a value.
        plain: Whether arrays and lists are refused.
    """

    name: str
    layout: str
    kind: str = "float"
    fixed: str = ""
    levels: bool = False
    ranks: tuple[int, ...] = (-1, 1)
    optional: bool = False
    plain: bool = True

    @property
    def axes(self) -> list[str]:
        return self.layout.split()


@dataclass(frozen=True)
class Part:
    """One way to call a public callable with tensors.

    Attributes:
        name: Who speaks in error messages, such as ``"PixelFocalLoss.generator"``.
        make: Builds what is called.
        inputs: Valid keyword inputs, new at each call.
        args: The tensors among them.
        sort: ``"module"``, ``"loss"`` (a scalar in float32 or better) or ``"function"``.
        case: Tells two rows of one callable apart.
        also: Parts inside of it that may speak in its place.
        norm: Whether it has a batch norm.
        wide: Whether finite float16 inputs of any size give finite results.
        exceptions: Checks that do not apply, with the reason.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    inputs: Callable[[], dict[str, Any]]
    args: tuple[Arg, ...]
    sort: str = "module"
    case: str = ""
    also: tuple[str, ...] = ()
    norm: bool = False
    wide: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.case}" if self.case else self.name

    @property
    def owners(self) -> tuple[str, ...]:
        return (self.name, *self.also)
