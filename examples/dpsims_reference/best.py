"""Which checkpoint of a run is the best one so far, by one figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dpsims.errors import InputError
from dpsims_reference.networks import ImageGenerator

Evaluate = Callable[[ImageGenerator], Mapping[str, float]]

# means of losses over the steps since the last regular checkpoint; all of them are minimised
_LOSSES = ("d_", "g_")


class BestFigure:
    """Judges every regular checkpoint of a run by one figure.

    The figure is a term of the log, as its mean over the steps since the last regular checkpoint,
    or one that ``evaluate`` measures on the averaged generator. A checkpoint that a signal or a
    time limit caused is not judged, so that an interrupted run keeps the same one as a whole run.

    Args:
        rule: ``"min:NAME"`` or ``"max:NAME"``; a loss may leave out ``"min:"``. ``None`` judges
            nothing, and hands on what an earlier part of the run found.
        evaluate: Measures the averaged generator; ``None`` takes the terms of the log.

    Raises:
        InputError: ``rule`` says neither ``min:`` nor ``max:`` and names no loss.

    Example:
        >>> best = BestFigure("g_pixel")
        >>> for step, value in enumerate([3.0, 1.0, 2.0], start=1):
        ...     best.observe({"step": step, "g_pixel": value})
        ...     print(step, best.judge(step, build=None))
        1 True
        2 True
        3 False
    """

    def __init__(self, rule: str | None, evaluate: Evaluate | None = None) -> None:
        self.rule, self.evaluate = rule, evaluate
        self.name, self._sign = ("", 1.0) if rule is None else _parse(rule)
        self._value: float | None = None
        self._step = -1
        self._total, self._count = 0.0, 0
        self._restored: dict[str, Any] | None = None

    def start(self, build: Callable[[], ImageGenerator]) -> None:
        """Measure once before the first step, so that a wrong name is no surprise hours later.

        Raises:
            InputError: ``evaluate`` gives no figure of this name.
        """
        if self.rule is not None and self.evaluate is not None:
            self._take(self.evaluate(build()))

    def observe(self, record: Mapping[str, float]) -> None:
        """Take in the log's record of one step.

        Raises:
            InputError: It has no term of this name.
        """
        if self.rule is not None and self.evaluate is None:
            self._total += self._take(record)
            self._count += 1

    def judge(self, step: int, build: Callable[[], ImageGenerator]) -> bool:
        """Whether the regular checkpoint of ``step`` is the best so far.

        Args:
            step: Its step.
            build: Makes the averaged generator; called only for ``evaluate``.
        """
        if self.rule is None:
            return False
        if self.evaluate is None:
            found = self._total / self._count if self._count else math.nan
            self._total, self._count = 0.0, 0
        else:
            found = self._take(self.evaluate(build()))
        # a figure that is no number is never the best
        if math.isfinite(found) and (
            self._value is None or self._sign * found < self._sign * self._value
        ):
            self._value, self._step = found, step
        return self._step == step

    def is_best(self, step: int) -> bool:
        """Whether ``step`` was judged the best so far."""
        return self._step == step

    def _take(self, figures: Mapping[str, float]) -> float:
        if self.name not in figures:
            names = ", ".join(sorted(set(figures) - {"step", "seconds"}))
            msg = f"BestFigure: rule must name one of the figures {names}; got {self.rule!r}"
            raise InputError(msg)
        return float(figures[self.name])

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold of it, as JSON values."""
        if self.rule is None:
            return self._restored
        # an infinite sum has no place in JSON, and no window that holds one can be the best
        sound = math.isfinite(self._total)
        return {
            "rule": self.rule,
            "value": self._value,
            "step": self._step,
            "window": [self._total if sound else None, self._count],
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Continue from :meth:`state`; another rule starts anew, and says so."""
        self._restored = state
        if self.rule is None or state is None:
            return
        if state["rule"] != self.rule:
            print(f"the best checkpoint is now judged by {self.rule}; so far by {state['rule']}")
            return
        self._value, self._step = state["value"], state["step"]
        total, self._count = state["window"]
        self._total = math.nan if total is None else total


def _parse(rule: str) -> tuple[str, float]:
    way, colon, name = rule.partition(":")
    if colon and way in ("min", "max") and name:
        return name, 1.0 if way == "min" else -1.0
    if rule.startswith(_LOSSES) and not colon:
        return rule, 1.0
    msg = f"BestFigure: rule must be min:NAME, max:NAME or the name of a loss; got {rule!r}"
    raise InputError(msg)


def flat_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of nested figures, their names joined by dots.

    Example:
        >>> flat_figures({"features": "pooled", "heldout": {"frechet": 80.0}})
        {'heldout.frechet': 80.0}
    """
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": inner for key, inner in flat_figures(value).items()}
        elif isinstance(value, int | float):
            found[name] = float(value)
    return found
